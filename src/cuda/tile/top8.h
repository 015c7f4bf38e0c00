#pragma once

#include "cuda/ptx/convert.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/warp.h"
#include "cuda/tile/order.h"

/// Running top-k, k <= 8, of the 16 rows of an accumulator tile. The four lanes of a row (a quad) append the
/// scores that reach its threshold to buffers of their own, in shared memory and without any exchange. When a
/// buffer could overflow, the quad finds the k-th best score with sorting networks in registers, makes it the
/// threshold and drops what is below.
namespace moba::cuda::tile {

inline constexpr int kTop = 8;

MOBA_DEVICE float larger(float a, float b) {
  return ptx::fmax(a, b);
}
MOBA_DEVICE float smaller(float a, float b) {
  return ptx::fmin(a, b);
}
MOBA_DEVICE std::uint32_t larger(std::uint32_t a, std::uint32_t b) {
  return a > b ? a : b;
}
MOBA_DEVICE std::uint32_t smaller(std::uint32_t a, std::uint32_t b) {
  return a < b ? a : b;
}

/// Orders two values, the larger first.
template <typename V>
MOBA_DEVICE void order(V& first, V& second) {
  const V low = smaller(first, second);
  first = larger(first, second);
  second = low;
}

/// Sorts the first n values, a bitonic sequence, largest first.
template <int n, typename V>
MOBA_DEVICE void sort_bitonic(V (&values)[8]) {
  MOBA_UNROLL
  for (int distance = n / 2; distance > 0; distance /= 2) {
    MOBA_UNROLL
    for (int i = 0; i < n; ++i) {
      if ((i & distance) == 0) order(values[i], values[i + distance]);
    }
  }
}

/// Sorts eight values, largest first: Batcher's odd-even merge sort, 19 comparators.
template <typename V>
MOBA_DEVICE void sort(V (&v)[8]) {
  constexpr int kPairs[19][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6},
                                 {5, 7}, {1, 2}, {5, 6}, {0, 4}, {1, 5}, {2, 6}, {3, 7},
                                 {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
  MOBA_UNROLL
  for (int i = 0; i < 19; ++i) order(v[kPairs[i][0]], v[kPairs[i][1]]);
}

/// Merges the sorted lists of the lanes of a quad; returns in all of them the best 8 in order.
template <typename V>
MOBA_DEVICE void merge_quad(V (&best)[8]) {
  MOBA_UNROLL
  for (int distance = 1; distance < 4; distance *= 2) {
    V other[8];
    MOBA_UNROLL
    for (int i = 0; i < 8; ++i) other[i] = ptx::shfl_xor(best[i], distance);
    MOBA_UNROLL
    for (int i = 0; i < 8; ++i) best[i] = larger(best[i], other[7 - i]);
    sort_bitonic<8>(best);
  }
}

/// Unit u of a lane is its share of row lane / 4 + 8 u. Scores are pushed in groups of kColumns for each lane
/// and unit.
struct Top8 {
  static constexpr int kRows = 16, kUnits = 2, kUnitRows = 8, kGroupTiles = 2, kColumns = 2 * kGroupTiles;
  static constexpr int kBuffer = 32;                  // candidates of a row
  static constexpr int kShare = kBuffer / 4;          // of a lane
  static constexpr float kLowest = -3.40282347e+38F;  // -inf and NaN do not reach it

  /// In shared memory, of one warp.
  struct Memory {
    Candidate buffer[kUnits][kBuffer][kUnitRows];
  };

  Memory& memory;
  int k[kUnits] = {};  // 0: nothing is kept
  float threshold[kUnits] = {};
  int counts[kUnits] = {};  // in the buffers

  MOBA_DEVICE explicit Top8(Memory& of) : memory(of) {}

  MOBA_DEVICE static int row_of(int unit) { return kUnitRows * unit + ptx::lane() / 4; }
  /// Block of column `column` of a lane in the tiles that begin at `first`.
  MOBA_DEVICE static std::int32_t block_at(std::int32_t first, int column) {
    return first + ptx::lane() % 4 * 2 + column / 2 * 8 + column % 2;
  }
  /// Calls visit(unit, column) for the scores of a lane in `tiles` accumulator tiles.
  template <int tiles, typename Visit>
  MOBA_DEVICE static void for_scores(Visit&& visit) {
    MOBA_UNROLL
    for (int column = 0; column < 2 * tiles; ++column) {
      MOBA_UNROLL
      for (int unit = 0; unit < kUnits; ++unit) visit(unit, column);
    }
  }
  /// Candidate i of this lane's row.
  MOBA_DEVICE Candidate& entry(int unit, int i) const { return memory.buffer[unit][i][ptx::lane() / 4]; }

  MOBA_DEVICE void begin(int unit, int kept) {
    k[unit] = kept;
    threshold[unit] = kept > 0 ? kLowest : ptx::infinity();
    counts[unit] = 0;
  }

  /// Raises the threshold of a row to a score that at least k scores reach; `first` and `second` are the
  /// maxima of two sets of scores of this lane.
  MOBA_DEVICE void raise(int unit, float first, float second) {
    float best[8] = {first, second};
    order(best[0], best[1]);
    MOBA_UNROLL
    for (int n = 2; n < 8; n *= 2) {
      MOBA_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (i < n) best[2 * n - 1 - i] = ptx::shfl_xor(best[i], n / 2);
      }
      if (n == 2) {
        sort_bitonic<4>(best);
      } else {
        sort_bitonic<8>(best);
      }
    }
    if (k[unit] > 0) threshold[unit] = larger(threshold[unit], at_rank(best, k[unit]));
  }

  /// Appends the scores against the means of blocks [first, end) that reach the threshold of their row.
  template <int tiles>
  MOBA_DEVICE void push(const float (&scores)[tiles][4], std::int32_t first, std::int32_t end) {
    int done = 0;  // groups
    for (bool is_full = true; is_full;) {
      is_full = false;
      MOBA_UNROLL
      for (int group = 0; group < tiles / kGroupTiles; ++group) {
        const std::int32_t group_first = first + 8 * kGroupTiles * group;
        if (group < done || is_full || group_first >= end) continue;
        bool passes = false;
        for_scores<kGroupTiles>([&](int unit, int column) {
          passes |= score_at(scores, group, unit, column) >= threshold[unit];
        });
        if (ptx::ballot(passes) != 0) is_full = !append(scores, group, group_first);
        if (!is_full) done = group + 1;
      }
      if (is_full) drop_low();
    }
  }

  /// Leaves the best k of every row in the buffers.
  MOBA_DEVICE void drop_low() {
    ptx::syncwarp();
    bool has_ties = false;
    for_units([&](int unit, int kept, float& limit, int& count) {
      Candidate share[kShare];
      load_share(unit, share);
      const float lowest = kth_best(count, kept, -ptx::infinity(), [&](int i) { return share[i].score; });
      if (kept > 0) limit = larger(limit, lowest);
      keep(share, unit, count, [&](const Candidate& c) { return c.score >= limit; });
      has_ties |= count > kept;
    });
    if (ptx::ballot(has_ties) != 0) drop_early_ties();
    ptx::syncwarp();
  }

 private:
  template <int tiles>
  MOBA_DEVICE static float score_at(const float (&scores)[tiles][4], int group, int unit, int column) {
    return scores[group * kGroupTiles + column / 2][2 * unit + column % 2];
  }

  /// Sums of a quad: of the lanes before this one, and of all.
  struct Sums {
    std::uint32_t before, all;
  };
  MOBA_DEVICE static Sums sum_quad(std::uint32_t own) {
    const std::uint32_t neighbour = ptx::shfl_xor(own, 1), pair = own + neighbour;
    const std::uint32_t other_pair = ptx::shfl_xor(pair, 2);
    return {((ptx::lane() & 1) != 0 ? neighbour : 0) + ((ptx::lane() & 2) != 0 ? other_pair : 0),
            pair + other_pair};
  }

  static constexpr std::uint32_t kStep = kUnitRows * sizeof(Candidate);
  /// Bytes before candidate i of this lane's row.
  MOBA_DEVICE static std::uint32_t offset_of(int unit, std::uint32_t i) {
    return (unit * kBuffer + i) * kStep + ptx::lane() / 4 * std::uint32_t{sizeof(Candidate)};
  }

  /// Returns false, and appends nothing, if a buffer is too small.
  template <int tiles>
  MOBA_DEVICE bool append(const float (&scores)[tiles][4], int group, std::int32_t first) {
    std::uint32_t passing = 0;  // of unit u: bits 16 u to 16 u + 15
    for_scores<kGroupTiles>([&](int unit, int column) {
      passing += score_at(scores, group, unit, column) >= threshold[unit] ? 1U << 16 * unit : 0;
    });
    const Sums sums = sum_quad(passing);
    const auto of_unit = [](std::uint32_t packed, int unit) {
      return static_cast<int>(packed >> 16 * unit & 0xFFFFU);
    };
    const bool is_full =
        counts[0] + of_unit(sums.all, 0) > kBuffer || counts[1] + of_unit(sums.all, 1) > kBuffer;
    if (ptx::ballot(is_full) != 0) return false;
    MOBA_UNROLL
    for (int unit = 0; unit < kUnits; ++unit) {
      std::uint32_t offset = offset_of(unit, counts[unit] + of_unit(sums.before, unit));
      MOBA_UNROLL
      for (int column = 0; column < kColumns; ++column) {
        ptx::append_if_ge(score_at(scores, group, unit, column), threshold[unit], block_at(first, column),
                          &memory, offset, kStep);
      }
      counts[unit] += of_unit(sums.all, unit);
    }
    return true;
  }

  /// Of the scores at the threshold, drops those of the earliest blocks.
  MOBA_DEVICE void drop_early_ties() {
    ptx::syncwarp();
    for_units([&](int unit, int kept, float& limit, int& count) {
      Candidate share[kShare];
      load_share(unit, share);
      std::uint32_t above = 0;
      MOBA_UNROLL
      for (int i = 0; i < kShare; ++i) above += index_of(i) < count && share[i].score > limit ? 1 : 0;
      const int ties = kept - static_cast<int>(sum_quad(above).all);
      const auto number = [&](const Candidate& c) {
        return c.score == limit ? static_cast<std::uint32_t>(c.block) + 1 : 0;
      };
      const std::uint32_t earliest =
          kth_best(count, ties, std::uint32_t{0}, [&](int i) { return number(share[i]); });
      keep(share, unit, count,
           [&](const Candidate& c) { return c.score > limit || (ties > 0 && number(c) >= earliest); });
    });
  }

  /// Calls visit(unit, k, threshold, count) for both units by one piece of code.
  template <typename Visit>
  MOBA_DEVICE void for_units(Visit&& visit) {
    static_assert(kUnits == 2);
    MOBA_NO_UNROLL
    for (int unit = 0; unit < kUnits; ++unit) {
      visit(unit, k[0], threshold[0], counts[0]);
      swap(k[0], k[1]);
      swap(threshold[0], threshold[1]);
      swap(counts[0], counts[1]);
    }
  }
  template <typename V>
  MOBA_DEVICE static void swap(V& a, V& b) {
    const V copy = a;
    a = b;
    b = copy;
  }

  /// Candidate i of a lane's share is candidate index_of(i) of the row.
  MOBA_DEVICE static int index_of(int i) { return 4 * i + ptx::lane() % 4; }
  MOBA_DEVICE void load_share(int unit, Candidate (&share)[kShare]) const {
    MOBA_UNROLL
    for (int i = 0; i < kShare; ++i) share[i] = entry(unit, index_of(i));
  }

  /// The rank-th of sorted values, from 1.
  template <typename V>
  MOBA_DEVICE static V at_rank(const V (&sorted)[8], int rank) {
    V value = sorted[0];
    MOBA_UNROLL
    for (int i = 1; i < 8; ++i) {
      if (rank > i) value = sorted[i];
    }
    return value;
  }

  /// Returns the rank-th best value of the `count` candidates of a row, `none` where there are fewer.
  template <typename V, typename Value>
  MOBA_DEVICE static V kth_best(int count, int rank, V none, Value&& value) {
    V best[kShare];
    MOBA_UNROLL
    for (int i = 0; i < kShare; ++i) best[i] = index_of(i) < count ? value(i) : none;
    sort(best);
    merge_quad(best);
    return at_rank(best, rank);
  }

  template <typename Keeps>
  MOBA_DEVICE void keep(const Candidate (&share)[kShare], int unit, int& count, Keeps&& keeps) {
    std::uint32_t kept = 0;  // bits
    MOBA_UNROLL
    for (int i = 0; i < kShare; ++i) kept |= index_of(i) < count && keeps(share[i]) ? 1U << i : 0;
    const Sums sums = sum_quad(ptx::popc(kept));
    std::uint32_t offset = offset_of(unit, sums.before);
    ptx::syncwarp();  // the shares were read
    MOBA_UNROLL
    for (int i = 0; i < kShare; ++i) {
      const bool is_kept = (kept >> i & 1) != 0;
      ptx::store_pair_if(is_kept, &memory, offset, share[i].score, share[i].block);
      offset += is_kept ? kStep : 0;
    }
    count = static_cast<int>(sums.all);
  }
};

}  // namespace moba::cuda::tile
