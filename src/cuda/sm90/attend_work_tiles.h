#pragma once

#include <utility>

#include "cuda/attend_work_tiles.h"
#include "cuda/sm90/pipeline.h"

/// Work tiles of attend_work_tiles.h in the sm_90a kernels.
namespace moba::cuda::sm90 {

/// Returns the work tile that lane `lane` holds.
MOBA_DEVICE WorkTile shfl(const WorkTile& work, int lane) {
  return {.diagonal = ptx::shfl(static_cast<int>(work.diagonal), lane) != 0,
          .keeps_kv = ptx::shfl(static_cast<int>(work.keeps_kv), lane) != 0,
          .head = ptx::shfl(work.head, lane),
          .count = ptx::shfl(work.count, lane),
          .first_key = ptx::shfl(work.first_key, lane),
          .begin = ptx::shfl(work.begin, lane),
          .end = ptx::shfl(work.end, lane),
          .all_begin = ptx::shfl(work.all_begin, lane),
          .all_end = ptx::shfl(work.all_end, lane),
          .first_row = ptx::shfl(work.first_row, lane),
          .position = ptx::shfl(work.position, lane),
          .member = ptx::shfl(work.member, lane)};
}
MOBA_DEVICE WorkTile warp_uniform(const WorkTile& work) {
  return shfl(work, 0);
}

/// Work tiles of each thread block: chunks of consecutive ones, of which it takes every n-th.
struct TileSchedule {
  std::int64_t work_tiles = 0;
  std::int32_t chunk = 1;

  /// Returns the i-th work tile of this thread block.
  MOBA_DEVICE std::int64_t own(std::int32_t i) const {
    return (std::int64_t{i / chunk} * ptx::blocks_x() + ptx::block_x()) * chunk + i % chunk;
  }
  /// Counts them.
  MOBA_DEVICE std::int32_t own_tiles() const {
    const std::int64_t round = std::int64_t{chunk} * ptx::blocks_x();
    const std::int64_t left = work_tiles % round - std::int64_t{chunk} * ptx::block_x();
    return static_cast<std::int32_t>(work_tiles / round * chunk + (left < 0       ? 0
                                                                   : left < chunk ? left
                                                                                  : chunk));
  }
  /// Tests that work tile i + 1 of this thread block follows on work tile i.
  MOBA_DEVICE bool is_consecutive(std::int32_t i) const { return (i + 1) % chunk != 0; }
};

/// Calls run(work) for each work tile of this thread block. All lanes of a warp call: each finds one of 32
/// tiles, so the latency of reading the plan is paid once for all of them. Consecutive routed tiles that have
/// the same keys, at most `kept_keys`, keep them in shared memory.
template <typename T, typename Run>
MOBA_DEVICE void for_own_work_tiles(const AttendParams<T>& p, const TileSchedule& schedule, int kept_keys,
                                    Run&& run) {
  const std::int32_t tiles = schedule.own_tiles();
  for (std::int32_t first = 0; first < tiles; first += ptx::kLanes) {
    const std::int32_t own = first + ptx::lane();
    WorkTile found;
    if (own < tiles) found = work_tile_at(p, static_cast<std::uint32_t>(schedule.own(own)));
    const int next_lane = (ptx::lane() + 1) % ptx::kLanes;
    const bool next_is_routed = ptx::shfl(static_cast<int>(found.diagonal), next_lane) == 0;
    const std::int32_t next_head = ptx::shfl(found.head, next_lane),
                       next_key = ptx::shfl(found.first_key + found.begin, next_lane);
    found.keeps_kv = own + 1 < tiles && next_lane > 0 && schedule.is_consecutive(own) && !found.diagonal &&
                     next_is_routed && next_head == found.head && next_key == found.first_key + found.begin &&
                     found.end - found.begin <= kept_keys;
    for (int i = 0; i < ptx::kLanes && first + i < tiles; ++i) run(shfl(found, i));
  }
}

/// Producer of k and v: one warp loads the key tiles of every work tile by TMA. `shared` has kStages buffers
/// k(stage) and v(stage) of type Keys, and StageBarriers control().k[stage] and control().v[stage].
template <typename Shared, typename T>
MOBA_DEVICE void load_kv(const TensorMap& k, const TensorMap& v, const AttendParams<T>& p,
                         const Shared& shared, const TileSchedule& schedule) {
  using Keys = typename Shared::Keys;
  auto& control = shared.control();
  PipelineState<Shared::kStages> stage;
  bool is_loaded = false;
  for_own_work_tiles(p, schedule, Keys::kRows, [&](const WorkTile& work) {
    if (std::exchange(is_loaded, work.keeps_kv)) return;
    const auto load = [&](const TensorMap& map, const Keys& to, StageBarriers& barriers, std::int32_t key) {
      ptx::mbarrier_wait(&barriers.empty, stage.phase ^ 1U);
      ptx::mbarrier_arrive_expect_tx(&barriers.full, Keys::kBytes);
      tma_load_tile(to, map, p.head0 + work.head, work.first_key + key, &barriers.full);
    };
    for (std::int32_t tile = 0; tile < work.key_tiles(Keys::kRows); ++tile, stage.advance()) {
      if (ptx::lane() != 0) continue;
      const std::int32_t key = work.begin + tile * Keys::kRows;
      load(k, shared.k(stage.index), control.k[stage.index], key);
      load(v, shared.v(stage.index), control.v[stage.index], key);
    }
  });
}

}  // namespace moba::cuda::sm90
