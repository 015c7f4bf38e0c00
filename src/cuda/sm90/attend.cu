// Forward attention on sm_90a, over the work tiles of sm80/attend.cu. Warpgroup 0 is the producer; the two
// consumer warpgroups hold 64 rows each and take turns to issue Q K^T, so that the softmax of one overlaps
// the products of the other (ping-pong scheduling of FlashAttention-3).
#include <algorithm>
#include <cstdlib>
#include <string>

#include "cuda/sm90/attend_work_tiles.h"
#include "moba/error.h"

namespace moba::cuda {
namespace sm90 {

inline constexpr int kKeys = 128;  // of a tile
inline constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;

template <typename T>
struct Params {
  TensorMap k, v;
  AttendParams<T> attend;
};

/// Table of the rows of a work tile, which the producer writes.
struct RowTable {
  std::int64_t q_offsets[kTileRows];
  KeyRange bounds[kTileRows];
  std::uint32_t slots[kTileRows];
  WorkTile work;
};

template <typename T, int head_dim>
struct Shared {
  static constexpr int kStages = head_dim > 64 ? 2 : 4;  // tiles of keys
  using Rows = tile::SwizzledTile128B<T, kTileRows, head_dim>;
  using Keys = tile::SwizzledTile128B<T, kKeys, head_dim>;

  struct Control {
    RowTable tables[2];
    StageBarriers q[2], k[kStages], v[kStages];
    float poison[kStages][kKeys];  // of the values of mixed tiles
  };
  static constexpr std::size_t kBytes = 2 * Rows::kBytes + 2 * kStages * Keys::kBytes + sizeof(Control);

  std::byte* memory;

