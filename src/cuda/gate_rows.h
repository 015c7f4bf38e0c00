#pragma once

#include "cuda/gate.h"
#include "cuda/tile/topk.h"

/// Rows of the gate in the sm80 and sm90 kernels: their candidates, their running top-k and their results.
namespace moba::cuda {

template <typename T>
struct GateParams {
  View<const T> q;
  const T* means;  // [heads, max_blocks, D]
  Batch batch;
  std::int64_t block_size, max_blocks, max_tiles;
  std::int64_t heads_per_kv, head0;
  std::int32_t token0, token1;
  std::int32_t width, sinks;
  bool causal, own_block;
  tile::Key* heaps;  // [heads, max_tiles, warps, width, rows of a warp]; null: in shared memory
  SelectionRows selection;

  /// Returns the heaps of tile `index`: `shared`, or those in global memory.
  MOBA_DEVICE tile::Key* heaps_of(std::int64_t head, std::int32_t index, tile::Key* shared) const {
    return heaps == nullptr ? shared : heaps + (head * max_tiles + index) * kTileRows * width;
  }
  /// Returns row r of a tile.
  MOBA_DEVICE const T* query(const Tile& tile, std::int64_t head, int r) const {
    const std::int64_t row = tile.first_row + r;
    return q.row(token0 + row / heads_per_kv, (head0 + head) * heads_per_kv + row % heads_per_kv);
  }
};

template <typename T>
MOBA_DEVICE std::int32_t own_block_of(const GateParams<T>& p, const Tile& tile, int row) {
  const std::int32_t position = tile.position_of(row, p.heads_per_kv);
  return position < 0 ? -1 : static_cast<std::int32_t>(position / p.block_size);
}

/// Returns the candidates of a row, of which the first are behind the sinks.
template <typename T>
MOBA_DEVICE tile::Candidates candidates_of(const GateParams<T>& p, const Tile& tile, int row) {
  const std::int32_t own = own_block_of(p, tile, row);
  if (p.causal) return {p.sinks, own < 0 ? 0 : own, -1};
  return {p.sinks, static_cast<std::int32_t>(divide_up(tile.keys, p.block_size)), p.own_block ? own : -1};
}

/// Fills the heap of a row with its forced blocks, sinks and own, above empty entries; that of a missing row
/// so that nothing enters.
template <int stride>
MOBA_DEVICE void init_heap(const tile::Heap<stride>& heap, const tile::Candidates& candidates,
                           bool is_missing) {
  const std::int32_t blocks = candidates.last, sinks = candidates.first < blocks ? candidates.first : blocks;
  const std::int32_t own = candidates.own >= sinks ? candidates.own : -1;
  const std::int32_t forced = sinks + (own >= 0 ? 1 : 0);
  for (std::int32_t i = 0; i < heap.size; ++i) {
    const std::int32_t n = i - (heap.size - forced);  // of the forced blocks, ascending
    heap[i] = is_missing ? tile::key_of(tile::kForced, 0)
              : n < 0    ? 0
                         : tile::key_of(tile::kForced, n < sinks ? n : own);
  }
}

/// Writes the blocks of a heap in ascending order, then the row's own block if causal.
template <int heap_stride>
MOBA_DEVICE void write_row(const tile::Heap<heap_stride>& heap, std::int32_t own, std::int32_t* to,
                           std::int64_t stride) {
  constexpr tile::Key kNone = ~tile::Key{0};
  for (std::int32_t i = 0; i < heap.size; ++i) heap[i] = heap[i] == 0 ? kNone : heap[i] & 0xFFFFFFFFU;
  for (std::int32_t i = heap.size / 2 - 1; i >= 0; --i) heap.sift_down(i, heap[i]);
  std::int64_t count = 0;
  for (; count < heap.size && heap.root() != kNone; ++count) {
    to[count] = static_cast<std::int32_t>(static_cast<std::uint32_t>(heap.root()));
    heap.sift_down(0, kNone);
  }
  if (own >= 0) to[count++] = own;
  for (; count < stride; ++count) to[count] = -1;
}

/// The rows [warp_row, warp_row + TopK::kRows) of a tile, for which one warp selects. Lane r keeps the heap
/// of row r.
template <typename T, typename TopK>
struct WarpRows {
  /// Blocks of a group, whose scores are pushed at a time.
  static constexpr int kGroup = 4 * TopK::kColumns;

