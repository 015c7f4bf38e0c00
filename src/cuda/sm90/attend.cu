// Forward attention on sm_90a, over the work tiles of sm80/attend.cu. Warpgroup 0 is the producer; the two
// consumer warpgroups hold 64 rows each. Both overlaps of FlashAttention-3: they take turns to issue
// products, so that the softmax of one overlaps the products of the other (ping-pong), and each issues Q K^T
// of a key tile before P V of the previous one, which runs during the softmax. The sequence of key tiles goes
// on across work tiles, so that an epilogue overlaps products too.
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
  std::int32_t chunk;  // of the schedule
};

/// Table of the rows of a work tile, which the producer writes.
struct RowTable {
  std::int64_t q_offsets[kTileRows];
  KeyRange bounds[kTileRows];  // of diagonal tiles
  std::uint32_t slots[kTileRows];
  WorkTile work;
};

template <typename T, int head_dim>
struct Shared {
  static constexpr int kStages = head_dim > 64 ? 2 : 4;  // tiles of keys
  static constexpr int kTables = 8;
  using Rows = tile::SwizzledTile128B<T, kTileRows, head_dim>;
  using Keys = tile::SwizzledTile128B<T, kKeys, head_dim>;

  struct Control {
    RowTable tables[kTables];
    StageBarriers table_barriers[kTables];
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

/// Fills row `r` of the table of a work tile. `slot` is that of the row.
template <typename T>
MOBA_DEVICE void store_row(const AttendParams<T>& p, const WorkTile& work, RowTable& table, int r,
                           std::uint32_t slot) {
  const WorkRow row = row_of(p, work, slot);
  table.q_offsets[r] = row.q_offset;
  table.slots[r] = row.slot;
  if (work.diagonal) table.bounds[r] = visible_at(p, work, r);
}

/// A consumer warpgroup. Member functions are called by all of its threads.
template <typename T, int head_dim>
struct Consumer {
  using S = Shared<T, head_dim>;

  const AttendParams<T>& p;
  const S& shared;
  const int warpgroup;

  unsigned tile = 0;  // work tiles before the one whose S is computed
  PipelineState<S::kStages> k_stage{}, v_stage{};

  MOBA_DEVICE int first_row() const { return warpgroup * kWarpgroupRows; }
  MOBA_DEVICE int warp_row() const { return first_row() + ptx::warp() % 4 * 16; }
  MOBA_DEVICE const RowTable& table(unsigned of) const { return shared.control().tables[of % S::kTables]; }
  MOBA_DEVICE StageBarriers& q_barriers() const { return shared.control().q[tile % 2]; }
  MOBA_DEVICE StageBarriers& k_barriers() const { return shared.control().k[k_stage.index]; }
  MOBA_DEVICE StageBarriers& v_barriers() const { return shared.control().v[v_stage.index]; }

  /// Waits for q and the table of the work tile.
  MOBA_DEVICE WorkTile wait_for_q() const {
    ptx::mbarrier_wait(&q_barriers().full, tile / 2 & 1U);
    return warp_uniform(table(tile).work);
  }
  MOBA_DEVICE void release_k(const WorkTile& work) {
    if (work.keeps_kv) return;
    consumer_release(k_barriers().empty);
    k_stage.advance();
  }
  MOBA_DEVICE void release_v() {
    consumer_release(v_barriers().empty);
    v_stage.advance();
  }

  MOBA_DEVICE void issue_s(float (&s)[1][kKeys / 8][4]) const {
    issue_qk(s[0], shared.q(tile % 2), first_row(), shared.k(k_stage.index));
  }
  MOBA_DEVICE void issue_out(float (&out)[1][head_dim / 8][4],
                             const std::uint32_t (&probs)[kKeys / 16][4]) const {
    issue_pv(out[0], probs, shared.v(v_stage.index));
  }

  /// Releases the operands of S, and turns S into weights. `key` is the first of its keys.
  MOBA_DEVICE void update_softmax(float (&s)[1][kKeys / 8][4], tile::Softmax<1>& softmax,
                                  const WorkTile& work, std::int32_t key) {
    release_k(work);
    if (key + kKeys >= work.end) consumer_release(q_barriers().empty);
    if (p.scale.negate) negate(s);
    if (work.is_masked(key, kKeys)) apply_mask(s, VisibleKeys<1>(work, table(tile).bounds, warp_row()), key);
    softmax.update(s, p.scale.scale);
  }

  /// Packs the weights, and cleans the values of keys that some rows do not see.
  MOBA_DEVICE void pack_p(std::uint32_t (&probs)[kKeys / 16][4], float (&weights)[1][kKeys / 8][4],
                          const WorkTile& work, std::int32_t key) const {
    if (work.is_masked(key, kKeys)) {
      const auto v = shared.v(v_stage.index);
      ptx::mbarrier_wait(&v_barriers().full, v_stage.phase);
      if (work.diagonal) {
        float* poison = shared.control().poison[v_stage.index];
        isolate_nonfinite(v, poison);
        add_poison(weights, poison, VisibleKeys<1>(work, table(tile).bounds, warp_row()), key);
      }
      if (key + kKeys > work.end) zero_rows_from(v, work.end - key, warpgroup);
    }
    pack_p_as_a_operand<T>(probs, weights[0]);
  }

