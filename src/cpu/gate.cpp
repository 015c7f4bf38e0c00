// Scores and top-k, fused: a worker takes a few hundred rows, visits the block means one panel at a time, and
// keeps each row's best blocks in a short sorted list. Most scores are dismissed by one comparison against
// the worst of the list; no matrix of scores is stored. With many candidates the scores are first bounded in
// int8 (gate_int8.h), and only the blocks whose bounds overlap the top-k are scored in f32.
#include <bit>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string_view>

#include "cpu/gate_int8.h"
#include "cpu/prefetch.h"
#include "cpu/sizes.h"
#include "cpu/stages.h"
#include "cpu/topk.h"
#include "number.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/gate.cpp"
#include <hwy/foreach_target.h>
// foreach_target first
#include <hwy/highway.h>

#include "cpu/tile-inl.h"

#ifndef MOBA_CPU_GATE_TASK_
#define MOBA_CPU_GATE_TASK_
namespace moba::cpu {

/// Queries [q0, q1) of one sequence at one kv head.
struct GateTask {
  std::size_t sequence = 0;
  std::int64_t head = 0, q0 = 0, q1 = 0;
  const ScreenedMeans* screened = nullptr;  // null: score everything in f32
};

}  // namespace moba::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr auto kStep = static_cast<std::int64_t>(kLanes);
constexpr auto kTileBlocks = static_cast<std::int64_t>(kKeyTileSize);

/// Returns the mask of the kLanes values that are not below `bound`; NaN is not below.
HWY_INLINE std::uint32_t not_below(Vec values, float bound) {
  const F32 d;
  std::conditional_t<kLanes <= 8, std::uint8_t, std::uint16_t> below = 0;
  hn::StoreMaskBits(d, hn::Lt(values, hn::Set(d, bound)), reinterpret_cast<std::uint8_t*>(&below));
  return ~static_cast<std::uint32_t>(below) & ((1U << kLanes) - 1);
}

HWY_INLINE std::uint32_t first_lanes(std::int64_t count) {
  return count >= kStep ? (1U << kLanes) - 1 : (1U << count) - 1;
}

#if HWY_TARGET <= HWY_AVX3
/// Counts, for every lane, the others that have a higher value, or the same value and come later.
HWY_INLINE __m512i ranks(__m512 values) {
  __m512i rank = _mm512_setzero_si512();
  const __m512i one = _mm512_set1_epi32(1), bits = _mm512_castps_si512(values);
  const auto count = [&](auto by) HWY_ATTR {
    constexpr int kBy = decltype(by)::value;
    constexpr auto kLater = static_cast<__mmask16>((1U << (16 - kBy)) - 1);
    const __m512 other = _mm512_castsi512_ps(_mm512_alignr_epi32(bits, bits, kBy));
    const __mmask16 ahead = _mm512_cmp_ps_mask(other, values, _CMP_GT_OQ) |
                            _mm512_mask_cmp_ps_mask(kLater, other, values, _CMP_EQ_OQ);
    rank = _mm512_mask_add_epi32(rank, ahead, rank, one);
  };
  [&]<int... kBy>(std::integer_sequence<int, kBy...>) HWY_ATTR {
    (count(std::integral_constant<int, kBy + 1>()), ...);
  }
  (std::make_integer_sequence<int, 15>());
  return rank;
}

/// Returns the value with exactly `k - 1` others ahead of it.
HWY_INLINE float ranked(__m512 values, std::int64_t k) {
  const __mmask16 at = _mm512_cmpeq_epi32_mask(ranks(values), _mm512_set1_epi32(static_cast<int>(k - 1)));
  return _mm512_cvtss_f32(_mm512_maskz_compress_ps(at, values));
}
#else
float ranked(Vec values, std::int64_t k) {
  alignas(64) float lanes[kLanes];
  hn::Store(values, F32(), lanes);
  std::nth_element(lanes, lanes + k - 1, lanes + kLanes, std::greater<float>());
  return lanes[k - 1];
}
#endif

