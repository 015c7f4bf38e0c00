// The walk by key on Hopper, with the chunks, segments and orders of attend_backward_dkv.cu: two warpgroups
// hold 64 keys each and their gradients, and rows stream past both.
#include <algorithm>

#include "cuda/attend_backward_chunks.h"
#include "cuda/sm90/pipeline.h"

namespace moba::cuda {
namespace sm90::dkv {

inline constexpr int kKeys = kConsumerWarpgroups * kWarpgroupRows;
inline constexpr int kRows = 64;  // of a tile
inline constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
static_assert(kConsumerWarpgroups * ptx::kWarpgroupThreads == kChunkThreads && kRows <= kGatherThreads);

template <typename T>
struct Params {
  TensorMap k_map, v_map;
  KeysParams<T> walk;
  std::int64_t heads;

  MOBA_DEVICE std::int64_t chunks() const { return walk.walk.chunk_starts[walk.batch.sequences]; }
  MOBA_DEVICE std::int64_t items() const {
    return walk.segments ? *walk.walk.count * walk.chunks : chunks() * heads;
  }
};

/// The chunks of a head are neighbours, so that blocks which work on them at a time read the same rows.
template <int head_dim, typename T>
MOBA_DEVICE Chunk chunk_of_item(const Params<T>& p, std::int64_t index) {
  if (p.walk.segments) return chunk_of_segment<head_dim>(p.walk, index);
  return chunk_at<head_dim>(p.walk, index / p.chunks(), static_cast<std::int32_t>(index % p.chunks()));
}

/// What is known of a tile's rows.
struct RowTable {
  LseDelta sums[kRows];
  std::int64_t q_offsets[kRows], d_out_offsets[kRows];
  std::int32_t seen[kRows];  // keys of the chunk, the first so many
  bool whole;                // every row sees every key
};

template <typename T, int head_dim>
struct Shared {
  static constexpr int kStages = head_dim > 64 ? 4 : 8;  // tiles of rows
  using Keys = tile::SwizzledTile128B<T, kKeys, head_dim>;
  using Rows = tile::SwizzledTile128B<T, kRows, head_dim>;
  struct Control {
    RowTable tables[kStages];
    StageBarriers rows[kStages];
    StageBarriers keys;
    Chunk chunk;
  };
  static constexpr std::size_t kBytes = 2 * Keys::kBytes + 2 * kStages * Rows::kBytes + sizeof(Control);

  std::byte* memory;

