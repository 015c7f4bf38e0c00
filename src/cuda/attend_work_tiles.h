#pragma once

#include <algorithm>

#include "cuda/attend.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/warp.h"
#include "cuda/tile/nonfinite.h"
#include "cuda/tile/softmax.h"

/// Work tiles of attention and of dq, and the epilogue that writes their rows. Routed tiles come first, full
/// ones before partial ones; diagonal tiles follow.
namespace moba::cuda {

template <typename T>
struct AttendParams {
  View<const T> q, k, v;
  Batch batch;
  Plan plan;
  const std::uint32_t* entries;
  std::int64_t block_size, heads_per_kv, head0, heads;
  std::int64_t rows, width, ranks;  // of a head
  std::int32_t token0, token1;
  bool diagonal, causal;
  tile::Scale scale;
  // The output where width is 0.
  View<T> out;
  float* lse;  // [Hq, Tq], may be null
  std::int64_t tokens;
  // Slots elsewhere.
  T* partials;         // [heads, rows * ranks, D]
  float* partial_lse;  // [heads, rows * ranks]

  MOBA_DEVICE std::uint32_t routed_tiles() const {
    return plan.totals[Plan::kFull] + plan.totals[Plan::kPartial];
  }
  MOBA_DEVICE std::int64_t work_tiles() const {
    return routed_tiles() + (diagonal ? batch.tile_starts[batch.sequences] * heads : 0);
  }
};

/// Work tile: up to kTileRows rows, and keys [begin, end) of a sequence. All rows see the keys [all_begin,
/// all_end).
struct WorkTile {
  bool diagonal = false;
  std::int64_t head = 0;  // of the slice
  std::int32_t count = 0;
  std::int32_t first_key = 0;  // of the sequence, packed
  std::int32_t begin = 0, end = 0, all_begin = 0, all_end = 0;

