#pragma once

#include <utility>

#include "cuda/attend_work_tiles.h"
#include "cuda/sm90/pipeline.h"

/// Work tiles of attend_work_tiles.h in the sm_90a kernels. Of the producer warpgroup, warp 0 loads k and v,
/// warps 1 and 2 gather the rows of every second work tile each, and warp 3 finds the work tiles and looks up
/// their rows: it is up to kTables of them ahead, so that no other warp waits for the plan. `shared` has
/// kTables row tables control().tables[i] with their StageBarriers control().table_barriers[i].
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

/// Initialises the barriers of the row tables: the consumers and the producer of k and v release them.
template <typename Control>
MOBA_DEVICE void init_table_barriers(Control& control) {
  for (StageBarriers& barriers : control.table_barriers) barriers.init(1, kConsumerWarps + 1);
}

/// Fills the row table of each work tile by one warp; store(work, table, row, slot) fills a row of it. The
/// slots of the next work tile are loaded meanwhile.
template <typename Shared, typename T, typename Store>
MOBA_DEVICE void find_work_tiles(const AttendParams<T>& p, const Shared& shared, const TileSchedule& schedule,
                                 int kept_keys, Store&& store) {
  constexpr int kRowsPerLane = kTileRows / ptx::kLanes;
  struct Found {
    WorkTile work;
    std::uint32_t slots[kRowsPerLane];
  };
  auto& control = shared.control();
  PipelineState<Shared::kTables> stage;
  const auto publish = [&](const Found& found) {
    auto& table = control.tables[stage.index];
    StageBarriers& barriers = control.table_barriers[stage.index];
    ptx::mbarrier_wait(&barriers.empty, stage.phase ^ 1U);
    MOBA_UNROLL
    for (int i = 0; i < kRowsPerLane; ++i)
      store(found.work, table, i * ptx::kLanes + ptx::lane(), found.slots[i]);
    if (ptx::lane() == 0) table.work = found.work;
    ptx::syncwarp();
    if (ptx::lane() == 0) ptx::mbarrier_arrive(&barriers.full);
    stage.advance();
  };
  Found pending;
  bool is_pending = false;
  for_own_work_tiles(p, schedule, kept_keys, [&](const WorkTile& work) {
    Found found{.work = work, .slots = {}};
    MOBA_UNROLL
    for (int i = 0; i < kRowsPerLane; ++i)
      found.slots[i] = slot_of(p, work, i * ptx::kLanes + ptx::lane());
    if (is_pending) publish(pending);
    pending = found;
    is_pending = true;
  });
  if (is_pending) publish(pending);
}

/// Producer of rows: a warp calls gather(table, buffer) for every second work tile of the thread block, whose
/// rows fill that one of two buffers.
template <typename Shared, typename Gather>
MOBA_DEVICE void load_rows(const Shared& shared, std::int32_t own_tiles, int buffer, Gather&& gather) {
  auto& control = shared.control();
  PipelineState<Shared::kTables> stage;
  if (buffer == 1) stage.advance();
  for (std::int32_t own = buffer; own < own_tiles; own += 2) {
    ptx::mbarrier_wait(&control.table_barriers[stage.index].full, stage.phase);
    ptx::mbarrier_wait(&control.q[buffer].empty, (own / 2 & 1) ^ 1);
    gather(control.tables[stage.index]);
    producer_commit(control.q[buffer].full);
    stage.advance();
    stage.advance();
  }
}

/// Producer of k and v: one warp loads the key tiles of every work tile by TMA. `shared` has kStages buffers
/// k(stage) and v(stage) of type Keys, and StageBarriers control().k[stage] and control().v[stage].
template <typename Shared>
MOBA_DEVICE void load_kv(const TensorMap& k, const TensorMap& v, std::int64_t head0, const Shared& shared,
                         std::int32_t own_tiles) {
  using Keys = typename Shared::Keys;
  auto& control = shared.control();
  PipelineState<Shared::kTables> table;
  PipelineState<Shared::kStages> stage;
  bool is_loaded = false;
  for (std::int32_t own = 0; own < own_tiles; ++own, table.advance()) {
    ptx::mbarrier_wait(&control.table_barriers[table.index].full, table.phase);
    const WorkTile work = control.tables[table.index].work;
    consumer_release(control.table_barriers[table.index].empty);
    if (std::exchange(is_loaded, work.keeps_kv)) continue;
    const auto load = [&](const TensorMap& map, const Keys& to, StageBarriers& barriers, std::int32_t key) {
      ptx::mbarrier_wait(&barriers.empty, stage.phase ^ 1U);
      ptx::mbarrier_arrive_expect_tx(&barriers.full, Keys::kBytes);
      tma_load_tile(to, map, head0 + work.head, work.first_key + key, &barriers.full);
    };
    for (std::int32_t tile = 0; tile < work.key_tiles(Keys::kRows); ++tile, stage.advance()) {
      if (ptx::lane() != 0) continue;
      const std::int32_t key = work.begin + tile * Keys::kRows;
      load(k, shared.k(stage.index), control.k[stage.index], key);
      load(v, shared.v(stage.index), control.v[stage.index], key);
    }
  }
}

/// Runs the producer warpgroup.
template <typename Shared, typename T, typename Store, typename Gather>
MOBA_DEVICE void produce(const TensorMap& k, const TensorMap& v, const AttendParams<T>& p,
                         const Shared& shared, const TileSchedule& schedule, int kept_keys, Store&& store,
                         Gather&& gather) {
  const int warp = ptx::warp();
  const std::int32_t own_tiles = schedule.own_tiles();
  if (warp == 0) load_kv(k, v, p.head0, shared, own_tiles);
  if (warp == 1 || warp == 2) load_rows(shared, own_tiles, warp - 1, [&](auto& table) { gather(table, warp - 1); });
  if (warp == 3) find_work_tiles(p, shared, schedule, kept_keys, store);
}

}  // namespace moba::cuda::sm90