  const GateParams<T>& p;
  const Tile& tile;
  std::int64_t head;
  int warp_row;
  TopK topk;
  // Rows ascend, so the first and the last bound the candidates of all.
  tile::Candidates first_candidates{}, last_candidates{};

  /// `heaps` holds the heaps of the tile.
  MOBA_DEVICE WarpRows(const GateParams<T>& params, const Tile& of, std::int64_t kv_head, int row,
                       typename TopK::Memory& memory, tile::Key* heaps)
      : p(params),
        tile(of),
        head(kv_head),
        warp_row(row),
        topk{memory, {heaps + std::int64_t{row} * params.width + ptx::lane(), params.width}} {
    const int last_row = std::min(warp_row + TopK::kRows, static_cast<int>(tile.count)) - 1;
    first_candidates = candidates_of(p, tile, std::min(warp_row, last_row));
    last_candidates = candidates_of(p, tile, last_row);
    if (ptx::lane() < TopK::kRows)
      init_heap(topk.heap, candidates_of(p, tile, has_row() ? lane_row() : 0), !has_row());
    topk.merge();  // of nothing: it sets the thresholds
  }

  MOBA_DEVICE int lane_row() const { return warp_row + ptx::lane(); }
  MOBA_DEVICE bool has_row() const { return ptx::lane() < TopK::kRows && lane_row() < tile.count; }
  /// Returns the end of the blocks that any row may select.
  MOBA_DEVICE std::int32_t end() const { return warp_row < tile.count ? last_candidates.last : 0; }

  /// Pushes the scores against the means of blocks [first, first + kGroup).
  template <int row_tiles, int column_tiles>
  MOBA_DEVICE void push(const float (&scores)[row_tiles][column_tiles][4], std::int32_t first) {
    const std::int32_t group_end = first + kGroup;
    const bool is_masked = first < p.sinks || group_end > first_candidates.last ||
                           (p.own_block && group_end > first_candidates.own && first <= last_candidates.own);
    topk.push(scores, first, is_masked ? allowed(first) : ~0U);
  }

  /// Writes the selection of the rows.
  MOBA_DEVICE void finish() {
    topk.merge();
    if (!has_row()) return;
    const std::int64_t row = tile.first_row + lane_row();
    write_row(topk.heap, p.causal ? own_block_of(p, tile, lane_row()) : -1,
              p.selection.of((p.head0 + head) * p.heads_per_kv + row % p.heads_per_kv,
                             p.token0 + row / p.heads_per_kv),
              p.selection.stride);
  }

 private:
  /// Mask of the scores of a group that are those of candidates.
  MOBA_DEVICE std::uint32_t allowed(std::int32_t first) const {
    std::uint32_t mask = 0;
    MOBA_NO_UNROLL
    for (int unit = 0; unit < TopK::kUnits; ++unit) {
      const tile::Candidates candidates = candidates_of(p, tile, warp_row + TopK::row_of(unit));
      MOBA_NO_UNROLL
      for (int column = 0; column < TopK::kColumns; ++column) {
        if (candidates.has(TopK::block_at(first, column))) mask |= 1U << (unit * TopK::kColumns + column);
      }
    }
    return mask;
  }
};

/// Returns whether the heaps fit into shared memory beside the tiles.
inline bool heaps_are_shared(const DeviceCall& call) {
  return call.head_dim <= 128 && call.width() <= 16;
}
/// Bytes of the heaps of a tile in shared memory; 0 if they are in global memory.
inline std::size_t shared_heap_bytes(const DeviceCall& call) {
  return heaps_are_shared(call) ? static_cast<std::size_t>(kTileRows * call.width()) * sizeof(tile::Key) : 0;
}

template <typename T>
GateParams<T> gate_params(const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
                          const void* means, std::uint64_t* heaps, const SelectionRows& selection) {
  return {.q = view_of<const T>(call.q),
          .means = static_cast<const T*>(means),
          .batch = batch,
          .block_size = call.routing.block_size,
          .max_blocks = call.max_blocks(),
          .max_tiles = call.max_tiles(slice),
          .heads_per_kv = call.heads_per_kv,
          .head0 = slice.head0,
          .token0 = static_cast<std::int32_t>(slice.token0),
          .token1 = static_cast<std::int32_t>(slice.token1),
          .width = static_cast<std::int32_t>(call.width()),
          .sinks = static_cast<std::int32_t>(call.routing.sink_blocks),
          .causal = call.routing.causal,
          .own_block = call.routing.own_block,
          .heaps = heaps,
          .selection = selection};
}

}  // namespace moba::cuda