  /// Tests that some row does not see some of the `keys` keys from `key` on.
  MOBA_DEVICE bool is_masked(std::int32_t key, std::int32_t keys) const {
    return key < all_begin || key + keys > all_end;
  }
  /// Tests that rows see different ones of them. Other keys that no row sees are after `end`.
  MOBA_DEVICE bool is_mixed(std::int32_t key, std::int32_t keys) const {
    return diagonal && is_masked(key, keys);
  }
};

/// Row of a work tile.
struct WorkRow {
  std::int64_t q_offset = kNoRow;  // of its query's elements
  std::uint32_t slot = 0;
  KeyRange visible{};  // keys, where the tile is diagonal
};

/// Keys of its own block that the query at `position` sees; all keys without a causal mask.
template <typename T>
MOBA_DEVICE KeyRange diagonal_keys(const AttendParams<T>& p, std::int32_t position, std::int32_t keys) {
  if (!p.causal) return {0, keys};
  if (position < 0) return {0, 0};
  return {static_cast<std::int32_t>(position / p.block_size * p.block_size), position + 1};
}

/// Element offset of a row in `view`, which is p.q or has the same tokens and heads.
template <typename T>
MOBA_DEVICE std::int64_t row_offset(const AttendParams<T>& p, const View<const T>& view, std::int64_t head,
                                    std::uint32_t row) {
  const auto heads_per_kv = static_cast<std::uint32_t>(p.heads_per_kv);
  return (std::int64_t{p.token0} + row / heads_per_kv) * view.token_stride +
         ((p.head0 + head) * p.heads_per_kv + row % heads_per_kv) * view.head_stride;
}

/// Counts the rows [first, first + max_rows) of a tile of `count` rows.
template <int max_rows>
MOBA_DEVICE std::int32_t rows_from(int first, std::int32_t count) {
  if constexpr (max_rows == kTileRows) return count;
  const std::int32_t left = count - first;
  return left < max_rows ? left : max_rows;
}

/// Calls run for diagonal tile `index`; tiles of the last queries, which see most keys, come first. Keys
/// begin as for the full tile, so that a row visits them in the same order for any slice.
template <int max_rows, typename T, typename Run>
MOBA_DEVICE void with_diagonal_tile(const AttendParams<T>& p, std::int64_t index, int first, Run&& run) {
  const Tile tile = tile_at(
      p.batch, static_cast<std::int32_t>(p.batch.tile_starts[p.batch.sequences] - 1 - index / p.heads),
      p.token0, p.token1, p.heads_per_kv);
  const auto visible = [&](int r) {
    return diagonal_keys(p, tile.position_of(first + r, p.heads_per_kv), tile.keys);
  };
  const std::int32_t count = rows_from<max_rows>(first, tile.count);
  if (max_rows < kTileRows && count <= 0) return;
  const KeyRange first_visible = visible(0), last_visible = visible(count - 1);
  const KeyRange cut_visible = diagonal_keys(p, tile.position_at(tile.cut, p.heads_per_kv), tile.keys);
  const WorkTile work{.diagonal = true,
                      .head = index % p.heads,
                      .count = count,
                      .first_key = tile.first_key,
                      .begin = cut_visible.begin,
                      .end = last_visible.end,
                      .all_begin = last_visible.begin,
                      .all_end = first_visible.end};
  run(work, [&](int r) -> WorkRow {
    if (r >= work.count) return {};
    const auto row = static_cast<std::uint32_t>(tile.first_row + first + r);
    return {row_offset(p, p.q, work.head, row),
            row * static_cast<std::uint32_t>(p.ranks) + static_cast<std::uint32_t>(p.width), visible(r)};
  });
}

/// Calls run for routed tile `index`: rows that selected one block.
template <int max_rows, typename T, typename Run>
MOBA_DEVICE void with_routed_tile(const AttendParams<T>& p, std::uint32_t index, int first, Run&& run) {
  const std::uint32_t full = p.plan.totals[Plan::kFull];
  const RoutedTile tile = index < full ? p.plan.full[index] : p.plan.partial[index - full];
  const std::int32_t sequence = sequence_of(p.batch.block_starts, p.batch.sequences, tile.block);
  const std::int32_t k_begin = p.batch.k_starts[sequence];
  const KeyRange keys = keys_of(tile.block - p.batch.block_starts[sequence], p.block_size,
                                p.batch.k_starts[sequence + 1] - k_begin);
  const std::int32_t count = rows_from<max_rows>(first, static_cast<std::int32_t>(tile.count));
  if (max_rows < kTileRows && count <= 0) return;
  const std::uint32_t* entries = p.entries + tile.head * p.rows * p.width + tile.first + first;
  const WorkTile work{.head = tile.head,
                      .count = count,
                      .first_key = k_begin,
                      .begin = keys.begin,
                      .end = keys.end,
                      .all_begin = keys.begin,
                      .all_end = keys.end};
  run(work, [&](int r) -> WorkRow {
    if (r >= work.count) return {};
    return {row_offset(p, p.q, work.head, entries[r] / static_cast<std::uint32_t>(p.ranks)), entries[r], {}};
  });
}

/// Calls run(work, row_of) for up to `max_rows` rows of a work tile from row `first` on; row_of(r) is the
/// WorkRow of the r-th. Does not call it where the tile has no such rows.
template <int max_rows = kTileRows, typename T, typename Run>
MOBA_DEVICE void with_work_tile(const AttendParams<T>& p, std::int64_t index, int first, Run&& run) {
  const std::uint32_t routed = p.routed_tiles();
  if (index < routed) {
    with_routed_tile<max_rows>(p, static_cast<std::uint32_t>(index), first, run);
  } else {
    with_diagonal_tile<max_rows>(p, index - routed, first, run);
  }
}

template <int row_tiles, int key_tiles>
MOBA_DEVICE void negate(float (&logits)[row_tiles][key_tiles][4]) {
  MOBA_UNROLL
  for (int i = 0; i < row_tiles; ++i) {
    MOBA_UNROLL
    for (int j = 0; j < key_tiles; ++j) {
      MOBA_UNROLL
      for (int e = 0; e < 4; ++e) logits[i][j][e] = -logits[i][j][e];
    }
  }
}

/// Calls visit(value, column, is_visible) for each key of a tile and row: the rows of a diagonal tile see the
/// keys of `bounds`, those of a routed one all keys of the work tile. `key` is the key of the first column.
template <int row_tiles, int key_tiles, typename Visit>
MOBA_DEVICE void for_keys(float (&values)[row_tiles][key_tiles][4], const KeyRange* bounds,
                          const WorkTile& work, std::int32_t key, int warp_row, Visit&& visit) {
  MOBA_UNROLL
  for (int i = 0; i < row_tiles; ++i) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * i + 8 * half + ptx::lane() / 4;
      const KeyRange visible = work.diagonal ? bounds[row] : KeyRange{work.begin, work.end};
      MOBA_UNROLL
      for (int j = 0; j < key_tiles; ++j) {
        MOBA_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * j + ptx::lane() % 4 * 2 + e;
          visit(values[i][j][2 * half + e], column,
                key + column >= visible.begin && key + column < visible.end);
        }
      }
    }
  }
}

/// Masks logits of keys that a row does not see.
template <int row_tiles, int key_tiles>
MOBA_DEVICE void apply_mask(float (&logits)[row_tiles][key_tiles][4], const KeyRange* bounds,
                            const WorkTile& work, std::int32_t key, int warp_row) {
  for_keys(logits, bounds, work, key, warp_row, [](float& logit, int, bool is_visible) {
    if (!is_visible) logit = -ptx::infinity();
  });
}

