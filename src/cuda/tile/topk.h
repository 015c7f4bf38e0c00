#pragma once

#include "cuda/geometry.h"
#include "cuda/ptx/warp.h"
#include "cuda/tile/order.h"

/// Running top-k of the rows of a warp, fed with accumulator tiles of scores. A score that reaches its row's
/// threshold, the lowest score of a full top-k, is appended to the row's buffer; when a buffer could
/// overflow, each lane merges the buffer of one row into that row's heap, and thresholds rise. Of N random
/// scores about k (1 + ln(N / k)) of a row pass the threshold.
namespace moba::cuda::tile {

/// Score and block as one number, so that the better candidate is the larger: of equal scores the more
/// recent block; a NaN counts as -inf; 0 is an empty entry.
using Key = std::uint64_t;

MOBA_DEVICE Key key_of(std::uint32_t order, std::int32_t block) {
  return static_cast<Key>(order) << 32 | static_cast<std::uint32_t>(block);
}
/// Returns the lowest score that can enter a heap with that root.
MOBA_DEVICE float threshold_of(Key root) {
  const auto order = static_cast<std::uint32_t>(root >> 32);
  if (order == 0) return -ptx::infinity();
  if (order == kForced) return ptx::infinity();
  return ptx::uint_as_float(order >> 31 != 0 ? order & 0x7FFFFFFFU : ~order);
}

/// Min-heap of the `size` best keys of a row; key i lies at data[i * stride].
template <int stride>
struct Heap {
  Key* data;
  std::int32_t size;

  MOBA_DEVICE Key& operator[](std::int32_t i) const { return data[i * stride]; }
  MOBA_DEVICE Key root() const { return data[0]; }

  /// Places `key` at position `i` and sifts it down.
  MOBA_DEVICE void sift_down(std::int32_t i, Key key) const {
    for (std::int32_t child = 2 * i + 1; child < size; child = 2 * i + 1) {
      Key smaller = (*this)[child];
      if (child + 1 < size && (*this)[child + 1] < smaller) smaller = (*this)[++child];
      if (smaller >= key) break;
      (*this)[i] = smaller;
      i = child;
    }
    (*this)[i] = key;
  }
};

/// Blocks that a row selects by score: `first` <= block < `last`, without `own`.
struct Candidates {
  std::int32_t first = 0, last = 0, own = -1;

  MOBA_DEVICE bool has(std::int32_t block) const { return block >= first && block < last && block != own; }
};

/// The rows lane / 4 and lane / 4 + 8 of each of `row_tiles` accumulator tiles: unit 2 i + half of a lane is
/// its half of tile i. Scores come in groups of `column_tiles` tiles; a lane has kColumns of a row, which
/// stand for kColumns bits of a mask. Counts of a unit take a byte of a word.
template <int row_tiles, int column_tiles>
struct TopK {
  static constexpr int kRows = 16 * row_tiles, kUnits = 2 * row_tiles, kColumns = 2 * column_tiles;
  /// Buffered candidates of a row: all columns of a group may pass.
  static constexpr int kBuffer = 4 * kColumns;
  static_assert(kUnits <= 4 && kUnits * kColumns <= 32 && kBuffer == 32);

  /// In shared memory, of one warp.
  struct Memory {
    Candidate buffer[kBuffer + 1][kRows];  // and the place after a full buffer, which stays unused
    float threshold[kRows];
    std::uint32_t count[kRows];
  };

  Memory& memory;
  Heap<kRows> heap;              // of row `lane`, if that is below kRows
  float threshold[kUnits] = {};  // of this lane's rows
  std::uint32_t counts = 0;      // buffered candidates of this lane's rows

  MOBA_DEVICE static int row_of(int unit) { return 8 * unit + ptx::lane() / 4; }
  MOBA_DEVICE static std::uint32_t byte_of(std::uint32_t word, int unit) { return word >> 8 * unit & 0xFFU; }
  /// Block of bit `column` of a lane in the group that begins at `first`.
  MOBA_DEVICE static std::int32_t block_at(std::int32_t first, int column) {
    return first + ptx::lane() % 4 * 2 + column / 2 * 8 + column % 2;
  }

