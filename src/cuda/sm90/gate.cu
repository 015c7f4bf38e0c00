// The gate on sm_90a. Warpgroup 0 is the producer: it gathers the queries of a tile and loads means by TMA.
// The consumer warpgroups hold 64 rows each and take turns to issue their products, so that one selects
// (tile/topk.h) while the tensor cores compute the scores of the other.
#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "cuda/attend.h"
#include "cuda/gate_rows.h"
#include "cuda/sm90/pipeline.h"

namespace moba::cuda {
namespace sm90::gating {

inline constexpr int kMeans = 128;  // of a tile
inline constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;

template <typename T>
struct Params {
  TensorMap means;
  GateParams<T> gate;
  std::int64_t heads;  // of the slice

  /// Calls run(tile, index of the tile, head) for every work tile of this thread block; tiles of the last
  /// queries, which have the most candidates, come first.
  template <typename Run>
  MOBA_DEVICE void for_own_rows(std::int32_t tiles, Run&& run) const {
    for_own_tiles(tiles * heads, [&](std::int64_t work) {
      const auto index = static_cast<std::int32_t>(tiles - 1 - work / heads);
      run(tile_at(gate.batch, index, gate.token0, gate.token1, gate.heads_per_kv), index, work % heads);
    });
  }
};

template <typename T>
using ManyRows = WarpRows<T, tile::TopK<1, 4>>;

template <typename T, int head_dim, typename Rows>
struct Shared {
  static constexpr int kStages = head_dim > 64 ? 3 : 4;  // tiles of means
  using Queries = tile::SwizzledTile128B<T, kTileRows, head_dim>;
  using Means = tile::SwizzledTile128B<T, kMeans, head_dim>;

  struct Control {
    typename Rows::Memory topk[kConsumerWarps];
    std::int64_t q_offsets[2][kTileRows];
    StageBarriers q[2], means[kStages];
  };
  static constexpr std::size_t kBytes = 2 * Queries::kBytes + kStages * Means::kBytes + sizeof(Control);

  std::byte* memory;