/// Returns a bound that at least `k` of `count` scores reach: each lane's maximum over all vectors is a score
/// of its own, so the `k`-th of them is one. -inf where no bound follows.
HWY_INLINE float topk_lower_bound(const float* scores, std::int64_t count, std::int64_t k) {
  if (k > kStep || count < kStep) return kNegInf;
  const F32 d;
  const Vec neg_inf = hn::Set(d, kNegInf);
  Vec best = neg_inf;
  for (std::int64_t i = 0; i + kStep <= count; i += kStep) {
    const Vec s = hn::LoadU(d, scores + i);
    best = hn::Max(hn::IfThenElse(hn::Eq(s, s), s, neg_inf), best);
  }
#if HWY_TARGET <= HWY_AVX3
  return ranked(best.raw, k);
#else
  return ranked(best, k);
#endif
}

/// Calls visit(i) for those of `count` values, at most kKeyTileSize, that are not below `bound`. All are
/// compared before the first is visited, so that a branch is taken for each of the few, not for each vector.
template <typename Visit>
HWY_INLINE void for_not_below(const float* values, std::int64_t count, float bound, Visit&& visit) {
  std::uint64_t hits[kKeyTileSize / 64] = {};
  auto* bytes = reinterpret_cast<std::uint8_t*>(hits);
  for (std::int64_t i = 0; i < count; i += kStep) {
    const std::uint32_t mask = not_below(hn::LoadU(F32(), values + i), bound) & first_lanes(count - i);
    if constexpr (kLanes >= 8) {
      std::memcpy(bytes + i / 8, &mask, kLanes / 8);
    } else {
      hits[i / 64] |= static_cast<std::uint64_t>(mask) << i % 64;
    }
  }
  for (std::int64_t word = 0; word * 64 < count; ++word) {
    for (std::uint64_t left = hits[word]; left != 0; left &= left - 1)
      visit(word * 64 + std::countr_zero(left));
  }
}

/// Pushes the scores of blocks [first, last) that are not below `bound` into a row's list.
void push_each(const float* scores, std::int64_t first, std::int64_t last, std::int64_t own, float bound,
               TopK& topk) {
  if (topk.count == topk.k) bound = std::max(bound, topk.scores[0]);
  for_not_below(scores, last - first, bound, [&](std::int64_t i) {
    if (first + i != own) topk.push(scores[i], static_cast<std::int32_t>(first + i));
  });
}

#if HWY_TARGET <= HWY_AVX3
/// Handles the first scores of a row: those that reach `bound`, above -inf, are few and are ranked in
/// registers, without a branch that could be mispredicted. Returns false when they are more than a vector
/// holds, or fewer than k.
bool push_ranked(const float* scores, std::int64_t first, std::int64_t last, float bound, TopK& topk) {
  const std::int64_t count = last - first;
  alignas(64) float reached[kKeyTileSize + kLanes];
  alignas(64) std::int32_t blocks[kKeyTileSize + kLanes];
  const __m512 min = _mm512_set1_ps(bound);
  __m512i block = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                                   _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  std::int64_t taken = 0;
  for (std::int64_t i = 0; i < count; i += kStep) {
    const __m512 s = _mm512_loadu_ps(scores + i);
    const __mmask16 hits =
        _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(first_lanes(count - i)), s, min, _CMP_GE_OQ);
    _mm512_storeu_ps(reached + taken, _mm512_maskz_compress_ps(hits, s));
    _mm512_storeu_si512(blocks + taken, _mm512_maskz_compress_epi32(hits, block));
    taken += std::popcount(static_cast<unsigned>(hits));
    block = _mm512_add_epi32(block, _mm512_set1_epi32(16));
  }
  if (taken > kStep || taken < topk.k) return false;
  const auto filled = static_cast<__mmask16>(first_lanes(taken));
  alignas(64) std::int32_t rank[kLanes];
  _mm512_store_si512(rank, ranks(_mm512_mask_loadu_ps(_mm512_set1_ps(kNegInf), filled, reached)));
  for (std::int64_t i = 0; i < taken; ++i) {
    // Worst first; a block that is ranked too low falls on a place that better ones overwrite, or past the
    // row's own.
    const std::int64_t place = topk.k - 1 - rank[i];
    if (place < 0) continue;
    topk.scores[place] = reached[i];
    topk.blocks[place] = blocks[i];
  }
  topk.count = topk.k;
  return true;
}
#endif

