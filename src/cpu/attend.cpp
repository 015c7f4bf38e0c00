// Attention, block by block: a worker owns a range of queries, visits the blocks, gathers the rows that
// selected each block, and keeps a running maximum, sum and output for every row (online softmax). No two
// workers touch the same row, so no merge across threads is needed and the order of every sum is fixed.
#include "constants.h"
#include "cpu/key_tiles.h"
#include "cpu/prefetch.h"
#include "cpu/sizes.h"
#include "cpu/stages.h"
#include "number.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attend.cpp"
#include <hwy/foreach_target.h>
// foreach_target first
#include <hwy/highway.h>

#include "cpu/bf16_arithmetic-inl.h"
#include "cpu/bf16x6_arithmetic-inl.h"
#include "cpu/f32_arithmetic-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

/// Online-softmax state of the rows of one range. Logits are in units of log2, so weights are powers of 2.
struct RangeState {
  float* out;  // [rows, stride], unnormalised
  float* max;
  float* sum;
  std::size_t stride;
};

/// Addresses of a tile's rows, computed one tile ahead so that the next rows can be prefetched while the
/// current ones are processed.
struct TileRows {
  std::size_t count = 0;
  std::uint32_t ids[kMaxTileRows];
  std::int64_t position[kMaxTileRows];  // among the keys
  const std::byte* query[kMaxTileRows];
};

template <TileArithmetic Arithmetic>
struct AttendWorker {
  const Call& call;
  const SequenceView& sequence;
  const Range& range;
  RangeState state;
  TileScratch& tile;
  Arithmetic arithmetic;
  float sign, scale;  // of the logits, in units of log2, the scale positive
  KeyTile key_tile{};
  KvPrefetcher kv_prefetch{};

  std::size_t depth() const { return static_cast<std::size_t>(call.head_dim); }
  /// Returns the number of keys of the key tile that a row may see when the tile lies in the row's own block.
  std::size_t visible(std::int64_t position) const {
    return static_cast<std::size_t>(
        std::clamp<std::int64_t>(position + 1 - key_tile.first, 0, key_tile.count));
  }

  /// Prefetched while a tile is processed: rows of the next tile and rows of the next key tile, a few between
  /// any two panels. All at once they would take every line-fill buffer and stall the panels' own loads.
  TileRows next{};
  std::size_t next_row = 0;
  std::int64_t prefetch_rows = 0;  // of the next key tile, at a time

  void prefetch_next() {
    if constexpr (!Arithmetic::kPrefetchesRows) {
      constexpr std::size_t kRows = (Arithmetic::kHeight + 5) / 6;
      const std::size_t bytes = depth() * size_of(call.q.dtype);
      for (std::size_t end = std::min(next_row + kRows, next.count); next_row < end; ++next_row) {
        const std::byte* query = next.query[next_row];
        const float* out = state.out + next.ids[next_row] * state.stride;
        prefetch_l2(query, bytes);
        prefetch_l2_for_write(out, state.stride * sizeof(float));
      }
    }
    kv_prefetch.advance(prefetch_rows);
  }

  void begin_prefetch() {
    next_row = 0;
    if constexpr (Arithmetic::kPrefetchesRows) {
      arithmetic.begin_prefetch(next.count, state.stride * sizeof(float), [&](std::size_t r) {
        return std::pair(next.query[r],
                         reinterpret_cast<const std::byte*>(state.out + next.ids[r] * state.stride));
      });
    }
  }
};

HWY_INLINE float max_of(const float* HWY_RESTRICT scores, std::size_t columns) {
  const F32 d;
  Vec left = hn::Load(d, scores), right = hn::Load(d, scores + kLanes);
  for (std::size_t i = kCols; i < columns; i += kCols) {
    left = hn::Max(left, hn::Load(d, scores + i));
    right = hn::Max(right, hn::Load(d, scores + i + kLanes));
  }
  return hn::GetLane(hn::MaxOfLanes(d, hn::Max(left, right)));
}

