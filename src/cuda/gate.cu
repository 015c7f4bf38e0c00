// Scores and selects in one pass: a thread block holds a tile of rows, whose queries stay in registers; the
// tensor cores compute their products with a group of means at a time, and the scores that reach the
// threshold of their row enter its running top-k (tile/topk.h).
#include "cuda/gate.h"

#include "cuda/ptx/barrier.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/warp.h"
#include "cuda/tile/swizzled_tile.h"
#include "cuda/tile/topk.h"
#include "selection.h"

namespace moba::cuda {
namespace {

/// Shape of a tile: as many warps as keep the queries of a warp in 64 registers.
template <int head_dim>
struct TileShape {
  static constexpr int kWarps = head_dim > 128 ? 8 : 4;
  static constexpr int kThreads = kWarps * ptx::kLanes;
  static constexpr int kWarpRows = kTileRows / kWarps, kRowTiles = kWarpRows / 16;
  static constexpr int kMeans = head_dim > 128 ? 32 : 64;  // of a stage of the pipeline
  static constexpr int kGroupTiles = 4, kGroup = 8 * kGroupTiles;
  static constexpr int kStages = 2;
  static constexpr int kBlocksPerMultiprocessor = head_dim > 128 ? 1 : 3;
  using TopK = tile::TopK<kRowTiles, kGroupTiles>;

  /// Elements of the queries, and of the stages of means that take their place.
  static constexpr int kElements = std::max(kTileRows, kStages* kMeans) * head_dim;
  static constexpr std::size_t kBytes = kElements * 2 + kWarps * sizeof(typename TopK::Memory);
};

/// Tests that the heaps fit into shared memory beside the tiles.
bool heaps_are_shared(const DeviceCall& call) {
  return call.head_dim <= 128 && call.width() <= 16;
}

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

template <typename T, int head_dim>
MOBA_KERNEL(TileShape<head_dim>::kThreads, TileShape<head_dim>::kBlocksPerMultiprocessor)
gate_kernel(MOBA_GRID_CONSTANT GateParams<T> p) {
  using C = TileShape<head_dim>;
  using TopK = typename C::TopK;
  constexpr int kRowTiles = C::kRowTiles;
  const std::int32_t tiles = p.batch.tile_starts[p.batch.sequences];
  const std::int64_t head = ptx::block_y();
  // The last queries have the most candidates and come first.
  const std::int32_t index = tiles - 1 - static_cast<std::int32_t>(ptx::block_x());
  if (index < 0) return;
  const Tile tile = tile_at(p.batch, index, p.token0, p.token1, p.heads_per_kv);
  const auto q_head_of = [&](std::int64_t row) {
    return (p.head0 + head) * p.heads_per_kv + row % p.heads_per_kv;
  };
  const auto token_of = [&](std::int64_t row) { return p.token0 + row / p.heads_per_kv; };

  auto* const elements = reinterpret_cast<T*>(ptx::shared());
  auto* const memory = reinterpret_cast<typename TopK::Memory*>(elements + C::kElements);
  const tile::SwizzledTile<T, head_dim> q{elements};
  tile::gather_rows<kTileRows, C::kThreads>(q, [&](int r) -> const T* {
    const std::int64_t row = tile.first_row + r;
    return r < tile.count ? p.q.row(token_of(row), q_head_of(row)) : nullptr;
  });
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::syncthreads();
  const int warp_row = ptx::warp() * C::kWarpRows;
  std::uint32_t queries[head_dim / 16][kRowTiles][4];
  MOBA_UNROLL
  for (int k = 0; k < head_dim / 16; ++k) {
    MOBA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) load_a(queries[k][i], q, warp_row + 16 * i, k, ptx::lane());
  }
  ptx::syncthreads();  // the means take the place of the queries

  // Lane r of a warp keeps the heap of row r.
  const int lane_row = warp_row + ptx::lane();
  const bool has_row = ptx::lane() < C::kWarpRows && lane_row < tile.count;
  tile::Key* const heaps = p.heaps != nullptr ? p.heaps + (head * p.max_tiles + index) * kTileRows * p.width
                                              : reinterpret_cast<tile::Key*>(memory + C::kWarps);
  TopK topk{memory[ptx::warp()], {heaps + std::int64_t{warp_row} * p.width + ptx::lane(), p.width}};
  if (ptx::lane() < C::kWarpRows)
    init_heap(topk.heap, candidates_of(p, tile, has_row ? lane_row : 0), !has_row);
  topk.merge();  // of nothing: it sets the thresholds

  // Rows ascend, so the first and last of a warp bound the candidates of all.
  const int last_row = std::min(warp_row + C::kWarpRows, static_cast<int>(tile.count)) - 1;
  const tile::Candidates first_candidates = candidates_of(p, tile, std::min(warp_row, last_row)),
                         last_candidates = candidates_of(p, tile, last_row);
  const std::int32_t warp_blocks = warp_row < tile.count ? last_candidates.last : 0;
  const std::int32_t max_blocks = candidates_of(p, tile, tile.count - 1).last;
  const auto needs_mask = [&](std::int32_t first) {
    const std::int32_t end = first + C::kGroup;
    return first < p.sinks || end > first_candidates.last ||
           (p.own_block && end > first_candidates.own && first <= last_candidates.own);
  };

