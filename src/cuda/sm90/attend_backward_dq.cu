// dq on sm_90a, over the work tiles and slots of sm80/attend_backward_dq.cu. Each consumer warpgroup holds
// 64 rows of q, d_out and dq; tiles of k and v stream past both.
#include <algorithm>

#include "cuda/attend_backward_dq.h"
#include "cuda/sm90/attend_work_tiles.h"

namespace moba::cuda {
namespace sm90::dq {

inline constexpr int kKeys = 64;  // of a tile
inline constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
static_assert(kConsumerWarpgroups * kWarpgroupRows == kTileRows);

template <typename T>
struct Params {
  TensorMap k_map, v_map;
  DqParams<T> dq;
};

/// Table of the rows of a work tile, which the producer writes.
struct RowTable {
  std::int64_t q_offsets[kTileRows], d_out_offsets[kTileRows];
  LseDelta lse_delta[kTileRows];
  KeyRange bounds[kTileRows];
  std::uint32_t slots[kTileRows];
  WorkTile work;
};

template <typename T, int head_dim>
struct Shared {
  static constexpr int kStages = head_dim > 64 ? 2 : 4;  // tiles of keys
  static constexpr int kTables = 4;
  using Rows = tile::SwizzledTile128B<T, kTileRows, head_dim>;
  using Keys = tile::SwizzledTile128B<T, kKeys, head_dim>;
  struct Control {
    RowTable tables[kTables];
    StageBarriers table_barriers[kTables];
    StageBarriers q[2], k[kStages], v[kStages];
    float poison[kStages][kKeys];  // of mixed tiles
  };
  static constexpr std::size_t kBytes = 4 * Rows::kBytes + 2 * kStages * Keys::kBytes + sizeof(Control);

  std::byte* memory;

  MOBA_DEVICE Rows q(int buffer) const { return {memory + 2 * buffer * Rows::kBytes}; }
  MOBA_DEVICE Rows d_out(int buffer) const { return {q(buffer).data + Rows::kBytes}; }
  MOBA_DEVICE Keys k(int stage) const { return {memory + 4 * Rows::kBytes + 2 * stage * Keys::kBytes}; }
  MOBA_DEVICE Keys v(int stage) const { return {k(stage).data + Keys::kBytes}; }
  MOBA_DEVICE Control& control() const { return *reinterpret_cast<Control*>(k(kStages).data); }
};

/// LSE, delta and key range of the two rows that a thread holds.
struct ThreadRows {
  LseDelta lse_delta[2];
  KeyRange visible[2];

  MOBA_DEVICE ThreadRows(const RowTable& table, int warp_row) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 8 * half + ptx::lane() / 4;
      lse_delta[half] = table.lse_delta[row];
      visible[half] = table.bounds[row];
    }
  }
};

/// Recomputes P = exp2(log2_scale * S - lse) in place, at most 1 whatever the rounding of lse.
MOBA_DEVICE void recompute_p(float (&products)[kKeys / 8][4], const ThreadRows& rows, float log2_scale) {
  MOBA_UNROLL
  for (int j = 0; j < kKeys / 8; ++j) {
    MOBA_UNROLL
    for (int e = 0; e < 4; ++e)
      products[j][e] =
          ptx::exp2(ptx::at_most_zero(ptx::fma(products[j][e], log2_scale, -rows.lse_delta[e / 2].lse)));
  }
}

/// Computes dS = P * (dP - delta); `ds` holds dP on entry.
MOBA_DEVICE void compute_ds(float (&ds)[kKeys / 8][4], const float (&probs)[kKeys / 8][4],
                            const ThreadRows& rows) {
  MOBA_UNROLL
  for (int j = 0; j < kKeys / 8; ++j) {
    MOBA_UNROLL
    for (int e = 0; e < 4; ++e) ds[j][e] = probs[j][e] * (ds[j][e] - rows.lse_delta[e / 2].delta);
  }
}

/// Zeroes dS of keys outside the range of a row. `key` is the key of the first column.
MOBA_DEVICE void apply_mask(float (&ds)[kKeys / 8][4], const ThreadRows& rows, std::int32_t key) {
  MOBA_UNROLL
  for (int j = 0; j < kKeys / 8; ++j) {
    MOBA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const std::int32_t column = key + 8 * j + ptx::lane() % 4 * 2 + e % 2;
      const KeyRange& visible = rows.visible[e / 2];
      if (column < visible.begin || column >= visible.end) ds[j][e] = 0;
    }
  }
}

