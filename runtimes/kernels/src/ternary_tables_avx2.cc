// Ternary matmul of many rows, AVX2 without VNNI: tables of partial sums (the "method of four Russians").
//
// Four ternary weights have 3^4 = 81 values. For sixteen rows of x and four channels, the 81 possible sums of four
// products are made once, as vectors of sixteen int16; then every output adds the one that its four weights name:
//   sums[n] += table[w0 + 3 w1 + 9 w2 + 27 w3],  w in 0..2
// One vpaddw in place of 64 products, for which maddubs takes four instructions (docs/benchmarks.md). A table has 2.6
// KB and those of eight such quads of channels stay in the first-level cache, while the sums of all outputs of the tile
// pass by.
//
// int16 sums hold as long as the magnitudes of a row add up to at most 32767; before they could exceed it, sums move
// on to int32. So the results are exact, and only rows full of large activations pay for it often.
#include "ternary_avx2_layout.h"

namespace qsk {
namespace {

constexpr int64_t kQuads = kTableChannels / 4;
constexpr int64_t kEntries = 81;
constexpr int64_t kTableBytes = kEntries * 32;
constexpr int64_t kBlockVectors = kBlockSums / kVectorSums;
constexpr int64_t kInt16Most = 32767;
// A code 3, which no valid file has, names an entry up to 3 * (1 + 3 + 9 + 27): memory of ours, whatever is in it.
constexpr int64_t kTablesBytes = kQuads * kTableBytes + (3 * 40 + 1 - kEntries) * 32;

// Sums of one group of rows wait as int16 [block][h][plane][lane][16 rows]: the order of the sums, rows last.
struct Waiting {
  int64_t bound;               // on the magnitude of any of them
  int32_t offset[kTableRows];  // of each row: its activations since sums last moved on
};

struct Tables {
  alignas(64) uint8_t entries[kTablesBytes];
  alignas(64) int16_t q[kTableChannels][kTableRows];
  alignas(64) uint16_t names[kTableTileOutputs][kQuads];  // the byte offset of each output's entry of each quad
  alignas(64) int16_t sums[kTableMostGroups][kTableTileOutputs][kTableRows];
  Waiting waiting[kTableMostGroups];
};
static_assert(sizeof(Tables) <= kTableWorkspaceBytes, "workspace");

__m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// Transposes 16 x 16 bytes: out[i] has byte i of every row, once each of four passes has interleaved rows 8 apart.
void transpose(__m128i rows[16]) {
  QSK_UNROLL
  for (int pass = 0; pass < 4; ++pass) {
    __m128i out[16];
    QSK_UNROLL
    for (int i = 0; i < 8; ++i) {
      out[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
      out[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
    }
    QSK_UNROLL
    for (int i = 0; i < 16; ++i) rows[i] = out[i];
  }
}

// Activations of `rows` rows and `channels` channels as int16 [channel][row], with zeros for what is not there. Returns
// a bound on the magnitude of a row's sum of products; adds each row's activations to `offset`.
int64_t gather_activations(const int8_t* q, int64_t q_stride, int64_t rows, int64_t channels,
                           int16_t (*out)[kTableRows], int32_t* offset) {
  __m256i total = _mm256_setzero_si256(), magnitudes = total;
  for (int64_t begin = 0; begin < kTableChannels; begin += 16) {
    __m128i bytes[16];
    for (int64_t row = 0; row < 16; ++row) {
      const int64_t count = row < rows ? channels - begin : 0;
      const int8_t* from = q + row * q_stride + begin;
      int8_t part[16] = {};
      if (count < 16) {
        if (count > 0) memcpy(part, from, count);
        from = part;
      }
      bytes[row] = load_half(from);
    }
    transpose(bytes);
    for (int64_t c = 0; c < 16; ++c) {
      const __m256i values = _mm256_cvtepi8_epi16(bytes[c]);
      store(out[begin + c], values);
      total = _mm256_add_epi16(total, values);
      magnitudes = _mm256_add_epi16(magnitudes, _mm256_abs_epi16(values));
    }
  }
  add_to(offset, _mm256_cvtepi16_epi32(_mm256_castsi256_si128(total)));
  add_to(offset + 8, _mm256_cvtepi16_epi32(_mm256_extracti128_si256(total, 1)));
  alignas(32) int16_t each[kTableRows];
  store(each, magnitudes);
  int16_t most = 0;
  for (int16_t magnitude : each) most = magnitude > most ? magnitude : most;
  return most;
}

// The 81 sums of a quad's products, in the order of their names.
void fill_table(const int16_t (*q)[kTableRows], uint8_t* table) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i q0 = load(q[0]), q1 = load(q[1]), q2 = load(q[2]), q3 = load(q[3]);
  const __m256i sum = _mm256_add_epi16(q0, q1), difference = _mm256_sub_epi16(q0, q1);
  const __m256i low[9] = {_mm256_sub_epi16(zero, sum),
                          _mm256_sub_epi16(zero, q1),
                          difference,
                          _mm256_sub_epi16(zero, q0),
                          zero,
                          q0,
                          _mm256_sub_epi16(zero, difference),
                          q1,
                          sum};
  __m256i high = _mm256_sub_epi16(zero, _mm256_add_epi16(q2, q3));
  for (int w3 = 0; w3 < 3; ++w3) {
    for (int w2 = 0; w2 < 3; ++w2) {
      QSK_UNROLL
      for (int i = 0; i < 9; ++i) store(table + 32 * i, _mm256_add_epi16(low[i], high));
      table += 9 * 32;
      high = _mm256_add_epi16(high, q2);
    }
    high = _mm256_add_epi16(high, _mm256_sub_epi16(q3, _mm256_add_epi16(q2, _mm256_add_epi16(q2, q2))));
  }
}

// The names of the entries of 32 bytes of a quad's four rows, one byte each: [plane] of w0 + 3 w1 + 9 w2 + 27 w3.
// Planes two apart are added up together, each in four bits, where the largest sum of two, 2 + 3 * 2, fits.
void name_entries(const uint8_t* const* rows, int64_t column, __m256i planes[4]) {
  const __m256i pairs = _mm256_set1_epi8(0x33), low = _mm256_set1_epi8(0x0f);
  QSK_UNROLL
  for (int odd = 0; odd < 2; ++odd) {
    __m256i codes[4];
    QSK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m256i bytes = load(rows[i] + column);
      codes[i] = _mm256_and_si256(odd ? _mm256_srli_epi16(bytes, 2) : bytes, pairs);
    }
    const auto triple = [](__m256i v) { return _mm256_add_epi8(v, _mm256_add_epi8(v, v)); };
    const __m256i first = _mm256_add_epi8(codes[0], triple(codes[1]));
    const __m256i second = _mm256_add_epi8(codes[2], triple(codes[3]));
    QSK_UNROLL
    for (int upper = 0; upper < 2; ++upper) {
      const __m256i a = _mm256_and_si256(upper ? _mm256_srli_epi16(first, 4) : first, low);
      const __m256i b = _mm256_and_si256(upper ? _mm256_srli_epi16(second, 4) : second, low);
      planes[2 * upper + odd] = _mm256_add_epi8(a, triple(triple(b)));
    }
  }
}

// The names of one block's outputs in all quads, as byte offsets: eight neighbours of one output.
void name_block(const uint8_t* const* rows, int64_t column, uint16_t (*names)[kQuads]) {
  static_assert(kQuads == 8, "a transposition of eight");
  __m256i planes[kQuads][4];
  for (int64_t quad = 0; quad < kQuads; ++quad) name_entries(rows + 4 * quad, column, planes[quad]);
  alignas(16) uint16_t starts[16];
  for (int i = 0; i < 16; ++i) starts[i] = static_cast<uint16_t>(i % kQuads * kTableBytes);
  const __m256i start = load(starts);
  for (int p = 0; p < 4; ++p) {
    __m256i pairs[8], fours[8];
    QSK_UNROLL
    for (int i = 0; i < 4; ++i) {  // [i][half of each lane]: quads 2i and 2i + 1 of the bytes 0..7 or 8..15
      pairs[2 * i] = _mm256_unpacklo_epi8(planes[2 * i][p], planes[2 * i + 1][p]);
      pairs[2 * i + 1] = _mm256_unpackhi_epi8(planes[2 * i][p], planes[2 * i + 1][p]);
    }
    QSK_UNROLL
    for (int half = 0; half < 2; ++half) {  // [half][quarter][quads 0..3 or 4..7]
      QSK_UNROLL
      for (int i = 0; i < 2; ++i) {
        fours[4 * half + i] = _mm256_unpacklo_epi16(pairs[4 * i + half], pairs[4 * i + 2 + half]);
        fours[4 * half + 2 + i] = _mm256_unpackhi_epi16(pairs[4 * i + half], pairs[4 * i + 2 + half]);
      }
    }
    QSK_UNROLL
    for (int h = 0; h < 4; ++h) {
      uint16_t (*out)[kQuads] = names + (4 * h + p) * kVectorSums;
      const __m256i a = _mm256_unpacklo_epi32(fours[2 * h], fours[2 * h + 1]);  // the bytes 4h and 4h + 1 of each lane
      const __m256i b = _mm256_unpackhi_epi32(fours[2 * h], fours[2 * h + 1]);
      const __m128i two_outputs[4] = {_mm256_castsi256_si128(a), _mm256_castsi256_si128(b),
                                      _mm256_extracti128_si256(a, 1), _mm256_extracti128_si256(b, 1)};
      QSK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const __m256i offsets = _mm256_slli_epi16(_mm256_cvtepu8_epi16(two_outputs[i]), 5);
        store(out[2 * i], _mm256_add_epi16(offsets, start));
      }
    }
  }
}

// sums += the entry at `offset`. GCC would load entries first and add them in pairs: more instructions than the core
// can take, which is what limits this loop.
void add_entry(const uint8_t* entries, uint32_t offset, __m256i& sums) {
#if defined(__GNUC__)
  __asm__("vpaddw %1, %0, %0" : "+x"(sums) : "m"(*reinterpret_cast<const __m256i*>(entries + offset)));
#else
  sums = _mm256_add_epi16(sums, load(entries + offset));
#endif
}

void add_entries(const uint16_t (*names)[kQuads], int64_t outputs, const uint8_t* entries,
                 int16_t (*sums)[kTableRows]) {
  for (int64_t n = 0; n < outputs; ++n) {
    __m256i even = load(sums[n]), odd = _mm256_setzero_si256();
    QSK_UNROLL
    for (int64_t quad = 0; quad < kQuads; quad += 2) {  // two names a load: loads are scarce too
      uint32_t two;
      memcpy(&two, names[n] + quad, sizeof two);
      add_entry(entries, two & 0xffff, even);
      add_entry(entries, two >> 16, odd);
    }
    store(sums[n], _mm256_add_epi16(even, odd));
  }
}

// Adds the waiting sums of `rows` rows to those of the tile and clears them. Theirs are of weights, the tile's of
// codes, which are one more.
void move_on(int16_t (*waiting)[kTableRows], int64_t outputs, int64_t rows, const int32_t* offset, int32_t* sums) {
  for (int64_t n = 0; n < outputs; n += kVectorSums, waiting += kVectorSums) {
    __m256i v[8];
    QSK_UNROLL
    for (int i = 0; i < 8; ++i) {
      v[i] = load(waiting[i]);
      store(waiting[i], _mm256_setzero_si256());
    }
    QSK_UNROLL
    for (int pass = 0; pass < 3; ++pass) {  // transposes the rows 0..7 in the lower lane, 8..15 in the upper one
      __m256i out[8];
      QSK_UNROLL
      for (int i = 0; i < 4; ++i) {
        out[2 * i] = _mm256_unpacklo_epi16(v[i], v[i + 4]);
        out[2 * i + 1] = _mm256_unpackhi_epi16(v[i], v[i + 4]);
      }
      QSK_UNROLL
      for (int i = 0; i < 8; ++i) v[i] = out[i];
    }
    QSK_UNROLL
    for (int64_t i = 0; i < 8; ++i) {
      const __m256i lower = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(v[i]));
      const __m256i upper = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(v[i], 1));
      int32_t* const out = sums + i * kTableTile.sums_stride + n;
      if (i < rows) add_to(out, _mm256_add_epi32(lower, _mm256_set1_epi32(offset[i])));
      if (i + 8 < rows) {
        add_to(out + 8 * kTableTile.sums_stride, _mm256_add_epi32(upper, _mm256_set1_epi32(offset[i + 8])));
      }
    }
  }
}

