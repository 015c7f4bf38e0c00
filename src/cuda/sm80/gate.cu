// Scores and selects in one pass: a thread block holds a tile of rows, whose queries stay in registers; the
// tensor cores compute their products with a group of means at a time, and the scores that reach the
// threshold of their row enter its running top-k (tile/topk.h).
#include "cuda/gate_rows.h"
#include "cuda/ptx/barrier.h"
#include "cuda/tile/swizzled_tile.h"

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

template <typename T, int head_dim>
MOBA_KERNEL(TileShape<head_dim>::kThreads, TileShape<head_dim>::kBlocksPerMultiprocessor)
gate_kernel(MOBA_GRID_CONSTANT GateParams<T> p) {
  using C = TileShape<head_dim>;
  // The last queries have the most candidates and come first.
  const std::int32_t index =
      p.batch.tile_starts[p.batch.sequences] - 1 - static_cast<std::int32_t>(ptx::block_x());
  if (index < 0) return;
  const std::int64_t head = ptx::block_y();
  const Tile tile = tile_at(p.batch, index, p.token0, p.token1, p.heads_per_kv);

  auto* const elements = reinterpret_cast<T*>(ptx::shared());
  auto* const memory = reinterpret_cast<typename C::TopK::Memory*>(elements + C::kElements);
  const tile::SwizzledTile<T, head_dim> q{elements};
  tile::gather_rows<kTileRows, C::kThreads>(
      q, [&](int r) -> const T* { return r < tile.count ? p.query(tile, head, r) : nullptr; });
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::syncthreads();
  const int warp_row = ptx::warp() * C::kWarpRows;
  std::uint32_t queries[head_dim / 16][C::kRowTiles][4];
  MOBA_UNROLL
  for (int k = 0; k < head_dim / 16; ++k) {
    MOBA_UNROLL
    for (int i = 0; i < C::kRowTiles; ++i) load_a(queries[k][i], q, warp_row + 16 * i, k, ptx::lane());
  }
  ptx::syncthreads();  // the means take the place of the queries

  const std::int32_t max_blocks = candidates_of(p, tile, tile.count - 1).last;
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
  tile::Key* const heaps = p.heaps_of(head, index, reinterpret_cast<tile::Key*>(memory + C::kWarps));
  WarpRows<T, typename C::TopK> rows(p, tile, head, warp_row, memory[ptx::warp()], heaps);
  for (std::int32_t first = 0; first < max_blocks; first += C::kGroup) {
    if (first % C::kMeans == 0) {
      ptx::cp_async_wait<0>();
      ptx::syncthreads();  // this stage is full, the other one is no longer read
      if (first + C::kMeans < max_blocks) load(first + C::kMeans);
    }
    if (first >= rows.end()) continue;
    float scores[C::kRowTiles][C::kGroupTiles][4] = {};
    tile::gemm_nt(scores, queries, stage(first), first % C::kMeans);
    rows.push(scores, first);
  }
  rows.finish();
}

}  // namespace

void gate(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
          const void* means, std::uint64_t* heaps, const SelectionRows& selection) {
  with_type(call, [&]<typename T, int head_dim>() {
    using C = TileShape<head_dim>;
    stream.launch("gate", gate_kernel<T, head_dim>, {call.max_tiles(slice), slice.heads()}, C::kThreads,
                  C::kBytes + shared_heap_bytes(call),
                  gate_params<T>(call, slice, batch, means, heaps, selection));
  });
}

}  // namespace moba::cuda
