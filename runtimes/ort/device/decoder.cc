#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace qsparse_device {
namespace {

constexpr char kIds[] = "input_ids", kPositions[] = "position_ids", kMask[] = "attention_mask";
constexpr char kPast[] = "past_key_values.";
constexpr char kPresent[] = "present.";
constexpr char kSharedCache[] = "ai.qsparse.shared_cache";
constexpr int64_t kCacheTokens = 64;  // a shared cache has room for a multiple of that many

float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 0x1f, mantissa = half & 0x3ff;
  if (exponent == 0) {  // zero and subnormal: mantissa * 2^-24
    return std::copysign(static_cast<float>(mantissa) * 0x1p-24f, sign ? -1.0f : 1.0f);
  }
  const uint32_t bits =
      sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;  // 112: 127 - 15, the biases
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The first of the largest. In a loop that compilers turn into vector instructions: a vocabulary takes longer than a
// layer's attention otherwise.
int64_t argmax(const float* values, int64_t count) {
  constexpr int64_t kLanes = 16;
  float largest[kLanes];
  bool is_nan[kLanes] = {};
  std::fill_n(largest, kLanes, -INFINITY);
  const auto take = [&](float value, int64_t lane) {
    largest[lane] = value > largest[lane] ? value : largest[lane];
    is_nan[lane] |= value != value;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) take(values[i + lane], lane);
  }
  for (; i < count; ++i) take(values[i], 0);
  if (std::any_of(is_nan, is_nan + kLanes, [](bool is) { return is; })) {
    throw std::runtime_error("the model computed NaN logits");
  }
  return std::find(values, values + count, *std::max_element(largest, largest + kLanes)) - values;
}

}  // namespace

Decoder::Decoder(const OnnxRuntime& runtime, Session& session) : runtime_(runtime), session_(session) {
  const std::vector<std::string>& outputs = session.outputs();
  const auto position_of = [&](const std::string& name) {
    const auto found = std::find(outputs.begin(), outputs.end(), name);
    if (found == outputs.end()) throw std::runtime_error("the graph has no output " + name + ": it is no decoder");
    return static_cast<size_t>(found - outputs.begin());
  };
  logits_ = position_of("logits");
  shares_cache_ = session.metadata(kSharedCache) == "true";
  bool has_ids = false;
  for (size_t i = 0; i < session.inputs().size(); ++i) {
    const Input& input = session.inputs()[i];
    has_ids = has_ids || input.name == kIds;
    if (input.name == kIds || input.name == kPositions || input.name == kMask) continue;
    if (input.name.rfind(kPast, 0) != 0)
      throw std::runtime_error("the graph has an input " + input.name + ": it is no decoder");
    if (input.shape.size() != 4 || input.shape[1] < 1 || input.shape[3] < 1) {
      throw std::runtime_error(input.name + " is not [batch, heads, past, head_dim] with known heads and head_dim");
    }
    caches_.push_back({i, position_of(kPresent + input.name.substr(sizeof kPast - 1))});
  }
  if (!has_ids) throw std::runtime_error("the graph has no input input_ids: it is no decoder");
  reset();
}

void Decoder::reset() {
  past_.clear();
  position_ = room_ = 0;
  for (size_t i = 0; i < caches_.size(); ++i) past_.push_back(cache(i, 0));
}

Tensor Decoder::cache(size_t position, int64_t room) const {
  const Input& input = session_.inputs()[caches_[position].input];
  return Tensor::empty(runtime_, {1, input.shape[1], room, input.shape[3]}, input.type);
}

// Gives a shared cache room for `tokens`, half as much again so that copying stays a small share of filling.
void Decoder::make_room(int64_t tokens) {
  if (!shares_cache_ || tokens <= room_) return;
  const int64_t room = (tokens * 3 / 2 + kCacheTokens - 1) / kCacheTokens * kCacheTokens;
  for (size_t i = 0; i < caches_.size(); ++i) {
    Tensor larger = cache(i, room);
    const Input& input = session_.inputs()[caches_[i].input];
    const int64_t heads = input.shape[1];
    const int64_t token_bytes = input.shape[3] * (input.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2);
    auto* to = static_cast<uint8_t*>(larger.data());
    memset(to, 0, static_cast<size_t>(heads * room * token_bytes));
    const auto* from = position_ > 0 ? static_cast<const uint8_t*>(past_[i].data()) : nullptr;
    for (int64_t head = 0; head < heads && from != nullptr; ++head) {
      memcpy(to + head * room * token_bytes, from + head * room_ * token_bytes,
             static_cast<size_t>(position_ * token_bytes));
    }
    past_[i] = std::move(larger);
  }
  room_ = room;
}

int64_t Decoder::step(const std::vector<int64_t>& ids) {
  const auto count = static_cast<int64_t>(ids.size());
  std::vector<int64_t> positions(ids.size());
  for (int64_t i = 0; i < count; ++i) positions[static_cast<size_t>(i)] = position_ + i;
  const std::vector<int64_t> ones(static_cast<size_t>(position_ + count), 1);
  const Tensor input_ids = Tensor::of(runtime_, {1, count}, ids);
  const Tensor position_ids = Tensor::of(runtime_, {1, count}, positions);
  const Tensor mask = Tensor::of(runtime_, {1, position_ + count}, ones);
  make_room(position_ + count);
  std::vector<const Tensor*> feeds(session_.inputs().size()), results(session_.outputs().size());
  for (size_t i = 0; i < feeds.size(); ++i) {
    const std::string& name = session_.inputs()[i].name;
    feeds[i] = name == kIds ? &input_ids : name == kPositions ? &position_ids : &mask;
  }
  for (size_t i = 0; i < caches_.size(); ++i) {
    feeds[caches_[i].input] = &past_[i];
    if (shares_cache_) results[caches_[i].output] = &past_[i];
  }
  std::vector<Tensor> outputs = session_.run(feeds, results);
  for (size_t i = 0; i < caches_.size() && !shares_cache_; ++i) past_[i] = std::move(outputs[caches_[i].output]);
  position_ += count;
  const Tensor& logits = outputs[logits_];
  const std::vector<int64_t> shape = logits.shape();
  const int64_t vocabulary = shape.back(), last = (shape[shape.size() - 2] - 1) * vocabulary;
  if (logits.type() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    return argmax(static_cast<const float*>(logits.data()) + last, vocabulary);
  }
  if (logits.type() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
    const uint16_t* row = static_cast<const uint16_t*>(logits.data()) + last;
    std::vector<float> values(static_cast<size_t>(vocabulary));
    std::transform(row, row + vocabulary, values.begin(), from_half);
    return argmax(values.data(), vocabulary);
  }
  throw std::runtime_error("the logits are neither float32 nor float16");
}

std::vector<int64_t> Decoder::generate(const std::vector<int64_t>& prompt, int64_t count) {
  reset();
  std::vector<int64_t> tokens;
  std::vector<int64_t> feed = prompt;
  while (static_cast<int64_t>(tokens.size()) < count) {
    tokens.push_back(step(feed));
    feed = {tokens.back()};
  }
  return tokens;
}

}  // namespace qsparse_device