/// Computes the weights 2^(scale * score - top) of one row; returns their sum.
template <TileArithmetic Arithmetic>
HWY_INLINE float exp2_and_sum(Arithmetic& arithmetic, std::size_t r, const float* HWY_RESTRICT scores,
                              std::size_t columns, float scale, float top) {
  const F32 d;
  const Vec by = hn::Set(d, scale), less = hn::Set(d, top);
  Vec left = hn::Zero(d), right = left;
  for (std::size_t i = 0; i < columns; i += kCols) {
    const Vec a = exp2(hn::MulSub(hn::Load(d, scores + i), by, less));
    const Vec b = exp2(hn::MulSub(hn::Load(d, scores + i + kLanes), by, less));
    arithmetic.store_weights(r, i, a, b);
    left = hn::Add(left, a);
    right = hn::Add(right, b);
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(left, right)));
}

/// Turns the scores of a tile over `columns` (whole panels) into weights, and updates each row's maximum and
/// sum. tile.rescale receives the factor by which each row's earlier output is multiplied.
template <TileArithmetic Arithmetic>
void update_online_softmax(AttendWorker<Arithmetic>& w, const TileRows& rows, std::size_t columns) {
  const F32 d;
  TileScratch& tile = w.tile;
  for (std::size_t r = 0; r < rows.count; ++r) {
    tile.rescale[r] = w.state.max[rows.ids[r]];
    tile.row_max[r] = max_of(tile.scores + r * kScoreStride, columns);
  }
  for (std::size_t r = 0; r < rows.count; r += kLanes) {
    const Vec neg_inf = hn::Set(d, kNegInf), before = hn::Load(d, tile.rescale + r);
    const Vec now = hn::Max(hn::Mul(hn::Load(d, tile.row_max + r), hn::Set(d, w.scale)), before);
    // A row whose scores are all -inf keeps weights of 0, not NaN.
    const Vec safe = hn::IfThenZeroElse(hn::Eq(now, neg_inf), now);
    hn::Store(now, d, tile.row_max + r);
    hn::Store(safe, d, tile.top + r);
    hn::Store(exp2(hn::Sub(before, safe)), d, tile.rescale + r);
  }
  for (std::size_t r = 0; r < rows.count; ++r) {
    float& sum = w.state.sum[rows.ids[r]];
    sum = sum * tile.rescale[r] +
          exp2_and_sum(w.arithmetic, r, tile.scores + r * kScoreStride, columns, w.scale, tile.top[r]);
    w.state.max[rows.ids[r]] = tile.row_max[r];
  }
}

/// Processes one tile: rows of the range against the first columns of the key tile that any of them may see.
template <TileArithmetic Arithmetic>
void attend_tile(AttendWorker<Arithmetic>& w, const TileRows& rows, bool own_block) {
  const auto all = static_cast<std::size_t>(w.key_tile.count);
  const std::size_t columns = own_block ? w.visible(rows.position[rows.count - 1]) : all;
  const auto between = [&w]() HWY_ATTR { w.prefetch_next(); };
  for (std::size_t r = 0; r < rows.count; ++r) {
    w.arithmetic.gather(r, rows.query[r], w.call.q.dtype, w.sign);
    w.tile.out[r] = w.state.out + rows.ids[r] * w.state.stride;
    w.tile.visible[r] = own_block ? w.visible(rows.position[r]) : all;
  }
  w.arithmetic.score(rows.count, columns, between);
  const std::size_t padded = round_up(columns, kMaxCols);
  for (std::size_t r = 0; r < rows.count; ++r) {
    float* scores = w.tile.scores + r * kScoreStride;
    std::fill(scores + w.tile.visible[r], scores + padded, kNegInf);
  }
  update_online_softmax(w, rows, padded);
  w.arithmetic.add_values(rows.count, columns, between);
  if (w.arithmetic.nonfinite_values.any()) {
    add_nonfinite_values(w.arithmetic.source, w.arithmetic.nonfinite_values, w.tile, rows.count, w.depth(),
                         [&](std::size_t r, std::size_t column) { return w.arithmetic.weight(r, column); });
  }
}

template <TileArithmetic Arithmetic>
std::int64_t tiles_of(std::int64_t rows) {
  constexpr auto kHeight = static_cast<std::int64_t>(Arithmetic::kHeight);
  return (rows + kHeight - 1) / kHeight;
}

