// dk and dv on sm_90a, with the key tiles, segments and summation order of sm80/attend_backward_dkv.cu. Each
// consumer warpgroup holds 64 keys and their gradients; tiles of q and d_out stream past both.
#include <algorithm>

#include "cuda/attend_backward_key_tiles.h"
#include "cuda/sm90/pipeline.h"

namespace moba::cuda {
namespace sm90::dkv {

inline constexpr int kKeys = kConsumerWarpgroups * kWarpgroupRows;
inline constexpr int kRows = 64;  // of a tile
inline constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
static_assert(kConsumerWarpgroups * ptx::kWarpgroupThreads == kDkvThreads && kRows <= kGatherThreads);

template <typename T>
struct Params {
  TensorMap k_map, v_map;
  DkvParams<T> dkv;
  std::int64_t heads;

  MOBA_DEVICE std::int64_t key_tiles() const { return dkv.plan.key_tile_starts[dkv.batch.sequences]; }
  MOBA_DEVICE std::int64_t work_tiles() const {
    return dkv.segments ? *dkv.plan.count * dkv.key_tiles : key_tiles() * heads;
  }
};

/// Maps a work index to a key tile. The key tiles of a head are consecutive, so that concurrent thread
/// blocks read the same rows from L2.
template <int head_dim, typename T>
MOBA_DEVICE KeyTile key_tile_of_work(const Params<T>& p, std::int64_t index) {
  if (p.dkv.segments) return key_tile_of_segment<head_dim>(p.dkv, index);
  return key_tile_at<head_dim>(p.dkv, index / p.key_tiles(),
                               static_cast<std::int32_t>(index % p.key_tiles()));
}

/// Table of the rows of a tile of q, which the producer writes.
struct RowTable {
  LseDelta lse_delta[kRows];
  std::int64_t q_offsets[kRows], d_out_offsets[kRows];
  std::int32_t visible_keys[kRows];  // leading keys of the key tile that the row sees
  bool unmasked;                     // every row sees every key
};

template <typename T, int head_dim>
struct Shared {
  static constexpr int kStages = head_dim > 64 ? 4 : 8;  // tiles of rows
  using Keys = tile::SwizzledTile128B<T, kKeys, head_dim>;
  using Rows = tile::SwizzledTile128B<T, kRows, head_dim>;
  struct Control {
    RowTable tables[kStages];
    StageBarriers q[kStages];
    StageBarriers kv;
    KeyTile key_tile;
  };
  static constexpr std::size_t kBytes = 2 * Keys::kBytes + 2 * kStages * Rows::kBytes + sizeof(Control);

  std::byte* memory;

