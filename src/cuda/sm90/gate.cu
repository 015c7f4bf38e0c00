// The gate on sm_90a. Warpgroup 0 is the producer: it gathers the queries of a tile and loads means by TMA.
// The consumer warpgroups hold 64 rows each and take turns to issue their products, so that one selects
// (tile/top8.h, tile/topk.h) while the tensor cores compute the scores of the other.
#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "cuda/attend.h"
#include "cuda/gate_rows.h"
#include "cuda/sm90/pipeline.h"

namespace moba::cuda {
namespace sm90::gating {

inline constexpr int kMeans = 64;  // of a tile
/// Two thread blocks of a multiprocessor hide each other's latencies.
inline constexpr int kBlocksPerMultiprocessor = 2;
/// The first pass takes as many tiles at most. It leaves about 14 scores of a row to append to the second
/// pass, where 40 and more reach the thresholds that rise with it.
inline constexpr std::int32_t kSampled = 16;
inline constexpr int kProducerRegisters = 32, kConsumerRegisters = 104;

template <typename T>
struct Params {
  TensorMap means;
  GateParams<T> gate;
  std::int64_t heads;  // of the slice

  /// Index of the tile of rows of work tile `work`; those of the last queries, which have the most
  /// candidates, come first.
  MOBA_DEVICE std::int32_t index_of(std::int64_t work, std::int32_t tiles) const {
    return static_cast<std::int32_t>(tiles - 1 - work / heads);
  }
  MOBA_DEVICE Tile tile_of(std::int64_t work, std::int32_t tiles) const {
    return tile_at(gate.batch, index_of(work, tiles), gate.token0, gate.token1, gate.heads_per_kv);
  }
  MOBA_DEVICE std::int32_t candidates_end(const Tile& tile) const {
    return candidates_of(gate, tile, tile.count - 1).last;
  }
};

/// The rows of a tile, which the producer of the queries looks up.
struct RowTable {
  GateRow rows[kTileRows];
  Tile tile;
  std::int64_t head;
  std::int32_t index, end;  // of the tile, and of all candidates
};

/// How a warp selects: few blocks with sorting networks, or any number with heaps.
template <typename T>
struct Few {
  static constexpr bool kSamples = true;
  using Memory = tile::Top8::Memory;
  using Rows = Top8Rows<T>;
  static MOBA_DEVICE Rows rows(const GateParams<T>& p, const RowTable& table, int warp, Memory& memory,
                               tile::Key* /*heaps*/) {
    const int first = 16 * warp;
    return {p, table.rows + first, table.tile.count - first, memory};
  }
};
template <typename T>
struct Many {
  static constexpr bool kSamples = false;
  using TopK = tile::TopK<1, 4>;
  using Memory = TopK::Memory;
  using Rows = WarpRows<T, TopK>;
  static MOBA_DEVICE Rows rows(const GateParams<T>& p, const RowTable& table, int warp, Memory& memory,
                               tile::Key* heaps) {
    return {p, table.tile, table.head, 16 * warp, memory, p.heaps_of(table.head, table.index, heaps)};
  }
};

/// The tiles of means that a tile of rows meets: those of the first pass, if there is one, then all, from the
/// last to the first.
template <typename Selecting>
struct Steps {
  std::int32_t sampled = 0, all = 0;

  MOBA_DEVICE explicit Steps(std::int32_t end) {
    const std::int32_t tiles = (end + kMeans - 1) / kMeans;
    if (Selecting::kSamples && tiles > 1) sampled = tiles < kSampled ? tiles : kSampled;
    all = sampled + tiles;
  }
  /// The first block of the tile that comes at `step`.
  MOBA_DEVICE std::int32_t first_block(std::int32_t step) const {
    return (step < sampled || !Selecting::kSamples ? step : all - 1 - step) * kMeans;
  }
};

template <typename T, int head_dim, typename Selecting>
struct Shared {
  static constexpr int kStages = head_dim > 64 ? 2 : 4;  // tiles of means
  using Queries = tile::SwizzledTile128B<T, kTileRows, head_dim>;
  using Means = tile::SwizzledTile128B<T, kMeans, head_dim>;