void push_all(const float* scores, std::int64_t first, std::int64_t last, std::int64_t own, TopK& topk) {
  float bound = kNegInf;
  if (topk.count == 0 && own < 0) {
    bound = topk_lower_bound(scores, last - first, topk.k);
#if HWY_TARGET <= HWY_AVX3
    const float above = std::max(bound, std::numeric_limits<float>::lowest());
    if (push_ranked(scores, first, last, above, topk)) return;
#endif
  }
  push_each(scores, first, last, own, bound, topk);
}

/// Sorts up to kLanes blocks, all different: the general sort after this finds nothing to do.
HWY_INLINE void sort_blocks([[maybe_unused]] std::int32_t* blocks, [[maybe_unused]] std::int64_t count) {
#if HWY_TARGET <= HWY_AVX3
  if (count < 3 || count > kStep) return;
  const auto filled = static_cast<__mmask16>(first_lanes(count));
  const __m512i all = _mm512_mask_loadu_epi32(_mm512_set1_epi32(-1), filled, blocks);
  // Block numbers are below 2^24 wherever they are this few; f32 compares them exactly.
  alignas(64) std::int32_t rank[kLanes], unsorted[kLanes];
  _mm512_store_si512(rank, ranks(_mm512_cvtepi32_ps(all)));
  _mm512_store_si512(unsorted, all);
  for (std::int64_t i = 0; i < count; ++i) blocks[count - 1 - rank[i]] = unsorted[i];
#endif
}

/// The rows of a task, their candidates and their lists.
struct GateRows {
  const Problem& problem;
  const Means& means;
  const GateTask& task;
  const SequenceView& sequence;
  std::int64_t width, count;
  std::int32_t* blocks;  // [count, width]
  float* scores;         // [count, width]
  Candidates* candidates;
  std::int64_t first_scored = 0;

  std::size_t depth() const { return static_cast<std::size_t>(problem.head_dim); }
  const std::byte* query(std::int64_t row) const {
    const std::int64_t head = task.head * problem.group + row % problem.group;
    const std::int64_t offset = Problem::offset(problem.q, sequence, task.q0 + row / problem.group, head);
    return static_cast<const std::byte*>(problem.q.data) +
           offset * static_cast<std::int64_t>(size_of(problem.q.dtype));
  }
  /// Prefetches a query that is read soon.
  HWY_INLINE void prefetch_query(std::int64_t row) const {
    if (row >= count) return;
    prefetch_l1(query(row), depth() * size_of(problem.q.dtype));
  }
  const float* mean(std::int64_t block) const {
    return means.of(task.sequence, task.head) + block * means.block_stride;
  }
  TopK topk(std::int64_t row) const {
    return {scores + row * width, blocks + row * width, candidates[row].count, candidates[row].k};
  }
  /// Returns the end of the blocks that any row may select: candidates grow with the query.
  std::int64_t last_block() const { return first_scored < count ? candidates[count - 1].last : 0; }

  /// Selects all candidates of the rows that have no more of them than k, without scores; these rows come
  /// first.
  void take_all() {
    bool selecting = false;
    for (std::int64_t row = 0; row < count; ++row) {
      Candidates& c = candidates[row] =
          candidates_of(problem, sequence, task.q0 + row / problem.group, width);
      selecting = selecting || c.last - c.first - (c.own >= 0 ? 1 : 0) > c.k;
      if (selecting) continue;
      first_scored = row + 1;
      for (std::int64_t block = c.first; block < c.last; ++block) {
        if (block != c.own) blocks[row * width + c.count++] = static_cast<std::int32_t>(block);
      }
    }
  }
  void finish() {
    for (std::int64_t row = 0; row < count; ++row) {
      sort_blocks(blocks + row * width, candidates[row].count);
      finish_row(problem, candidates[row], candidates[row].count, width, blocks + row * width);
    }
  }
};

/// Calls visit(from, to) for tiles of nearly equal height over the rows that need scores.
template <typename Visit>
void for_tiles(const GateRows& rows, std::int64_t height, Visit&& visit) {
  const std::int64_t scored = rows.count - rows.first_scored, tiles = (scored + height - 1) / height;
  for (std::int64_t t = 0; t < tiles; ++t)
    visit(rows.first_scored + scored * t / tiles, rows.first_scored + scored * (t + 1) / tiles);
}

