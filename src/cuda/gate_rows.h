#pragma once

#include <algorithm>

#include "cuda/divisor.h"
#include "cuda/gate.h"
#include "cuda/tile/top8.h"
#include "cuda/tile/topk.h"

/// Rows of the gate in the sm80 and sm90 kernels: their candidates, their running top-k and their results.
namespace moba::cuda {

template <typename T>
struct GateParams {
  View<const T> q;
  const T* means;  // [heads, max_blocks, D]
  Batch batch;
  Divisor by_block_size, by_heads_per_kv;
  std::int64_t max_blocks, max_tiles;
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
  /// Returns row r of a tile: a packed token, and which of the kv head's query heads.
  struct Row {
    std::int32_t token, member;
  };
  MOBA_DEVICE Row row_at(const Tile& tile, int r) const {
    const auto row = static_cast<std::uint32_t>(tile.first_row + r), query = by_heads_per_kv.quotient(row);
    return {token0 + static_cast<std::int32_t>(query),
            static_cast<std::int32_t>(row - query * by_heads_per_kv.divisor)};
  }
  MOBA_DEVICE std::int64_t q_head(std::int64_t head, const Row& row) const {
    return (head0 + head) * heads_per_kv + row.member;
  }
  /// Returns the query of row r of a tile, and where its selection goes.
  MOBA_DEVICE const T* query(const Tile& tile, std::int64_t head, int r) const {
    const Row row = row_at(tile, r);
    return q.row(row.token, q_head(head, row));
  }
  MOBA_DEVICE std::int32_t* selection_of(const Tile& tile, std::int64_t head, int r) const {
    const Row row = row_at(tile, r);
    return selection.of(q_head(head, row), row.token);
  }
  /// Returns the block of that query; -1 before the first key.
  MOBA_DEVICE std::int32_t own_block_at(const Tile& tile, int r) const {
    const std::int32_t position = row_at(tile, r).token - batch.q_starts[tile.sequence] + tile.before;
    return position < 0 ? -1 : static_cast<std::int32_t>(by_block_size.quotient(position));
  }
};

/// Returns the candidates of a row with that own block, of which the first are behind the sinks.
template <typename T>
MOBA_DEVICE tile::Candidates candidates_given(const GateParams<T>& p, const Tile& tile, std::int32_t own) {
  if (p.causal) return {p.sinks, own < 0 ? 0 : own, -1};
  const auto keys = static_cast<std::uint32_t>(tile.keys), whole = p.by_block_size.quotient(keys);
  const bool has_rest = whole * p.by_block_size.divisor != keys;
  return {p.sinks, static_cast<std::int32_t>(whole + (has_rest ? 1 : 0)), p.own_block ? own : -1};
}
template <typename T>
MOBA_DEVICE tile::Candidates candidates_of(const GateParams<T>& p, const Tile& tile, int row) {
  return candidates_given(p, tile, p.own_block_at(tile, row));
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
  using Memory = typename TopK::Memory;
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
                       Memory& memory, tile::Key* heaps)
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

  /// Pushes the scores against the means of blocks [first, first + 8 tiles).
  template <int tiles>
  MOBA_DEVICE void push(const float (&scores)[tiles][4], std::int32_t first) {
    MOBA_UNROLL
    for (int group = 0; group < 8 * tiles / kGroup; ++group) {
      float of_group[1][4][4];
      MOBA_UNROLL
      for (int i = 0; i < 16; ++i) of_group[0][i / 4][i % 4] = scores[4 * group + i / 4][i % 4];
      if (first + group * kGroup < end()) push(of_group, first + group * kGroup);
    }
  }

  /// Pushes the scores against the means of blocks [first, first + kGroup).
  template <int row_tiles>
  MOBA_DEVICE void push(const float (&scores)[row_tiles][4][4], std::int32_t first) {
    const std::int32_t group_end = first + kGroup;
    const bool is_masked = first < p.sinks || group_end > first_candidates.last ||
                           (p.own_block && group_end > first_candidates.own && first <= last_candidates.own);
    topk.push(scores, first, is_masked ? allowed(first) : ~0U);
  }

