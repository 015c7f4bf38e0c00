#pragma once

#include "cuda/ptx/convert.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/warp.h"
#include "cuda/tile/order.h"

/// Running top-k, k <= 8, of the 16 rows of a warp's accumulator tiles. The four lanes of a row (a quad)
/// append the scores that reach its threshold to buffers of their own, in shared memory and without any
/// exchange. When a buffer could overflow, the quad finds the k-th best score with sorting networks in
/// registers, makes it the threshold, drops what is below, and shares out what is left.
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
  static constexpr int kBuffer = 8;  // candidates of a lane and unit: a share of kTop, and a group
  static_assert(kTop / 4 + kColumns <= kBuffer);
  /// Lanes with scores to append, from which raising the thresholds first is worth its time.
  static constexpr int kMany = 24;
  static constexpr float kLowest = -3.40282347e+38F;  // -inf and NaN do not reach it

  /// In shared memory, of one warp.
  struct Memory {
    Candidate buffer[kUnits][kBuffer][ptx::kLanes];
  };

  Memory& memory;
  int k[kUnits] = {};  // 0: nothing is kept
  float threshold[kUnits] = {};
  int counts[kUnits] = {};        // in this lane's buffers
  float sampled[kUnits][2] = {};  // maxima of what was sampled, of two sets of scores

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
  /// Candidate i of this lane's row, once they are shared out.
  MOBA_DEVICE Candidate& entry(int unit, int i) const {
    return memory.buffer[unit][i / 4][ptx::lane() / 4 * 4 + i % 4];
  }

  MOBA_DEVICE void begin(int unit, int kept) {
    k[unit] = kept;
    threshold[unit] = kept > 0 ? kLowest : ptx::infinity();
    counts[unit] = 0;
    sampled[unit][0] = sampled[unit][1] = -ptx::infinity();
  }

  /// A first pass over some of the scores raises the thresholds, so that few scores reach them in the second,
  /// `push`.
  template <int tiles>
  MOBA_DEVICE void sample(const float (&scores)[tiles][4]) {
    MOBA_UNROLL
    for (int unit = 0; unit < kUnits; ++unit) {
      MOBA_UNROLL
      for (int group = 0; group < tiles / kGroupTiles; ++group) {
        float& max = sampled[unit][group / (tiles / kGroupTiles / 2)];
        max = larger(max, max_of(scores, group, unit));
      }
    }
  }
  MOBA_DEVICE void finish_sample() { raise(sampled); }

  /// Appends the scores against the means of blocks [first, end) that reach the threshold of their row.
  /// Blocks come from the last to the first: of equal scores the later blocks win, so a full row takes only
  /// larger ones.
  template <int tiles>
  MOBA_DEVICE void push(const float (&scores)[tiles][4], std::int32_t first, std::int32_t end) {
    constexpr int kGroups = tiles / kGroupTiles;
    float maxima[kUnits][kGroups];
    MOBA_UNROLL
    for (int unit = 0; unit < kUnits; ++unit) {
      MOBA_UNROLL
      for (int group = 0; group < kGroups; ++group) maxima[unit][group] = max_of(scores, group, unit);
    }
    const unsigned lanes = reaching([&](int unit) { return max_of(maxima[unit], 0, kGroups); });
    if (lanes == 0) return;
    if (ptx::popc(lanes) >= kMany) raise(maxima);
    int done = 0;  // groups
    for (bool is_full = true; is_full;) {
      is_full = false;
      MOBA_UNROLL
      for (int i = 0; i < kGroups; ++i) {
        const int group = kGroups - 1 - i;
        const std::int32_t group_first = first + 8 * kGroupTiles * group;
        if (i < done || is_full || group_first >= end) continue;
        if (reaching([&](int unit) { return maxima[unit][group]; }) != 0) {
          is_full = ptx::ballot(counts[0] > kBuffer - kColumns || counts[1] > kBuffer - kColumns) != 0;
          if (is_full) continue;
          append(scores, group, group_first);
        }
        done = i + 1;
      }
      if (is_full) drop_low();
    }
  }

  /// Leaves the best k of every row in the buffers, shared out to the lanes of a quad in turn.
  MOBA_DEVICE void drop_low() {
    bool has_ties = false;
    for_units([&](int unit, int kept, float& limit, int& count) {
      const float lowest = kth_best(unit, count, kept, -ptx::infinity(), score_of);
      const auto is_kept = [&](const Candidate& c) { return kept > 0 && c.score >= lowest; };
      has_ties |= keep(unit, count, is_kept) > kept;
      if (kept > 0 && lowest > -ptx::infinity()) limit = next_above(lowest);
    });
    if (ptx::ballot(has_ties) != 0) drop_early_ties();
  }

 private:
  /// Maximum of values [begin, end); NaN only if all are.
  template <int n>
  MOBA_DEVICE static float max_of(const float (&values)[n], int begin, int end) {
    float max = values[begin];
    MOBA_UNROLL
    for (int i = 0; i < n; ++i) {
      if (i > begin && i < end) max = larger(max, values[i]);
    }
    return max;
  }
  template <int tiles>
  MOBA_DEVICE static float max_of(const float (&scores)[tiles][4], int group, int unit) {
    float max = score_at(scores, group, unit, 0);
    MOBA_UNROLL
    for (int column = 1; column < kColumns; ++column)
      max = larger(max, score_at(scores, group, unit, column));
    return max;
  }

  /// Returns the lanes with a maximum that reaches the threshold of its row.
  template <typename Maximum>
  MOBA_DEVICE unsigned reaching(Maximum&& maximum) const {
    return ptx::ballot(maximum(0) >= threshold[0] || maximum(1) >= threshold[1]);
  }

  /// Raises the threshold of a row to a score that at least k scores reach: the k-th best of the maxima of
  /// two sets of scores in each lane.
  template <int groups>
  MOBA_DEVICE void raise(const float (&maxima)[kUnits][groups]) {
    MOBA_UNROLL
    for (int unit = 0; unit < kUnits; ++unit) {
      float best[8] = {larger(max_of(maxima[unit], 0, groups / 2), -ptx::infinity()),
                       larger(max_of(maxima[unit], groups / 2, groups), -ptx::infinity())};
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
  }

  template <int tiles>
  MOBA_DEVICE static float score_at(const float (&scores)[tiles][4], int group, int unit, int column) {
    return scores[group * kGroupTiles + column / 2][2 * unit + column % 2];
  }

  /// Sums over a quad: of the lanes before this one, and of all.
  struct Sums {
    int before, all;
  };
  MOBA_DEVICE static Sums sum_quad(int own) {
    const int neighbour = ptx::shfl_xor(own, 1), pair = own + neighbour;
    const int other_pair = ptx::shfl_xor(pair, 2);
    return {((ptx::lane() & 1) != 0 ? neighbour : 0) + ((ptx::lane() & 2) != 0 ? other_pair : 0),
            pair + other_pair};
  }

  template <int tiles>
  MOBA_DEVICE void append(const float (&scores)[tiles][4], int group, std::int32_t first) {
    MOBA_UNROLL
    for (int unit = 0; unit < kUnits; ++unit) {
      constexpr std::uint32_t kStep = ptx::kLanes * sizeof(Candidate);
      const std::uint32_t begin = offset_of(unit, 0, ptx::lane());
      std::uint32_t end = begin + counts[unit] * kStep;
      MOBA_UNROLL
      for (int column = 0; column < kColumns; ++column) {
        ptx::append_if_ge(score_at(scores, group, unit, column), threshold[unit], block_at(first, column),
                          &memory, end, kStep);
      }
      counts[unit] = static_cast<int>((end - begin) / kStep);
    }
  }

  MOBA_DEVICE static std::uint32_t offset_of(int unit, int i, int lane) {
    return static_cast<std::uint32_t>(((unit * kBuffer + i) * ptx::kLanes + lane) * sizeof(Candidate));
  }

  /// Of the scores at the threshold, drops those of the earliest blocks.
  MOBA_DEVICE void drop_early_ties() {
    for_units([&](int unit, int kept, float&, int& count) {
      const float lowest = kth_best(unit, count, kept, -ptx::infinity(), score_of);
      int above = 0;
      for (int i = 0; i < count; ++i) above += candidate(unit, i).score > lowest ? 1 : 0;
      const int ties = kept - sum_quad(above).all;
      const auto number = [&](const Candidate& c) {
        return c.score == lowest ? static_cast<std::uint32_t>(c.block) + 1 : 0;
      };
      const std::uint32_t earliest = kth_best(unit, count, ties, std::uint32_t{0}, number);
      keep(unit, count, [&](const Candidate& c) { return c.score > lowest || number(c) >= earliest; });
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

  MOBA_DEVICE static float score_of(const Candidate& c) { return c.score; }
  /// Returns the next larger number; NaN for infinity.
  MOBA_DEVICE static float next_above(float x) {
    const std::uint32_t bits = ptx::float_as_uint(x);
    return ptx::uint_as_float(x >= 0 ? bits + 1 : bits - 1);
  }

  /// Candidate i of this lane's buffer.
  MOBA_DEVICE const Candidate& candidate(int unit, int i) const {
    return memory.buffer[unit][i][ptx::lane()];
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

  /// Returns the rank-th best value of the candidates of a row, `none` where there are fewer. The lane has
  /// `count`.
  template <typename V, typename Value>
  MOBA_DEVICE V kth_best(int unit, int count, int rank, V none, Value&& value) const {
    V best[kBuffer];
    MOBA_UNROLL
    for (int i = 0; i < kBuffer; ++i) best[i] = i < count ? value(candidate(unit, i)) : none;
    sort(best);
    merge_quad(best);
    return at_rank(best, rank);
  }

  /// Shares out the candidates for which `keeps` holds; returns their number in the row.
  template <typename Keeps>
  MOBA_DEVICE int keep(int unit, int& count, Keeps&& keeps) {
    Candidate own[kBuffer];
    std::uint32_t kept = 0;  // bits
    MOBA_UNROLL
    for (int i = 0; i < kBuffer; ++i) {
      own[i] = candidate(unit, i);
      kept |= i < count && keeps(own[i]) ? 1U << i : 0;
    }
    const Sums sums = sum_quad(ptx::popc(kept));
    const int quad = ptx::lane() / 4 * 4;
    int place = sums.before;
    ptx::syncwarp();  // all were loaded
    MOBA_UNROLL
    for (int i = 0; i < kBuffer; ++i) {
      const bool is_kept = (kept >> i & 1) != 0;
      ptx::store_pair_if(is_kept, &memory, offset_of(unit, place / 4, quad + place % 4), own[i].score,
                         own[i].block);
      place += is_kept ? 1 : 0;
    }
    ptx::syncwarp();
    count = (sums.all + 3 - ptx::lane() % 4) / 4;
    return sums.all;
  }
};

}  // namespace moba::cuda::tile
