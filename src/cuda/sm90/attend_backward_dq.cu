// The walk by row on Hopper, with the items and slots of attend_backward_dq.cu: two warpgroups hold 64 rows
// each and their gradients, and keys stream past both.
#include <algorithm>

#include "cuda/attend_backward.h"
#include "cuda/sm90/attend_items.h"

namespace moba::cuda {
namespace sm90::dq {

inline constexpr int kKeys = 64;  // of a tile
inline constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
static_assert(kConsumerWarpgroups * kWarpgroupRows == kTileRows);

template <typename T>
struct Params {
  TensorMap k_map, v_map;
  AttendParams<T> items;
  View<const T> d_out;
  const LseDelta* sums;  // [heads, sums_rows], of rows from the part's first on
  std::int64_t sums_rows;
  float scale, log2_scale;  // the latter for powers of 2
};

/// What is known of an item's rows.
struct RowTable {
  std::int64_t q_offsets[kTileRows], d_out_offsets[kTileRows];
  LseDelta sums[kTileRows];
  KeyRange bounds[kTileRows];
  std::uint32_t slots[kTileRows];
  Work work;
};

template <typename T, int head_dim>
struct Shared {
  static constexpr int kStages = head_dim > 64 ? 2 : 4;  // tiles of keys
  using Rows = tile::SwizzledTile128B<T, kTileRows, head_dim>;
  using Keys = tile::SwizzledTile128B<T, kKeys, head_dim>;
  struct Control {
    RowTable tables[2];
    StageBarriers rows[2], k[kStages], v[kStages];
  };
  static constexpr std::size_t kBytes = 4 * Rows::kBytes + 2 * kStages * Keys::kBytes + sizeof(Control);

  std::byte* memory;

  MOBA_DEVICE Rows q(int buffer) const { return {memory + 2 * buffer * Rows::kBytes}; }
  MOBA_DEVICE Rows d_out(int buffer) const { return {q(buffer).data + Rows::kBytes}; }
  MOBA_DEVICE Keys k(int stage) const { return {memory + 4 * Rows::kBytes + 2 * stage * Keys::kBytes}; }
  MOBA_DEVICE Keys v(int stage) const { return {k(stage).data + Keys::kBytes}; }
  MOBA_DEVICE Control& control() const { return *reinterpret_cast<Control*>(k(kStages).data); }
};

/// By kGatherThreads threads; `thread` is the number among them.
template <typename T, int head_dim>
MOBA_DEVICE void load_q(const Params<T>& p, const Shared<T, head_dim>& shared, std::int64_t items,
                        int thread) {
  PipelineState<2> buffer;
  for_own_items(items, [&](std::int64_t index) {
    StageBarriers& barriers = shared.control().rows[buffer.index];
    RowTable& table = shared.control().tables[buffer.index];
    ptx::mbarrier_wait(&barriers.empty, buffer.phase ^ 1U);
    with_item(p.items, index, [&](const Work& work, auto&& place_of) {
      for (int r = thread; r < kTileRows; r += kGatherThreads) {
        const Place place = place_of(r);
        const std::uint32_t row = place.slot / static_cast<std::uint32_t>(p.items.ranks);
        const bool exists = place.q_offset != kNoRow;
        table.q_offsets[r] = place.q_offset;
        table.d_out_offsets[r] = exists ? row_offset(p.items, p.d_out, work.head, row) : kNoRow;
        table.sums[r] = exists ? p.sums[work.head * p.sums_rows + row] : LseDelta{ptx::infinity(), 0};
        table.bounds[r] = work.near ? place.sees : KeyRange{work.begin, work.end};
        table.slots[r] = place.slot;
      }
      if (thread == 0) table.work = work;
    });
    ptx::bar_sync(kRowTableReady, kGatherThreads);
    gather_rows(shared.q(buffer.index), p.items.q.data, table.q_offsets, thread);
    gather_rows(shared.d_out(buffer.index), p.d_out.data, table.d_out_offsets, thread);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(&barriers.full);
    buffer.advance();
  });
}

/// What a lane knows of its two rows.
struct OwnRows {
  LseDelta sums[2];
  KeyRange sees[2];