  /// Stores the rows of work tile `of`, and releases its table.
  MOBA_DEVICE void store(unsigned of, const float (&out)[1][head_dim / 8][4],
                         const tile::Softmax<1>& softmax) const {
    const RowTable& rows = table(of);
    const std::uint32_t slots[1][2] = {
        {rows.slots[warp_row() + ptx::lane() / 4], rows.slots[warp_row() + 8 + ptx::lane() / 4]}};
    store_out(p, rows.work.head, rows.work.count, warp_row(), slots, out, softmax);
    consumer_release(shared.control().table_barriers[of % S::kTables].empty);
  }

  MOBA_DEVICE void run(std::int32_t own_tiles) {
    if (warpgroup == 1) pingpong_arrive(warpgroup);
    float s[1][kKeys / 8][4], out[1][head_dim / 8][4] = {};
    std::uint32_t probs[kKeys / 16][4];
    tile::Softmax<1> softmax;
    softmax.init();
    WorkTile work = wait_for_q();
    std::int32_t key = work.begin;
    ptx::mbarrier_wait(&k_barriers().full, k_stage.phase);
    ptx::wgmma_fence();
    issue_s(s);
    ptx::wgmma_wait(s[0]);
    update_softmax(s, softmax, work, key);
    pack_p(probs, s, work, key);
    for (;;) {
      // `probs` are of the keys from `key` on: their P V is issued after Q K^T of the next key tile.
      const bool ends = key + kKeys >= work.end, keeps_v = work.keeps_kv;
      const tile::Softmax<1> ended = softmax;
      key += kKeys;
      if (ends) {
        if (++tile == static_cast<unsigned>(own_tiles)) break;
        work = wait_for_q();
        key = work.begin;
        softmax.init();
      }
      ptx::mbarrier_wait(&k_barriers().full, k_stage.phase);
      ptx::mbarrier_wait(&v_barriers().full, v_stage.phase);
      pingpong_wait(warpgroup);
      ptx::wgmma_fence();
      issue_s(s);
      issue_out(out, probs);
      pingpong_arrive(warpgroup);
      ptx::wgmma_wait<1>(s[0]);
      update_softmax(s, softmax, work, key);
      ptx::pin(softmax.row_sum[0][0] + softmax.row_sum[0][1]);
      ptx::wgmma_wait(out[0]);
      if (!keeps_v) release_v();
      if (ends) {
        store(tile - 1, out, ended);
        MOBA_UNROLL
        for (int i = 0; i < head_dim / 2; ++i) out[0][i / 4][i % 4] = 0;
      } else {
        softmax.rescale_out(out);
      }
      pack_p(probs, s, work, key);
    }
    ptx::mbarrier_wait(&v_barriers().full, v_stage.phase);
    ptx::wgmma_fence();
    issue_out(out, probs);
    ptx::wgmma_wait(out[0]);
    release_v();
    store(tile - 1, out, softmax);
    if (warpgroup == 0) pingpong_wait(warpgroup);  // matches the last arrive of warpgroup 1
  }
};

template <typename T, int head_dim>
MOBA_KERNEL(kThreads, 1)
attend_kernel(MOBA_GRID_CONSTANT Params<T> p) {
  if constexpr (ptx::kHasWarpgroups) {
    const Shared<T, head_dim> shared{ptx::shared()};
    const TileSchedule schedule{.work_tiles = warp_uniform(p.attend.work_tiles()), .chunk = p.chunk};
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
              p.k, p.v, p.attend, shared, schedule, kKeys,
              [&](const WorkTile& work, RowTable& table, int r, std::uint32_t slot) {
                store_row(p.attend, work, table, r, slot);
              },
              [&](const RowTable& table, int buffer) {
                gather_rows<ptx::kLanes>(shared.q(buffer), p.attend.q.data, table.q_offsets, ptx::lane());
              });
        },
        [&](int warpgroup) {
          const std::int32_t own_tiles = schedule.own_tiles();
          Consumer<T, head_dim> consumer{p.attend, shared, warpgroup};
          if (own_tiles > 0) consumer.run(own_tiles);
        });
  }
}

}  // namespace sm90

namespace {

/// Returns the chunk of the schedule of `blocks` thread blocks: where a block is one key tile, consecutive
/// work tiles keep it in shared memory, as long as every thread block has several chunks.
std::int32_t chunk_of(const DeviceCall& call, std::int64_t work_tiles, std::int64_t blocks) {
  constexpr std::int64_t kMaxChunk = 8, kMinChunks = 4;
  if (call.routing.block_size > sm90::kKeys) return 1;
  return static_cast<std::int32_t>(
      std::clamp<std::int64_t>(work_tiles / (blocks * kMinChunks), 1, kMaxChunk));
}

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
      const std::int64_t work_tiles = max_work_tiles(call, slice);
      const std::int64_t blocks = std::min(std::int64_t{current_hardware().multiprocessors}, work_tiles);
      const sm90::Params<T> params{.k = tensor_map(call.k, sm90::kKeys),
                                   .v = tensor_map(call.v, sm90::kKeys),
                                   .attend = attend_params<T>(call, slice, batch, plan, partials, outputs),
                                   .chunk = chunk_of(call, work_tiles, blocks)};
      stream.launch("attend_sm90", sm90::attend_kernel<T, head_dim>, {blocks}, sm90::kThreads,
                    sm90::Shared<T, head_dim>::kBytes, params);
    }
  });
}

}  // namespace moba::cuda