void score_exactly(GateRows& rows, TileScratch& tile, float* packed) {
  for (std::int64_t begin = 0; begin < rows.last_block(); begin += kTileBlocks) {
    const std::int64_t count = std::min(kTileBlocks, rows.last_block() - begin);
    const auto mean = [&](std::size_t i, float*) { return rows.mean(begin + static_cast<std::int64_t>(i)); };
    pack_transposed(static_cast<std::size_t>(count), rows.depth(), mean, tile.f32_rows, packed);
    for_tiles(rows, static_cast<std::int64_t>(kTileRows), [&](std::int64_t from, std::int64_t to) HWY_ATTR {
      const std::int64_t columns = std::min(rows.candidates[to - 1].last - begin, count);
      if (columns <= 0) return;
      for (std::int64_t row = from; row < to; ++row) {
        load_f32(rows.query(row), rows.problem.q.dtype, rows.depth(), 1.0F,
                 tile.rows + static_cast<std::size_t>(row - from) * kRowStride);
        rows.prefetch_query(row + to - from);
      }
      for (std::size_t panel = 0; panel < panels(static_cast<std::size_t>(columns)); ++panel) {
        kScoreTiles[static_cast<std::size_t>(to - from - 1)](tile.rows, packed + panel * rows.depth() * kCols,
                                                             rows.depth(), tile.scores + panel * kCols);
      }
      for (std::int64_t row = from; row < to; ++row) {
        Candidates& c = rows.candidates[row];
        const std::int64_t first = std::max(c.first, begin), last = std::min(c.last, begin + count);
        if (first >= last || c.k == 0) continue;
        TopK topk = rows.topk(row);
        push_all(tile.scores + static_cast<std::size_t>(row - from) * kScoreStride + (first - begin), first,
                 last, c.own, topk);
        c.count = topk.count;
      }
    });
  }
}

/// The scale of rounded values, and the norms of the values and of their rounding errors.
struct Rounded {
  float scale = 0, norm = 0, error = 0;
};

/// Rounds values to [-127, 127] with one scale. `values` and `levels` hold kMaxHeadDim; what lies beyond
/// `size` is overwritten. Norms are summed in units of the scale, where nothing under- or overflows. NaN and
/// infinite values make both norms NaN, so that no bound derived from them rules anything out.
Rounded round_to_int8(float* HWY_RESTRICT values, std::size_t size, std::int32_t* HWY_RESTRICT levels) {
  const F32 d;
  const hn::RebindToSigned<F32> di;
  const std::size_t padded = round_up(size, kLanes);
  std::fill(values + size, values + padded, 0.0F);
  Vec max_abs = hn::Zero(d), norm = max_abs, error = max_abs;
  for (std::size_t i = 0; i < padded; i += kLanes)
    max_abs = hn::Max(hn::Abs(hn::Load(d, values + i)), max_abs);
  const float largest = hn::GetLane(hn::MaxOfLanes(d, max_abs)), scale = largest / 127;
  const Vec inverse = hn::Set(d, largest > 0 ? 127 / largest : 0.0F);
  for (std::size_t i = 0; i < padded; i += kLanes) {
    const Vec v = hn::Mul(hn::Load(d, values + i), inverse);
    const Vec level = hn::Clamp(hn::Round(v), hn::Set(d, -127.0F), hn::Set(d, 127.0F)),
              left = hn::Sub(v, level);
    hn::Store(hn::ConvertTo(di, level), di, levels + i);
    norm = hn::MulAdd(v, v, norm);
    error = hn::MulAdd(left, left, error);
  }
  // What the division and the product with its result may be off by, for every value.
  const float off = 127 * 0x1p-22F * std::sqrt(static_cast<float>(size));
  return {scale, scale * std::sqrt(hn::GetLane(hn::SumOfLanes(d, norm))),
          scale * (std::sqrt(hn::GetLane(hn::SumOfLanes(d, error))) + off)};
}