/// Adds the poison of the keys that a row sees to its weights.
template <int row_tiles, int key_tiles>
MOBA_DEVICE void add_poison(float (&weights)[row_tiles][key_tiles][4], const float* poison,
                            const KeyRange* bounds, const WorkTile& work, std::int32_t key, int warp_row) {
  for_keys(weights, bounds, work, key, warp_row, [&](float& weight, int column, bool is_visible) {
    if (is_visible) weight += poison[column];
  });
}

/// Copies the rows of this warp from shared memory to the output or to their slots.
template <int head_dim, int row_tiles, int out_tiles, typename T, typename Rows>
MOBA_DEVICE void store_rows(const AttendParams<T>& p, const Rows& rows, const std::uint32_t* slots,
                            const WorkTile& work, int warp_row, int first_vec = 0) {
  ptx::syncwarp();
  for (int i = ptx::lane(); i < 16 * row_tiles * out_tiles; i += ptx::kLanes) {
    const int row = warp_row + i / out_tiles, vec = first_vec + i % out_tiles;
    if (row >= work.count) break;
    const std::uint32_t slot = slots[row];
    T* to = p.width == 0 ? p.out.row(p.token0 + slot / p.heads_per_kv,
                                     (p.head0 + work.head) * p.heads_per_kv + slot % p.heads_per_kv)
                         : p.partials + slot_at(work.head, p.rows, p.ranks, slot) * head_dim;
    *reinterpret_cast<ptx::Vec16*>(to + vec * 8) = *reinterpret_cast<const ptx::Vec16*>(rows.vec(row, vec));
  }
}

/// Epilogue: normalises and stores the rows of this warp through its rows of q's shared memory, in 16-byte
/// vectors.
template <typename T, typename Rows, int row_tiles, int out_tiles>
MOBA_DEVICE void store_out(const AttendParams<T>& p, const Rows& rows, const std::uint32_t* slots,
                           const WorkTile& work, const float (&out)[row_tiles][out_tiles][4],
                           const tile::Softmax<row_tiles>& softmax, int warp_row) {
  const int lane = ptx::lane();
  const bool last_word = p.width == 0;
  MOBA_UNROLL
  for (int i = 0; i < row_tiles; ++i) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * i + 8 * half + lane / 4;
      float total = 0;
      const float lse = kLn2 * softmax.log2_sum(i, half, p.scale.scale, total);
      const float share = total == 0 ? 0 : 1 / total;
      MOBA_UNROLL
      for (int j = 0; j < out_tiles; ++j) {
        auto* to = reinterpret_cast<std::uint32_t*>(rows.vec(row, j)) + lane % 4;
        *to = ptx::pack<T>(out[i][j][2 * half] * share, out[i][j][2 * half + 1] * share);
      }
      if (lane % 4 != 0 || row >= work.count) continue;
      if (!last_word) {
        p.partial_lse[slot_at(work.head, p.rows, p.ranks, slots[row])] = lse;
      } else if (p.lse != nullptr) {
        const std::int64_t slice_row = slots[row];
        const std::int64_t q_head = (p.head0 + work.head) * p.heads_per_kv + slice_row % p.heads_per_kv;
        p.lse[q_head * p.tokens + p.token0 + slice_row / p.heads_per_kv] = lse;
      }
    }
  }
  store_rows<8 * out_tiles, row_tiles, out_tiles>(p, rows, slots, work, warp_row);
}

/// Parameters of one launch.
template <typename T>
AttendParams<T> attend_params(const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
                              const Plan& plan, const Partials& partials, const Outputs& outputs) {
  return {.q = view_of<const T>(call.q),
          .k = view_of<const T>(call.k),
          .v = view_of<const T>(call.v),
          .batch = batch,
          .plan = plan,
          .entries = plan.entries,
          .block_size = call.routing.block_size,
          .heads_per_kv = call.heads_per_kv,
          .head0 = slice.head0,
          .heads = slice.heads(),
          .rows = call.rows(slice),
          .width = call.width(),
          .ranks = call.ranks(),
          .token0 = static_cast<std::int32_t>(slice.token0),
          .token1 = static_cast<std::int32_t>(slice.token1),
          .diagonal = call.has_diagonal(),
          .causal = call.routing.causal,
          .scale = tile::scale_of(call.scale),
          .out = view_of<T>(outputs.out),
          .lse = outputs.lse,
          .tokens = call.tokens,
          .partials = static_cast<T*>(partials.out),
          .partial_lse = partials.lse};
}

/// Upper bound on the work tiles, which only the device counts.
inline std::int64_t max_work_tiles(const DeviceCall& call, const WorkSlice& slice) {
  return slice.heads() * (call.rows(slice) * call.width() / kTileRows +
                          (call.width() > 0 ? call.max_blocks() : 0) + call.max_tiles(slice));
}

}  // namespace moba::cuda
