// SparseMatMulNBits: 4- and 8-bit channel-major weights with a scale for each group of channels, in float32 sums. Few
// rows go through the sparse GEMV here, many through the dense GEMM.
#include "joined_tiles.h"

namespace qsk_cuda {
namespace {

constexpr int kUnitWords = 8;          // hold 8 * planes outputs, plane i of word j output 8 i + j (formats/nbits.py)
constexpr int kPieceChannels = kWarp;  // a warp's unit of work: one ballot, one group of scales
constexpr int64_t kSlicePieces = kWarps;

template <int kBits>
struct NBits {
  static constexpr int kPlanes = 32 / kBits;
  static constexpr int kWarpOutputs = kWarp * kPlanes;
  struct Shared {
    float sum[kWarps][kWarpOutputs];
  };
  static __device__ float code(uint32_t word, int plane) {  // sign-extended
    return static_cast<float>(static_cast<int>(word << (32 - kBits - kBits * plane)) >> (32 - kBits));
  }
};

// Adds the channels begin..end-1, at most 32 of one group, to the sums of a lane's outputs. Only channels with x != 0
// are read, four at a time. A NaN or Inf counts as NaN: it makes every output one, whatever the code.
template <int kBits, typename T>
__device__ void add_piece(const T* x, const uint8_t* w, int64_t row_bytes, int64_t begin, int64_t end, bool is_inside,
                          float (&piece)[NBits<kBits>::kPlanes]) {
  constexpr int kTogether = 4;
  const int64_t own = begin + lane_of_thread();
  float value = own < end ? to_float(x[own]) : 0.0f;
  if (!is_finite(value)) value = not_a_number();
  uint32_t active = __ballot_sync(kAllLanes, value != 0.0f);
  while (active != 0) {
    float values[kTogether];
    uint32_t words[kTogether];
    for (int i = 0; i < kTogether; ++i) {
      const int channel = active != 0 ? __ffs(static_cast<int>(active)) - 1 : -1;
      values[i] = __shfl_sync(kAllLanes, value, channel < 0 ? 0 : channel);
      if (channel < 0) values[i] = 0.0f;
      const uint8_t* word = w + (begin + channel) * row_bytes;
      words[i] = channel >= 0 && is_inside ? *reinterpret_cast<const uint32_t*>(word) : 0;
      active &= active - 1;
    }
    for (int i = 0; i < kTogether; ++i) {
      for (int plane = 0; plane < NBits<kBits>::kPlanes; ++plane) {
        piece[plane] += values[i] * NBits<kBits>::code(words[i], plane);
      }
    }
  }
}

// Block (row, a word for each lane, slice); the warps of all slices take pieces of groups in turn.
template <int kBits, typename T>
__global__ void __launch_bounds__(kThreads) nbits_gemv(const T* x, int64_t k, const uint8_t* w, const uint16_t* scales,
                                                       int64_t group, int64_t columns, float* sums) {
  using Form = NBits<kBits>;
  QSK_SHARED(typename Form::Shared, shared);
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const int64_t row_bytes = columns * kBits / 8;
  const int64_t word = static_cast<int64_t>(blockIdx.y) * kWarp + lane;
  const bool is_inside = 4 * word < row_bytes;
  const int64_t first_output = word / kUnitWords * (kUnitWords * Form::kPlanes) + word % kUnitWords;  // of plane 0
  x += static_cast<int64_t>(blockIdx.x) * k;
  w += 4 * word;
  const int64_t pieces_of_group = (group + kPieceChannels - 1) / kPieceChannels;
  const int64_t pieces = (k + group - 1) / group * pieces_of_group;
  const int64_t step = static_cast<int64_t>(gridDim.z) * kWarps;
  float sum[Form::kPlanes] = {};
  for (int64_t number = static_cast<int64_t>(blockIdx.z) * kWarps + warp; number < pieces; number += step) {
    const int64_t of_group = number / pieces_of_group;
    const int64_t begin = of_group * group + number % pieces_of_group * kPieceChannels;
    const int64_t end_of_group = (of_group + 1) * group < k ? (of_group + 1) * group : k;
    const int64_t end = begin + kPieceChannels < end_of_group ? begin + kPieceChannels : end_of_group;
    float piece[Form::kPlanes] = {};
    add_piece<kBits>(x, w, row_bytes, begin, end, is_inside, piece);
    if (!is_inside) continue;
    for (int plane = 0; plane < Form::kPlanes; ++plane) {
      sum[plane] += piece[plane] * to_float(scales[of_group * columns + first_output + kUnitWords * plane]);
    }
  }
  for (int plane = 0; plane < Form::kPlanes; ++plane) {
    const int within = lane / kUnitWords * (kUnitWords * Form::kPlanes) + kUnitWords * plane + lane % kUnitWords;
    shared.sum[warp][within] = sum[plane];
  }
  __syncthreads();
  sums += (static_cast<int64_t>(blockIdx.z) * gridDim.x + blockIdx.x) * columns;
  for (int output = threadIdx.x; output < Form::kWarpOutputs; output += kThreads) {
    float total = 0.0f;
    for (int of = 0; of < kWarps; ++of) total += shared.sum[of][output];
    const int64_t column = static_cast<int64_t>(blockIdx.y) * Form::kWarpOutputs + output;
    if (column < columns) sums[column] = total;
  }
}

constexpr int kTile = QSK_NBITS_TILE_OUTPUTS;

// Adds up the slices. Block (row, four tiles).
template <typename T>
__global__ void __launch_bounds__(kThreads) nbits_finish(const float* sums, int slices, JoinedMatrices joined, T* y) {
  const int tile = blockIdx.y * (kThreads / kTile) + threadIdx.x / kTile;
  if (tile >= joined.tiles) return;
  const int matrix = matrix_of_tile(joined, tile);
  const int output = (tile - joined.first_tile[matrix]) * kTile + threadIdx.x % kTile;
  if (output >= joined.n[matrix]) return;
  const int64_t row = blockIdx.x, columns = static_cast<int64_t>(joined.tiles) * kTile;
  const int64_t column = static_cast<int64_t>(tile) * kTile + threadIdx.x % kTile;
  float sum = 0.0f;
  for (int slice = 0; slice < slices; ++slice) {
    sum += sums[(static_cast<int64_t>(slice) * gridDim.x + row) * columns + column];
  }
  y[row * joined.outputs + joined.first_output[matrix] + output] = from_float<T>(sum);
}

// From here on a row's own active channels save less than reading every weight once for 64 rows. Without tensor cores a
// tile of 64 rows takes longer, however few there are.
constexpr int64_t kGemmRows = 8, kFloatGemmRows = 32;
constexpr int64_t kGemmSliceChannels = 256;  // at least; fewer would not pay for a slice's sums

struct Plan {
  bool has_selection = false;
  bool is_gemm = false;
  int bits = 0;
  int64_t slices = 1;
  int64_t columns = 0;
  JoinedMatrices joined = {};
  // Scratch.
  void* masked = nullptr;
  float* sums = nullptr;
  int64_t scratch_bytes = 0;
};

int make_plan(const qsk_sparse_matmul_args* args, const qsk_cuda_queue* queue, void* scratch, Plan* plan) {
  if (args == nullptr || queue == nullptr) return QSK_NULL_ARGUMENT;
  if (args->type != QSK_FLOAT32 && args->type != QSK_FLOAT16) return QSK_BAD_TYPE;
  if (args->weight_type != QSK_INT8 && args->weight_type != QSK_INT4) return QSK_BAD_TYPE;
  if (args->m < 0 || args->k < 0 || args->k > kLargestK || args->block < 0 || args->group < 1) return QSK_BAD_SIZE;
  if (args->m > INT32_MAX || (args->k > 0 && args->m > INT32_MAX / args->k)) return QSK_BAD_SIZE;
  if (args->top_k < 0 || args->top_k > (args->block > 0 ? args->block : args->k)) return QSK_BAD_K;
  const int status = join_matrices(args->n, args->matrices, kTile, &plan->joined);
  if (status != QSK_OK) return status;
  plan->has_selection = selects(args->top_k, args->k, args->block, args->rescale_l2);
  plan->bits = args->weight_type == QSK_INT4 ? 4 : 8;
  plan->columns = static_cast<int64_t>(plan->joined.tiles) * kTile;
  plan->is_gemm = args->m >= (args->type == QSK_FLOAT16 ? kGemmRows : kFloatGemmRows);
  if (plan->is_gemm) {
    const int64_t groups = ceil_div(args->k, args->group), most = args->k / kGemmSliceChannels;
    plan->slices = slices_for(*queue, nbits_gemm_blocks(args->m, plan->joined.tiles), most < groups ? most : groups);
  } else {
    const int64_t blocks = args->m * ceil_div(plan->columns, kWarp * (32 / plan->bits));
    const int64_t pieces = ceil_div(args->k, args->group < kPieceChannels ? args->group : kPieceChannels);
    plan->slices = slices_for(*queue, blocks, pieces / kSlicePieces);
  }
  Scratch taken(scratch);
  const int64_t element_bytes = args->type == QSK_FLOAT16 ? 2 : 4;
  if (plan->has_selection) plan->masked = taken.take<char>(args->m * args->k * element_bytes);
  if (!plan->is_gemm || plan->slices > 1) {
    plan->sums = taken.take<float>(plan->slices * args->m * plan->columns);
  }
  plan->scratch_bytes = taken.used();
  return QSK_OK;
}

template <int kBits, typename T>
void enqueue_gemv(const NBitsProduct& product, const Plan& plan, const qsk_cuda_queue& queue) {
  const auto blocks = static_cast<unsigned>(ceil_div(plan.columns, NBits<kBits>::kWarpOutputs));
  const dim3 grid(static_cast<unsigned>(product.m), blocks, static_cast<unsigned>(plan.slices));
  launch(nbits_gemv<kBits, T>, grid, queue.stream, static_cast<const T*>(product.x), product.k, product.w,
         product.scales, product.group, plan.columns, plan.sums);
}

template <typename T>
void enqueue(const NBitsProduct& product, const Plan& plan, const qsk_cuda_queue& queue) {
  if (plan.is_gemm) {
    enqueue_nbits_gemm(product, plan.slices, plan.sums, queue);
    if (plan.slices == 1) return;
  } else {
    product.bits == 4 ? enqueue_gemv<4, T>(product, plan, queue) : enqueue_gemv<8, T>(product, plan, queue);
  }
  const dim3 grid(static_cast<unsigned>(product.m),
                  static_cast<unsigned>(ceil_div(plan.joined.tiles, kThreads / kTile)));
  launch(nbits_finish<T>, grid, queue.stream, plan.sums, static_cast<int>(plan.slices), plan.joined,
         static_cast<T*>(product.y));
}

}  // namespace
}  // namespace qsk_cuda

