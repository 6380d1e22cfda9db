// How a kernel gets threads: the caller's pool behind one callback.
#ifndef QSK_PARALLEL_H_
#define QSK_PARALLEL_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// `run` calls task(argument, i) exactly once for every i in 0..count-1, on any threads in any order, and returns when
// all have returned. The library asks for at most `workers` tasks, each of which takes pieces of work until none is
// left: a pool with fewer threads, or a late one, costs nothing. `workers` bounds the scratch. NULL means one thread.
typedef struct qsk_parallel {
  void* context;
  void (*run)(void* context, void (*task)(void* argument, int64_t index), void* argument, int64_t count);
  int64_t workers;
} qsk_parallel;

#ifdef __cplusplus
}
#endif

#endif  // QSK_PARALLEL_H_
