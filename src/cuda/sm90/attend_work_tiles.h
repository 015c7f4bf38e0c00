#pragma once

#include "cuda/attend_work_tiles.h"
#include "cuda/sm90/pipeline.h"

/// Work tiles of attend_work_tiles.h in the sm_90a kernels.
namespace moba::cuda::sm90 {

MOBA_DEVICE WorkTile warp_uniform(const WorkTile& work) {
  return {.diagonal = warp_uniform(static_cast<int>(work.diagonal)) != 0,
          .head = warp_uniform(work.head),
          .count = warp_uniform(work.count),
          .begin = warp_uniform(work.begin),
          .end = warp_uniform(work.end),
          .all_begin = warp_uniform(work.all_begin),
          .all_end = warp_uniform(work.all_end)};
}

/// Producer of k and v: one thread loads the key tiles of every work tile by TMA. `shared` has kStages
/// buffers k(stage) and v(stage) of type Keys, and StageBarriers control().k[stage] and control().v[stage].
template <typename Shared, typename T>
MOBA_DEVICE void load_kv(const TensorMap& k, const TensorMap& v, const AttendParams<T>& p,
                         const Shared& shared, std::int64_t work_tiles) {
  using Keys = typename Shared::Keys;
  auto& control = shared.control();
  PipelineState<Shared::kStages> stage;
  for_own_tiles(work_tiles, [&](std::int64_t index) {
    with_work_tile(p, index, 0, [&](const WorkTile& work, auto&&) {
      const auto load = [&](const TensorMap& map, const Keys& to, StageBarriers& barriers, std::int32_t key) {
        ptx::mbarrier_wait(&barriers.empty, stage.phase ^ 1U);
        ptx::mbarrier_arrive_expect_tx(&barriers.full, Keys::kBytes);
        tma_load_tile(to, map, p.head0 + work.head, work.first_key + key, &barriers.full);
      };
      for (std::int32_t key = work.begin; key < work.end; key += Keys::kRows, stage.advance()) {
        load(k, shared.k(stage.index), control.k[stage.index], key);
        load(v, shared.v(stage.index), control.v[stage.index], key);
      }
    });
  });
}

}  // namespace moba::cuda::sm90
