// Ternary matmul, portable: sums in natural order.
#include "kernels.h"

namespace qsk {
namespace {

void add_row(const uint8_t* row, int64_t bytes, int32_t q, int32_t* sums) {
  for (int64_t j = 0; j < bytes; ++j) {
    const int32_t code = row[j];
    sums[4 * j + 0] += q * (code & 3);
    sums[4 * j + 1] += q * (code >> 2 & 3);
    sums[4 * j + 2] += q * (code >> 4 & 3);
    sums[4 * j + 3] += q * (code >> 6);
  }
}

void gemv(const TernaryRows& rows, int32_t* sums) {
  for (int64_t i = 0; i < rows.count; ++i) {
    add_row(rows.w + rows.index[i] * rows.row_bytes, rows.row_bytes, rows.value[i], sums);
  }
}

void gemm(const TernaryTile& tile, int32_t* sums) {
  for (int64_t c = 0; c < tile.weights.channels; ++c) {
    const uint8_t* row = tile.weights.w + tile.weights.index[c] * tile.row_bytes;
    for (int64_t j = 0; j < tile.bytes; ++j) {
      for (int p = 0; p < 4; ++p) tile.workspace[4 * j + p] = row[j] >> 2 * p & 3;
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int32_t q = tile.q[r * tile.q_stride + c];
      int32_t* out = sums + r * kGemmSumsStride;
      for (int64_t n = 0; n < 4 * tile.bytes; ++n) out[n] += q * tile.workspace[n];
    }
  }
}

void finish(const int32_t* const* parts, int64_t part_count, int64_t begin, int64_t n, int32_t offset, float factor,
            float* y) {
  for (int64_t i = 0; i < n; ++i) {
    int32_t sum = -offset;
    for (int64_t part = 0; part < part_count; ++part) sum += parts[part][begin + i];
    y[i] = static_cast<float>(sum) * factor;
  }
}

}  // namespace

const TernaryKernels ternary_generic = {32, gemv, 1.0f, {{0.3f, 1.0f}, kGemmTile, gemm}, nullptr, finish};

}  // namespace qsk
