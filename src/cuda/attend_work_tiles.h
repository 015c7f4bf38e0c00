#pragma once

#include <algorithm>
#include <limits>

#include "cuda/attend.h"
#include "cuda/divisor.h"
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
  std::int32_t block_size;  // at most the largest number of keys
  std::int64_t heads_per_kv, head0, heads;
  std::int64_t rows, width, ranks;  // of a head
  Divisor by_heads_per_kv, by_ranks;
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
struct alignas(8) WorkTile {
  bool diagonal = false;
  bool keeps_kv = false;  // sm_90a: the next work tile of the thread block has the same keys
  std::int32_t head = 0;  // of the slice
  std::int32_t count = 0;
  std::int32_t first_key = 0;  // of the sequence, packed
  std::int32_t begin = 0, end = 0, all_begin = 0, all_end = 0;
  std::uint32_t first_row = 0;  // diagonal: of the slice; routed: index of its entry in the list of the head
  /// Diagonal tiles: position of the query of row 0, and its query head in the group.
  std::int32_t position = 0, member = 0;

  /// Number of tiles of `keys` keys: at least one, which is masked where there are no keys.
  MOBA_DEVICE std::int32_t key_tiles(std::int32_t keys) const {
    return end > begin ? (end - begin + keys - 1) / keys : 1;
  }
  /// Tests that some row does not see some of the `keys` keys from `key` on.
  MOBA_DEVICE bool is_masked(std::int32_t key, std::int32_t keys) const {
    return key < all_begin || key + keys > all_end;
  }
  /// Tests that rows see different ones of them. Other keys that no row sees are after `end`.
  MOBA_DEVICE bool is_mixed(std::int32_t key, std::int32_t keys) const {
    return diagonal && is_masked(key, keys);
  }
};

constexpr std::uint32_t kNoSlot = 0xFFFFFFFFU;

/// Row of a work tile.
struct WorkRow {
  std::int64_t q_offset = kNoRow;  // of its query's elements
  std::uint32_t slot = 0;
};

/// Keys of its own block that the query at `position` sees; all keys without a causal mask.
template <typename T>
MOBA_DEVICE KeyRange diagonal_keys(const AttendParams<T>& p, std::int32_t position, std::int32_t keys) {
  if (!p.causal) return {0, keys};
  if (position < 0) return {0, 0};
  return {position - position % p.block_size, position + 1};
}

/// Element offset of a row in `view`, which is p.q or has the same tokens and heads.
template <typename T>
MOBA_DEVICE std::int64_t row_offset(const AttendParams<T>& p, const View<const T>& view, std::int32_t head,
                                    std::uint32_t row) {
  const std::uint32_t token = p.by_heads_per_kv.quotient(row),
                      member = row - token * p.by_heads_per_kv.divisor;
  return (std::int64_t{p.token0} + token) * view.token_stride +
         ((p.head0 + head) * p.heads_per_kv + member) * view.head_stride;
}

/// Counts the rows [first, first + max_rows) of a tile of `count` rows.
template <int max_rows>
MOBA_DEVICE std::int32_t rows_from(int first, std::int32_t count) {
  if constexpr (max_rows == kTileRows) return count;
  const std::int32_t left = count - first;
  return left < max_rows ? left : max_rows;
}

/// Returns diagonal tile `index`; tiles of the last queries, which see most keys, come first. Keys begin as
/// for the full tile, so that a row visits them in the same order for any slice.
template <int max_rows, typename T>
MOBA_DEVICE WorkTile diagonal_tile_at(const AttendParams<T>& p, std::uint32_t index, int first) {
  const auto heads = static_cast<std::uint32_t>(p.heads);
  const Tile tile =
      tile_at(p.batch, p.batch.tile_starts[p.batch.sequences] - 1 - static_cast<std::int32_t>(index / heads),
              p.token0, p.token1, p.heads_per_kv);
  const std::int32_t count = rows_from<max_rows>(first, tile.count);
  if (max_rows < kTileRows && count <= 0) return {};
  const std::int64_t row = tile.from + first;
  const auto visible = [&](std::int64_t sequence_row) {
    return diagonal_keys(p, tile.position_at(sequence_row, p.heads_per_kv), tile.keys);
  };
  const KeyRange first_visible = visible(row), last_visible = visible(row + count - 1);
  return {.diagonal = true,
          .head = static_cast<std::int32_t>(index % heads),
          .count = count,
          .first_key = tile.first_key,
          .begin = visible(tile.cut).begin,
          .end = last_visible.end,
          .all_begin = last_visible.begin,
          .all_end = first_visible.end,
          .first_row = static_cast<std::uint32_t>(tile.first_row + first),
          .position = tile.position_at(row, p.heads_per_kv),
          .member = static_cast<std::int32_t>(row % p.heads_per_kv)};
}