int64_t qsk_cuda_sparse_matmul_scratch_bytes(const qsk_sparse_matmul_args* args, const qsk_cuda_queue* queue) {
  qsk_cuda::Plan plan;
  return qsk_cuda::make_plan(args, queue, nullptr, &plan) == QSK_OK ? plan.scratch_bytes : 0;
}

int qsk_cuda_sparse_matmul(const qsk_sparse_matmul_args* args, const qsk_cuda_queue* queue, void* scratch,
                           int64_t scratch_bytes) {
  using namespace qsk_cuda;
  Plan plan;
  int status = make_plan(args, queue, scratch, &plan);
  if (status == QSK_OK) status = check_scratch(scratch, scratch_bytes, plan.scratch_bytes);
  if (status != QSK_OK || args->m == 0 || plan.joined.outputs == 0) return status;
  const bool lacks_inputs = args->k > 0 && (args->x == nullptr || args->w == nullptr || args->scales == nullptr);
  if (lacks_inputs || args->y == nullptr) return QSK_NULL_ARGUMENT;
  if (reinterpret_cast<uintptr_t>(args->w) % 4 != 0) return QSK_CUDA_MISALIGNED;
  const void* x = args->x;
  if (plan.has_selection) {
    enqueue_topk({args->type, x, plan.masked, args->m, args->k, args->top_k, args->block, args->rescale_l2}, *queue);
    x = plan.masked;
  }
  const NBitsProduct product = {args->type,   plan.bits,   x,       static_cast<const uint8_t*>(args->w),
                                args->scales, args->group, args->y, args->m,
                                args->k,      plan.joined};
  args->type == QSK_FLOAT16 ? enqueue<uint16_t>(product, plan, *queue) : enqueue<float>(product, plan, *queue);
  return launch_status();
}