  MOBA_DEVICE Queries q(int buffer) const { return {memory + buffer * Queries::kBytes}; }
  MOBA_DEVICE Means means(int stage) const { return {memory + 2 * Queries::kBytes + stage * Means::kBytes}; }
  MOBA_DEVICE Control& control() const { return *reinterpret_cast<Control*>(means(kStages).data); }
  MOBA_DEVICE tile::Key* heaps() const { return reinterpret_cast<tile::Key*>(&control() + 1); }
};

/// Producer of the queries. Called by kGatherThreads threads, numbered by `thread`.
template <typename T, int head_dim, typename Rows>
MOBA_DEVICE void load_q(const Params<T>& p, const Shared<T, head_dim, Rows>& shared, std::int32_t tiles,
                        int thread) {
  PipelineState<2> buffer;
  p.for_own_rows(tiles, [&](const Tile& tile, std::int32_t, std::int64_t head) {
    StageBarriers& barriers = shared.control().q[buffer.index];
    std::int64_t* offsets = shared.control().q_offsets[buffer.index];
    ptx::mbarrier_wait(&barriers.empty, buffer.phase ^ 1U);
    for (int r = thread; r < kTileRows; r += kGatherThreads)
      offsets[r] = r < tile.count ? p.gate.query(tile, head, r) - p.gate.q.data : kNoRow;
    ptx::bar_sync(kGatherSync, kGatherThreads);
    gather_rows(shared.q(buffer.index), p.gate.q.data, offsets, thread);
    producer_commit(barriers.full);
    buffer.advance();
  });
}

/// Producer of the means. Called by one thread.
template <typename T, int head_dim, typename Rows>
MOBA_DEVICE void load_means(const Params<T>& p, const Shared<T, head_dim, Rows>& shared, std::int32_t tiles) {
  using Means = typename Shared<T, head_dim, Rows>::Means;
  PipelineState<Shared<T, head_dim, Rows>::kStages> stage;
  p.for_own_rows(tiles, [&](const Tile& tile, std::int32_t, std::int64_t head) {
    const std::int32_t end = candidates_of(p.gate, tile, tile.count - 1).last;
    for (std::int32_t first = 0; first < end; first += kMeans, stage.advance()) {
      StageBarriers& barriers = shared.control().means[stage.index];
      ptx::mbarrier_wait(&barriers.empty, stage.phase ^ 1U);
      ptx::mbarrier_arrive_expect_tx(&barriers.full, Means::kBytes);
      tma_load_tile(shared.means(stage.index), p.means, head,
                    p.gate.batch.block_starts[tile.sequence] + first, &barriers.full);
    }
  });
}

/// Main loop of the consumer warpgroups.
template <typename T, int head_dim, typename Rows>
MOBA_DEVICE void select(const Params<T>& p, const Shared<T, head_dim, Rows>& shared, std::int32_t tiles,
                        int warpgroup) {
  using S = Shared<T, head_dim, Rows>;
  typename S::Control& control = shared.control();
  const int first_row = warpgroup * kWarpgroupRows;
  const int warp = warpgroup * 4 + ptx::warp() % 4;
  PipelineState<2> buffer;
  PipelineState<S::kStages> stage;
  if (warpgroup == 1) pingpong_arrive(warpgroup);
  p.for_own_rows(tiles, [&](const Tile& tile, std::int32_t index, std::int64_t head) {
    const std::int32_t end = warp_uniform(candidates_of(p.gate, tile, tile.count - 1).last);
    const bool has_rows = warp_uniform(first_row < tile.count ? 1 : 0) != 0;
    tile::Key* const heaps = p.gate.heaps_of(head, index, shared.heaps());
    Rows rows(p.gate, tile, head, 16 * warp, control.topk[warp], heaps);
    ptx::mbarrier_wait(&control.q[buffer.index].full, buffer.phase);
    for (std::int32_t first = 0; first < end; first += kMeans, stage.advance()) {
      float scores[kMeans / 8][4];
      ptx::mbarrier_wait(&control.means[stage.index].full, stage.phase);
      pingpong_wait(warpgroup);
      if (has_rows) {
        ptx::wgmma_fence();
        issue_qk(scores, shared.q(buffer.index), first_row, shared.means(stage.index));
        pingpong_arrive(warpgroup);
        ptx::wgmma_wait(scores);
      } else {
        pingpong_arrive(warpgroup);
      }
      consumer_release(control.means[stage.index].empty);
      if (!has_rows) continue;
      if (first < rows.end()) rows.push(scores, first);
    }
    consumer_release(control.q[buffer.index].empty);
    buffer.advance();
    rows.finish();
    ptx::syncwarp();  // the next tile's heaps take their place
  });
  if (warpgroup == 0) pingpong_wait(warpgroup);  // matches the last arrive of warpgroup 1
}

template <typename T, int head_dim, typename Rows>
MOBA_KERNEL(kThreads, 1)
gate_kernel(MOBA_GRID_CONSTANT Params<T> p) {
  if constexpr (ptx::kHasWarpgroups) {
    const Shared<T, head_dim, Rows> shared{ptx::shared()};
    const std::int32_t tiles = warp_uniform(p.gate.batch.tile_starts[p.gate.batch.sequences]);
    specialise_warpgroups<kProducerRegisters, kConsumerRegisters>(
        [&] {
          auto& control = shared.control();
          for (StageBarriers& barriers : control.q) barriers.init(kGatherThreads);
          for (StageBarriers& barriers : control.means) barriers.init(1);
        },
        [&] { load_means(p, shared, tiles); }, [&](int thread) { load_q(p, shared, tiles, thread); },
        [&](int warpgroup) { select(p, shared, tiles, warpgroup); });
  }
}

template <typename T, int head_dim, typename Rows>
void launch(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Params<T>& params,
            std::size_t heap_bytes) {
  const std::int64_t blocks =
      std::min<std::int64_t>(current_hardware().multiprocessors, call.max_tiles(slice) * slice.heads());
  stream.launch("gate_sm90", gate_kernel<T, head_dim, Rows>, {blocks}, kThreads,
                Shared<T, head_dim, Rows>::kBytes + heap_bytes, params);
}

}  // namespace sm90::gating

bool gate_uses_sm90(const DeviceCall& call) {
  const char* forced = std::getenv("MOBA_CUDA_ARCH");
  return has_sm90(call.head_dim) && (forced == nullptr || std::string_view(forced) != "sm80");
}

void gate_sm90(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
               const void* means, std::uint64_t* heaps, const SelectionRows& selection) {
  with_type(call, [&]<typename T, int head_dim>() {
    if constexpr (head_dim == 64 || head_dim == 128) {
      const Tensor rows{.data = const_cast<void*>(means),
                        .dtype = call.k.dtype,
                        .device = Device::cuda,
                        .rank = 3,
                        .sizes = {call.max_blocks(), slice.heads(), head_dim},
                        .strides = {head_dim, call.max_blocks() * head_dim, 1}};
      const sm90::gating::Params<T> params{
          .means = tensor_map(rows, sm90::gating::kMeans),
          .gate = gate_params<T>(call, slice, batch, means, heaps, selection),
          .heads = slice.heads()};
      if (call.width() <= tile::kTop) {
        sm90::gating::launch<T, head_dim, Top8Rows<T>>(stream, call, slice, params, 0);
      } else {
        sm90::gating::launch<T, head_dim, sm90::gating::ManyRows<T>>(stream, call, slice, params,
                                                                     shared_heap_bytes(call));
      }
    }
  });
}

}  // namespace moba::cuda
