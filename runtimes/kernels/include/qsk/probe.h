// The machine's own limit, for benchmarks: how fast it reads the rows that a sparse kernel reads.
#ifndef QSK_PROBE_H_
#define QSK_PROBE_H_

#include "qsk/parallel.h"
#include "qsk/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qsk_probe_args {
  const uint8_t* base;
  int64_t row_bytes;     // a multiple of 32
  const int64_t* index;  // [count] which rows, in the order of reading
  int64_t count;
  int64_t ahead;     // the row so many positions ahead is prefetched line by line; 0: left to the hardware
  int64_t together;  // so many rows are read line by line in turns: 1..16
} qsk_probe_args;

// Reads the rows and writes the sum of their 64-bit words to *sum, so that no read can be left out. `parallel` shares
// the rows as the kernels share theirs.
QSK_API int qsk_probe_read(const qsk_probe_args* args, const qsk_parallel* parallel, uint64_t* sum);

#ifdef __cplusplus
}
#endif

#endif  // QSK_PROBE_H_
