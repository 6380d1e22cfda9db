// The kernel of DenseMatMulNBits, in terms of the vectors of code_rows.h and of H16, sixteen uint16_t, with
//   load_halves(p) low_bits(h, bits)     shift<bits>(h): each lane to the right
//   madd_halves(sums, codes, p): sums + the products of codes with the sixteen int16 at p, added in pairs
//   add_halves(a, b, c, d): the sums of the lower four lanes of a, b, c and d, then those of the upper four
//   pick(p, lanes): p[lanes[0]], p[lanes[1]], ... of the eight values at p, all of which may be read
// and the table of all kernels in floating point.
#ifndef QSK_SRC_DENSE_ROWS_H_
#define QSK_SRC_DENSE_ROWS_H_

#include "code_rows.h"

namespace qsk {
namespace {

// Half a step's inputs are the least that share a scale where the eight sums of a block's half steps are scaled at
// once.
template <int Bits>
constexpr int64_t kHalfStepInputs = kDenseStepInputs<Bits> / 2;

// Where the scales of a block are among those of one output: `lanes` from its first one, in the order of add_halves.
template <int Bits>
struct BlockScales {
  static constexpr int64_t kInputs = kDenseBlockSteps * kDenseStepInputs<Bits>;

  // Whether there is such an order: whole half steps share a scale, and groups begin where blocks do.
  static bool fit(const DenseRows& rows) {
    if (rows.scales_stride == 1) return true;
    if (rows.group % kHalfStepInputs<Bits> != 0) return false;
    return rows.group < kInputs ? kInputs % rows.group == 0 : rows.group % kInputs == 0;
  }

  explicit BlockScales(const DenseRows& rows) {
    const bool is_one = rows.scales_stride == 1, is_within = rows.group < kInputs;
    advance = is_one ? 0 : is_within ? kInputs / rows.group : 1;
    blocks = is_one || is_within ? 1 : rows.group / kInputs;
    const int64_t last_block = (rows.steps - 1) / kDenseBlockSteps;
    const int64_t left = rows.scales_stride - 1 - last_block / blocks * advance;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t half_step = lane % kDenseBlockSteps * 2 + lane / kDenseBlockSteps;
      const int64_t group = is_one || !is_within ? 0 : half_step * kHalfStepInputs<Bits> / rows.group;
      lanes[lane] = static_cast<int32_t>(group);
      last_lanes[lane] = static_cast<int32_t>(group < left ? group : left);
    }
  }

  int64_t advance, blocks;  // after so many blocks, the first scale is so many further
  alignas(32) int32_t lanes[kLanes];
  alignas(32) int32_t last_lanes[kLanes];  // of the last block, which may have fewer steps
};

// `count` float16 scales in float.
inline void widen(const uint16_t* scales, int64_t count, float* wide) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(wide + i, load_half(scales + i));
  if (i < count) {
    uint16_t last[kLanes] = {};
    memcpy(last, scales + i, (count - i) * sizeof *scales);
    store(wide + i, load_half(last));
  }
}

template <int Bits>
I8 step_sums(const uint8_t* words, const DenseStep<Bits>& x) {
  const H16 codes = load_halves(words);
  I8 sums = load_int(x.offset);
  if constexpr (Bits == 4) {
    sums = madd_halves(sums, low_bits(codes, 0x0f), x.values[0]);
    sums = madd_halves(sums, low_bits(shift<4>(codes), 0x0f), x.values[1]);
    sums = madd_halves(sums, low_bits(shift<8>(codes), 0x0f), x.values[2]);
    sums = madd_halves(sums, shift<12>(codes), x.values[3]);
  } else {
    sums = madd_halves(sums, low_bits(codes, 0xff), x.values[0]);
    sums = madd_halves(sums, shift<8>(codes), x.values[1]);
  }
  return sums;
}

constexpr int64_t kAheadBytes = 8 << 10;  // of weights, which lie in order

// What the first `Steps` steps of a block add to the eight lanes of an output.
template <int Bits, int Steps>
F8 block_product(const uint8_t* words, const DenseBlock<Bits>& x, const float* scales, const int32_t* lanes) {
  I8 sums[kDenseBlockSteps];
  QSK_UNROLL
  for (int i = 0; i < kDenseBlockSteps; ++i) {
    sums[i] = i < Steps ? step_sums<Bits>(words + i * 32, x.steps[i]) : splat_int(0);
  }
  const F8 scale = mul(load(x.units), pick(scales, lanes));
  return mul(from_int(add_halves(sums[0], sums[1], sums[2], sums[3])), scale);
}

template <int Bits>
F8 last_product(const uint8_t* words, const DenseBlock<Bits>& x, const float* scales, const int32_t* lanes,
                int64_t steps) {
  switch (steps) {
    case 1:
      return block_product<Bits, 1>(words, x, scales, lanes);
    case 2:
      return block_product<Bits, 2>(words, x, scales, lanes);
    case 3:
      return block_product<Bits, 3>(words, x, scales, lanes);
    default:
      return block_product<Bits, 4>(words, x, scales, lanes);
  }
}

