// The gradient, block by block: keys, values and their gradients stay in cache while the rows that attend to
// them pass by. Queries are cut into as many ranges as keys are into parts, and the work is done in rounds:
// in round t, range r is paired with part (r + t) modulo their number. No two backward tiles of a round share
// a row or a key, so every sum is accumulated in place, in an order that depends on the call alone.
#include <algorithm>
#include <atomic>
#include <numeric>
#include <string_view>

#include "cpu/backward.h"
#include "cpu/key_tiles.h"
#include "cpu/sizes.h"
#include "cpu/stages.h"
#include "number.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attend_backward.cpp"
#include <hwy/foreach_target.h>
// foreach_target first
#include <hwy/highway.h>

#include "cpu/backward-inl.h"
#include "cpu/backward_bf16x6-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

constexpr auto kHeight = static_cast<std::int64_t>(kTileRows);
constexpr auto kKeyGradTiles = key_grad_tiles(std::make_index_sequence<kTileRows>());

void pack(BackwardWorker& w) {
  const Call& call = w.g.call;
  const auto row_of = [&](const Rows& rows, DType dtype) {
    return [&rows, dtype, &w](std::size_t i, float* scratch)
               HWY_ATTR { return row_as_f32(rows, dtype, static_cast<std::int64_t>(i), w.depth(), scratch); };
  };
  const std::int64_t head = w.backward_tile.range->head;
  const Rows keys = call.keys(w.sequence, head, w.key_tile.first),
             values = call.values(w.sequence, head, w.key_tile.first);
  const auto key = row_of(keys, call.k.dtype);
  pack_transposed(w.count(), w.depth(), key, w.batch.f32_rows, w.keys);
  pack_transposed(w.count(), w.depth(), row_of(values, call.v.dtype), w.batch.f32_rows, w.values);
  w.nonfinite_keys.reset();
  for (std::size_t i = 0; i < w.count(); ++i) {
    const float* from = key(i, w.batch.f32_rows);
    w.nonfinite_keys[i] = !all_finite(from, w.depth());
    if (w.nonfinite_keys[i]) from = w.batch.f32_rows + kMaxLanes * kMaxHeadDim;  // zeros
    float* to = w.key_rows + i * kCols;
    for (std::size_t column = 0; column < w.depth(); column += kCols, to += w.count() * kCols) {
      const std::size_t width = std::min(kCols, w.depth() - column);
      std::copy_n(from + column, width, to);
      std::fill(to + width, to + kCols, 0.0F);
    }
  }
}

/// weights = 2^min(weights - lse, 0), d_logits = weights (d_logits - delta)
void exp2_and_d_logits(float* HWY_RESTRICT weights, float* HWY_RESTRICT d_logits, std::size_t columns,
                       RowStats stats) {
  const F32 d;
  const Vec lse = hn::Set(d, stats.lse), delta = hn::Set(d, stats.delta);
  for (std::size_t i = 0; i < columns; i += kLanes) {
    const Vec p = exp2(at_most_zero(hn::Sub(hn::Load(d, weights + i), lse)));
    hn::Store(p, d, weights + i);
    hn::Store(hn::Mul(p, hn::Sub(hn::Load(d, d_logits + i), delta)), d, d_logits + i);
  }
}

/// Adds the non-finite keys, which are packed as zeros, to dq of the rows that see them: in a product of
/// tiles they would reach every row, because 0 * inf is NaN.
void add_nonfinite_keys(BackwardWorker& w, const float* d_logits, const std::size_t* seen, std::size_t rows) {
  const Rows keys = w.g.call.keys(w.sequence, w.backward_tile.range->head, w.key_tile.first);
  for (std::size_t i = 0; i < w.count(); ++i) {
    if (!w.nonfinite_keys[i]) continue;
    const float* key =
        row_as_f32(keys, w.g.call.k.dtype, static_cast<std::int64_t>(i), w.depth(), w.batch.f32_rows);
    for (std::size_t r = 0; r < rows; ++r) {
      if (i >= seen[r]) continue;
      for (std::size_t c = 0; c < w.depth(); ++c)
        w.batch.dq_rows[r][c] += d_logits[r * kScoreStride + i] * key[c];
    }
  }
}