  const auto allowed = [&](std::int32_t first) {
    std::uint32_t mask = 0;
    MOBA_UNROLL
    for (int unit = 0; unit < TopK::kUnits; ++unit) {
      const tile::Candidates candidates = candidates_of(p, tile, warp_row + TopK::row_of(unit));
      MOBA_UNROLL
      for (int column = 0; column < TopK::kColumns; ++column) {
        if (candidates.has(TopK::block_at(first, column))) mask |= 1U << (unit * TopK::kColumns + column);
      }
    }
    return mask;
  };

  const T* means = p.means + mean_offset(head, p.max_blocks, p.batch.block_starts[tile.sequence], head_dim);
  const auto stage = [&](std::int32_t first) {
    return tile::SwizzledTile<T, head_dim>{elements + first / C::kMeans % C::kStages * C::kMeans * head_dim};
  };
  const auto load = [&](std::int32_t first) {
    tile::load_rows<C::kMeans, C::kThreads>(stage(first), means + static_cast<std::int64_t>(first) * head_dim,
                                            head_dim, max_blocks - first);
    ptx::cp_async_commit();
  };
  if (max_blocks > 0) load(0);
  for (std::int32_t first = 0; first < max_blocks; first += C::kGroup) {
    if (first % C::kMeans == 0) {
      ptx::cp_async_wait<0>();
      ptx::syncthreads();  // this stage is full, the other one is no longer read
      if (first + C::kMeans < max_blocks) load(first + C::kMeans);
    }
    if (first >= warp_blocks) continue;
    float scores[kRowTiles][C::kGroupTiles][4] = {};
    tile::gemm_nt(scores, queries, stage(first), first % C::kMeans);
    topk.push(scores, first, needs_mask(first) ? allowed(first) : ~0U);
  }
  topk.merge();
  if (!has_row) return;
  const std::int64_t row = tile.first_row + lane_row;
  write_row(topk.heap, p.causal ? own_block_of(p, tile, lane_row) : -1,
            p.selection.of(q_head_of(row), token_of(row)), p.selection.stride);
}

constexpr int kListThreads = 128;

struct ListParams {
  SelectionRows selection;
  Batch batch;
  std::int64_t block_size, heads_per_kv, head0, rows, token0;
  bool causal, is_dense;
};

/// Uses one thread per row.
MOBA_KERNEL(kListThreads, 8) list_unscored_kernel(MOBA_GRID_CONSTANT ListParams p) {
  const std::int64_t head = ptx::block_y();
  const std::int64_t row = std::int64_t{ptx::block_x()} * kListThreads + ptx::thread();
  if (row >= p.rows) return;
  const auto token = static_cast<std::int32_t>(p.token0 + row / p.heads_per_kv);
  const std::int32_t s = sequence_of(p.batch.q_starts, p.batch.sequences, token);
  const std::int32_t keys = p.batch.k_starts[s + 1] - p.batch.k_starts[s];
  const std::int32_t last = p.causal ? token + keys - p.batch.q_starts[s + 1] : keys - 1;
  const std::int64_t end = last < 0 ? 0 : last / p.block_size + 1,
                     begin = p.is_dense || end == 0 ? 0 : end - 1;
  std::int32_t* to = p.selection.of((p.head0 + head) * p.heads_per_kv + row % p.heads_per_kv, token);
  for (std::int64_t i = 0; i < p.selection.stride; ++i)
    to[i] = begin + i < end ? static_cast<std::int32_t>(begin + i) : -1;
}

}  // namespace

std::uint64_t* carve_gate(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice) {
  if (heaps_are_shared(call)) return nullptr;
  return layout.take<std::uint64_t>(slice.heads() * call.max_tiles(slice) * kTileRows * call.width());
}

SelectionRows carve_selection(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice) {
  const std::int64_t stride = call.selection_width;
  return rows_in(layout.take<std::int32_t>(slice.heads() * call.rows(slice) * stride), call, slice, stride);
}

void gate(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
          const void* means, std::uint64_t* heaps, const SelectionRows& selection) {
  with_type(call, [&]<typename T, int head_dim>() {
    using C = TileShape<head_dim>;
    const GateParams<T> params{.q = view_of<const T>(call.q),
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
    const std::size_t heap_bytes =
        heaps == nullptr ? static_cast<std::size_t>(kTileRows * call.width()) * sizeof(tile::Key) : 0;
    stream.launch("gate", gate_kernel<T, head_dim>, {params.max_tiles, slice.heads()}, C::kThreads,
                  C::kBytes + heap_bytes, params);
  });
}

void write_unscored_selection(Stream& stream, const DeviceCall& call, const WorkSlice& slice,
                              const Batch& batch, const SelectionRows& selection) {
  const ListParams params{.selection = selection,
                          .batch = batch,
                          .block_size = call.requested.block_size,
                          .heads_per_kv = call.heads_per_kv,
                          .head0 = slice.head0,
                          .rows = call.rows(slice),
                          .token0 = slice.token0,
                          .causal = call.routing.causal,
                          .is_dense = call.is_dense};
  stream.launch("list_unscored", list_unscored_kernel, {divide_up(params.rows, kListThreads), slice.heads()},
                kListThreads, 0, params);
}

}  // namespace moba::cuda