  /// Writes the selection of the rows.
  MOBA_DEVICE void finish() {
    topk.merge();
    if (!has_row()) return;
    write_row(topk.heap, p.causal ? p.own_block_at(tile, lane_row()) : -1,
              p.selection_of(tile, head, lane_row()), p.selection.stride);
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

/// What selecting for a row takes: the end of its candidates, its own block, -1 if it is not selected, and
/// where its selection goes; null for a missing row.
struct GateRow {
  std::int32_t end = 0, own = -1;
  std::int32_t* to = nullptr;
};

template <typename T>
MOBA_DEVICE GateRow gate_row(const GateParams<T>& p, const Tile& tile, std::int64_t head, int row) {
  if (row >= tile.count) return {};
  const std::int32_t own = p.own_block_at(tile, row);
  return {candidates_given(p, tile, own).last, p.causal || p.own_block ? own : -1,
          p.selection_of(tile, head, row)};
}

/// The rows of a warp, of which each selects at most tile::kTop blocks by score or as sinks.
template <typename T>
struct Top8Rows {
  using TopK = tile::Top8;

  const GateParams<T>& p;
  const GateRow* rows;
  TopK topk;
  tile::Candidates candidates[TopK::kUnits];  // of this lane's rows
  std::int32_t common_end = 0, all_end = 0;   // of the candidates of every row, and of any

  /// The first `count` of 16 rows exist.
  MOBA_DEVICE Top8Rows(const GateParams<T>& params, const GateRow* of, int count, TopK::Memory& memory)
      : p(params), rows(of), topk{memory} {
    MOBA_UNROLL
    for (int unit = 0; unit < TopK::kUnits; ++unit) {
      const GateRow row = rows[TopK::row_of(unit)];
      candidates[unit] = {p.sinks, row.end, p.causal ? -1 : row.own};
      topk.begin(unit, row.to == nullptr ? 0 : p.width - forced(candidates[unit]));
    }
    if (count <= 0) return;
    common_end = rows[0].end;
    all_end = rows[(count < TopK::kRows ? count : TopK::kRows) - 1].end;
  }

  MOBA_DEVICE std::int32_t end() const { return all_end; }

  /// Sets the scores of what is no candidate to -inf; they are against the means of blocks [first, first + 8
  /// tiles).
  template <int tiles>
  MOBA_DEVICE void mask(float (&scores)[tiles][4], std::int32_t first) const {
    if (first >= p.sinks && first + 8 * tiles <= common_end && !p.own_block) return;
    TopK::for_scores<tiles>([&](int unit, int column) {
      float& score = scores[column / 2][2 * unit + column % 2];
      if (!candidates[unit].has(TopK::block_at(first, column))) score = -ptx::infinity();
    });
  }

  /// Pushes masked scores. Tiles come from the last to the first.
  template <int tiles>
  MOBA_DEVICE void push(const float (&scores)[tiles][4], std::int32_t first) {
    topk.push(scores, first, all_end);
  }

  /// Writes the selection of the rows.
  MOBA_DEVICE void finish() {
    topk.drop_low();
    MOBA_UNROLL
    for (int unit = 0; unit < TopK::kUnits; ++unit) {
      int& count = topk.counts[unit];  // from here on of the row
      count += ptx::shfl_xor(count, 1);
      count += ptx::shfl_xor(count, 2);
      if (ptx::lane() % 4 == 0) {
        add_unordered(unit, count);
        add_forced(unit, count);
      }
      count = ptx::shfl(count, ptx::lane() / 4 * 4);
    }
    ptx::syncwarp();
    MOBA_UNROLL
    for (int unit = 0; unit < TopK::kUnits; ++unit) write(unit);
  }

 private:
  MOBA_DEVICE static std::int32_t sinks_of(const tile::Candidates& of) { return std::min(of.first, of.last); }
  MOBA_DEVICE static bool forces_own(const tile::Candidates& of) { return of.own >= sinks_of(of); }
  MOBA_DEVICE static std::int32_t forced(const tile::Candidates& of) {
    return sinks_of(of) + (forces_own(of) ? 1 : 0);
  }

  /// Adds the latest of the blocks whose scores are -inf or NaN, which are never appended, to a row that has
  /// too few others.
  MOBA_DEVICE void add_unordered(int unit, int& count) {
    const tile::Candidates& of = candidates[unit];
    const int wanted = std::min(topk.k[unit], of.last - forced(of));
    for (std::int32_t block = of.last - 1; count < wanted; --block) {
      bool is_new = of.has(block);
      for (int i = 0; i < count; ++i) is_new &= topk.entry(unit, i).block != block;
      if (is_new) topk.entry(unit, count++) = {-ptx::infinity(), block};
    }
  }

  MOBA_DEVICE void add_forced(int unit, int& count) {
    const tile::Candidates& of = candidates[unit];
    for (std::int32_t block = 0; block < sinks_of(of); ++block) topk.entry(unit, count++) = {0, block};
    if (forces_own(of)) topk.entry(unit, count++) = {0, of.own};
  }

  /// Writes the blocks of a row in ascending order, then its own if causal. Each lane of the four writes a
  /// quarter.
  MOBA_DEVICE void write(int unit) {
    const int count = topk.counts[unit];
    // Sorted largest first: complements of the blocks, and 0 for none.
    std::uint32_t blocks[tile::kTop];
    MOBA_UNROLL
    for (int i = 0; i < tile::kTop; ++i)
      blocks[i] = i < count ? ~static_cast<std::uint32_t>(topk.entry(unit, i).block) : 0;
    tile::sort(blocks);
    const GateRow row = rows[TopK::row_of(unit)];
    if (row.to == nullptr) return;
    const std::int32_t last = p.causal ? row.own : -1;
    const auto block_at = [&](int i, std::uint32_t complement) {
      return i < count ? static_cast<std::int32_t>(~complement) : i == count ? last : -1;
    };
    MOBA_UNROLL
    for (int i = 0; i < tile::kTop; ++i) {
      if (i % 4 == ptx::lane() % 4 && i < p.selection.stride) row.to[i] = block_at(i, blocks[i]);
    }
    for (int i = tile::kTop + ptx::lane() % 4; i < p.selection.stride; i += 4) row.to[i] = block_at(i, 0);
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
          .by_block_size = Divisor(std::min(call.routing.block_size, kMaxPosition)),
          .by_heads_per_kv = Divisor(call.heads_per_kv),
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
