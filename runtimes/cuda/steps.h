// The steps that ops are made of, as host functions that enqueue one kernel or two, and what passes between them.
#ifndef QSK_CUDA_STEPS_H_
#define QSK_CUDA_STEPS_H_

#include <stdint.h>

#include "qsk_cuda.h"

namespace qsk_cuda {

constexpr int64_t kScratchAlignment = 64;
constexpr int64_t kLargestK = 8000000;    // so that int32 sums of 128 * 2 per channel fit
constexpr int64_t kMostGridRows = 65535;  // of gridDim.y and z

inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
inline int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// Hands out pieces of scratch, or only adds up their sizes when it begins at NULL.
class Scratch {
 public:
  explicit Scratch(void* begin) : begin_(static_cast<char*>(begin)) {}
  template <typename T>
  T* take(int64_t count) {
    char* piece = begin_ == nullptr ? nullptr : begin_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kScratchAlignment);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* begin_;
  int64_t used_ = 0;
};

inline int check_scratch(const void* scratch, int64_t given, int64_t needed) {
  if (given < needed) return QSK_SCRATCH_TOO_SMALL;
  if (needed > 0 && scratch == nullptr) return QSK_NULL_ARGUMENT;
  if (reinterpret_cast<uintptr_t>(scratch) % kScratchAlignment != 0) return QSK_CUDA_MISALIGNED;
  return QSK_OK;
}

// Matrices side by side, each padded to whole tiles; passed to kernels by value.
struct JoinedMatrices {
  int matrices;
  int tiles;                            // of all
  int outputs;                          // of all, without padding
  int first_tile[QSK_MOST_MATRICES];    // of each
  int first_output[QSK_MOST_MATRICES];  // of each, in a row of y
  int n[QSK_MOST_MATRICES];             // outputs of each
};
// Sums that do not fit an int are QSK_BAD_SIZE.
int join_matrices(const int64_t* n, int64_t matrices, int64_t tile_outputs, JoinedMatrices* joined);

// What the quantiser knows of a row. A row with NaN or Inf has gamma NaN and nothing active.
struct QuantizedRow {
  float gamma;
  int32_t sum;     // of q
  int32_t active;  // channels with q != 0
};

// The active channels of rows in order: `index` and `value` [rows, stride], padded with a zero of channel 0 to whole
// fours; stride is a multiple of 4.
struct ActiveChannels {
  int32_t* index;
  int8_t* value;
  int64_t stride;
};

bool selects(int64_t k, int64_t width, int64_t block, int rescale_l2);
// y may be x.
void enqueue_topk(const qsk_topk_sparsify_args& args, const qsk_cuda_queue& queue);
// q [rows, stride] with zeros from width on; either of gamma [rows] and summary [rows] may be NULL.
void enqueue_quantize(int type, const void* x, int64_t rows, int64_t width, int8_t* q, int64_t stride, float* gamma,
                      QuantizedRow* summary, const qsk_cuda_queue& queue);
void enqueue_quantize_active(int type, const void* x, int64_t rows, int64_t width, ActiveChannels active,
                             QuantizedRow* summary, const qsk_cuda_queue& queue);

// What the two ternary products have in common. Weights: formats/ternary.py, rows of joined.tiles * 32 bytes.
struct TernaryProduct {
  int type;  // of y
  const uint8_t* w;
  const float* scales;  // of each matrix
  const QuantizedRow* summary;
  void* y;
  int64_t m, k;
  JoinedMatrices joined;
};
// Sums of each slice of the active channels: int32 [slices, m, joined.tiles * 128].
void enqueue_ternary_gemv(const TernaryProduct& product, ActiveChannels active, int64_t slices, int32_t* sums,
                          const qsk_cuda_queue& queue);
constexpr int64_t kGemmChannels = 128;  // the stride of q is a multiple of it
void enqueue_ternary_gemm(const TernaryProduct& product, const int8_t* q, int64_t stride, const qsk_cuda_queue& queue);

// The product of SparseMatMulNBits. Weights: formats/nbits.py.
struct NBitsProduct {
  int type;  // of x and y
  int bits;
  const void* x;
  const uint8_t* w;
  const uint16_t* scales;  // float16 [groups, columns]
  int64_t group;
  void* y;
  int64_t m, k;
  JoinedMatrices joined;
};
// With more than one slice (of the groups) into sums float32 [slices, m, columns]; with one into y, and sums is NULL.
void enqueue_nbits_gemm(const NBitsProduct& product, int64_t slices, float* sums, const qsk_cuda_queue& queue);
int64_t nbits_gemm_blocks(int64_t m, int64_t tiles);  // of a slice

// Slices of a product that give every multiprocessor two blocks, where there are that many pieces of work.
int64_t slices_for(const qsk_cuda_queue& queue, int64_t blocks_per_slice, int64_t most);

}  // namespace qsk_cuda

#endif  // QSK_CUDA_STEPS_H_