/// Adds a row with a non-finite query or d_out to the gradients of the keys that it sees, then clears it: in
/// a product of tiles it would reach the other keys of the tile, too.
void add_nonfinite_row(BackwardWorker& w, float* query, float* d_out, float* weights, float* d_logits,
                       std::size_t seen) {
  for (std::size_t i = 0; i < seen; ++i) {
    for (std::size_t c = 0; c < w.depth(); ++c) {
      w.dv[i * w.stride + c] += weights[i] * d_out[c];
      w.dk[i * w.stride + c] += d_logits[i] * query[c];
    }
  }
  std::fill_n(query, kRowStride, 0.0F);
  std::fill_n(d_out, kRowStride, 0.0F);
  std::fill_n(weights, kScoreStride, 0.0F);
  std::fill_n(d_logits, kScoreStride, 0.0F);
}

/// Processes rows [first, last) of the key tile's list as rows `at` and on of the batch: computes their
/// weights and the gradients of their logits, and accumulates dq.
void backward_row_tile(BackwardWorker& w, std::int64_t first, std::int64_t last, std::size_t at) {
  const Call& call = w.g.call;
  BackwardScratch& batch = w.batch;
  const auto rows = static_cast<std::size_t>(last - first);
  float *queries = batch.queries + at * kRowStride, *d_outs = batch.d_outs + at * kRowStride;
  float *weights = batch.weights + at * kScoreStride, *d_logits = batch.d_logits + at * kScoreStride;
  std::size_t* seen = batch.seen + at;
  for (std::size_t r = 0; r < rows; ++r) {
    const std::int64_t index = first + static_cast<std::int64_t>(r);
    const std::uint32_t row = w.row(index);
    gather(w, call.q, row, call.scale * kLog2E, queries + r * kRowStride);
    gather(w, w.g.backward.d_out, row, 1, d_outs + r * kRowStride);
    seen[r] = w.seen(index);
  }
  const std::size_t columns = seen[rows - 1];
  w.row_budget.reset(3 * last, 3 * std::min(last + kHeight, w.rows()),
                     static_cast<std::int64_t>(2 * panels(columns) + panels(w.depth())));
  for (std::size_t panel = 0; panel < panels(columns); ++panel) {
    const std::size_t offset = panel * w.depth() * kCols;
    kScoreTiles[rows - 1](queries, w.keys + offset, w.depth(), weights + panel * kCols);
    prefetch_some_rows(w);
    kScoreTiles[rows - 1](d_outs, w.values + offset, w.depth(), d_logits + panel * kCols);
    prefetch_some_rows(w);
  }
  const std::size_t padded = panels(columns) * kCols;
  for (std::size_t r = 0; r < rows; ++r) {
    const std::uint32_t row = w.row(first + static_cast<std::int64_t>(r));
    const RowStats& stats = w.g.stats_of(w.head_of(row), w.sequence.q_begin + w.query_of(row));
    exp2_and_d_logits(weights + r * kScoreStride, d_logits + r * kScoreStride, padded, stats);
    if (seen[r] == w.count()) continue;
    // A tile of keys reaches past what its first row sees by less than its height.
    const std::size_t end = std::max(padded, seen[r] + kTileRows);
    std::fill(weights + r * kScoreStride + seen[r], weights + r * kScoreStride + end, 0.0F);
    std::fill(d_logits + r * kScoreStride + seen[r], d_logits + r * kScoreStride + end, 0.0F);
  }
  for (std::size_t r = 0; r < rows; ++r) std::fill_n(batch.dq_rows[r], w.stride, 0.0F);
  for (std::size_t panel = 0; panel < panels(w.depth()); ++panel) {
    kValueTiles[rows - 1](d_logits, w.key_rows + panel * w.count() * kCols, columns, batch.ones,
                          batch.dq_rows, panel * kCols);
    prefetch_some_rows(w);
  }
  if (w.nonfinite_keys.any()) add_nonfinite_keys(w, d_logits, seen, rows);
  for (std::size_t r = 0; r < rows; ++r) {
    float *query = queries + r * kRowStride, *d_out = d_outs + r * kRowStride;
    if (seen[r] < w.count() && !(all_finite(query, w.depth()) && all_finite(d_out, w.depth()))) {
      add_nonfinite_row(w, query, d_out, weights + r * kScoreStride, d_logits + r * kScoreStride, seen[r]);
    }
  }
  for (std::size_t r = 0; r < rows; ++r) {
    add_scaled(batch.dq_rows[r], w.depth(), call.scale, w.dq_of(w.row(first + static_cast<std::int64_t>(r))));
  }
}

