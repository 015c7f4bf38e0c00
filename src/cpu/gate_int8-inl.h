// The gate by int8 screening (gate_int8.h): bounds every score in int8, and scores only the survivors in f32.
#if defined(MOBA_CPU_GATE_INT8_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_GATE_INT8_INL_H_
#undef MOBA_CPU_GATE_INT8_INL_H_
#else
#define MOBA_CPU_GATE_INT8_INL_H_
#endif

#include <cstring>

#include "cpu/gate_int8.h"
#include "cpu/gate_rows-inl.h"
#include "cpu/matrix_tiles.h"
#include "cpu/topk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

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
  // Bound of the rounding error of the division and of the product with its result, for every value.
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
  std::int32_t* survivor_blocks;  // [rows, kMaxSurvivors]
  float* survivor_upper;          // [rows, kMaxSurvivors]
};

void round_queries(const GateRows& rows, const ScreenMemory& memory, TileScratch& tile) {
  const std::size_t depth = ScreenedMeans::depth(rows.call.head_dim);
  alignas(64) std::int32_t levels[kMaxHeadDim];
  const float rounding =
      static_cast<float>(rows.depth() + 8) * 0x1p-22F;  // of the f32 score itself, generously
  for (std::int64_t row = rows.first_scored; row < rows.count; ++row) {
    load_f32(rows.query(row), rows.call.q.dtype, rows.depth(), 1.0F, tile.rows);
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
  load_f32(rows.query(row), rows.call.q.dtype, rows.depth(), 1.0F, tile.rows);
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
  const std::size_t depth = ScreenedMeans::depth(rows.call.head_dim);
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
}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