  MOBA_DEVICE Keys k() const { return {memory}; }
  MOBA_DEVICE Keys v() const { return {memory + Keys::kBytes}; }
  MOBA_DEVICE Rows q(int stage) const { return {memory + 2 * Keys::kBytes + 2 * stage * Rows::kBytes}; }
  MOBA_DEVICE Rows d_out(int stage) const { return {q(stage).data + Rows::kBytes}; }
  MOBA_DEVICE Control& control() const { return *reinterpret_cast<Control*>(q(kStages).data); }
};

/// Producer of k and v: one thread loads a key tile by TMA.
template <typename T, int head_dim>
MOBA_DEVICE void load_kv(const Params<T>& p, const Shared<T, head_dim>& shared, std::int64_t work_tiles) {
  auto& control = shared.control();
  PipelineState<1> kv_buffer;
  for_own_tiles(work_tiles, [&](std::int64_t index) {
    const KeyTile key_tile = key_tile_of_work<head_dim>(p, index);
    const std::int64_t head = p.dkv.head0 + key_tile.head;
    ptx::mbarrier_wait(&control.kv.empty, kv_buffer.phase ^ 1U);
    control.key_tile = key_tile;
    ptx::mbarrier_arrive_expect_tx(&control.kv.full, 2 * Shared<T, head_dim>::Keys::kBytes);
    tma_load_tile(shared.k(), p.k_map, head, key_tile.first_key, &control.kv.full);
    tma_load_tile(shared.v(), p.v_map, head, key_tile.first_key, &control.kv.full);
    kv_buffer.advance();
  });
}

/// Producer of q and d_out. Called by kGatherThreads threads, numbered by `thread`. Each of the first kRows
/// threads fetches the metadata of one row, one tile ahead of the gather.
template <typename T, int head_dim>
MOBA_DEVICE void load_q(const Params<T>& p, const Shared<T, head_dim>& shared, std::int64_t work_tiles,
                        int thread) {
  auto& control = shared.control();
  /// A gathered tile that is not published yet.
  struct Gathered {
    int stage = -1;
    bool mixed = false;
  };
  const auto publish = [&](const Gathered& tile) {
    if (tile.mixed) {
      ptx::bar_sync(kGatherSync, kGatherThreads);  // the copies of all threads have completed
      isolate_nonfinite_rows<kGatherThreads, kRows>(shared.q(tile.stage), shared.d_out(tile.stage), thread,
                                                    control.tables[tile.stage].lse_delta);
    }
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(&control.q[tile.stage].full);
  };
  const bool owns_row = thread < kRows;
  PipelineState<Shared<T, head_dim>::kStages> stage;
  for_own_tiles(work_tiles, [&](std::int64_t index) {
    const KeyTile key_tile = key_tile_of_work<head_dim>(p, index);
    RowInfo row_info;
    LseDelta lse_delta;
    std::uint32_t entry = kNoEntry;
    const auto fetch_row = [&](std::uint32_t first) {
      const std::uint32_t row = first + static_cast<std::uint32_t>(thread);
      row_info = row_info_of(p.dkv, key_tile, row, entry);
      lse_delta = lse_delta_of(p.dkv, key_tile, row_info);
      entry = entry_at(key_tile, row + kRows);
    };
    if (owns_row) {
      entry = entry_at(key_tile, static_cast<std::uint32_t>(thread));
      fetch_row(0);
    }
    Gathered pending;
    for (std::uint32_t first = 0; first < key_tile.rows(); first += kRows, stage.advance()) {
      RowTable& table = control.tables[stage.index];
      const bool unmasked = is_unmasked<kRows>(p.dkv, key_tile, first);
      ptx::mbarrier_wait(&control.q[stage.index].empty, stage.phase ^ 1U);
      if (owns_row) {
        const bool exists = row_info.row != kNoEntry;
        table.lse_delta[thread] = lse_delta;
        table.visible_keys[thread] = row_info.visible_keys;
        table.q_offsets[thread] = exists ? row_info.q : kNoRow;
        table.d_out_offsets[thread] = exists ? row_info.d_out : kNoRow;
        if (thread == 0) table.unmasked = unmasked;
        fetch_row(first + kRows);
      }
      ptx::bar_sync(kGatherSync, kGatherThreads);
      gather_rows(shared.q(stage.index), p.dkv.q.data, table.q_offsets, ptx::opaque(thread));
      gather_rows(shared.d_out(stage.index), p.dkv.d_out.data, table.d_out_offsets, ptx::opaque(thread));
      ptx::cp_async_commit();
      if (pending.stage >= 0) {
        ptx::cp_async_wait<1>();
        publish(pending);
      }
      pending = {stage.index, !unmasked && is_mixed<kRows>(p.dkv, key_tile, first)};
    }
    if (pending.stage < 0) return;  // no query sees these keys
    ptx::cp_async_wait<0>();
    publish(pending);
  });
}

/// Accumulates dk and dv of this warpgroup over one tile of rows. The keys of the warpgroup begin at
/// `warpgroup_key`, those of the warp at `warp_key`.
template <typename T, int head_dim>
MOBA_DEVICE void accumulate_dk_dv(const Params<T>& p, const Shared<T, head_dim>& shared, int stage,
                                  int warpgroup_key, int warp_key, float (&dk)[head_dim / 8][4],
                                  float (&dv)[head_dim / 8][4]) {
  const RowTable& table = shared.control().tables[stage];
  const auto q = shared.q(stage), d_out = shared.d_out(stage);
  const bool unmasked = warp_uniform(static_cast<int>(table.unmasked)) != 0;
  float probs[kRows / 8][4], ds[kRows / 8][4];
  std::uint32_t p_operand[kRows / 16][4], ds_operand[kRows / 16][4];
  ptx::wgmma_fence();
  issue_qk(probs, shared.k(), warpgroup_key, q);
  issue_qk(ds, shared.v(), warpgroup_key, d_out);
  ptx::wgmma_wait<1>(probs);
  recompute_p(probs, table.lse_delta, p.dkv.log2_scale);
  if (!unmasked) apply_mask(probs, table.visible_keys, warp_key);
  pack_p_as_a_operand<T>(p_operand, probs);
  ptx::wgmma_fence();
  issue_pv(dv, p_operand, d_out);
  ptx::wgmma_wait<1>(ds);
  compute_ds(ds, probs, table.lse_delta);
  if (!unmasked) apply_mask(ds, table.visible_keys, warp_key);
  pack_p_as_a_operand<T>(ds_operand, ds);
  ptx::wgmma_fence();
  issue_pv(dk, ds_operand, q);
  ptx::wgmma_wait(dv);
  ptx::wgmma_wait(dk);
}

/// Epilogue: stores partial sums of a segment, or adds those of the other segments and stores dk and dv
/// through the shared memory of k and v.
template <typename T, int head_dim>
MOBA_DEVICE void store_dk_dv(const Params<T>& p, const Shared<T, head_dim>& shared, const KeyTile& key_tile,
                             int warp_key, float (&dk)[head_dim / 8][4], float (&dv)[head_dim / 8][4]) {
  const int thread = ptx::thread() - ptx::kWarpgroupThreads;
  if (p.dkv.segments) {
    store_partial_sums(p.dkv, key_tile.sums, 0, thread, dk);
    store_partial_sums(p.dkv, key_tile.sums, 1, thread, dv);
    return;
  }
  add_partial_sums(p.dkv, key_tile, 0, thread, dk);
  add_partial_sums(p.dkv, key_tile, 1, thread, dv);
  const std::int64_t kv_head = p.dkv.head0 + key_tile.head;
  store_gradient(p.dkv.dk, shared.k(), key_tile, kv_head, warp_key, 0, p.dkv.scale, dk);
  store_gradient(p.dkv.dv, shared.v(), key_tile, kv_head, warp_key, 0, 1, dv);
  ptx::fence_proxy_async();  // the next TMA load overwrites k and v
}

/// Main loop of the consumer warpgroups.
template <typename T, int head_dim>
MOBA_DEVICE void consume(const Params<T>& p, const Shared<T, head_dim>& shared, std::int64_t work_tiles,
                         int warpgroup) {
  auto& control = shared.control();
  const int warpgroup_key = warpgroup * kWarpgroupRows;
  const int warp_key = warpgroup_key + ptx::warp() % 4 * 16;
  PipelineState<1> kv_buffer;
  PipelineState<Shared<T, head_dim>::kStages> stage;
  for_own_tiles(work_tiles, [&](std::int64_t) {
    ptx::mbarrier_wait(&control.kv.full, kv_buffer.phase);
    const std::uint32_t rows = warp_uniform(control.key_tile.rows());
    const bool has_keys = warpgroup_key < warp_uniform(control.key_tile.count);
    float dk[head_dim / 8][4] = {}, dv[head_dim / 8][4] = {};
    for (std::uint32_t first = 0; first < rows; first += kRows, stage.advance()) {
      ptx::mbarrier_wait(&control.q[stage.index].full, stage.phase);
      if (has_keys)
        accumulate_dk_dv(p, shared, stage.index, ptx::opaque(warpgroup_key), ptx::opaque(warp_key), dk, dv);
      consumer_release(control.q[stage.index].empty);
    }
    if (has_keys) {
      warpgroup_sync(warpgroup);  // k and v are no longer read: the epilogue overwrites them
      store_dk_dv(p, shared, control.key_tile, warp_key, dk, dv);
    }
    consumer_release(control.kv.empty);
    kv_buffer.advance();
  });
}

template <typename T, int head_dim>
MOBA_KERNEL(kThreads, 1)
attend_backward_dkv_kernel(MOBA_GRID_CONSTANT Params<T> p) {
  if constexpr (ptx::kHasWarpgroups) {
    const Shared<T, head_dim> shared{ptx::shared()};
    const std::int64_t work_tiles = warp_uniform(p.work_tiles());
    specialise_warpgroups<kProducerRegisters, kConsumerRegisters>(
        [&] {
          auto& control = shared.control();
          control.kv.init(1);
          for (StageBarriers& barriers : control.q) barriers.init(kGatherThreads);
        },
        [&] { load_kv(p, shared, work_tiles); }, [&](int thread) { load_q(p, shared, work_tiles, thread); },
        [&](int warpgroup) { consume(p, shared, work_tiles, warpgroup); });
  }
}

}  // namespace sm90::dkv

void attend_backward_dkv_sm90(Stream& stream, const DeviceCall& call, const WorkSlice& slice,
                              const Batch& batch, const Plan& plan, const LseDelta* sums,
                              const Backward& backward, const DkvPlan& dkv_plan) {
  with_type(call, [&]<typename T, int head_dim>() {
    if constexpr (head_dim == 64 || head_dim == 128) {
      static_assert(sm90::dkv::kKeys == keys_per_tile(head_dim));
      sm90::dkv::Params<T> params{.k_map = tensor_map(call.k, sm90::dkv::kKeys),
                                  .v_map = tensor_map(call.v, sm90::dkv::kKeys),
                                  .dkv = dkv_params<T>(call, slice, batch, plan, sums, backward, dkv_plan),
                                  .heads = slice.heads()};
      const std::int64_t blocks = current_hardware().multiprocessors;
      const auto launch = [&](bool segments, std::int64_t max_work_tiles) {
        params.dkv.segments = segments;
        stream.launch("attend_backward_dkv_sm90", sm90::dkv::attend_backward_dkv_kernel<T, head_dim>,
                      {std::min(blocks, max_work_tiles)}, sm90::kThreads,
                      sm90::dkv::Shared<T, head_dim>::kBytes, params);
      };
      launch(true, max_segments(call, slice) * params.dkv.key_tiles);
      launch(false, max_key_tiles(call) * slice.heads());
    }
  });
}

}  // namespace moba::cuda