std::size_t key_grad_tiles_of(const BackwardWorker& w) {
  return (w.count() + kTileRows - 1) / kTileRows;
}

/// out[key] += sum over the rows of the batch of coefficients[row][key] * vectors[row]
void add_to_keys(BackwardWorker& w, const float* coefficients, const float* vectors, std::size_t rows,
                 float* out) {
  const std::size_t tiles = key_grad_tiles_of(w);
  std::size_t from = 0;  // the first row that sees the tile
  for (std::size_t tile = 0; tile < tiles; ++tile) {
    const std::size_t first = w.count() * tile / tiles, last = w.count() * (tile + 1) / tiles;
    while (from < rows && w.batch.seen[from] <= first) ++from;
    if (from == rows) return;
    for (std::size_t panel = 0; panel < panels(w.depth()); ++panel) {
      kKeyGradTiles[last - first - 1](coefficients + from * kScoreStride + first,
                                      vectors + from * kRowStride + panel * kCols, rows - from,
                                      out + first * w.stride + panel * kCols, w.stride);
      prefetch_some_keys(w);
    }
  }
}

/// Processes tiles [first, last) of the `tiles` that the key tile's rows are cut into.
void backward_batch(BackwardWorker& w, std::int64_t first, std::int64_t last, std::int64_t tiles) {
  const auto begin_of = [&](std::int64_t tile) { return w.rows() * tile / tiles; };
  const std::int64_t begin = begin_of(first);
  for (std::int64_t tile = first; tile < last; ++tile)
    backward_row_tile(w, begin_of(tile), begin_of(tile + 1),
                      static_cast<std::size_t>(begin_of(tile) - begin));
  const auto rows = static_cast<std::size_t>(begin_of(last) - begin);
  add_to_keys(w, w.batch.weights, w.batch.d_outs, rows, w.dv);
  add_to_keys(w, w.batch.d_logits, w.batch.queries, rows, w.dk);
}

void backward_key_tile(BackwardWorker& w) {
  pack(w);
  std::fill(w.dk, w.dk + w.count() * w.stride, 0.0F);
  std::fill(w.dv, w.dv + w.count() * w.stride, 0.0F);
  constexpr std::int64_t kMaxTiles = static_cast<std::int64_t>(kBatch) / kHeight;
  const std::int64_t tiles = (w.rows() + kHeight - 1) / kHeight,
                     batches = (tiles + kMaxTiles - 1) / kMaxTiles;
  w.key_budget.reset(0, 4 * std::max(w.key_tile.count, w.next_key_tile.count),
                     2 * batches * static_cast<std::int64_t>(key_grad_tiles_of(w) * panels(w.depth())));
  for (std::int64_t i = 0; i < batches; ++i)
    backward_batch(w, tiles * i / batches, tiles * (i + 1) / batches, tiles);
  accumulate_dk_dv(w, kLn2);  // the gathered queries carry scale x log2(e)
}

