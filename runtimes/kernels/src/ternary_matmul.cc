#include "qsk/ternary_matmul.h"

#include "kernels.h"
#include "ternary_product.h"
#include "work.h"

namespace qsk {
namespace {

int check(const qsk_ternary_matmul_args* args) {
  if (args == nullptr) return QSK_NULL_ARGUMENT;
  if (args->type != QSK_FLOAT32 && args->type != QSK_FLOAT16) return QSK_BAD_TYPE;
  if (args->m < 0 || args->k < 0 || args->n < 0 || args->k > kLargestTernaryK) return QSK_BAD_SIZE;
  return args->m > INT32_MAX || args->n > INT32_MAX ? QSK_BAD_SIZE : QSK_OK;
}

TernaryProduct product_of(const qsk_ternary_matmul_args& args, const TernaryMatrix& matrix) {
  return {args.type, args.x, args.w, qsk_ternary_row_bytes(args.n), args.y, args.m, args.k, args.n,
          &matrix,   1,      nullptr};
}

}  // namespace
}  // namespace qsk

int64_t qsk_ternary_row_bytes(int64_t n) { return qsk::round_up(n, QSK_TERNARY_TILE_OUTPUTS) / 4; }

int64_t qsk_ternary_matmul_scratch_bytes(const qsk_ternary_matmul_args* args, const qsk_parallel* parallel) {
  if (qsk::check(args) != QSK_OK) return 0;
  const qsk::TernaryMatrix matrix = {0, args->n, 0, args->scale};
  return qsk::ternary_product_scratch_bytes(qsk::product_of(*args, matrix), parallel);
}

int qsk_ternary_matmul(const qsk_variant* variant, const qsk_ternary_matmul_args* args, const qsk_parallel* parallel,
                       void* scratch, int64_t scratch_bytes) {
  int status = qsk::check(args);
  if (status == QSK_OK) status = qsk::resolve_variant(&variant);
  if (status != QSK_OK) return status;
  const qsk::TernaryMatrix matrix = {0, args->n, 0, args->scale};
  return qsk::ternary_product(*variant, qsk::product_of(*args, matrix), parallel, scratch, scratch_bytes);
}
