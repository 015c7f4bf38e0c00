// Scores and selects in one pass: a thread block holds a tile of rows, the tensor cores compute its products
// with 64 means at a time, and scores above the minimum of a row's top-k heap enter that heap.
#include "cuda/gate.h"

#include "cuda/ptx/barrier.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/warp.h"
#include "cuda/tile/order.h"
#include "cuda/tile/swizzled_tile.h"
#include "selection.h"

namespace moba::cuda {
namespace {

/// Tile shape, as in sm80/attend.cu.
template <int head_dim>
struct TileShape {
  static constexpr int kWarps = head_dim > 128 ? 8 : 4;
  static constexpr int kThreads = kWarps * ptx::kLanes;
  static constexpr int kRowTiles = kTileRows / (16 * kWarps);
  static constexpr int kMeans = head_dim > 128 ? 32 : 64;
  static constexpr int kBlocksPerMultiprocessor = head_dim > 128 ? 1 : 2;
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
  std::int64_t heads_per_kv, head0, rows;
  std::int32_t token0, token1;
  std::int32_t width, sinks;
  bool causal, own_block;
  std::uint64_t* best;  // [heads, max_tiles * kTileRows, width], null: in shared memory
  SelectionRows selection;
};

/// Score and block as one number, so that the better candidate is the larger: of equal scores the more
/// recent block; a NaN counts as -inf; 0 is an empty entry.
using Key = std::uint64_t;

MOBA_DEVICE Key key_of(std::uint32_t order, std::int32_t block) {
  return static_cast<Key>(order) << 32 | static_cast<std::uint32_t>(block);
}
/// Returns the lowest score that can enter a heap with that root.
MOBA_DEVICE float threshold_of(Key root) {
  const auto order = static_cast<std::uint32_t>(root >> 32);
  if (order == 0) return -ptx::infinity();
  if (order == tile::kForced) return ptx::infinity();
  return ptx::uint_as_float(order >> 31 != 0 ? order & 0x7FFFFFFFU : ~order);
}

/// Places `key` at position `i` of a min-heap and sifts it down.
MOBA_DEVICE void sift_down(Key* heap, std::int32_t width, std::int32_t i, Key key) {
  for (std::int32_t child = 2 * i + 1; child < width; child = 2 * i + 1) {
    if (child + 1 < width && heap[child + 1] < heap[child]) ++child;
    if (heap[child] >= key) break;
    heap[i] = heap[child];
    i = child;
  }
  heap[i] = key;
}

/// Candidate blocks of a row: [0, count), and its own block where it is not causal.
struct Candidates {
  std::int32_t count = 0, own = -1;
};

template <typename T>
MOBA_DEVICE Candidates candidates_of(const GateParams<T>& p, const Tile& tile, int row) {
  const std::int32_t position = tile.position_of(row, p.heads_per_kv);
  const std::int32_t own = position < 0 ? -1 : static_cast<std::int32_t>(position / p.block_size);
  if (p.causal) return {own < 0 ? 0 : own, -1};
  return {static_cast<std::int32_t>(divide_up(tile.keys, p.block_size)), p.own_block ? own : -1};
}

/// Pushes the scores of a row against means [first, first + columns) to its heap. The four lanes that share
/// the row take turns.
template <int column_tiles>
MOBA_DEVICE void push_scores(Key* heap, std::int32_t width, const float (&scores)[column_tiles][4], int half,
                             const Candidates& candidates, std::int32_t sinks, std::int32_t first) {
  const int own_lane = ptx::lane() % 4;
  const auto block_at = [&](int j, int e) { return first + 8 * j + own_lane * 2 + e; };
  const auto is_forced = [&](std::int32_t block) { return block < sinks || block == candidates.own; };
  float threshold = threshold_of(heap[0]);
  const auto may_enter = [&](int j, int e) {
    const std::int32_t block = block_at(j, e);
    return block < candidates.count && (!(scores[j][2 * half + e] < threshold) || is_forced(block));
  };

  bool any = false;
  MOBA_UNROLL
  for (int j = 0; j < column_tiles; ++j) any = any || may_enter(j, 0) || may_enter(j, 1);
  if (ptx::ballot(any) == 0) return;
  MOBA_UNROLL
  for (int j = 0; j < column_tiles; ++j) {
    MOBA_UNROLL
    for (int e = 0; e < 2; ++e) {
      const bool enters = may_enter(j, e);
      if (ptx::ballot(enters) == 0) continue;
      const std::int32_t block = block_at(j, e);
      const Key key =
          key_of(is_forced(block) ? tile::kForced : tile::order_of(scores[j][2 * half + e]), block);
      for (int turn = 0; turn < 4; ++turn) {
        if (enters && own_lane == turn && key > heap[0]) sift_down(heap, width, 0, key);
        ptx::syncwarp();
      }
      threshold = threshold_of(heap[0]);
      ptx::syncwarp();
    }
  }
}

/// Writes the blocks of a heap in ascending order, then the row's own block if causal.
MOBA_DEVICE void write_row(Key* heap, std::int32_t width, std::int32_t own, std::int32_t* to,
                           std::int64_t stride) {
  constexpr Key kNone = ~Key{0};
  for (std::int32_t i = 0; i < width; ++i) heap[i] = heap[i] == 0 ? kNone : heap[i] & 0xFFFFFFFFU;
  for (std::int32_t i = width / 2 - 1; i >= 0; --i) sift_down(heap, width, i, heap[i]);
  std::int64_t count = 0;
  for (; count < width && heap[0] != kNone; ++count) {
    to[count] = static_cast<std::int32_t>(static_cast<std::uint32_t>(heap[0]));
    sift_down(heap, width, 0, kNone);
  }
  if (own >= 0) to[count++] = own;
  for (; count < stride; ++count) to[count] = -1;
}

template <typename T, int head_dim>
MOBA_KERNEL(TileShape<head_dim>::kThreads, TileShape<head_dim>::kBlocksPerMultiprocessor)
gate_kernel(MOBA_GRID_CONSTANT GateParams<T> p) {
  using C = TileShape<head_dim>;
  constexpr int kRowTiles = C::kRowTiles, kMeanTiles = C::kMeans / 8;
  const auto index = static_cast<std::int32_t>(ptx::block_x());
  const std::int64_t head = ptx::block_y();
  if (index >= p.batch.tile_starts[p.batch.sequences]) return;
  const Tile tile = tile_at(p.batch, index, p.token0, p.token1, p.heads_per_kv);

  const tile::SwizzledTile<T, head_dim> q{reinterpret_cast<T*>(ptx::shared())};
  T* means_memory = q.data + kTileRows * head_dim;  // two buffers
  const auto buffer = [&](int which) {
    return tile::SwizzledTile<T, head_dim>{means_memory + which * C::kMeans * head_dim};
  };
  Key* heaps = p.best != nullptr ? p.best + (head * p.max_tiles + index) * kTileRows * p.width
                                 : reinterpret_cast<Key*>(means_memory + 2 * C::kMeans * head_dim);
  for (std::int64_t i = ptx::thread(); i < std::int64_t{kTileRows} * p.width; i += C::kThreads) heaps[i] = 0;

  tile::gather_rows<kTileRows, C::kThreads>(q, [&](int r) -> const T* {
    if (r >= tile.count) return nullptr;
    const std::int64_t row = tile.first_row + r;
    return p.q.row(p.token0 + row / p.heads_per_kv, (p.head0 + head) * p.heads_per_kv + row % p.heads_per_kv);
  });
  // The last row has the most candidates.
  const std::int32_t max_candidates = candidates_of(p, tile, tile.count - 1).count;
  const T* means = p.means + mean_offset(head, p.max_blocks, p.batch.block_starts[tile.sequence], head_dim);
  const auto load = [&](std::int32_t first) {
    tile::load_rows<C::kMeans, C::kThreads>(buffer(first / C::kMeans % 2),
                                            means + static_cast<std::int64_t>(first) * head_dim, head_dim,
                                            max_candidates - first);
    ptx::cp_async_commit();
  };
  load(0);

  const int warp_row = ptx::warp() * 16 * kRowTiles;
  for (std::int32_t first = 0; first < max_candidates; first += C::kMeans) {
    ptx::cp_async_wait<0>();
    ptx::syncthreads();  // this buffer is full, the other one is no longer read
    if (first + C::kMeans < max_candidates) load(first + C::kMeans);
    if (warp_row >= tile.count) continue;
    float scores[kRowTiles][kMeanTiles][4] = {};
    tile::gemm_nt(scores, q, warp_row, buffer(first / C::kMeans % 2));
    MOBA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      MOBA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + 16 * i + 8 * half + ptx::lane() / 4;
        const Candidates candidates = row < tile.count ? candidates_of(p, tile, row) : Candidates{};
        push_scores(heaps + static_cast<std::int64_t>(row) * p.width, p.width, scores[i], half, candidates,
                    p.sinks, first);
      }
    }
  }
  ptx::cp_async_wait<0>();
  ptx::syncthreads();
  for (int row = ptx::thread(); row < tile.count; row += C::kThreads) {
    const std::int32_t position = tile.position_of(row, p.heads_per_kv);
    const std::int64_t own = p.causal && position >= 0 ? position / p.block_size : -1;
    const std::int64_t slice_row = tile.first_row + row;
    write_row(heaps + static_cast<std::int64_t>(row) * p.width, p.width, static_cast<std::int32_t>(own),
              p.selection.of((p.head0 + head) * p.heads_per_kv + slice_row % p.heads_per_kv,
                             p.token0 + slice_row / p.heads_per_kv),
              p.selection.stride);
  }
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
          const void* means, std::uint64_t* best, const SelectionRows& selection) {
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
                               .rows = call.rows(slice),
                               .token0 = static_cast<std::int32_t>(slice.token0),
                               .token1 = static_cast<std::int32_t>(slice.token1),
                               .width = static_cast<std::int32_t>(call.width()),
                               .sinks = static_cast<std::int32_t>(call.routing.sink_blocks),
                               .causal = call.routing.causal,
                               .own_block = call.routing.own_block,
                               .best = best,
                               .selection = selection};
    const std::size_t tiles = (kTileRows + 2 * C::kMeans) * head_dim * sizeof(T);
    const std::size_t heaps =
        best == nullptr ? static_cast<std::size_t>(kTileRows * call.width()) * sizeof(std::uint64_t) : 0;
    stream.launch("gate", gate_kernel<T, head_dim>, {params.max_tiles, slice.heads()}, C::kThreads,
                  tiles + heaps, params);
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