/// Returns routed tile `index`: rows that selected one block.
template <int max_rows, typename T>
MOBA_DEVICE WorkTile routed_tile_at(const AttendParams<T>& p, std::uint32_t index, int first) {
  const std::uint32_t full = p.plan.totals[Plan::kFull];
  const RoutedTile tile = index < full ? p.plan.full[index] : p.plan.partial[index - full];
  const std::int32_t sequence = sequence_of(p.batch.block_starts, p.batch.sequences, tile.block);
  const std::int32_t k_begin = p.batch.k_starts[sequence];
  const KeyRange keys = keys_of(tile.block - p.batch.block_starts[sequence], p.block_size,
                                p.batch.k_starts[sequence + 1] - k_begin);
  return {.head = tile.head,
          .count = rows_from<max_rows>(first, static_cast<std::int32_t>(tile.count)),
          .first_key = k_begin,
          .begin = keys.begin,
          .end = keys.end,
          .all_begin = keys.begin,
          .all_end = keys.end,
          .first_row = tile.first + static_cast<std::uint32_t>(first)};
}

/// Returns the `max_rows` rows of work tile `index` from row `first` on; `count` is at most 0 where the tile
/// has no such rows.
template <int max_rows = kTileRows, typename T>
MOBA_DEVICE WorkTile work_tile_at(const AttendParams<T>& p, std::uint32_t index, int first = 0) {
  const std::uint32_t routed = p.routed_tiles();
  return index < routed ? routed_tile_at<max_rows>(p, index, first)
                        : diagonal_tile_at<max_rows>(p, index - routed, first);
}

/// Returns the slot of the r-th row of a work tile; kNoSlot where there is no such row.
template <typename T>
MOBA_DEVICE std::uint32_t slot_of(const AttendParams<T>& p, const WorkTile& work, int r) {
  if (r >= work.count) return kNoSlot;
  const std::uint32_t index = work.first_row + static_cast<std::uint32_t>(r);
  const auto ranks = static_cast<std::uint32_t>(p.ranks), width = static_cast<std::uint32_t>(p.width);
  return work.diagonal ? index * ranks + width : p.entries[work.head * p.rows * p.width + index];
}

/// Returns the row of a work tile that has `slot`.
template <typename T>
MOBA_DEVICE WorkRow row_of(const AttendParams<T>& p, const WorkTile& work, std::uint32_t slot) {
  if (slot == kNoSlot) return {};
  return {row_offset(p, p.q, work.head, p.by_ranks.quotient(slot)), slot};
}

/// Returns the keys that the r-th row of a work tile sees.
template <typename T>
MOBA_DEVICE KeyRange visible_at(const AttendParams<T>& p, const WorkTile& work, int r) {
  if (!work.diagonal || !p.causal) return {work.begin, work.end};
  if (r >= work.count) return {};
  const std::uint32_t query = p.by_heads_per_kv.quotient(static_cast<std::uint32_t>(work.member + r));
  return diagonal_keys(p, work.position + static_cast<std::int32_t>(query), 0);
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

/// Keys that the rows of this lane see: rows lane / 4 and lane / 4 + 8 of each row tile.
template <int row_tiles>
struct VisibleKeys {
  KeyRange of[row_tiles][2];

  /// `bounds` has the keys of the rows of a diagonal tile; those of a routed one see all of its keys.
  MOBA_DEVICE VisibleKeys(const WorkTile& work, const KeyRange* bounds, int warp_row) {
    MOBA_UNROLL
    for (int i = 0; i < row_tiles; ++i) {
      MOBA_UNROLL
      for (int half = 0; half < 2; ++half) {
        of[i][half] = work.diagonal ? bounds[warp_row + 16 * i + 8 * half + ptx::lane() / 4]
                                    : KeyRange{work.begin, work.end};
      }
    }
  }
};

/// Calls visit(value, column, is_visible) for each key of a tile and row, with the columns counted from
/// `first_column()` on. `key` is the key of column 0.
MOBA_DEVICE int first_column() {
  return ptx::lane() % 4 * 2;
}
template <int row_tiles, int key_tiles, typename Visit>
MOBA_DEVICE void for_keys(float (&values)[row_tiles][key_tiles][4], const VisibleKeys<row_tiles>& visible,
                          std::int32_t key, Visit&& visit) {
  MOBA_UNROLL
  for (int i = 0; i < row_tiles; ++i) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const std::int32_t begin = visible.of[i][half].begin - key - first_column(),
                         end = visible.of[i][half].end - key - first_column();
      MOBA_UNROLL
      for (int j = 0; j < key_tiles; ++j) {
        MOBA_UNROLL
        for (int e = 0; e < 2; ++e)
          visit(values[i][j][2 * half + e], 8 * j + e, 8 * j + e >= begin && 8 * j + e < end);
      }
    }
  }
}

/// Masks logits of keys that a row does not see.
template <int row_tiles, int key_tiles>
MOBA_DEVICE void apply_mask(float (&logits)[row_tiles][key_tiles][4], const VisibleKeys<row_tiles>& visible,
                            std::int32_t key) {
  for_keys(logits, visible, key, [](float& logit, int, bool is_visible) {
    if (!is_visible) logit = -ptx::infinity();
  });
}

