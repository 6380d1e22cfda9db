#include "qsk/sparse_ternary_matmul.h"

#include "kernels.h"
#include "ternary_product.h"

namespace qsk {
namespace {

int check(const qsk_sparse_ternary_matmul_args* args) {
  if (args == nullptr) return QSK_NULL_ARGUMENT;
  if (args->type != QSK_FLOAT32 && args->type != QSK_FLOAT16) return QSK_BAD_TYPE;
  if (args->m < 0 || args->k < 0 || args->k > kLargestTernaryK || args->m > INT32_MAX) return QSK_BAD_SIZE;
  if (args->block < 0 || args->matrices < 0 || args->matrices > QSK_MOST_MATRICES) return QSK_BAD_SIZE;
  if (args->matrices > 0 && (args->n == nullptr || args->scales == nullptr)) return QSK_NULL_ARGUMENT;
  int64_t outputs = 0;
  for (int64_t i = 0; i < args->matrices; ++i) {
    if (args->n[i] < 0 || args->n[i] > INT32_MAX) return QSK_BAD_SIZE;
    outputs += 4 * qsk_ternary_row_bytes(args->n[i]);
  }
  if (outputs > INT32_MAX) return QSK_BAD_SIZE;
  if (args->top_k < 0 || args->top_k > (args->block > 0 ? args->block : args->k)) return QSK_BAD_K;
  return QSK_OK;
}

// A product with the arrays that it points to.
struct Prepared {
  explicit Prepared(const qsk_sparse_ternary_matmul_args& args)
      : selection{args.top_k, args.block, args.rescale_l2 != 0} {
    int64_t outputs = 0, padded = 0;
    for (int64_t i = 0; i < args.matrices; ++i) {
      matrices[i] = {padded, args.n[i], outputs, args.scales[i]};
      outputs += args.n[i];
      padded += 4 * qsk_ternary_row_bytes(args.n[i]);
    }
    const int64_t unit = args.block > 0 ? args.block : args.k;
    const bool selects = args.top_k < unit || selection.rescale_l2;
    product = {args.type,
               args.x,
               args.w,
               padded / 4,
               args.y,
               args.m,
               args.k,
               outputs,
               matrices,
               args.matrices,
               selects ? &selection : nullptr};
  }
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

  Selection selection;
  TernaryMatrix matrices[QSK_MOST_MATRICES];
  TernaryProduct product;
};

}  // namespace
}  // namespace qsk

int64_t qsk_sparse_ternary_matmul_scratch_bytes(const qsk_sparse_ternary_matmul_args* args,
                                                const qsk_parallel* parallel) {
  if (qsk::check(args) != QSK_OK) return 0;
  return qsk::ternary_product_scratch_bytes(qsk::Prepared(*args).product, parallel);
}

int qsk_sparse_ternary_matmul(const qsk_variant* variant, const qsk_sparse_ternary_matmul_args* args,
                              const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes) {
  int status = qsk::check(args);
  if (status == QSK_OK) status = qsk::resolve_variant(&variant);
  if (status != QSK_OK) return status;
  return qsk::ternary_product(*variant, qsk::Prepared(*args).product, parallel, scratch, scratch_bytes);
}