/// Locates rows [first, last) of a list as a tile.
template <TileArithmetic Arithmetic, typename Id>
TileRows locate(const AttendWorker<Arithmetic>& w, std::int64_t first, std::int64_t last, Id&& id) {
  TileRows rows;
  const Tensor& q = w.call.q;
  const auto heads_per_kv = static_cast<std::uint32_t>(w.call.heads_per_kv);
  const auto size = static_cast<std::int64_t>(size_of(q.dtype));
  for (std::int64_t i = first; i < last; ++i, ++rows.count) {
    const std::uint32_t row = id(i);
    const std::uint32_t token = heads_per_kv == 1 ? row : row / heads_per_kv;  // a division is worth avoiding
    const std::int64_t query = w.range.q0 + token,
                       head = w.range.head * w.call.heads_per_kv + row - token * heads_per_kv;
    rows.ids[rows.count] = row;
    rows.position[rows.count] = w.sequence.position(query);
    rows.query[rows.count] =
        static_cast<const std::byte*>(q.data) + Call::offset(q, w.sequence, query, head) * size;
  }
  return rows;
}

/// Cuts a list of rows into tiles: of nearly equal height, or as many full ones as there are.
template <TileArithmetic Arithmetic, typename Id>
void attend_rows(AttendWorker<Arithmetic>& w, std::int64_t rows, bool own_block, Id&& id) {
  const std::int64_t tiles = tiles_of<Arithmetic>(rows);
  if (tiles == 0) return;
  const auto begin = [rows, tiles](std::int64_t tile) {
    return Arithmetic::kEqualTiles ? rows * tile / tiles
                                   : std::min(rows, tile * static_cast<std::int64_t>(Arithmetic::kHeight));
  };
  w.next = locate(w, 0, begin(1), id);
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const TileRows now = w.next;
    w.next.count = 0;
    if (tile + 1 < tiles) w.next = locate(w, begin(tile + 1), begin(tile + 2), id);
    w.begin_prefetch();
    attend_tile(w, now, own_block);
  }
}

template <TileArithmetic Arithmetic>
void attend_key_tile(AttendWorker<Arithmetic>& w, const KeyTile& key_tile) {
  w.key_tile = key_tile;
  w.arithmetic.pack(w.call, w.sequence, w.range.head, key_tile.first, key_tile.count);
  const auto selected = static_cast<std::int64_t>(key_tile.selected.size());
  const std::int64_t own = std::max<std::int64_t>(key_tile.own_last - key_tile.own_first, 0);
  const std::int64_t tiles = tiles_of<Arithmetic>(selected) + tiles_of<Arithmetic>(own);
  const auto panels_of_tile =
      static_cast<std::int64_t>(panels(static_cast<std::size_t>(key_tile.count)) + panels(w.depth()));
  w.prefetch_rows = w.kv_prefetch.left() / std::max<std::int64_t>(tiles * panels_of_tile, 1) + 1;
  attend_rows(w, selected, false,
              [&](std::int64_t i) { return key_tile.selected[static_cast<std::size_t>(i)]; });
  attend_rows(w, own, true,
              [&](std::int64_t i) { return static_cast<std::uint32_t>(key_tile.own_first + i); });
}

template <TileArithmetic Arithmetic>
void finish_rows(const AttendWorker<Arithmetic>& w, std::int64_t rows, const Outputs& outputs) {
  const Call& call = w.call;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t query = w.range.q0 + row / call.heads_per_kv,
                       head = w.range.head * call.heads_per_kv + row % call.heads_per_kv;
    const float sum = w.state.sum[row], inverse = sum == 0 ? 0.0F : 1 / sum;
    const float* from = w.state.out + static_cast<std::size_t>(row) * w.state.stride;
    const std::int64_t offset = Call::offset(outputs.out, w.sequence, query, head);
    store_f32(from, static_cast<std::size_t>(call.head_dim), inverse, outputs.out.dtype,
              static_cast<std::byte*>(outputs.out.data) +
                  offset * static_cast<std::int64_t>(size_of(outputs.out.dtype)));
    if (outputs.lse == nullptr) continue;
    outputs.lse[head * call.tokens + w.sequence.q_begin + query] =
        sum == 0 ? kNegInf : (w.state.max[row] + std::log2(sum)) * kLn2;
  }
}