template <int Bits>
float output_by_blocks(const DenseRows& rows, const uint8_t* w, const float* scales, const BlockScales<Bits>& of_block,
                       const DenseBlock<Bits>* x) {
  constexpr int64_t kBlockBytes = kDenseBlockSteps * 32;
  const int64_t whole_blocks = rows.row_bytes / kBlockBytes, bytes_left = rows.row_bytes % kBlockBytes;
  F8 total = zero();
  int64_t blocks_left = of_block.blocks;
  for (int64_t block = 0; block < whole_blocks; ++block) {
    const uint8_t* const words = w + block * kBlockBytes;
    __builtin_prefetch(words + kAheadBytes);
    __builtin_prefetch(words + kAheadBytes + kBlockBytes / 2);
    total = add(total, block_product<Bits, kDenseBlockSteps>(words, x[block], scales, of_block.lanes));
    if (--blocks_left == 0) {
      scales += of_block.advance;
      blocks_left = of_block.blocks;
    }
  }
  if (bytes_left > 0) {
    const uint8_t* words = w + whole_blocks * kBlockBytes;
    uint8_t padded[kBlockBytes];
    if (bytes_left % 32 != 0) {
      memset(padded, 0, sizeof padded);
      memcpy(padded, words, bytes_left);
      words = padded;
    }
    total = add(total, last_product<Bits>(words, x[whole_blocks], scales, of_block.last_lanes, (bytes_left + 31) / 32));
  }
  return sum(total);
}

// Any groups of whole words: each lane of a step has its scale.
template <int Bits>
float output_by_steps(const DenseRows& rows, const uint8_t* w, const float* scales, const DenseBlock<Bits>* x) {
  F8 total = zero();
  for (int64_t step = 0; step < rows.steps; ++step) {
    const int64_t begin = step * 32, bytes = rows.row_bytes - begin < 32 ? rows.row_bytes - begin : 32;
    uint8_t words[32] = {};
    memcpy(words, w + begin, bytes);
    float lane[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      const int64_t group = (step * kDenseStepInputs<Bits> + j * (32 / Bits)) / rows.group;
      lane[j] = scales[group < rows.scales_stride ? group : rows.scales_stride - 1];
    }
    const DenseBlock<Bits>& block = x[step / kDenseBlockSteps];
    const int64_t of_block = step % kDenseBlockSteps;
    const F8 scale = mul(splat(block.units[of_block]), load(lane));
    total = add(total, mul(from_int(step_sums<Bits>(words, block.steps[of_block])), scale));
  }
  return sum(total);
}

// y = output(weights, scales, x) of every output and row. By value: what is behind a reference would be read again
// after each write to y.
template <int Bits, class Output>
void for_outputs(DenseRows rows, float* y, Output output) {
  const auto* x = static_cast<const DenseBlock<Bits>*>(rows.x);
  const int64_t groups = rows.scales_stride, blocks = (rows.steps + kDenseBlockSteps - 1) / kDenseBlockSteps;
  for (int64_t n = 0; n < rows.outputs; ++n) {
    const int64_t of_piece = n % kDensePiece;
    if (of_piece == 0) {
      const int64_t piece = rows.outputs - n < kDensePiece ? rows.outputs - n : kDensePiece;
      widen(rows.scales + n * groups, piece * groups, rows.wide);
    }
    for (int64_t row = 0; row < rows.rows; ++row) {
      y[row * rows.y_stride + n] = output(rows.w + n * rows.row_bytes, rows.wide + of_piece * groups, x + row * blocks);
    }
  }
}

template <int Bits>
void dense(const DenseRows& rows, float* y) {
  using X = const DenseBlock<Bits>*;
  if (rows.steps == 0) {
    for_outputs<Bits>(rows, y, [](const uint8_t*, const float*, X) { return 0.0f; });
  } else if (BlockScales<Bits>::fit(rows)) {
    const BlockScales<Bits> of_block(rows);
    for_outputs<Bits>(rows, y, [=](const uint8_t* w, const float* scales, X x) {
      return output_by_blocks<Bits>(rows, w, scales, of_block, x);
    });
  } else {
    for_outputs<Bits>(
        rows, y, [&](const uint8_t* w, const float* scales, X x) { return output_by_steps<Bits>(rows, w, scales, x); });
  }
}

// Lays out the inputs of one row of x for `dense`: fixed-point values in the order of the planes, and what the zero
// points add.
template <int Bits>
void lay_out_x(const float* x, int64_t k, int64_t steps, void* laid_out) {
  constexpr int kPlanes = 16 / Bits;  // of a half word
  constexpr int32_t kZero = 1 << (Bits - 1);
  auto* const out = static_cast<DenseBlock<Bits>*>(laid_out);
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t begin = step * kDenseStepInputs<Bits>;
    const int64_t end = begin + kDenseStepInputs<Bits> < k ? begin + kDenseStepInputs<Bits> : k;
    DenseBlock<Bits>& block = out[step / kDenseBlockSteps];
    const int64_t of_block = step % kDenseBlockSteps;
    if (of_block == 0) memset(&block, 0, sizeof block);
    float largest = 0.0f;
    for (int64_t i = begin; i < end; ++i) largest = larger_magnitude(largest, x[i]);
    const Unit unit = unit_of(largest);
    block.units[of_block] = block.units[of_block + kDenseBlockSteps] = unit.from_fixed;
    DenseStep<Bits>& laid_step = block.steps[of_block];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t half = (i - begin) / kPlanes, plane = (i - begin) % kPlanes;
      const int16_t value = fixed_of(x[i], unit);
      laid_step.values[plane][half] = value;
      laid_step.offset[half / 2] -= kZero * value;
    }
  }
}

constexpr FloatKernels float_kernels(const FloatGemmCost (&cost)[kWeightTypes]) {
  return {{add_floats<Float32>, add_floats<Float16>, add_codes<8>, add_codes<4>},
          {unpack_floats<Float32>, unpack_floats<Float16>, unpack_codes<8>, unpack_codes<4>},
          multiply,
          compact,
          {nullptr, nullptr, lay_out_x<8>, lay_out_x<4>},
          {nullptr, nullptr, dense<8>, dense<4>},
          {cost[0], cost[1], cost[2], cost[3]}};
}

}  // namespace
}  // namespace qsk

#endif  // QSK_SRC_DENSE_ROWS_H_