/// State of a row that is screened: its best lower bounds so far, and the blocks that may still be selected
/// (survivors).
struct ScreenState {
  float scale = 0;                  // of the rounded query
  float by_norm = 0, by_error = 0;  // the bound is by_norm |c| + by_error |c - c'|
  std::int64_t lower_count = 0, survivors = 0;
};

struct ScreenMemory {
  std::uint8_t* queries;  // [rows, depth]
  ScreenState* states;
  float* lower_scores;            // [rows, width]
  std::int32_t* lower_blocks;     // [rows, width]
  std::int32_t* survivor_blocks;  // [rows, kHeldBack]
  float* survivor_upper;          // [rows, kHeldBack]
};

void round_queries(const GateRows& rows, const ScreenMemory& memory, TileScratch& tile) {
  const std::size_t depth = ScreenedMeans::depth(rows.problem.head_dim);
  alignas(64) std::int32_t levels[kMaxHeadDim];
  const float rounding =
      static_cast<float>(rows.depth() + 8) * 0x1p-22F;  // of the f32 score itself, generously
  for (std::int64_t row = rows.first_scored; row < rows.count; ++row) {
    load_f32(rows.query(row), rows.problem.q.dtype, rows.depth(), 1.0F, tile.rows);
    std::uint8_t* to = memory.queries + static_cast<std::size_t>(row) * depth;
    std::fill(to, to + depth, std::uint8_t{128});
    const Rounded rounded = round_to_int8(tile.rows, rows.depth(), levels);
    for (std::size_t i = 0; i < rows.depth(); ++i)
      to[i] = static_cast<std::uint8_t>(std::clamp(levels[i], -127, 127) + 128);
    memory.states[row] = {rounded.scale, rounded.error * 1.001F + rounding * rounded.norm,
                          (rounded.norm + rounded.error) * 1.001F, 0, 0};
  }
}

/// Scores a row's survivors in order, in f32, bit-identical to score_exactly, after dropping those that the
/// final bound rules out.
void rescore(GateRows& rows, const ScreenMemory& memory, std::int64_t row, TileScratch& tile, float* packed) {
  ScreenState& screen = memory.states[row];
  std::int32_t* survivors = memory.survivor_blocks + row * kMaxSurvivors;
  const float* upper = memory.survivor_upper + row * kMaxSurvivors;
  const bool full = screen.lower_count == rows.candidates[row].k;
  const float bound = full ? memory.lower_scores[row * rows.width] : kNegInf;
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < screen.survivors; ++i) {
    if (!(upper[i] < bound)) survivors[kept++] = survivors[i];
  }
  screen.survivors = 0;
  const auto mean = [&](std::size_t i, float*) { return rows.mean(survivors[i]); };
  const auto mask = static_cast<std::size_t>(kept);
  pack_transposed(mask, rows.depth(), mean, tile.f32_rows, packed, round_up(mask, kLanes));
  load_f32(rows.query(row), rows.problem.q.dtype, rows.depth(), 1.0F, tile.rows);
  for (std::size_t panel = 0; panel < panels(static_cast<std::size_t>(kept)); ++panel) {
    kScoreTiles[0](tile.rows, packed + panel * rows.depth() * kCols, rows.depth(),
                   tile.product + panel * kCols);
  }
  TopK topk = rows.topk(row);
  for (std::int64_t i = 0; i < kept; ++i) topk.push(tile.product[i], survivors[i]);
  rows.candidates[row].count = topk.count;
}

