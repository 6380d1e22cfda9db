// The loop of a decoder: tokens in, the most likely next token out. The KV cache is fed back without a copy, or, in a
// graph that says so, one buffer with room to spare is past and present at once, as in qsparse_export/generate.py.
#ifndef QSPARSE_DEVICE_DECODER_H_
#define QSPARSE_DEVICE_DECODER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "onnxruntime.h"

namespace qsparse_device {

class Decoder {
 public:
  // Throws std::runtime_error when the graph's inputs are not those of a decoder (docs/bundle.md).
  Decoder(const OnnxRuntime& runtime, Session& session);
  // Forgets every token.
  void reset();
  // Appends `ids` to the sequence; the index of the largest logit after the last one, the lowest on ties.
  // Throws std::runtime_error when a logit is NaN.
  int64_t step(const std::vector<int64_t>& ids);
  // `count` greedy tokens after `prompt`, from an empty cache.
  std::vector<int64_t> generate(const std::vector<int64_t>& prompt, int64_t count);

 private:
  Tensor cache(size_t position, int64_t room) const;
  void make_room(int64_t tokens);
  const OnnxRuntime& runtime_;
  Session& session_;
  struct Cache {
    size_t input, output;  // positions: the past, and what replaces it
  };
  bool shares_cache_ = false;
  size_t logits_ = 0;
  std::vector<Cache> caches_;
  std::vector<Tensor> past_;  // in the order of caches_
  int64_t position_ = 0;
  int64_t room_ = 0;  // tokens that a shared cache can hold
};

}  // namespace qsparse_device

#endif  // QSPARSE_DEVICE_DECODER_H_
