// For every mask of eight bits the positions of its ones, lowest first: what lists the active among eight channels.
#ifndef QSK_SRC_BIT_POSITIONS_H_
#define QSK_SRC_BIT_POSITIONS_H_

#include <stdint.h>

namespace qsk {

struct BitPositions {
  uint8_t of[256][8];
};

constexpr BitPositions make_bit_positions() {
  BitPositions positions = {};
  for (int mask = 0; mask < 256; ++mask) {
    int count = 0;
    for (int bit = 0; bit < 8; ++bit) {
      if (mask >> bit & 1) positions.of[mask][count++] = static_cast<uint8_t>(bit);
    }
  }
  return positions;
}

alignas(64) constexpr BitPositions kBitPositions = make_bit_positions();

}  // namespace qsk

#endif  // QSK_SRC_BIT_POSITIONS_H_