void multiply(const TernaryTile& tile, int32_t* sums) {
  Tables& tables = *reinterpret_cast<Tables*>(tile.workspace);
  const int64_t outputs = 4 * tile.bytes;
  const int64_t groups = (tile.rows + kTableRows - 1) / kTableRows;
  for (int64_t group = 0; group < groups; ++group) {
    memset(tables.sums[group], 0, outputs * sizeof *tables.sums[group]);
    tables.waiting[group] = {};
  }
  const auto rows_of = [&](int64_t group) {
    const int64_t left = tile.rows - group * kTableRows;
    return left < kTableRows ? left : kTableRows;
  };
  const auto move_group = [&](int64_t group) {
    move_on(tables.sums[group], outputs, rows_of(group), tables.waiting[group].offset,
            sums + group * kTableRows * kTableTile.sums_stride);
    tables.waiting[group] = {};
  };
  for (int64_t begin = 0; begin < tile.weights.channels; begin += kTableChannels) {
    const int64_t left = tile.weights.channels - begin, channels = left < kTableChannels ? left : kTableChannels;
    const uint8_t* rows[kTableChannels];
    for (int64_t i = 0; i < kTableChannels; ++i) {
      const int64_t at = begin + (i < channels ? i : channels - 1);  // again, with activations of 0
      rows[i] = tile.weights.w + tile.weights.index[at] * tile.row_bytes;
    }
    for (int64_t i = begin + kTableChannels; i < begin + 2 * kTableChannels && i < tile.weights.channels; ++i) {
      const uint8_t* const next = tile.weights.w + tile.weights.index[i] * tile.row_bytes;
      for (int64_t byte = 0; byte < tile.bytes; byte += kLineBytes) prefetch<_MM_HINT_T1>(next + byte);
    }
    for (int64_t column = 0; column < tile.bytes; column += kBlockBytes) {
      name_block(rows, column, tables.names + 4 * column);
    }
    for (int64_t group = 0; group < groups; ++group) {
      Waiting& waiting = tables.waiting[group];
      int32_t offset[kTableRows] = {};
      const int8_t* q = tile.q + group * kTableRows * tile.q_stride + begin;
      const int64_t bound = gather_activations(q, tile.q_stride, rows_of(group), channels, tables.q, offset);
      if (waiting.bound + bound > kInt16Most) move_group(group);
      waiting.bound += bound;
      for (int64_t row = 0; row < kTableRows; ++row) waiting.offset[row] += offset[row];
      for (int64_t quad = 0; quad < kQuads; ++quad) {
        fill_table(tables.q + 4 * quad, tables.entries + quad * kTableBytes);
      }
      add_entries(tables.names, outputs, tables.entries, tables.sums[group]);
    }
  }
  for (int64_t group = 0; group < groups; ++group) move_group(group);
}

}  // namespace

const TernaryGemm ternary_tables_avx2 = {{1.6f, 0.45f}, kTableTile, multiply};

}  // namespace qsk
