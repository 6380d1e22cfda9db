// AddRmsNorm: the residual sum and the norm behind it.
#ifndef QSK_ADD_RMS_NORM_H_
#define QSK_ADD_RMS_NORM_H_

#include "qsk/parallel.h"
#include "qsk/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qsk_add_rms_norm_args {
  int type;              // of all tensors: QSK_FLOAT32 or QSK_FLOAT16
  const void* x;         // [rows, n]
  const void* residual;  // [rows, n]
  const void* weight;    // [n]
  void* sum;             // [rows, n]; may be x or residual
  void* y;               // [rows, n]; may be the one of them that sum is not
  int64_t rows;
  int64_t n;
  float epsilon;
} qsk_add_rms_norm_args;

// sum = x + residual in the tensors' type; y = sum / sqrt(mean(sum^2) + epsilon) * weight in float32.
QSK_API int64_t qsk_add_rms_norm_scratch_bytes(const qsk_add_rms_norm_args* args, const qsk_parallel* parallel);
QSK_API int qsk_add_rms_norm(const qsk_variant* variant, const qsk_add_rms_norm_args* args,
                             const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes);

#ifdef __cplusplus
}
#endif

#endif  // QSK_ADD_RMS_NORM_H_