/// Bounds the scores of blocks [first, last), whose int8 products start at `products`, and keeps those that
/// may still be selected as survivors.
void screen_row(GateRows& rows, const ScreenMemory& memory, std::int64_t row, std::int64_t first,
                std::int64_t last, const std::int32_t* products, TileScratch& tile, float* packed) {
  const F32 d;
  const hn::RebindToSigned<F32> di;
  const ScreenedMeans& means = *rows.task.screened;
  const Candidates& candidates = rows.candidates[row];
  ScreenState& screen = memory.states[row];
  TopK lower{memory.lower_scores + row * rows.width, memory.lower_blocks + row * rows.width,
             screen.lower_count, candidates.k};
  const Vec scale = hn::Set(d, screen.scale), by_norm = hn::Set(d, screen.by_norm),
            by_error = hn::Set(d, screen.by_error);
  const Vec smallest = hn::Set(d, std::numeric_limits<float>::min());  // denormal products round coarsely

  alignas(64) float low[kKeyTileSize + kLanes], high[kKeyTileSize + kLanes];
  const std::int64_t count = last - first;
  for (std::int64_t i = 0; i < count; i += kStep) {
    const std::int64_t block = first + i;
    const auto product = hn::Sub(hn::LoadU(di, products + i), hn::LoadU(di, means.offset + block));
    const Vec score = hn::Mul(hn::ConvertTo(d, product), hn::Mul(scale, hn::LoadU(d, means.scale + block)));
    const Vec slack = hn::MulAdd(by_norm, hn::LoadU(d, means.norm + block),
                                 hn::MulAdd(by_error, hn::LoadU(d, means.error + block), smallest));
    hn::Store(hn::Sub(score, slack), d, low + i);
    hn::Store(hn::Add(score, slack), d, high + i);
  }

  float bound = lower.count == lower.k ? lower.scores[0] : kNegInf;
  if (lower.count == 0 && candidates.own < 0) bound = topk_lower_bound(low, count, candidates.k);
  std::int32_t maybe[kKeyTileSize];
  std::int64_t maybes = 0;
  for_not_below(high, count, bound, [&](std::int64_t i) {
    const auto block = static_cast<std::int32_t>(first + i);
    if (block == candidates.own) return;
    maybe[maybes++] = static_cast<std::int32_t>(i);
    if (lower.count < lower.k || low[i] > lower.scores[0]) lower.push(low[i], block);
  });
  screen.lower_count = lower.count;
  if (lower.count == lower.k) bound = lower.scores[0];
  for (std::int64_t m = 0; m < maybes; ++m) {
    const std::int32_t i = maybe[m];
    if (high[i] < bound) continue;
    if (screen.survivors == kMaxSurvivors) rescore(rows, memory, row, tile, packed);
    memory.survivor_blocks[row * kMaxSurvivors + screen.survivors] = static_cast<std::int32_t>(first + i);
    memory.survivor_upper[row * kMaxSurvivors + screen.survivors++] = high[i];
  }
}

void score_screened(GateRows& rows, const ScreenMemory& memory, TileScratch& tile, float* packed) {
  const Int8Tiles& tiles = *int8_tiles();
  const std::size_t depth = ScreenedMeans::depth(rows.problem.head_dim);
  auto* products = reinterpret_cast<std::int32_t*>(tile.scores);
  round_queries(rows, memory, tile);
  tiles.begin();
  for (std::int64_t begin = 0; begin < rows.last_block(); begin += kTileBlocks) {
    const std::int64_t count = std::min(kTileBlocks, rows.last_block() - begin);
    const std::int8_t* panels_from = rows.task.screened->panels + static_cast<std::size_t>(begin) * depth;
    for_tiles(rows, static_cast<std::int64_t>(tiles.rows), [&](std::int64_t from, std::int64_t to) HWY_ATTR {
      const std::int64_t columns = std::min(rows.candidates[to - 1].last - begin, count);
      if (columns <= 0) return;
      tiles.multiply(memory.queries + static_cast<std::size_t>(from) * depth, depth,
                     static_cast<std::size_t>(to - from), panels_from, depth * kMatrixCols,
                     round_up(static_cast<std::size_t>(columns), kMatrixCols), depth, products, kScoreStride);
      for (std::int64_t row = from; row < to; ++row) {
        const Candidates& c = rows.candidates[row];
        const std::int64_t first = std::max(c.first, begin), last = std::min(c.last, begin + count);
        if (first >= last || c.k == 0) continue;
        screen_row(rows, memory, row, first, last,
                   products + (row - from) * static_cast<std::int64_t>(kScoreStride) + (first - begin), tile,
                   packed);
      }
    });
  }
  tiles.end();
  for (std::int64_t row = rows.first_scored; row < rows.count; ++row)
    rescore(rows, memory, row, tile, packed);
}

}  // namespace

