// Error codes and element types of the kernel library's C ABI.
#ifndef QSK_STATUS_H_
#define QSK_STATUS_H_

#include <stdint.h>

#if defined(__GNUC__)
#define QSK_API __attribute__((visibility("default")))
#else
#define QSK_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
  QSK_OK = 0,
  QSK_NULL_ARGUMENT = 1,        // a required pointer is NULL
  QSK_BAD_SIZE = 2,             // a negative size, or one beyond what 32-bit sums can hold
  QSK_BAD_TYPE = 3,             // not an element type that the argument takes
  QSK_BAD_K = 4,                // k outside 0..width of a row or block
  QSK_SCRATCH_TOO_SMALL = 5,    // ask the op's *_scratch_bytes function
  QSK_UNKNOWN_VARIANT = 6,      // QSPARSE_VARIANT names no variant of this library
  QSK_UNSUPPORTED_VARIANT = 7,  // QSPARSE_VARIANT names one that this processor or system cannot run
  QSK_BAD_INDEX = 8,            // an id outside the rows that there are
};

// Element types; the integers are weights only.
enum { QSK_FLOAT32 = 1, QSK_FLOAT16 = 2, QSK_INT8 = 3, QSK_INT4 = 4 };

// Matrices that one call may join: more than the projections of any layer that share a mask.
#define QSK_MOST_MATRICES 64

// One sentence for a code; never NULL.
QSK_API const char* qsk_status_message(int status);

// The version of the library, "major.minor.patch".
QSK_API const char* qsk_version(void);

#ifdef __cplusplus
}
#endif

#endif  // QSK_STATUS_H_