/// Adds the poison of the keys that a row sees to its weights.
template <int row_tiles, int key_tiles>
MOBA_DEVICE void add_poison(float (&weights)[row_tiles][key_tiles][4], const float* poison,
                            const VisibleKeys<row_tiles>& visible, std::int32_t key) {
  const float* from = poison + first_column();
  for_keys(weights, visible, key, [&](float& weight, int column, bool is_visible) {
    if (is_visible) weight += from[column];
  });
}

/// Returns where the result of a row goes: its slot, or the output.
template <int head_dim, typename T>
MOBA_DEVICE T* result_of(const AttendParams<T>& p, std::int32_t head, std::uint32_t slot) {
  if (p.width != 0) return p.partials + slot_at(head, p.rows, p.ranks, slot) * head_dim;
  const auto heads_per_kv = static_cast<std::uint32_t>(p.heads_per_kv);
  return p.out.row(std::int64_t{p.token0} + slot / heads_per_kv,
                   (p.head0 + head) * p.heads_per_kv + slot % heads_per_kv);
}

/// Stores the log-sum-exp of a row.
template <typename T>
MOBA_DEVICE void store_lse(const AttendParams<T>& p, std::int32_t head, std::uint32_t slot, float lse) {
  if (p.width != 0) {
    p.partial_lse[slot_at(head, p.rows, p.ranks, slot)] = lse;
  } else if (p.lse != nullptr) {
    const auto heads_per_kv = static_cast<std::uint32_t>(p.heads_per_kv);
    const std::int64_t q_head = (p.head0 + head) * p.heads_per_kv + slot % heads_per_kv;
    p.lse[q_head * p.tokens + p.token0 + slot / heads_per_kv] = lse;
  }
}

/// Copies the rows of this warp from shared memory to the output or to their slots.
template <int head_dim, int row_tiles, int out_tiles, typename T, typename Rows>
MOBA_DEVICE void store_rows(const AttendParams<T>& p, const Rows& rows, const std::uint32_t* slots,
                            const WorkTile& work, int warp_row, int first_vec = 0) {
  ptx::syncwarp();
  for (int i = ptx::lane(); i < 16 * row_tiles * out_tiles; i += ptx::kLanes) {
    const int row = warp_row + i / out_tiles, vec = first_vec + i % out_tiles;
    if (row >= work.count) break;
    *reinterpret_cast<ptx::Vec16*>(result_of<head_dim>(p, work.head, slots[row]) + vec * 8) =
        *reinterpret_cast<const ptx::Vec16*>(rows.vec(row, vec));
  }
}

/// Transposes a matrix of words over the four lanes of a row: word j of lane i becomes word i of lane j.
MOBA_DEVICE void transpose_quad(std::uint32_t (&words)[4]) {
  MOBA_UNROLL
  for (int distance = 1; distance < 4; distance *= 2) {
    const bool upper = (ptx::lane() & distance) != 0;
    MOBA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) != 0) continue;
      const std::uint32_t received = ptx::shfl_xor(upper ? words[i] : words[i + distance], distance);
      words[i] = upper ? received : words[i];
      words[i + distance] = upper ? words[i + distance] : received;
    }
  }
}

/// Epilogue: normalises and stores the rows of this warp, of which the tile has `count`, in 16-byte vectors.
/// `slots` are those of the rows of this lane.
template <typename T, int row_tiles, int out_tiles>
MOBA_DEVICE void store_out(const AttendParams<T>& p, std::int32_t head, std::int32_t count, int warp_row,
                           const std::uint32_t (&slots)[row_tiles][2],
                           const float (&out)[row_tiles][out_tiles][4],
                           const tile::Softmax<row_tiles>& softmax) {
  const int lane = ptx::lane();
  MOBA_UNROLL
  for (int i = 0; i < row_tiles; ++i) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const bool exists = warp_row + 16 * i + 8 * half + lane / 4 < count;
      float total = 0;
      const float lse = kLn2 * softmax.log2_sum(i, half, p.scale.scale, total);
      const float share = total == 0 ? 0 : 1 / total;
      T* to = result_of<8 * out_tiles>(p, head, slots[i][half]) + lane % 4 * 8;
      MOBA_UNROLL
      for (int j = 0; j < out_tiles; j += 4) {
        std::uint32_t words[4];
        MOBA_UNROLL
        for (int e = 0; e < 4; ++e)
          words[e] = ptx::pack<T>(out[i][j + e][2 * half] * share, out[i][j + e][2 * half + 1] * share);
        transpose_quad(words);
        if (exists) *reinterpret_cast<ptx::Vec16*>(to + j * 8) = {words[0], words[1], words[2], words[3]};
      }
      if (exists && lane % 4 == 0) store_lse(p, head, slots[i][half], lse);
    }
  }
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
          .block_size = static_cast<std::int32_t>(
              std::min<std::int64_t>(call.routing.block_size, std::numeric_limits<std::int32_t>::max())),
          .heads_per_kv = call.heads_per_kv,
          .head0 = slice.head0,
          .heads = slice.heads(),
          .rows = call.rows(slice),
          .width = call.width(),
          .ranks = call.ranks(),
          .by_heads_per_kv = Divisor(call.heads_per_kv),
          .by_ranks = Divisor(std::max<std::int64_t>(call.ranks(), 1)),
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