/// `memory` holds gate_bytes() bytes.
void gate_rows(const Problem& problem, const Means& means, const GateTask& task, const Selection& selection,
               std::byte* memory) {
  const auto take = [&memory](auto* /*type*/ kind, std::int64_t count) {
    auto* taken = reinterpret_cast<decltype(kind)>(memory);
    memory += round_up(static_cast<std::size_t>(count) * sizeof(*kind), Scratch::kAlignment);
    return taken;
  };
  const SequenceView& sequence = problem.sequences[task.sequence];
  const std::int64_t count = (task.q1 - task.q0) * problem.group, width = selection.width;
  TileScratch& tile = *take(static_cast<TileScratch*>(nullptr), 1);
  float* packed = take(static_cast<float*>(nullptr), kTileBlocks * problem.head_dim);
  GateRows rows{problem,
                means,
                task,
                sequence,
                width,
                count,
                selection.of(task.head, sequence.q_begin + task.q0),
                take(static_cast<float*>(nullptr), count * width),
                take(static_cast<Candidates*>(nullptr), count)};
  std::fill(std::begin(tile.f32_rows), std::end(tile.f32_rows), 0.0F);
  rows.take_all();
  if (task.screened == nullptr) {
    score_exactly(rows, tile, packed);
  } else {
    const auto depth = static_cast<std::int64_t>(ScreenedMeans::depth(problem.head_dim));
    const ScreenMemory screen{
        take(static_cast<std::uint8_t*>(nullptr), (count + static_cast<std::int64_t>(kTileCapacity)) * depth),
        take(static_cast<ScreenState*>(nullptr), count),
        take(static_cast<float*>(nullptr), count * width),
        take(static_cast<std::int32_t*>(nullptr), count * width),
        take(static_cast<std::int32_t*>(nullptr), count * kMaxSurvivors),
        take(static_cast<float*>(nullptr), count * kMaxSurvivors)};
    score_screened(rows, screen, tile, packed);
  }
  rows.finish();
}