  MOBA_DEVICE OwnRows(const RowTable& table, int warp_row) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 8 * half + ptx::lane() / 4;
      sums[half] = table.sums[row];
      sees[half] = table.bounds[row];
    }
  }
};

/// Products with keys become weights.
MOBA_DEVICE void to_weights(float (&products)[kKeys / 8][4], const OwnRows& rows, float log2_scale) {
  MOBA_UNROLL
  for (int j = 0; j < kKeys / 8; ++j) {
    MOBA_UNROLL
    for (int e = 0; e < 4; ++e)
      products[j][e] = ptx::exp2(ptx::fma(products[j][e], log2_scale, -rows.sums[e / 2].lse));
  }
}

/// Gradients of weights become gradients of logits.
MOBA_DEVICE void to_d_logits(float (&d_weights)[kKeys / 8][4], const float (&weights)[kKeys / 8][4],
                             const OwnRows& rows) {
  MOBA_UNROLL
  for (int j = 0; j < kKeys / 8; ++j) {
    MOBA_UNROLL
    for (int e = 0; e < 4; ++e) d_weights[j][e] = weights[j][e] * (d_weights[j][e] - rows.sums[e / 2].delta);
  }
}

/// 0 where a row does not see a key. `key` is that of the first column.
MOBA_DEVICE void apply_mask(float (&d_logits)[kKeys / 8][4], const OwnRows& rows, std::int32_t key) {
  MOBA_UNROLL
  for (int j = 0; j < kKeys / 8; ++j) {
    MOBA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const std::int32_t column = key + 8 * j + ptx::lane() % 4 * 2 + e % 2;
      const KeyRange& sees = rows.sees[e / 2];
      if (column < sees.begin || column >= sees.end) d_logits[j][e] = 0;
    }
  }
}

/// Writes this warp's rows, through its own rows of q's shared memory so that whole vecs go out.
template <typename T, int head_dim, typename Rows>
MOBA_DEVICE void write(const Params<T>& p, const Rows& q, const RowTable& table, const Work& work,
                       const float (&dq)[head_dim / 8][4], int warp_row) {
  MOBA_UNROLL
  for (int j = 0; j < head_dim / 8; ++j) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      auto* to = reinterpret_cast<std::uint32_t*>(q.vec(warp_row + 8 * half + ptx::lane() / 4, j));
      to[ptx::lane() % 4] = ptx::pack<T>(dq[j][2 * half] * p.scale, dq[j][2 * half + 1] * p.scale);
    }
  }
  store_rows<T, 1, head_dim / 8>(p.items, q, table.slots, work, warp_row);
}