/// Calls visit() for every key tile of the backward tile that any row attends to.
template <typename Visit>
void for_key_tiles(BackwardWorker& w, Visit&& visit) {
  const Call& call = w.g.call;
  const KeyTiling tiling = key_tiling_of(call, w.sequence);
  const std::int64_t blocks = call.routing.causal
                                  ? call.own_block(w.sequence, w.backward_tile.range->q1 - 1) + 1
                                  : call.blocks(w.sequence);
  std::int64_t index = w.backward_tile.part;
  const auto next_seen = [&] {
    for (; index < blocks * tiling.tiles_per_block; index += w.backward_tile.parts) {
      const KeyTile key_tile = key_tile_of(w.g, w.sequence, *w.backward_tile.range, tiling, index);
      if (key_tile.count == 0) continue;
      index += w.backward_tile.parts;
      return key_tile;
    }
    return KeyTile{};
  };
  for (w.next_key_tile = next_seen(); w.next_key_tile.count > 0 && !w.g.cancelled();) {
    w.key_tile = w.next_key_tile;
    w.next_key_tile = next_seen();
    visit();
  }
}

}  // namespace

void attend_backward_tile(const BackwardState& g, const BackwardTile& backward_tile, float* memory) {
  const Call& call = g.call;
  const SequenceView& sequence = call.sequences[static_cast<std::size_t>(backward_tile.range->sequence)];
  const std::size_t stride = padded_dim(call.head_dim);
  auto& batch = *reinterpret_cast<BackwardScratch*>(memory);
  float* buffers = memory + sizeof(BackwardScratch) / sizeof(float);
  const auto place = [&](std::size_t i) { return buffers + i * kKeyTileSize * stride; };
  BackwardWorker w{g,        sequence, backward_tile, batch,    place(0),
                   place(1), place(2), place(3),      place(4), stride};
  std::fill(std::begin(batch.f32_rows), std::end(batch.f32_rows), 0.0F);
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  if (g.units != Units::fma) {
    const auto run_tiles = [&](auto&& backward) { for_key_tiles(w, [&] { backward.backward_key_tile(); }); };
    amx_bf16x6_tiles()->begin();
    if (g.units == Units::amx_bf16) {
      run_tiles(AmxBackward<1>(w, buffers));
    } else {
      run_tiles(AmxBackward<kMaxParts>(w, buffers));
    }
    return amx_bf16x6_tiles()->end();
  }
#endif
  std::fill(std::begin(batch.ones), std::end(batch.ones), 1.0F);
  for (std::size_t r = 0; r < kMaxTileRows; ++r) batch.dq_rows[r] = batch.dq + r * kRowStride;
  for_key_tiles(w, [&] { backward_key_tile(w); });
}

/// Returns whether the first `count` of the rows are finite.
bool rows_finite(const Rows& rows, DType dtype, std::int64_t count, std::size_t size) {
  alignas(64) float f32_rows[kMaxHeadDim];
  for (std::int64_t i = 0; i < count; ++i) {
    if (!all_finite(row_as_f32(rows, dtype, i, size, f32_rows), size)) return false;
  }
  return true;
}