  /// Merges the buffers into the heaps. The latest block comes first, so that rising scores, of which all
  /// pass the threshold, do not all pass through the heap.
  MOBA_DEVICE void merge() {
    MOBA_UNROLL
    for (int unit = 0; unit < kUnits; ++unit) {
      if (ptx::lane() % 4 == 0) memory.count[row_of(unit)] = byte_of(counts, unit);
    }
    counts = 0;
    ptx::syncwarp();
    if (ptx::lane() < kRows) {
      Key root = heap.root();
      for (std::uint32_t n = memory.count[ptx::lane()]; n-- > 0;) {
        const Candidate candidate = memory.buffer[n][ptx::lane()];
        const Key key = key_of(order_of(candidate.score), candidate.block);
        if (key <= root) continue;
        heap.sift_down(0, key);
        root = heap.root();
      }
      memory.threshold[ptx::lane()] = threshold_of(root);
    }
    ptx::syncwarp();
    MOBA_UNROLL
    for (int unit = 0; unit < kUnits; ++unit) threshold[unit] = memory.threshold[row_of(unit)];
  }

  /// Appends the scores of the group that begins at block `first`, if they reach their row's threshold and
  /// their bit of `allowed` is set.
  MOBA_DEVICE void push(const float (&scores)[row_tiles][column_tiles][4], std::int32_t first,
                        std::uint32_t allowed) {
    const auto score_at = [&](int unit, int column) {
      return scores[unit / 2][column / 2][unit % 2 * 2 + column % 2];
    };
    std::uint32_t passing, added, before;
    for (;;) {
      passing = 0;
      MOBA_UNROLL
      for (int unit = 0; unit < kUnits; ++unit) {
        MOBA_UNROLL
        for (int column = 0; column < kColumns; ++column) {
          if (!(score_at(unit, column) < threshold[unit])) passing |= 1U << (unit * kColumns + column);
        }
      }
      passing &= allowed;
      if (ptx::ballot(passing != 0) == 0) return;

      // Exclusive prefix sum over the four lanes of a row, of all units at once.
      const std::uint32_t own = bytewise_popc(passing), neighbour = ptx::shfl_xor(own, 1);
      const std::uint32_t pair = own + neighbour, other_pair = ptx::shfl_xor(pair, 2);
      before = ((ptx::lane() & 1) != 0 ? neighbour : 0) + ((ptx::lane() & 2) != 0 ? other_pair : 0);
      added = pair + other_pair;
      constexpr std::uint32_t kAbove32 = 0x5F5F5F5FU;  // sets the top bit of bytes above 32
      if (ptx::ballot(((counts + added + kAbove32) & 0x80808080U) != 0) == 0) break;
      merge();
    }
    MOBA_UNROLL
    for (int unit = 0; unit < kUnits; ++unit) {
      const std::uint32_t bits = passing >> unit * kColumns & ((1U << kColumns) - 1);
      if (ptx::ballot(bits != 0) == 0) continue;
      Candidate* to = &memory.buffer[byte_of(counts + before, unit)][row_of(unit)];
      MOBA_UNROLL
      for (int column = 0; column < kColumns; ++column) {
        if ((bits >> column & 1) == 0) continue;
        *to = {score_at(unit, column), block_at(first, column)};
        to += kRows;
      }
    }
    counts += added;
  }

 private:
  static_assert(kColumns == 8);
  /// Number of bits of each byte.
  MOBA_DEVICE static std::uint32_t bytewise_popc(std::uint32_t bits) {
    bits -= bits >> 1 & 0x55555555U;
    bits = (bits & 0x33333333U) + (bits >> 2 & 0x33333333U);
    return (bits + (bits >> 4)) & 0x0F0F0F0FU;
  }
};

}  // namespace moba::cuda::tile