template <TileArithmetic Arithmetic>
void attend_with(const Call& call, const Plan& plan, const Range& range, RangeState state, TileScratch& tile,
                 Arithmetic arithmetic, const Outputs& outputs, Cancel& cancelled) {
  const float scale = call.scale;
  AttendWorker<Arithmetic> w{.call = call,
                             .sequence = call.sequences[static_cast<std::size_t>(range.sequence)],
                             .range = range,
                             .state = state,
                             .tile = tile,
                             .arithmetic = arithmetic,
                             .sign = scale > 0   ? 1.0F
                                     : scale < 0 ? -1.0F
                                                 : 0.0F,
                             .scale = scale == 0 ? 1.0F : std::fabs(scale) * kLog2E};
  KeyTileIterator key_tiles(call, w.sequence, plan, range, Arithmetic::kMaxKeys);
  KeyTile now, next;
  for (bool more = key_tiles.next(next); more;) {
    if (cancelled()) return;
    now = next;
    more = key_tiles.next(next);
    if (more) w.kv_prefetch.begin(call, w.sequence, range.head, next.first, next.count);
    attend_key_tile(w, now);
  }
  finish_rows(w, (range.q1 - range.q0) * call.heads_per_kv, outputs);
}

}  // namespace

/// `memory` holds attend_bytes() bytes.
void attend_range(const Call& call, const Plan& plan, const Range& range, float* memory,
                  const Outputs& outputs, Cancel& cancelled) {
  const std::int64_t rows = (range.q1 - range.q0) * call.heads_per_kv;
  const std::size_t stride = padded_dim(call.head_dim);
  auto& tile = *reinterpret_cast<TileScratch*>(memory);
  float* keys = memory + sizeof(TileScratch) / sizeof(float);
  float* values = keys + kPackedFloats * stride;
  float* out = values + kPackedFloats * stride;
  float* max = out + static_cast<std::size_t>(rows) * stride;
  const RangeState state{out, max, max + rows, stride};
  std::fill(std::begin(tile.f32_rows), std::end(tile.f32_rows), 0.0F);
  std::fill(out, max, 0.0F);
  std::fill(max, max + rows, kNegInf);
  std::fill(max + rows, max + 2 * rows, 0.0F);

  const auto head_dim = static_cast<std::size_t>(call.head_dim);
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  // Keys and values of an f32 cache keep their precision.
  const bool in_bf16 = call.q.dtype == DType::bf16 && call.k.dtype != DType::f32;
  if (const Bf16Tiles* tiles = bf16_tiles(); tiles != nullptr && in_bf16) {
    tiles->begin();
    attend_with(
        call, plan, range, state, tile,
        BFloat16{tile, head_dim, reinterpret_cast<bfloat16*>(keys), reinterpret_cast<bfloat16*>(values)},
        outputs, cancelled);
    return tiles->end();
  }
  if (const Bf16x6Tiles* tiles = bf16x6_tiles(); tiles != nullptr) {
    tiles->begin();
    attend_with(call, plan, range, state, tile,
                F32AsBf16x6{tile, head_dim, reinterpret_cast<std::uint32_t*>(keys),
                            reinterpret_cast<std::uint32_t*>(values)},
                outputs, cancelled);
    return tiles->end();
  }
#endif
  attend_with(call, plan, range, state, tile, Float32{tile, head_dim, keys, values}, outputs, cancelled);
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {

HWY_EXPORT(attend_range);

std::size_t attend_bytes(const Call& call, std::int64_t rows) {
  const std::size_t stride = padded_dim(call.head_dim);
  const std::size_t floats = 2 * kPackedFloats * stride + static_cast<std::size_t>(rows) * (stride + 2);
  return sizeof(TileScratch) + round_up(floats * sizeof(float), Scratch::kAlignment);
}

void attend(const Call& call, const SliceSelection& /*selection*/, const Plan& plan, const Outputs& outputs,
            Context& context) {
  if (plan.ranges.empty()) return;
  std::int64_t rows = 0;
  for (const Range& range : plan.ranges) rows = std::max(rows, (range.q1 - range.q0) * call.heads_per_kv);
  const std::size_t floats = attend_bytes(call, rows) / sizeof(float);
  const Buffer<float> memory(context.scratch, context.parallel.threads * static_cast<std::int64_t>(floats));
  const auto run = &HWY_DYNAMIC_DISPATCH(attend_range);
  context.parallel.run(static_cast<std::int64_t>(plan.ranges.size()), [&](std::int64_t task, int worker) {
    run(call, plan, plan.ranges[static_cast<std::size_t>(task)],
        memory.data() + static_cast<std::size_t>(worker) * floats, outputs, context.cancelled);
  });
}

}  // namespace moba::cpu
#endif
