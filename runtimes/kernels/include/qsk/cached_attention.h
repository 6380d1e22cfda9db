// CachedAttention: rotary positions, the KV cache and grouped attention in one call.
#ifndef QSK_CACHED_ATTENTION_H_
#define QSK_CACHED_ATTENTION_H_

#include "qsk/parallel.h"
#include "qsk/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qsk_cached_attention_args {
  int type;                // of everything but visible: QSK_FLOAT32 or QSK_FLOAT16
  const void* qkv;         // [batch, tokens, (heads + 2 * kv_heads) * width]
  const void* cosine;      // [batch, tokens, width / 2]
  const void* sine;        // the same
  const uint8_t* visible;  // [batch, tokens, total] of 0 and 1: the keys that a query may look at
  const void* past_key;    // [batch, kv_heads, past_capacity, width], of which total - tokens are filled
  const void* past_value;  // the same
  void* y;                 // [batch, tokens, heads * width]
  void* present_key;       // [batch, kv_heads, max(past_capacity, total), width]; may be past_key when the cache has
  void* present_value;     // room: then only the new tokens are written. So for the values.
  int64_t batch, tokens, total;
  int64_t heads, kv_heads, width;
  int64_t past_capacity;
} qsk_cached_attention_args;

// Sums and weights are float32. A query that may look at nothing gives NaN. Scratch: aligned to 64.
QSK_API int64_t qsk_cached_attention_scratch_bytes(const qsk_cached_attention_args* args, const qsk_parallel* parallel);
QSK_API int qsk_cached_attention(const qsk_variant* variant, const qsk_cached_attention_args* args,
                                 const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes);

#ifdef __cplusplus
}
#endif

#endif  // QSK_CACHED_ATTENTION_H_