  struct Control {
    typename Selecting::Memory topk[kConsumerWarps];
    std::int64_t q_offsets[kTileRows];
    RowTable tables[2];
    ptx::Mbarrier table_empty[2];  // q.full publishes a table
    StageBarriers q, means[kStages];
  };
  static constexpr std::size_t kBytes = Queries::kBytes + kStages * Means::kBytes + sizeof(Control);

  std::byte* memory;

  MOBA_DEVICE Queries q() const { return {memory}; }
  MOBA_DEVICE Means means(int stage) const { return {memory + Queries::kBytes + stage * Means::kBytes}; }
  MOBA_DEVICE Control& control() const { return *reinterpret_cast<Control*>(means(kStages).data); }
  MOBA_DEVICE tile::Key* heaps() const { return reinterpret_cast<tile::Key*>(&control() + 1); }
};

/// Producer of the queries and of what selecting for their rows takes, which it looks up a tile ahead. Called
/// by kGatherThreads threads, numbered by `thread`.
template <typename T, int head_dim, typename Selecting>
MOBA_DEVICE void load_q(const Params<T>& p, const Shared<T, head_dim, Selecting>& shared, std::int32_t tiles,
                        int thread) {
  auto& control = shared.control();
  unsigned turn = 0;  // tables alternate
  for_own_tiles(tiles * p.heads, [&](std::int64_t work) {
    RowTable& table = control.tables[turn % 2];
    ptx::mbarrier_wait(&control.table_empty[turn % 2], turn / 2 % 2 ^ 1U);
    if (thread == 0) {
      table.tile = p.tile_of(work, tiles);
      table.head = work % p.heads;
      table.index = p.index_of(work, tiles);
      table.end = p.candidates_end(table.tile);
    }
    ptx::bar_sync(kGatherSync, kGatherThreads);
    for (int r = thread; r < kTileRows; r += kGatherThreads) {
      table.rows[r] = gate_row(p.gate, table.tile, table.head, r);
      control.q_offsets[r] =
          r < table.tile.count ? p.gate.query(table.tile, table.head, r) - p.gate.q.data : kNoRow;
    }
    ptx::mbarrier_wait(&control.q.empty, turn % 2 ^ 1U);
    ptx::bar_sync(kGatherSync, kGatherThreads);
    gather_rows(shared.q(), p.gate.q.data, control.q_offsets, thread);
    producer_commit(control.q.full);
    ptx::bar_sync(kGatherSync, kGatherThreads);  // the offsets were read
    ++turn;
  });
}

/// Producer of the means. Called by one thread.
template <typename T, int head_dim, typename Selecting>
MOBA_DEVICE void load_means(const Params<T>& p, const Shared<T, head_dim, Selecting>& shared,
                            std::int32_t tiles) {
  using S = Shared<T, head_dim, Selecting>;
  PipelineState<S::kStages> stage;
  for_own_tiles(tiles * p.heads, [&](std::int64_t work) {
    const Tile tile = p.tile_of(work, tiles);
    const Steps<Selecting> steps(p.candidates_end(tile));
    const std::int32_t sequence_first = p.gate.batch.block_starts[tile.sequence];
    for (std::int32_t step = 0; step < steps.all; ++step, stage.advance()) {
      StageBarriers& barriers = shared.control().means[stage.index];
      ptx::mbarrier_wait(&barriers.empty, stage.phase ^ 1U);
      ptx::mbarrier_arrive_expect_tx(&barriers.full, S::Means::kBytes);
      tma_load_tile(shared.means(stage.index), p.means, work % p.heads,
                    sequence_first + steps.first_block(step), &barriers.full);
    }
  });
}

/// Main loop of the consumer warpgroups.
template <typename T, int head_dim, typename Selecting>
MOBA_DEVICE void select(const Params<T>& p, const Shared<T, head_dim, Selecting>& shared, std::int32_t tiles,
                        int warpgroup) {
  using S = Shared<T, head_dim, Selecting>;
  typename S::Control& control = shared.control();
  const int first_row = warpgroup * kWarpgroupRows;
  const int warp = warpgroup * 4 + ptx::warp() % 4;
  PipelineState<S::kStages> stage;
  unsigned turn = 0;  // tables alternate
  if (warpgroup == 1) pingpong_arrive(warpgroup);
  for_own_tiles(tiles * p.heads, [&](std::int64_t) {
    ptx::mbarrier_wait(&control.q.full, turn);
    const RowTable& table = control.tables[turn];
    const std::int32_t end = warp_uniform(table.end);
    const bool has_rows = warp_uniform(first_row < table.tile.count ? 1 : 0) != 0;
    auto rows = Selecting::rows(p.gate, table, warp, control.topk[warp], shared.heaps());
    const Steps<Selecting> steps(end);
    if (steps.all == 0) consumer_release(control.q.empty);
    for (std::int32_t step = 0; step < steps.all; ++step, stage.advance()) {
      float scores[kMeans / 8][4];
      ptx::mbarrier_wait(&control.means[stage.index].full, stage.phase);
      pingpong_wait(warpgroup);
      if (has_rows) {
        ptx::wgmma_fence();
        issue_qk(scores, shared.q(), first_row, shared.means(stage.index));
        pingpong_arrive(warpgroup);
        ptx::wgmma_wait(scores);
      } else {
        pingpong_arrive(warpgroup);
      }
      consumer_release(control.means[stage.index].empty);
      if (step + 1 == steps.all) consumer_release(control.q.empty);
      const std::int32_t first = steps.first_block(step);
      if (first >= rows.end()) continue;
      if constexpr (Selecting::kSamples) {
        rows.mask(scores, first);
        if (step < steps.sampled) {
          rows.topk.sample(scores);
          if (step + 1 == steps.sampled) rows.topk.finish_sample();
          continue;
        }
      }
      rows.push(scores, first);
    }
    rows.finish();
    consumer_release(control.table_empty[turn]);
    turn ^= 1U;
  });
  if (warpgroup == 0) pingpong_wait(warpgroup);  // matches the last arrive of warpgroup 1
}

template <typename T, int head_dim, typename Selecting>
MOBA_KERNEL(kThreads, kBlocksPerMultiprocessor)
gate_kernel(MOBA_GRID_CONSTANT Params<T> p) {
  if constexpr (ptx::kHasWarpgroups) {
    const Shared<T, head_dim, Selecting> shared{ptx::shared()};
    const std::int32_t tiles = warp_uniform(p.gate.batch.tile_starts[p.gate.batch.sequences]);
    specialise_warpgroups<kProducerRegisters, kConsumerRegisters>(
        [&] {
          auto& control = shared.control();
          control.q.init(kGatherThreads);
          for (ptx::Mbarrier& barrier : control.table_empty)
            ptx::mbarrier_init(&barrier, kConsumerWarps * kReleasingLanes);
          for (StageBarriers& barriers : control.means) barriers.init(1);
        },
        [&] { load_means(p, shared, tiles); }, [&](int thread) { load_q(p, shared, tiles, thread); },
        [&](int warpgroup) { select(p, shared, tiles, warpgroup); });
  }
}

template <typename T, int head_dim, typename Selecting>
void launch(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Params<T>& params,
            std::size_t heap_bytes) {
  const std::int64_t blocks = std::min<std::int64_t>(
      current_hardware().multiprocessors * kBlocksPerMultiprocessor, call.max_tiles(slice) * slice.heads());
  stream.launch("gate_sm90", gate_kernel<T, head_dim, Selecting>, {blocks}, kThreads,
                Shared<T, head_dim, Selecting>::kBytes + heap_bytes, params);
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
        sm90::gating::launch<T, head_dim, sm90::gating::Few<T>>(stream, call, slice, params, 0);
      } else {
        sm90::gating::launch<T, head_dim, sm90::gating::Many<T>>(stream, call, slice, params,
                                                                 shared_heap_bytes(call));
      }
    }
  });
}

}  // namespace moba::cuda
