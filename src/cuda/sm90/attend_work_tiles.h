#pragma once

#include "cuda/attend_work_tiles.h"
#include "cuda/sm90/pipeline.h"

/// Work tiles of attend_work_tiles.h in the sm_90a kernels.
namespace moba::cuda::sm90 {

/// Returns the work tile that lane `lane` holds.
MOBA_DEVICE WorkTile shfl(const WorkTile& work, int lane) {
  return {.diagonal = ptx::shfl(static_cast<int>(work.diagonal), lane) != 0,
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

/// Calls run(work) for each work tile of this thread block. All lanes of a warp call: each finds one of 32
/// tiles, so the latency of reading the plan is paid once for all of them.
template <typename T, typename Run>
MOBA_DEVICE void for_own_work_tiles(const AttendParams<T>& p, std::int64_t work_tiles, Run&& run) {
  const std::int64_t stride = ptx::blocks_x();
  for (std::int64_t first = ptx::block_x(); first < work_tiles; first += ptx::kLanes * stride) {
    const std::int64_t own = first + ptx::lane() * stride;
    WorkTile found;
    if (own < work_tiles) found = work_tile_at(p, static_cast<std::uint32_t>(own));
    for (int i = 0; i < ptx::kLanes && first + i * stride < work_tiles; ++i) run(shfl(found, i));
  }
}

/// Producer of k and v: one warp loads the key tiles of every work tile by TMA. `shared` has kStages buffers
/// k(stage) and v(stage) of type Keys, and StageBarriers control().k[stage] and control().v[stage].
template <typename Shared, typename T>
MOBA_DEVICE void load_kv(const TensorMap& k, const TensorMap& v, const AttendParams<T>& p,
                         const Shared& shared, std::int64_t work_tiles) {
  using Keys = typename Shared::Keys;
  auto& control = shared.control();
  PipelineState<Shared::kStages> stage;
  for_own_work_tiles(p, work_tiles, [&](const WorkTile& work) {
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
