// Variants: one set of kernels per instruction set, chosen at run time.
#ifndef QSK_VARIANT_H_
#define QSK_VARIANT_H_

#include "qsk/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qsk_variant qsk_variant;

// Every variant that the library knows, on any processor, from the slowest to the fastest of each architecture.
QSK_API int64_t qsk_variant_count(void);
QSK_API const qsk_variant* qsk_variant_at(int64_t position);       // NULL outside 0..count-1
QSK_API const qsk_variant* qsk_variant_by_name(const char* name);  // NULL when unknown
QSK_API const char* qsk_variant_name(const qsk_variant* variant);  // NULL for NULL
QSK_API int64_t qsk_variant_position(const qsk_variant* variant);  // -1 for NULL
QSK_API int qsk_variant_is_supported(const qsk_variant* variant);  // 1 when processor and system can run it

// The variant named by the environment variable QSPARSE_VARIANT, read on every call, or else the fastest supported one.
// QSK_UNKNOWN_VARIANT or QSK_UNSUPPORTED_VARIANT leave *chosen alone.
QSK_API int qsk_variant_choose(const qsk_variant** chosen);

// Writes why qsk_variant_choose failed, with the supported names, as at most `capacity` bytes including the final 0.
// Returns the bytes that the whole message takes.
QSK_API int64_t qsk_variant_explain(int status, char* message, int64_t capacity);

#ifdef __cplusplus
}
#endif

#endif  // QSK_VARIANT_H_
