#pragma once

#include "cuda/attend_items.h"
#include "cuda/sm90/pipeline.h"

/// What the kernels for Hopper that work on attend_items.h's items have in common.
namespace moba::cuda::hopper {

MOBA_DEVICE Work uniform(const Work& work) {
  return {.near = uniform(static_cast<int>(work.near)) != 0,
          .head = uniform(work.head),
          .count = uniform(work.count),
          .begin = uniform(work.begin),
          .end = uniform(work.end),
          .all_begin = uniform(work.all_begin),
          .all_end = uniform(work.all_end)};
}

/// Tiles of the items' keys and values, by one thread. `shared` has kStages buffers k(stage) and v(stage) of
/// Keys, and the StageBarriers rest().k[stage] and rest().v[stage].
template <typename Shared, typename T>
MOBA_DEVICE void load_kv(const TensorMap& k, const TensorMap& v, const AttendParams<T>& p,
                         const Shared& shared, std::int64_t items) {
  using Keys = typename Shared::Keys;
  auto& rest = shared.rest();
  PipelineState<Shared::kStages> stage;
  for_own_items(items, [&](std::int64_t index) {
    with_item(p, index, [&](const Work& work, auto&&) {
      const auto bring = [&](const TensorMap& map, const Keys& to, StageBarriers& turns, std::int32_t key) {
        ptx::mbarrier_wait(&turns.empty, stage.parity ^ 1U);
        ptx::mbarrier_arrive_expect_tx(&turns.full, Keys::kBytes);
        copy_tokens(to, map, p.head0 + work.head, work.first_key + key, &turns.full);
      };
      for (std::int32_t key = work.begin; key < work.end; key += Keys::kRows, stage.advance()) {
        bring(k, shared.k(stage.at), rest.k[stage.at], key);
        bring(v, shared.v(stage.at), rest.v[stage.at], key);
      }
    });
  });
}

}  // namespace moba::cuda::hopper
