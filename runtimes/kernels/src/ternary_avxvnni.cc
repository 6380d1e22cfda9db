// Ternary matmul, AVX2 with AVX-VNNI (Alder Lake, Zen 5 and newer): the dot product on 256 bits, without AVX-512.
//
// dpbusd adds the four products of unsigned codes and signed activations of four channels to an int32 lane. In one row
// the four outputs of a byte are four planes, masked without a shift, which multiplies the codes of plane p by 4^p (at
// most 2 * 64 = 128, still an unsigned byte) and is divided exactly when a group of channels is done.
#include "avxvnni.h"
#include "ternary_avx2_layout.h"
#include "ternary_quads.h"

namespace qsk {
namespace {

// sum += products of four channels. GCC 12 moves each sum to another register and back, a third of the instructions: an
// empty statement that claims to change it keeps it where it is.
void add_dot(__m256i codes, __m256i q, __m256i& sum) {
  sum = _mm256_dpbusd_avx_epi32(sum, codes, q);
#if defined(__GNUC__)
  __asm__("" : "+x"(sum));
#endif
}

// Adds the products of half of the 32 bytes at `column` of all rows of the group: the bytes that unpacklo (0) or
// unpackhi (1) takes. All sixteen sums at once would not fit the registers. Four calls make a line, and meanwhile
// prefetch the group's own next one (at `near`, parts 0 and 1) into the first-level cache, where 32 rows would not fit,
// and one of the next group from memory (parts 2 and 3).
template <int kHalf, int kPart>
inline __attribute__((always_inline)) void add_half_block(const QuadGroup& group, int64_t column, int64_t near,
                                                          int32_t* block) {
  const __m256i mask0 = _mm256_set1_epi8(0x03), mask1 = _mm256_set1_epi8(0x0c), mask2 = _mm256_set1_epi8(0x30);
  const __m256i mask3 = _mm256_set1_epi8(static_cast<char>(0xc0));
  __m256i products[2][4];  // [h][plane]
  for (auto& planes : products) {
    for (auto& plane : planes) plane = _mm256_setzero_si256();
  }
  for (int64_t i = 0; i < group.quad_count; ++i) {
    const uint8_t* const* const rows = group.rows + 4 * i;
    const uint8_t* const* const ahead = (kPart < 2 ? group.rows : group.next) + 4 * i + kPart % 2 * 2;
    if (kPart < 2) {
      prefetch<_MM_HINT_T0>(ahead[0] + near);
      prefetch<_MM_HINT_T0>(ahead[1] + near);
    } else {
      prefetch<_MM_HINT_T1>(ahead[0] + column);
      prefetch<_MM_HINT_T1>(ahead[1] + column);
    }
    const __m256i q = four_activations(group.activations + 4 * i);
    const __m256i a = load(rows[0] + column), b = load(rows[1] + column);
    const __m256i c = load(rows[2] + column), d = load(rows[3] + column);
    const __m256i ab = kHalf == 0 ? _mm256_unpacklo_epi8(a, b) : _mm256_unpackhi_epi8(a, b);
    const __m256i cd = kHalf == 0 ? _mm256_unpacklo_epi8(c, d) : _mm256_unpackhi_epi8(c, d);
    const __m256i bytes[2] = {_mm256_unpacklo_epi16(ab, cd), _mm256_unpackhi_epi16(ab, cd)};
    for (int h = 0; h < 2; ++h) {
      add_dot(_mm256_and_si256(bytes[h], mask0), q, products[h][0]);
      add_dot(_mm256_and_si256(bytes[h], mask1), q, products[h][1]);
      add_dot(_mm256_and_si256(bytes[h], mask2), q, products[h][2]);
      add_dot(_mm256_and_si256(bytes[h], mask3), q, products[h][3]);
    }
  }
  for (int h = 0; h < 2; ++h) {
    int32_t* const sums = block + (2 * kHalf + h) * 4 * kVectorSums;
    add_to(sums, products[h][0]);
    add_to(sums + kVectorSums, _mm256_srai_epi32(products[h][1], 2));
    add_to(sums + 2 * kVectorSums, _mm256_srai_epi32(products[h][2], 4));
    add_to(sums + 3 * kVectorSums, _mm256_srai_epi32(products[h][3], 6));
  }
}

void gemv(const TernaryRows& rows, int32_t* sums) {
  if (rows.count <= 0) return;
  const int64_t row_bytes = rows.row_bytes;
  QuadGroup group;
  set_up(group, rows);
  for (int64_t column = 0; column < row_bytes; column += kLineBytes, sums += 2 * kBlockSums) {
    const int64_t near = column + kLineBytes < row_bytes ? column + kLineBytes : column;
    add_half_block<0, 0>(group, column, near, sums);
    add_half_block<1, 2>(group, column, near, sums);
    if (column + kBlockBytes >= row_bytes) break;
    add_half_block<0, 1>(group, column + kBlockBytes, near, sums + kBlockSums);
    add_half_block<1, 3>(group, column + kBlockBytes, near, sums + kBlockSums);
  }
}

// Rows x 16 outputs.
struct Dpbusd {
  template <int Rows>
  static void multiply(const uint8_t* panel, int64_t quads, const int8_t* q, int64_t q_stride, int32_t* sums) {
    __m256i a[Rows], b[Rows];
    QSK_UNROLL
    for (int r = 0; r < Rows; ++r) {
      a[r] = load(sums + r * kGemmSumsStride);
      b[r] = load(sums + r * kGemmSumsStride + kVectorSums);
    }
    for (int64_t t = 0; t < quads; ++t) {
      const __m256i codes0 = load(panel + 64 * t), codes1 = load(panel + 64 * t + 32);
      QSK_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const __m256i activations = four_activations(q + r * q_stride + 4 * t);
        a[r] = _mm256_dpbusd_avx_epi32(a[r], codes0, activations);
        b[r] = _mm256_dpbusd_avx_epi32(b[r], codes1, activations);
      }
    }
    QSK_UNROLL
    for (int r = 0; r < Rows; ++r) {
      store(sums + r * kGemmSumsStride, a[r]);
      store(sums + r * kGemmSumsStride + kVectorSums, b[r]);
    }
  }
};

}  // namespace

const TernaryKernels ternary_avxvnni = {kBlockBytes, gemv,  1.0f, {{1.0f, 0.42f}, kGemmTile, gemm<Dpbusd>},
                                        nullptr,     finish};

}  // namespace qsk