  MOBA_DEVICE Rows q(int buffer) const { return {memory + buffer * Rows::kBytes}; }
  MOBA_DEVICE Keys k(int stage) const { return {memory + 2 * Rows::kBytes + 2 * stage * Keys::kBytes}; }
  MOBA_DEVICE Keys v(int stage) const { return {k(stage).data + Keys::kBytes}; }
  MOBA_DEVICE Control& control() const { return *reinterpret_cast<Control*>(k(kStages).data); }
};

/// Producer of q: gathers the rows of each work tile. Called by kGatherThreads threads, numbered by
/// `thread`.
template <typename T, int head_dim>
MOBA_DEVICE void load_q(const Params<T>& p, const Shared<T, head_dim>& shared, std::int64_t work_tiles,
                        int thread) {
  PipelineState<2> buffer;
  for_own_tiles(work_tiles, [&](std::int64_t index) {
    auto& barriers = shared.control().q[buffer.index];
    RowTable& table = shared.control().tables[buffer.index];
    ptx::mbarrier_wait(&barriers.empty, buffer.phase ^ 1U);
    with_work_tile(p.attend, index, 0, [&](const WorkTile& work, auto&& row_of) {
      for (int r = thread; r < kTileRows; r += kGatherThreads) {
        const WorkRow row = row_of(r);
        table.q_offsets[r] = row.q_offset;
        table.bounds[r] = row.visible;
        table.slots[r] = row.slot;
      }
      if (thread == 0) table.work = work;
    });
    ptx::bar_sync(kGatherSync, kGatherThreads);
    gather_rows(shared.q(buffer.index), p.attend.q.data, table.q_offsets, thread);
    producer_commit(barriers.full);
    buffer.advance();
  });
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
  PipelineState<S::kStages> stage;
  if (warpgroup == 1) pingpong_arrive(warpgroup);
  for_own_tiles(work_tiles, [&](std::int64_t) {
    ptx::mbarrier_wait(&control.q[buffer.index].full, buffer.phase);
    const RowTable& table = control.tables[buffer.index];
    const WorkTile work = warp_uniform(table.work);
    const auto q = shared.q(buffer.index);
    const bool has_rows = first_row < work.count;  // warpgroup-uniform
    float out[1][head_dim / 8][4] = {};
    tile::Softmax<1> softmax;
    softmax.init();
    for (std::int32_t key = work.begin; key < work.end; key += kKeys, stage.advance()) {
      const auto k = shared.k(stage.index), v = shared.v(stage.index);
      const bool mixed = work.is_mixed(key, kKeys);
      float logits[1][kKeys / 8][4];
      ptx::mbarrier_wait(&control.k[stage.index].full, stage.phase);
      pingpong_wait(warpgroup);
      if (has_rows) {
        ptx::wgmma_fence();
        issue_qk(logits[0], q, first_row, k);
        pingpong_arrive(warpgroup);
        ptx::wgmma_wait(logits[0]);
        if (p.attend.scale.negate) negate(logits);
        if (work.is_masked(key, kKeys)) apply_mask(logits, table.bounds, work, key, warp_row);
        softmax.update(logits, out, p.attend.scale.scale);
      } else {
        pingpong_arrive(warpgroup);
      }
      consumer_release(control.k[stage.index].empty);
      ptx::mbarrier_wait(&control.v[stage.index].full, stage.phase);
      if (mixed) isolate_nonfinite(v, control.poison[stage.index]);
      if (has_rows) {
        if (mixed) add_poison(logits, control.poison[stage.index], table.bounds, work, key, warp_row);
        if (key + kKeys > work.end) zero_rows_from(v, work.end - key, warpgroup);
        std::uint32_t probs[kKeys / 16][4];
        pack_p_as_a_operand<T>(probs, logits[0]);
        ptx::wgmma_fence();
        issue_pv(out[0], probs, v);
        ptx::wgmma_wait(out[0]);
      }
      consumer_release(control.v[stage.index].empty);
    }
    if (has_rows) {
      warpgroup_sync(warpgroup);  // q is no longer read: the epilogue overwrites it
      store_out(p.attend, q, table.slots, work, out, softmax, warp_row);
    }
    consumer_release(control.q[buffer.index].empty);
    buffer.advance();
  });
  if (warpgroup == 0) pingpong_wait(warpgroup);  // matches the last arrive of warpgroup 1
}

template <typename T, int head_dim>
MOBA_KERNEL(kThreads, 1)
attend_kernel(MOBA_GRID_CONSTANT Params<T> p) {
  if constexpr (ptx::kHasWarpgroups) {
    const Shared<T, head_dim> shared{ptx::shared()};
    const std::int64_t work_tiles = warp_uniform(p.attend.work_tiles());
    specialise_warpgroups<kProducerRegisters, kConsumerRegisters>(
        [&] {
          auto& control = shared.control();
          for (StageBarriers& barriers : control.q) barriers.init(kGatherThreads);
          for (StageBarriers& barriers : control.k) barriers.init(1);
          for (StageBarriers& barriers : control.v) barriers.init(1);
        },
        [&] { load_kv(p.k, p.v, p.attend, shared, work_tiles); },
        [&](int thread) { load_q(p, shared, work_tiles, thread); },
        [&](int warpgroup) { consume(p, shared, work_tiles, warpgroup); });
  }
}

}  // namespace sm90

namespace {

/// True in a build for sm_90a, which alone contains the kernels.
#if defined(MOBA_CUDA_SM90)
constexpr bool kIsBuilt = true;
#else
constexpr bool kIsBuilt = false;
#endif

/// Tests that a tensor map can describe `t`.
bool has_map(const Tensor& t) {
  constexpr std::int64_t kMaxBytes = std::int64_t{1} << 40;
  const auto fits = [](std::int64_t stride) { return stride > 0 && stride < kMaxBytes / 2; };
  return t.sizes[0] > 0 && fits(t.strides[0]) && fits(t.strides[1]);
}

}  // namespace

bool has_sm90(std::int64_t head_dim) {
  return kIsBuilt && current_hardware().capability == 90 && (head_dim == 64 || head_dim == 128);
}

bool uses_sm90(const DeviceCall& call) {
  const char* forced = std::getenv("MOBA_CUDA_ARCH");
  const std::string_view choice = forced == nullptr ? "" : forced;
  if (!choice.empty() && choice != "sm80" && choice != "sm90")
    refuse("MOBA_CUDA_ARCH", "expected sm80 or sm90, got ", choice);
  const bool can = has_sm90(call.head_dim) && has_map(call.k) && has_map(call.v);
  if (choice == "sm90" && !can) {
    refuse("MOBA_CUDA_ARCH",
           "expected sm80 where a build for sm_90a, compute capability 9.0, head_dim 64 or 128, or positive "
           "strides of k and v are missing, got sm90");
  }
  return choice == "sm90" || (choice.empty() && can && call.routing.block_size > sm90::kKeys / 2);
}

void attend_sm90(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
                 const Plan& plan, const Partials& partials, const Outputs& outputs) {
  with_type(call, [&]<typename T, int head_dim>() {
    if constexpr (head_dim == 64 || head_dim == 128) {
      const sm90::Params<T> params{.k = tensor_map(call.k, sm90::kKeys),
                                   .v = tensor_map(call.v, sm90::kKeys),
                                   .attend = attend_params<T>(call, slice, batch, plan, partials, outputs)};
      const std::int64_t blocks = current_hardware().multiprocessors;
      stream.launch("attend_sm90", sm90::attend_kernel<T, head_dim>,
                    {std::min(blocks, max_work_tiles(call, slice))}, sm90::kThreads,
                    sm90::Shared<T, head_dim>::kBytes, params);
    }
  });
}

}  // namespace moba::cuda