/// By the two groups that multiply: what the others load.
template <typename T, int head_dim>
MOBA_DEVICE void consume(const Params<T>& p, const Shared<T, head_dim>& shared, std::int64_t items,
                         int warpgroup) {
  using S = Shared<T, head_dim>;
  typename S::Control& control = shared.control();
  const int first_row = warpgroup * kWarpgroupRows;
  const int warp_row = first_row + ptx::warp() % 4 * 16;
  PipelineState<2> buffer;
  PipelineState<S::kStages> stage;
  for_own_items(items, [&](std::int64_t) {
    ptx::mbarrier_wait(&control.rows[buffer.index].full, buffer.phase);
    const RowTable& table = control.tables[buffer.index];
    const Work work = warp_uniform(table.work);
    const auto q = shared.q(buffer.index), d_out = shared.d_out(buffer.index);
    const bool has_rows = first_row < work.count;  // the other warpgroup has some
    const OwnRows rows(table, warp_row);
    float dq[head_dim / 8][4] = {};
    for (std::int32_t key = work.begin; key < work.end; key += kKeys, stage.advance()) {
      const auto k = shared.k(stage.index), v = shared.v(stage.index);
      float weights[kKeys / 8][4], d_logits[kKeys / 8][4];
      ptx::mbarrier_wait(&control.k[stage.index].full, stage.phase);
      ptx::mbarrier_wait(&control.v[stage.index].full, stage.phase);
      if (has_rows) {
        ptx::wgmma_fence();
        issue_qk(weights, q, first_row, k);
        issue_qk(d_logits, d_out, first_row, v);
        ptx::wgmma_wait<1>(weights);
        to_weights(weights, rows, p.log2_scale);
        ptx::wgmma_wait(d_logits);
      }
      consumer_release(control.v[stage.index].empty);
      if (has_rows) {
        to_d_logits(d_logits, weights, rows);
        if (key < work.all_begin || key + kKeys > work.all_end) apply_mask(d_logits, rows, key);
        if (key + kKeys > work.end) zero_rows_from(k, work.end - key, warpgroup);
        std::uint32_t left[kKeys / 16][4];
        pack_p_as_a_operand<T>(left, d_logits);
        ptx::wgmma_fence();
        issue_pv(dq, left, k);
        ptx::wgmma_wait(dq);
      }
      consumer_release(control.k[stage.index].empty);
    }
    if (has_rows) {
      warpgroup_sync(warpgroup);  // q has been read: gradients go there
      write<T, head_dim>(p, q, table, work, dq, warp_row);
    }
    consumer_release(control.rows[buffer.index].empty);
    buffer.advance();
  });
}

template <typename T, int head_dim>
MOBA_KERNEL(kThreads, 1)
attend_backward_dq_kernel(MOBA_GRID_CONSTANT Params<T> p) {
  if constexpr (ptx::kHasWarpgroups) {
    const Shared<T, head_dim> shared{ptx::shared()};
    const std::int64_t items = warp_uniform(p.items.items());
    if (ptx::thread() == 0) {
      auto& control = shared.control();
      for (StageBarriers& barriers : control.rows) barriers.init(kGatherThreads);
      for (StageBarriers& barriers : control.k) barriers.init(1);
      for (StageBarriers& barriers : control.v) barriers.init(1);
      ptx::fence_proxy_async();
    }
    ptx::syncthreads();
    const int warpgroup = warp_uniform(ptx::thread() / ptx::kWarpgroupThreads);
    if (warpgroup == 0) {
      ptx::warpgroup_reg_dealloc<kProducerRegisters>();
      if (ptx::thread() == 0) load_kv(p.k_map, p.v_map, p.items, shared, items);
      if (ptx::warp() > 0) load_q(p, shared, items, ptx::thread() - ptx::kLanes);
    } else {
      ptx::warpgroup_reg_alloc<kConsumerRegisters>();
      consume(p, shared, items, warpgroup - 1);
    }
  }
}

}  // namespace sm90::dq

void attend_backward_dq_sm90(Stream& stream, const Task& task, const WorkSlice& part, const Batch& batch,
                             const Plan& plan, const LseDelta* sums, const Backward& backward, void* slots) {
  with_type(task, [&]<typename T, int head_dim>() {
    if constexpr (head_dim == 64 || head_dim == 128) {
      const sm90::dq::Params<T> params{
          .k_map = tensor_map(stream.function(), task.k, sm90::dq::kKeys),
          .v_map = tensor_map(stream.function(), task.v, sm90::dq::kKeys),
          .items = attend_params<T>(task, part, batch, plan, {.out = slots}, {.out = backward.gradients.dq}),
          .d_out = view_of<const T>(backward.d_out),
          .sums = sums,
          .sums_rows = task.tokens * task.group,
          .scale = task.scale,
          .log2_scale = task.scale * ptx::kLog2E};
      const std::int64_t blocks = current_hardware(stream.function()).multiprocessors;
      stream.launch("attend_backward_dq_sm90", sm90::dq::attend_backward_dq_kernel<T, head_dim>,
                    {std::min(blocks, most_items(task, part))}, sm90::kThreads,
                    sm90::dq::Shared<T, head_dim>::kBytes, params);
    }
  });
}

}  // namespace moba::cuda