  MOBA_DEVICE Keys k() const { return {memory}; }
  MOBA_DEVICE Keys v() const { return {memory + Keys::kBytes}; }
  MOBA_DEVICE Rows q(int stage) const { return {memory + 2 * Keys::kBytes + 2 * stage * Rows::kBytes}; }
  MOBA_DEVICE Rows d_out(int stage) const { return {q(stage).data + Rows::kBytes}; }
  MOBA_DEVICE Control& control() const { return *reinterpret_cast<Control*>(q(kStages).data); }
};

/// By one thread.
template <typename T, int head_dim>
MOBA_DEVICE void load_kv(const Params<T>& p, const Shared<T, head_dim>& shared, std::int64_t items) {
  auto& control = shared.control();
  PipelineState<1> turn;
  for_own_items(items, [&](std::int64_t index) {
    const Chunk chunk = chunk_of_item<head_dim>(p, index);
    const std::int64_t head = p.walk.head0 + chunk.head;
    ptx::mbarrier_wait(&control.keys.empty, turn.phase ^ 1U);
    control.chunk = chunk;
    ptx::mbarrier_arrive_expect_tx(&control.keys.full, 2 * Shared<T, head_dim>::Keys::kBytes);
    tma_load_tile(shared.k(), p.k_map, head, chunk.first_key, &control.keys.full);
    tma_load_tile(shared.v(), p.v_map, head, chunk.first_key, &control.keys.full);
    turn.advance();
  });
}

/// By kGatherThreads threads; `thread` is the number among them. The first kRows look after a row each: it is
/// looked up while the tile before is copied.
template <typename T, int head_dim>
MOBA_DEVICE void load_q(const Params<T>& p, const Shared<T, head_dim>& shared, std::int64_t items,
                        int thread) {
  auto& control = shared.control();
  const auto producer_commit = [](StageBarriers& barriers) {
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(&barriers.full);
  };
  const bool owns_row = thread < kRows;
  PipelineState<Shared<T, head_dim>::kStages> stage;
  for_own_items(items, [&](std::int64_t index) {
    const Chunk chunk = chunk_of_item<head_dim>(p, index);
    Source source;
    LseDelta sums;
    std::uint32_t entry = kNoEntry;
    const auto look_up = [&](std::uint32_t first) {
      const std::uint32_t row = first + static_cast<std::uint32_t>(thread);
      source = source_of(p.walk, chunk, row, entry);
      sums = sums_of(p.walk, chunk, source);
      entry = entry_at(chunk, row + kRows);
    };
    if (owns_row) {
      entry = entry_at(chunk, static_cast<std::uint32_t>(thread));
      look_up(0);
    }
    StageBarriers* pending = nullptr;
    for (std::uint32_t first = 0; first < chunk.rows(); first += kRows, stage.advance()) {
      StageBarriers& barriers = control.rows[stage.index];
      RowTable& table = control.tables[stage.index];
      ptx::mbarrier_wait(&barriers.empty, stage.phase ^ 1U);
      if (owns_row) {
        const bool exists = source.row != kNoEntry;
        table.sums[thread] = sums;
        table.seen[thread] = source.seen;
        table.q_offsets[thread] = exists ? source.q : kNoRow;
        table.d_out_offsets[thread] = exists ? source.d_out : kNoRow;
        if (thread == 0) table.whole = is_whole<kRows>(p.walk, chunk, first);
        look_up(first + kRows);
      }
      ptx::bar_sync(kRowTableReady, kGatherThreads);
      gather_rows(shared.q(stage.index), p.walk.q.data, table.q_offsets, thread);
      gather_rows(shared.d_out(stage.index), p.walk.d_out.data, table.d_out_offsets, thread);
      ptx::cp_async_commit();
      if (pending != nullptr) {
        ptx::cp_async_wait<1>();
        producer_commit(*pending);
      }
      pending = &barriers;
    }
    if (pending == nullptr) return;  // no query sees these keys
    ptx::cp_async_wait<0>();
    producer_commit(*pending);
  });
}

/// The rows of a tile add to the gradients of a warpgroup's keys, which begin with `warpgroup_key`, and
/// `warp_key` those of this warp.
template <typename T, int head_dim>
MOBA_DEVICE void add_tile(const Params<T>& p, const Shared<T, head_dim>& shared, int stage, int warpgroup_key,
                          int warp_key, float (&dk)[head_dim / 8][4], float (&dv)[head_dim / 8][4]) {
  const RowTable& table = shared.control().tables[stage];
  const auto q = shared.q(stage), d_out = shared.d_out(stage);
  const bool whole = warp_uniform(static_cast<int>(table.whole)) != 0;
  float weights[kRows / 8][4], d_logits[kRows / 8][4];
  std::uint32_t left[kRows / 16][4], d_left[kRows / 16][4];
  ptx::wgmma_fence();
  issue_qk(weights, shared.k(), warpgroup_key, q);
  issue_qk(d_logits, shared.v(), warpgroup_key, d_out);
  ptx::wgmma_wait<1>(weights);
  to_weights(weights, table.sums, p.walk.log2_scale);
  if (!whole) hide_unseen(weights, table.seen, warp_key);
  pack_p_as_a_operand<T>(left, weights);
  ptx::wgmma_fence();
  issue_pv(dv, left, d_out);
  ptx::wgmma_wait<1>(d_logits);
  to_d_logits(d_logits, weights, table.sums);
  if (!whole) hide_unseen(d_logits, table.seen, warp_key);
  pack_p_as_a_operand<T>(d_left, d_logits);
  ptx::wgmma_fence();
  issue_pv(dk, d_left, q);
  ptx::wgmma_wait(dv);
  ptx::wgmma_wait(dk);
}

/// What the warp has summed goes to where it belongs, through the shared memory of the keys that it is of.
template <typename T, int head_dim>
MOBA_DEVICE void store_dk_dv(const Params<T>& p, const Shared<T, head_dim>& shared, const Chunk& chunk,
                             int warp_key, float (&dk)[head_dim / 8][4], float (&dv)[head_dim / 8][4]) {
  const int thread = ptx::thread() - ptx::kWarpgroupThreads;
  if (p.walk.segments) {
    leave_sums(p.walk, chunk.sums, 0, thread, dk);
    leave_sums(p.walk, chunk.sums, 1, thread, dv);
    return;
  }
  add_segments(p.walk, chunk, 0, thread, dk);
  add_segments(p.walk, chunk, 1, thread, dv);
  const std::int64_t kv_head = p.walk.head0 + chunk.head;
  write_gradient(p.walk.dk, shared.k(), chunk, kv_head, warp_key, 0, p.walk.scale, dk);
  write_gradient(p.walk.dv, shared.v(), chunk, kv_head, warp_key, 0, 1, dv);
  ptx::fence_proxy_async();  // bulk copies will load others
}

/// By the two groups that multiply: what the others load.
template <typename T, int head_dim>
MOBA_DEVICE void consume(const Params<T>& p, const Shared<T, head_dim>& shared, std::int64_t items,
                         int warpgroup) {
  auto& control = shared.control();
  const int warpgroup_key = warpgroup * kWarpgroupRows;
  const int warp_key = warpgroup_key + ptx::warp() % 4 * 16;
  PipelineState<1> turn;
  PipelineState<Shared<T, head_dim>::kStages> stage;
  for_own_items(items, [&](std::int64_t) {
    ptx::mbarrier_wait(&control.keys.full, turn.phase);
    const std::uint32_t rows = warp_uniform(control.chunk.rows());
    const bool has_keys = warpgroup_key < warp_uniform(control.chunk.count);
    float dk[head_dim / 8][4] = {}, dv[head_dim / 8][4] = {};
    for (std::uint32_t first = 0; first < rows; first += kRows, stage.advance()) {
      ptx::mbarrier_wait(&control.rows[stage.index].full, stage.phase);
      if (has_keys)
        add_tile(p, shared, stage.index, ptx::opaque(warpgroup_key), ptx::opaque(warp_key), dk, dv);
      consumer_release(control.rows[stage.index].empty);
    }
    if (has_keys) {
      warpgroup_sync(warpgroup);  // keys and values have been used: their gradients will lie there
      store_dk_dv(p, shared, control.chunk, warp_key, dk, dv);
    }
    consumer_release(control.keys.empty);
    turn.advance();
  });
}

template <typename T, int head_dim>
MOBA_KERNEL(kThreads, 1)
attend_backward_dkv_kernel(MOBA_GRID_CONSTANT Params<T> p) {
  if constexpr (ptx::kHasWarpgroups) {
    const Shared<T, head_dim> shared{ptx::shared()};
    const std::int64_t items = warp_uniform(p.items());
    if (ptx::thread() == 0) {
      auto& control = shared.control();
      control.keys.init(1);
      for (StageBarriers& barriers : control.rows) barriers.init(kGatherThreads);
      ptx::fence_proxy_async();
    }
    ptx::syncthreads();
    const int warpgroup = warp_uniform(ptx::thread() / ptx::kWarpgroupThreads);
    if (warpgroup == 0) {
      ptx::warpgroup_reg_dealloc<kProducerRegisters>();
      if (ptx::thread() == 0) load_kv(p, shared, items);
      if (ptx::warp() > 0) load_q(p, shared, items, ptx::thread() - ptx::kLanes);
    } else {
      ptx::warpgroup_reg_alloc<kConsumerRegisters>();
      consume(p, shared, items, warpgroup - 1);
    }
  }
}

}  // namespace sm90::dkv

void attend_backward_dkv_sm90(Stream& stream, const Task& task, const WorkSlice& part, const Batch& batch,
                              const Plan& plan, const LseDelta* sums, const Backward& backward,
                              const KeyWalk& walk) {
  with_type(task, [&]<typename T, int head_dim>() {
    if constexpr (head_dim == 64 || head_dim == 128) {
      static_assert(sm90::dkv::kKeys == keys_of_chunk(head_dim));
      sm90::dkv::Params<T> params{.k_map = tensor_map(stream.function(), task.k, sm90::dkv::kKeys),
                                  .v_map = tensor_map(stream.function(), task.v, sm90::dkv::kKeys),
                                  .walk = keys_params<T>(task, part, batch, plan, sums, backward, walk),
                                  .heads = part.heads()};
      const std::int64_t blocks = current_hardware(stream.function()).multiprocessors;
      const auto launch = [&](bool segments, std::int64_t most_items) {
        params.walk.segments = segments;
        stream.launch("attend_backward_dkv_sm90", sm90::dkv::attend_backward_dkv_kernel<T, head_dim>,
                      {std::min(blocks, most_items)}, sm90::kThreads, sm90::dkv::Shared<T, head_dim>::kBytes,
                      params);
      };
      launch(true, most_segments(task, part) * params.walk.chunks);
      launch(false, most_chunks(task) * part.heads());
    }
  });
}

}  // namespace moba::cuda
