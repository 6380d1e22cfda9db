// SparseTernaryMatMul: the steps in order. Few rows go through the sparse GEMV, many through the dense GEMM.
#include "device.h"
#include "steps.h"

namespace qsk_cuda {
namespace {

// From here on a row's own active channels save less than the tensor cores give.
constexpr int64_t kGemmRows = 8;
constexpr int64_t kSliceChannels = 256;  // at least; fewer would not pay for a slice's sums

struct Plan {
  bool has_selection = false;
  bool is_gemm = false;
  int64_t slices = 1;
  int64_t stride = 0;  // of a row's q, or of its active channels
  TernaryProduct product = {};
  // Scratch.
  void* masked = nullptr;
  QuantizedRow* summary = nullptr;
  int8_t* q = nullptr;
  int32_t* index = nullptr;
  int32_t* sums = nullptr;
  int64_t scratch_bytes = 0;
};

int make_plan(const qsk_sparse_ternary_matmul_args* args, const qsk_cuda_queue* queue, void* scratch, Plan* plan) {
  if (args == nullptr || queue == nullptr) return QSK_NULL_ARGUMENT;
  if (args->type != QSK_FLOAT32 && args->type != QSK_FLOAT16) return QSK_BAD_TYPE;
  if (args->m < 0 || args->k < 0 || args->k > kLargestK || args->block < 0) return QSK_BAD_SIZE;
  if (args->k > 0 && args->m > INT32_MAX / args->k) return QSK_BAD_SIZE;
  if (args->m > INT32_MAX) return QSK_BAD_SIZE;
  if (args->top_k < 0 || args->top_k > (args->block > 0 ? args->block : args->k)) return QSK_BAD_K;
  TernaryProduct& product = plan->product;
  const int status = join_matrices(args->n, args->matrices, QSK_TERNARY_TILE_OUTPUTS, &product.joined);
  if (status != QSK_OK) return status;
  plan->has_selection = selects(args->top_k, args->k, args->block, args->rescale_l2);
  plan->is_gemm = args->m >= kGemmRows;
  plan->stride = round_up(args->k, plan->is_gemm ? kGemmChannels : 4);
  Scratch pieces(scratch);
  const int64_t element_bytes = args->type == QSK_FLOAT16 ? 2 : 4;
  if (plan->has_selection) plan->masked = pieces.take<char>(args->m * args->k * element_bytes);
  plan->summary = pieces.take<QuantizedRow>(args->m);
  plan->q = pieces.take<int8_t>(args->m * plan->stride);
  if (!plan->is_gemm) {
    const int64_t blocks = args->m * ceil_div(product.joined.tiles, 4);
    plan->slices = slices_for(*queue, blocks, args->k / kSliceChannels);
    plan->index = pieces.take<int32_t>(args->m * plan->stride);
    plan->sums =
        pieces.take<int32_t>(plan->slices * args->m * product.joined.tiles * int64_t{QSK_TERNARY_TILE_OUTPUTS});
  }
  plan->scratch_bytes = pieces.used();
  product.type = args->type;
  product.w = args->w;
  product.scales = args->scales;
  product.summary = plan->summary;
  product.y = args->y;
  product.m = args->m;
  product.k = args->k;
  return QSK_OK;
}

void enqueue(const qsk_sparse_ternary_matmul_args& args, const Plan& plan, const qsk_cuda_queue& queue) {
  const void* x = args.x;
  if (plan.has_selection) {
    enqueue_topk({args.type, args.x, plan.masked, args.m, args.k, args.top_k, args.block, args.rescale_l2}, queue);
    x = plan.masked;
  }
  if (plan.is_gemm) {
    enqueue_quantize(args.type, x, args.m, args.k, plan.q, plan.stride, nullptr, plan.summary, queue);
    enqueue_ternary_gemm(plan.product, plan.q, plan.stride, queue);
  } else {
    const ActiveChannels active = {plan.index, plan.q, plan.stride};
    enqueue_quantize_active(args.type, x, args.m, args.k, active, plan.summary, queue);
    enqueue_ternary_gemv(plan.product, active, plan.slices, plan.sums, queue);
  }
}

}  // namespace
}  // namespace qsk_cuda

int64_t qsk_cuda_sparse_ternary_matmul_scratch_bytes(const qsk_sparse_ternary_matmul_args* args,
                                                     const qsk_cuda_queue* queue) {
  qsk_cuda::Plan plan;
  return qsk_cuda::make_plan(args, queue, nullptr, &plan) == QSK_OK ? plan.scratch_bytes : 0;
}

int qsk_cuda_sparse_ternary_matmul(const qsk_sparse_ternary_matmul_args* args, const qsk_cuda_queue* queue,
                                   void* scratch, int64_t scratch_bytes) {
  using namespace qsk_cuda;
  Plan plan;
  int status = make_plan(args, queue, scratch, &plan);
  if (status == QSK_OK) status = check_scratch(scratch, scratch_bytes, plan.scratch_bytes);
  if (status != QSK_OK || args->m == 0 || plan.product.joined.outputs == 0) return status;
  const bool lacks_inputs = args->k > 0 && (args->x == nullptr || args->w == nullptr);
  if (lacks_inputs || args->scales == nullptr || args->y == nullptr) return QSK_NULL_ARGUMENT;
  if (reinterpret_cast<uintptr_t>(args->w) % 4 != 0) return QSK_CUDA_MISALIGNED;
  enqueue(*args, plan, *queue);
  return launch_status();
}