/// Main loop of the consumer warpgroups.
template <typename T, int head_dim>
MOBA_DEVICE void consume(const Params<T>& p, const Shared<T, head_dim>& shared, std::int64_t work_tiles,
                         int warpgroup) {
  using S = Shared<T, head_dim>;
  typename S::Control& control = shared.control();
  const int first_row = warpgroup * kWarpgroupRows;
  const int warp_row = first_row + ptx::warp() % 4 * 16;
  PipelineState<2> buffer;
  PipelineState<S::kTables> row_table;
  PipelineState<S::kStages> stage;
  for_own_tiles(work_tiles, [&](std::int64_t) {
    ptx::mbarrier_wait(&control.q[buffer.index].full, buffer.phase);
    const RowTable& table = control.tables[row_table.index];
    const WorkTile work = warp_uniform(table.work);
    const auto q = shared.q(buffer.index), d_out = shared.d_out(buffer.index);
    const bool has_rows = first_row < work.count;  // warpgroup-uniform
    const ThreadRows rows(table, warp_row);
    float dq[1][head_dim / 8][4] = {};
    for (std::int32_t tile = 0; tile < work.key_tiles(kKeys); ++tile, stage.advance()) {
      const std::int32_t key = work.begin + tile * kKeys;
      const auto k = shared.k(stage.index), v = shared.v(stage.index);
      float probs[kKeys / 8][4], ds[1][kKeys / 8][4];
      ptx::mbarrier_wait(&control.k[stage.index].full, stage.phase);
      ptx::mbarrier_wait(&control.v[stage.index].full, stage.phase);
      const bool mixed = work.is_mixed(key, kKeys);
      if (mixed) isolate_nonfinite(k, control.poison[stage.index]);
      if (has_rows) {
        ptx::wgmma_fence();
        issue_qk(probs, q, first_row, k);
        issue_qk(ds[0], d_out, first_row, v);
        ptx::wgmma_wait<1>(probs);
        recompute_p(probs, rows, p.dq.log2_scale);
        ptx::wgmma_wait(ds[0]);
      }
      consumer_release(control.v[stage.index].empty);
      if (has_rows) {
        compute_ds(ds[0], probs, rows);
        if (mixed) add_poison(ds, control.poison[stage.index]);
        if (work.is_masked(key, kKeys)) apply_mask(ds[0], rows, key);
        if (key + kKeys > work.end) zero_rows_from(k, work.end - key, warpgroup);
        std::uint32_t ds_operand[kKeys / 16][4];
        pack_p_as_a_operand<T>(ds_operand, ds[0]);
        ptx::wgmma_fence();
        issue_pv(dq[0], ds_operand, k);
        ptx::wgmma_wait(dq[0]);
      }
      consumer_release(control.k[stage.index].empty);
    }
    if (has_rows) {
      warpgroup_sync(warpgroup);  // q is no longer read: the epilogue overwrites it
      store_dq<head_dim>(p.dq, q, table.slots, work, dq, warp_row);
    }
    consumer_release(control.q[buffer.index].empty);
    consumer_release(control.table_barriers[row_table.index].empty);
    buffer.advance();
    row_table.advance();
  });
}

template <typename T, int head_dim>
MOBA_KERNEL(kThreads, 1)
attend_backward_dq_kernel(MOBA_GRID_CONSTANT Params<T> p) {
  if constexpr (ptx::kHasWarpgroups) {
    const Shared<T, head_dim> shared{ptx::shared()};
    const std::int64_t work_tiles = warp_uniform(p.dq.attend.work_tiles());
    specialise_warpgroups<kProducerRegisters, kConsumerRegisters>(
        [&] {
          auto& control = shared.control();
          init_table_barriers(control);
          for (StageBarriers& barriers : control.q) barriers.init(ptx::kLanes);
          for (StageBarriers& barriers : control.k) barriers.init(1);
          for (StageBarriers& barriers : control.v) barriers.init(1);
        },
        [&] {
          produce(
              p.k_map, p.v_map, p.dq.attend, shared, {.work_tiles = work_tiles}, kKeys,
              [&](const WorkTile& work, RowTable& table, int r, std::uint32_t slot) {
                store_row(p.dq, work, table, r, slot);
              },
              [&](const RowTable& table, int buffer) {
                gather_rows<ptx::kLanes>(shared.q(buffer), p.dq.attend.q.data, table.q_offsets, ptx::lane());
                gather_rows<ptx::kLanes>(shared.d_out(buffer), p.dq.d_out.data, table.d_out_offsets,
                                         ptx::lane());
              });
        },
        [&](int warpgroup) { consume(p, shared, work_tiles, warpgroup); });
  }
}

}  // namespace sm90::dq

void attend_backward_dq_sm90(Stream& stream, const DeviceCall& call, const WorkSlice& slice,
                             const Batch& batch, const Plan& plan, const LseDelta* lse_delta,
                             const Backward& backward, void* slots) {
  with_type(call, [&]<typename T, int head_dim>() {
    if constexpr (head_dim == 64 || head_dim == 128) {
      const sm90::dq::Params<T> params{
          .k_map = tensor_map(call.k, sm90::dq::kKeys),
          .v_map = tensor_map(call.v, sm90::dq::kKeys),
          .dq = dq_params<T>(call, slice, batch, plan, lse_delta, backward, slots)};
      const std::int64_t blocks = current_hardware().multiprocessors;
      stream.launch("attend_backward_dq_sm90", sm90::dq::attend_backward_dq_kernel<T, head_dim>,
                    {std::min(blocks, max_work_tiles(call, slice))}, sm90::kThreads,
                    sm90::dq::Shared<T, head_dim>::kBytes, params);
    }
  });
}

}  // namespace moba::cuda
