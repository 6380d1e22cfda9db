// GatedActivation: the activation of a gated feed-forward block on its two products side by side.
#ifndef QSK_GATED_ACTIVATION_H_
#define QSK_GATED_ACTIVATION_H_

#include "qsk/parallel.h"
#include "qsk/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { QSK_RELU2 = 1, QSK_SILU = 2 };

typedef struct qsk_gated_activation_args {
  int type;        // of x: QSK_FLOAT32 or QSK_FLOAT16
  int activation;  // QSK_RELU2 or QSK_SILU
  const void* x;   // [rows, 2 * n]: the gate, then what it gates
  float* y;        // [rows, n]
  int64_t rows;
  int64_t n;
} qsk_gated_activation_args;

// y = relu(gate)^2 * up or silu(gate) * up in float32: a squared product leaves float16's range.
QSK_API int64_t qsk_gated_activation_scratch_bytes(const qsk_gated_activation_args* args, const qsk_parallel* parallel);
QSK_API int qsk_gated_activation(const qsk_variant* variant, const qsk_gated_activation_args* args,
                                 const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes);

#ifdef __cplusplus
}
#endif

#endif  // QSK_GATED_ACTIVATION_H_