/// Computes the statistics of tokens [first, last) at one query head.
void row_stats(const BackwardState& g, std::int64_t q_head, std::int64_t first, std::int64_t last) {
  const F32 d;
  const Call& call = g.call;
  const auto depth = static_cast<std::size_t>(call.head_dim);
  alignas(64) float out[kMaxHeadDim], d_out[kMaxHeadDim];
  std::fill(std::begin(out), std::end(out), 0.0F);
  std::fill(std::begin(d_out), std::end(d_out), 0.0F);
  for (std::int64_t token = first; token < last; ++token) {
    const auto load_row = [&](const Tensor& t, float* to) HWY_ATTR {
      const std::int64_t element = token * t.strides[0] + q_head * t.strides[1];
      load_f32(static_cast<const std::byte*>(t.data) + element * static_cast<std::int64_t>(size_of(t.dtype)),
               t.dtype, depth, 1, to);
    };
    load_row(g.backward.out, out);
    load_row(g.backward.d_out, d_out);
    Vec sum = hn::Zero(d);
    for (std::size_t i = 0; i < depth; i += kLanes)
      sum = hn::MulAdd(hn::Load(d, out + i), hn::Load(d, d_out + i), sum);
    const float lse = g.backward.lse[q_head * call.tokens + token];
    g.stats_of(q_head, token) = {lse == kNegInf ? -kNegInf : lse * kLog2E,
                                 hn::GetLane(hn::SumOfLanes(d, sum))};
  }
}