/// Rounds means [panel * kMatrixCols, + kMatrixCols) of `blocks` into their panel.
void round_means(const float* means, std::int64_t stride, std::int64_t blocks, std::int64_t head_dim,
                 std::int64_t panel, const ScreenedMeans& out) {
  const std::size_t depth = ScreenedMeans::depth(head_dim);
  std::int8_t* to = out.panels + static_cast<std::size_t>(panel) * depth * kMatrixCols;
  std::fill(to, to + depth * kMatrixCols, std::int8_t{0});
  alignas(64) float values[kMaxHeadDim];
  alignas(64) std::int32_t levels[kMaxHeadDim];
  for (std::size_t column = 0; column < kMatrixCols; ++column) {
    const std::int64_t block =
        panel * static_cast<std::int64_t>(kMatrixCols) + static_cast<std::int64_t>(column);
    Rounded rounded;
    std::int32_t sum = 0;
    if (block < blocks) {
      std::copy_n(means + block * stride, head_dim, values);
      rounded = round_to_int8(values, static_cast<std::size_t>(head_dim), levels);
      for (std::size_t i = 0; i < static_cast<std::size_t>(head_dim); ++i) {
        const std::int32_t level = std::clamp(levels[i], -127, 127);
        to[(i / 4 * kMatrixCols + column) * 4 + i % 4] = static_cast<std::int8_t>(level);
        sum += level;
      }
    }
    out.scale[block] = rounded.scale;
    out.norm[block] = rounded.norm * 1.001F;
    out.error[block] = rounded.error * 1.001F + rounded.norm * 0x1p-20F;
    out.offset[block] = 128 * sum;
  }
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {

HWY_EXPORT(gate_rows);
HWY_EXPORT(round_means);

namespace {

/// Returns the number of candidates from which a sequence is screened in int8; MOBA_CPU_GATE (f32, int8)
/// decides for all.
std::int64_t screen_from() {
  constexpr std::int64_t kNeverScreen = std::numeric_limits<std::int64_t>::max();
  const char* forced = std::getenv("MOBA_CPU_GATE");
  const std::string_view wanted = forced == nullptr ? "" : forced;
  if (wanted == "f32" || int8_tiles() == nullptr) return kNeverScreen;
  return wanted == "int8" ? 1 : kScreenFrom;
}

std::int64_t candidate_count(const Problem& problem, const SequenceView& s) {
  return problem.needs_scores() ? problem.candidate_blocks(s) : 0;
}

std::int64_t rows_of_task(const Problem& problem, bool screened) {
  return std::max(screened ? kScreenRows : kGateRows, problem.group);
}

}  // namespace

std::size_t screened_bytes(const Problem& problem, std::int64_t heads) {
  std::size_t bytes = 0;
  for (const SequenceView& s : problem.sequences) {
    if (candidate_count(problem, s) >= screen_from())
      bytes += ScreenedMeans::bytes(candidate_count(problem, s), problem.head_dim);
  }
  return bytes * static_cast<std::size_t>(heads);
}

std::size_t gate_bytes(const Problem& problem) {
  if (problem.width() == 0) return 0;
  const auto width = static_cast<std::size_t>(problem.width()),
             head_dim = static_cast<std::size_t>(problem.head_dim);
  const bool screened = screened_bytes(problem, 1) > 0;
  // Beside screened sequences there may be others in the same batch, with more rows a task.
  const auto rows = static_cast<std::size_t>(rows_of_task(problem, false));
  std::size_t bytes = sizeof(TileScratch) + kKeyTileSize * head_dim * sizeof(float) +
                      rows * (width * sizeof(float) + sizeof(Candidates));
  if (screened) {
    const auto few = static_cast<std::size_t>(rows_of_task(problem, true)),
               survivors = static_cast<std::size_t>(kMaxSurvivors);
    bytes += (few + kTileCapacity) * ScreenedMeans::depth(problem.head_dim) +
             few * (64 + (width + survivors) * 2 * sizeof(float));
  }
  return round_up(bytes, Scratch::kAlignment) + 16 * Scratch::kAlignment;
}

Selection gate(const Problem& problem, const Means& means, const Group& group, Resources& resources) {
  Selection selection{group, problem.group, problem.width(), {}};
  if (selection.width == 0) return selection;
  selection.blocks = Buffer<std::int32_t>(resources.scratch,
                                          group.heads() * group.tokens() * problem.group * selection.width);

  const Buffer<std::byte> screened_memory(resources.scratch,
                                          static_cast<std::int64_t>(screened_bytes(problem, group.heads())));
  std::vector<ScreenedMeans> screened(problem.sequences.size() * static_cast<std::size_t>(group.heads()));
  std::vector<GateTask> tasks;
  std::byte* next = screened_memory.data();
  for (std::int64_t head = group.head0; head < group.head1; ++head) {
    for (std::size_t s = 0; s < problem.sequences.size(); ++s) {
      const std::int64_t blocks = candidate_count(problem, problem.sequences[s]);
      ScreenedMeans* rounded = nullptr;
      if (blocks >= screen_from()) {
        rounded = &screened[static_cast<std::size_t>(head - group.head0) * problem.sequences.size() + s];
        *rounded = ScreenedMeans::in(next, blocks, problem.head_dim);
        next += ScreenedMeans::bytes(blocks, problem.head_dim);
        const auto round = &HWY_DYNAMIC_DISPATCH(round_means);
        const auto panel_count = static_cast<std::int64_t>(ScreenedMeans::padded(blocks) / kMatrixCols);
        resources.parallel.run(panel_count, [&](std::int64_t panel, int) {
          round(means.of(s, head), means.block_stride, blocks, problem.head_dim, panel, *rounded);
        });
      }
      const std::int64_t step =
          std::max<std::int64_t>(rows_of_task(problem, rounded != nullptr) / problem.group, 1);
      const auto [first, last] = group.queries_of(problem.sequences[s]);
      // Later queries have more candidates: begin with them.
      for (std::int64_t q1 = last; q1 > first; q1 -= step)
        tasks.push_back({s, head, std::max(q1 - step, first), q1, rounded});
    }
  }
  const std::size_t bytes = gate_bytes(problem);
  const Buffer<std::byte> memory(resources.scratch,
                                 resources.parallel.threads * static_cast<std::int64_t>(bytes));
  const auto run = &HWY_DYNAMIC_DISPATCH(gate_rows);
  resources.parallel.run(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t index, int worker) {
    run(problem, means, tasks[static_cast<std::size_t>(index)], selection,
        memory.data() + static_cast<std::size_t>(worker) * bytes);
  });
  return selection;
}

}  // namespace moba::cpu
#endif
