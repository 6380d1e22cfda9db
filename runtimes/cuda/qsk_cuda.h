// The kernels on an NVIDIA GPU, behind the argument structs of the CPU kernels (runtimes/kernels/include/qsk).
//
// The pointers x, y, w, q, gamma and scales of an argument struct are device memory here; `n` stays host memory, since
// the grid depends on it. Every function only enqueues kernels on the stream: it allocates nothing, waits for nothing
// and can be captured in a graph. The results are the CPU kernels' to the bit, except for float sums.
#ifndef QSK_CUDA_H_
#define QSK_CUDA_H_

#include "qsk/quantize_rows.h"
#include "qsk/sparse_matmul.h"
#include "qsk/sparse_ternary_matmul.h"
#include "qsk/topk_sparsify.h"

#ifdef __cplusplus
extern "C" {
#endif

// Beyond the codes of qsk/status.h.
enum {
  QSK_CUDA_LAUNCH_FAILED = 100,  // cudaGetLastError says more
  QSK_CUDA_MISALIGNED = 101,     // w is not aligned to 4 bytes, or scratch not to 64
};

// Where to run. `multiprocessors` of the device (cudaDevAttrMultiProcessorCount) decide into how many slices a single
// row's product is cut.
typedef struct qsk_cuda_queue {
  void* stream;  // cudaStream_t
  int64_t multiprocessors;
} qsk_cuda_queue;

// The multiprocessors of the calling thread's current device; 0 where there is no device.
QSK_API int64_t qsk_cuda_multiprocessors(void);

// Scratch is device memory, aligned to 64, that no other stream uses until the enqueued kernels are done.
QSK_API int64_t qsk_cuda_topk_sparsify_scratch_bytes(const qsk_topk_sparsify_args* args, const qsk_cuda_queue* queue);
QSK_API int qsk_cuda_topk_sparsify(const qsk_topk_sparsify_args* args, const qsk_cuda_queue* queue, void* scratch,
                                   int64_t scratch_bytes);

QSK_API int64_t qsk_cuda_quantize_rows_scratch_bytes(const qsk_quantize_rows_args* args, const qsk_cuda_queue* queue);
QSK_API int qsk_cuda_quantize_rows(const qsk_quantize_rows_args* args, const qsk_cuda_queue* queue, void* scratch,
                                   int64_t scratch_bytes);

// Also TernaryMatMul: one matrix, top_k = k and block = 0.
QSK_API int64_t qsk_cuda_sparse_ternary_matmul_scratch_bytes(const qsk_sparse_ternary_matmul_args* args,
                                                             const qsk_cuda_queue* queue);
QSK_API int qsk_cuda_sparse_ternary_matmul(const qsk_sparse_ternary_matmul_args* args, const qsk_cuda_queue* queue,
                                           void* scratch, int64_t scratch_bytes);

// Integer weights only: QSK_BAD_TYPE for others. Activations are not rounded to 16 bits here, unlike on a CPU.
QSK_API int64_t qsk_cuda_sparse_matmul_scratch_bytes(const qsk_sparse_matmul_args* args, const qsk_cuda_queue* queue);
QSK_API int qsk_cuda_sparse_matmul(const qsk_sparse_matmul_args* args, const qsk_cuda_queue* queue, void* scratch,
                                   int64_t scratch_bytes);

#ifdef __cplusplus
}
#endif

#endif  // QSK_CUDA_H_