void store_f32_row(const float* from, std::size_t size, DType dtype, std::byte* to) {
  store_f32(from, size, 1, dtype, to);
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {

HWY_EXPORT(attend_backward_tile);
HWY_EXPORT(row_stats);
HWY_EXPORT(rows_finite);
HWY_EXPORT(store_f32_row);

namespace {

std::size_t worker_bytes(const Call& call) {
  const std::size_t floats = std::max(5 * kKeyTileSize * padded_dim(call.head_dim),
                                      amx_bf16x6_tiles() == nullptr ? 0 : amx_backward_floats(call.head_dim));
  return sizeof(BackwardScratch) + floats * sizeof(float);
}

std::int64_t keys_of(const Call& call) {
  std::int64_t keys = 0;
  for (const SequenceView& s : call.sequences) keys += s.keys;
  return keys;
}

/// A gradient that is being accumulated: in place when the tensor is f32.
struct GradientAccumulator {
  const Tensor& to;
  std::int64_t head0, head1;
  Buffer<float> scratch{};
  AccumulatorView sums{};

  GradientAccumulator(const Tensor& tensor, std::int64_t first_head, std::int64_t last_head, Context& context)
      : to(tensor), head0(first_head), head1(last_head) {
    if (to.dtype == DType::f32) {
      sums = {static_cast<float*>(to.data), to.strides[0], to.strides[1], 0};
      return;
    }
    const std::int64_t depth = to.sizes[2], row = (head1 - head0) * depth;
    scratch = Buffer<float>(context.scratch, to.sizes[0] * row);
    sums = {scratch.data(), row, depth, head0};
  }

  template <typename Visit>
  void for_each_row(const Parallel& parallel, Visit&& visit) const {
    constexpr std::int64_t kTokens = 256;
    const std::int64_t tokens = to.sizes[0];
    parallel.run((tokens + kTokens - 1) / kTokens, [&](std::int64_t task, int) {
      for (std::int64_t token = task * kTokens; token < std::min(tokens, (task + 1) * kTokens); ++token) {
        for (std::int64_t head = head0; head < head1; ++head) visit(token, head);
      }
    });
  }

  void clear(const Parallel& parallel) const {
    for_each_row(parallel, [&](std::int64_t token, std::int64_t head) {
      std::fill_n(sums.row(token, head), to.sizes[2], 0.0F);
    });
  }

  void finish(const Parallel& parallel) const {
    if (to.dtype == DType::f32) return;
    const auto write = &HWY_DYNAMIC_DISPATCH(store_f32_row);
    for_each_row(parallel, [&](std::int64_t token, std::int64_t head) {
      const std::int64_t element = token * to.strides[0] + head * to.strides[1];
      write(sums.row(token, head), static_cast<std::size_t>(to.sizes[2]), to.dtype,
            static_cast<std::byte*>(to.data) + element * static_cast<std::int64_t>(size_of(to.dtype)));
    });
  }
};

/// Returns whether q, k, v and d_out are finite at the slice's heads, as the products of parts require.
bool finite(const Call& call, const Backward& backward, const WorkSlice& slice, const Parallel& parallel) {
  constexpr std::int64_t kTokens = 256;
  const auto check = &HWY_DYNAMIC_DISPATCH(rows_finite);
  const auto size = static_cast<std::size_t>(call.head_dim);
  std::atomic<bool> all{true};
  const auto spread = [&](std::int64_t tokens, std::int64_t heads, auto&& rows_at) {
    const std::int64_t steps = (tokens + kTokens - 1) / kTokens;
    parallel.run(steps * heads, [&](std::int64_t task, int) {
      const std::int64_t first = task % steps * kTokens;
      if (!rows_at(task / steps, first, std::min(kTokens, tokens - first))) all = false;
    });
  };
  for (const Tensor* t : {&call.q, &backward.d_out}) {
    spread(call.tokens, slice.heads() * call.heads_per_kv,
           [&](std::int64_t head, std::int64_t first, std::int64_t count) {
             const std::int64_t element =
                 first * t->strides[0] + (slice.head0 * call.heads_per_kv + head) * t->strides[1];
             const auto* from = static_cast<const std::byte*>(t->data) +
                                element * static_cast<std::int64_t>(size_of(t->dtype));
             return check({.data = from, .stride = t->strides[0]}, t->dtype, count, size);
           });
  }
  for (const SequenceView& s : call.sequences) {
    spread(s.keys, slice.heads(), [&](std::int64_t head, std::int64_t first, std::int64_t count) {
      return check(call.keys(s, slice.head0 + head, first), call.k.dtype, count, size) &&
             check(call.values(s, slice.head0 + head, first), call.v.dtype, count, size);
    });
  }
  return all;
}

Units units_for(const Call& call, const Backward& backward, const WorkSlice& slice,
                const Parallel& parallel) {
  const bool all_bf16 = call.q.dtype == DType::bf16 && call.k.dtype == DType::bf16 &&
                        call.v.dtype == DType::bf16 && backward.d_out.dtype == DType::bf16;
  const bool on_amx = all_bf16 ? bf16_tiles() != nullptr && bf16_tiles()->name == std::string_view("amx")
                               : bf16x6_tiles() != nullptr && call.routing.block_size >= kMinBf16x6BlockSize;
  if (!on_amx || !finite(call, backward, slice, parallel)) return Units::fma;
  return all_bf16 ? Units::amx_bf16 : Units::amx_bf16x6;
}

/// Pairs a range with every part of its sequence's keys.
std::vector<BackwardTile> backward_tiles_of(const BackwardState& g, const Range& range,
                                            std::int64_t first_key) {
  const SequenceView& sequence = g.call.sequences[static_cast<std::size_t>(range.sequence)];
  const KeyTiling tiling = key_tiling_of(g.call, sequence);
  const std::int64_t parts = backward_parts(g.call, sequence);
  std::vector<BackwardTile> tiles;
  for (std::int64_t part = 0; part < parts; ++part) tiles.push_back({&range, part, parts, first_key});
  for (std::int64_t index = 0; index < g.call.blocks(sequence) * tiling.tiles_per_block; ++index) {
    const KeyTile key_tile = key_tile_of(g, sequence, range, tiling, index);
    tiles[static_cast<std::size_t>(index % parts)].work +=
        key_tile.count *
        (static_cast<std::int64_t>(key_tile.selected.size()) + key_tile.own_last - key_tile.own_first);
  }
  return tiles;
}

/// Returns the backward tiles of each round, the longest first. Ranges of one sequence and head follow each
/// other in the plan.
std::vector<std::vector<BackwardTile>> rounds_of(const BackwardState& g, const Parallel& parallel) {
  std::vector<std::int64_t> first_key{0};
  for (const SequenceView& s : g.call.sequences) first_key.push_back(first_key.back() + s.keys);
  const std::vector<Range>& ranges = g.plan.ranges;
  std::vector<std::vector<BackwardTile>> tiles(ranges.size());
  parallel.run(static_cast<std::int64_t>(ranges.size()), [&](std::int64_t range, int) {
    const auto i = static_cast<std::size_t>(range);
    tiles[i] = backward_tiles_of(g, ranges[i], first_key[static_cast<std::size_t>(ranges[i].sequence)]);
  });

  std::vector<std::vector<BackwardTile>> rounds;
  for (std::size_t i = 0, number = 0; i < tiles.size(); ++i) {
    const std::size_t parts = tiles[i].size();
    for (std::size_t part = 0; part < parts; ++part) {
      if (tiles[i][part].work == 0) continue;
      const std::size_t round = (part + parts - number) % parts;
      rounds.resize(std::max(rounds.size(), round + 1));
      rounds[round].push_back(tiles[i][part]);
    }
    number = number + 1 == parts ? 0 : number + 1;
  }
  for (std::vector<BackwardTile>& round : rounds) {
    std::stable_sort(round.begin(), round.end(),
                     [](const BackwardTile& a, const BackwardTile& b) { return a.work > b.work; });
  }
  return rounds;
}

}  // namespace

std::size_t attend_backward_bytes(const Call& call, const WorkSlice& slice, int threads) {
  const std::int64_t rows = slice.heads() * call.heads_per_kv * call.tokens;
  const std::int64_t sums =
      call.q.dtype == DType::f32 ? 0 : (rows + 2 * slice.heads() * keys_of(call)) * call.head_dim;
  return static_cast<std::size_t>(rows) * sizeof(RowStats) + static_cast<std::size_t>(sums) * sizeof(float) +
         static_cast<std::size_t>(threads) * worker_bytes(call);
}

void attend_backward(const Call& call, const SliceSelection& selection, const Plan& plan,
                     const Backward& backward, Context& context) {
  const WorkSlice& slice = selection.slice;
  const Parallel& parallel = context.parallel;
  const Gradients& gradients = backward.gradients;
  const GradientAccumulator dq(gradients.dq, slice.head0 * call.heads_per_kv, slice.head1 * call.heads_per_kv,
                               context),
      dk(gradients.dk, slice.head0, slice.head1, context),
      dv(gradients.dv, slice.head0, slice.head1, context);
  const Buffer<RowStats> stats(context.scratch, slice.heads() * call.heads_per_kv * call.tokens);
  const BackwardState g{call,
                        plan,
                        backward,
                        slice,
                        dq.sums,
                        dk.sums,
                        dv.sums,
                        stats.data(),
                        units_for(call, backward, slice, parallel),
                        context.cancelled};
  for (const GradientAccumulator* output : {&dq, &dk, &dv}) output->clear(parallel);

  constexpr std::int64_t kTokens = 256;
  const std::int64_t steps = (call.tokens + kTokens - 1) / kTokens;
  const auto prepare = &HWY_DYNAMIC_DISPATCH(row_stats);
  parallel.run(steps * slice.heads() * call.heads_per_kv, [&](std::int64_t task, int) {
    const std::int64_t first = task % steps * kTokens;
    prepare(g, slice.head0 * call.heads_per_kv + task / steps, first, std::min(first + kTokens, call.tokens));
  });

  const std::size_t floats = worker_bytes(call) / sizeof(float);
  const Buffer<float> memory(context.scratch, parallel.threads * static_cast<std::int64_t>(floats));
  const auto run = &HWY_DYNAMIC_DISPATCH(attend_backward_tile);
  for (const std::vector<BackwardTile>& round : rounds_of(g, parallel)) {
    parallel.run(static_cast<std::int64_t>(round.size()), [&](std::int64_t task, int worker) {
      run(g, round[static_cast<std::size_t>(task)],
          memory.data() + static_cast<std::size_t>(worker) * floats);
    });
  }
  for (const GradientAccumulator* output : {&dq, &dk, &dv}) output->finish(parallel);
}

}  // namespace moba::cpu
#endif
