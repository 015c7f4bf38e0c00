#pragma once

#include <concepts>

#include "cuda/geometry.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/warp.h"
#include "cuda/tile/nonfinite.h"
#include "cuda/tile/swizzled_tile_128b.h"

/// Pipeline of the warp-specialised sm_90a kernels. A thread block is persistent and takes every n-th work
/// tile. Warpgroup 0 is the producer: one thread loads k and v by TMA in the 128-byte swizzle that wgmma
/// reads, and three warps gather rows of q with cp.async. Warpgroups 1 and 2 are the consumers.
///
/// The namespace is named, not anonymous: a compilation for another architecture leaves its functions
/// unused.
namespace moba::cuda::sm90 {

inline constexpr int kConsumerWarpgroups = 2;
inline constexpr int kWarpgroupRows = 64;
inline constexpr int kThreads = (1 + kConsumerWarpgroups) * ptx::kWarpgroupThreads;
inline constexpr int kGatherThreads = ptx::kWarpgroupThreads - ptx::kLanes;  // threads that gather rows
inline constexpr int kConsumerWarps = kConsumerWarpgroups * ptx::kWarpgroupThreads / ptx::kLanes;

/// Lanes of a consumer warp that arrive when it releases a stage. 32 show whether an error of racecheck is
/// the tool's (docs/cuda.md).
inline constexpr int kReleasingLanes = 1;

/// Named barriers: of the threads that gather rows, of both consumer warpgroups, and the first of one each
/// per consumer warpgroup.
inline constexpr int kGatherSync = 1, kPingpong = 2, kWarpgroupSync = 4, kConsumerSync = 6;

/// mbarriers of a stage: the producer waits for `empty`, consumers wait for `full`.
struct StageBarriers {
  ptx::Mbarrier full, empty;

  /// Initialises both. Called by one thread, which fences afterwards.
  MOBA_DEVICE void init(int producers, int consumer_warps = kConsumerWarps) {
    ptx::mbarrier_init(&full, producers);
    ptx::mbarrier_init(&empty, consumer_warps * kReleasingLanes);
  }
};

/// Index and phase of the next stage in a circular buffer of `count` stages.
template <int count>
struct PipelineState {
  int index = 0;
  unsigned phase = 0;

  MOBA_DEVICE void advance() {
    if (++index < count) return;
    index = 0;
    phase ^= 1U;
  }
};

/// Marks a value as warp-uniform: the compiler serialises wgmma around branches that it believes may
/// diverge.
template <std::integral N>
MOBA_DEVICE N warp_uniform(N value) {
  return ptx::shfl(value, 0);
}

template <typename Run>
MOBA_DEVICE void for_own_tiles(std::int64_t work_tiles, Run&& run) {
  for (std::int64_t index = ptx::block_x(); index < work_tiles; index += ptx::blocks_x()) run(index);
}

/// Issues the TMA loads of a tile of tokens from `token` on. Called by one thread; all bytes complete on
/// `barrier`.
template <typename T, int rows, int head_dim>
MOBA_DEVICE void tma_load_tile(const tile::SwizzledTile128B<T, rows, head_dim>& to, const TensorMap& map,
                               std::int64_t head, std::int64_t token, ptx::Mbarrier* barrier) {
  using To = tile::SwizzledTile128B<T, rows, head_dim>;
  MOBA_UNROLL
  for (int panel = 0; panel < To::kPanels; ++panel) {
    ptx::tma_load_3d(to.data + panel * To::kPanelBytes, map, panel * To::kColumns, static_cast<int>(head),
                     static_cast<int>(token), barrier);
  }
}

/// Issues cp.async copies of rows at element offsets `offsets` from `from`; kNoRow is a row of zeros. Called
/// by `threads` threads, numbered by `thread`; eight of them copy the 128 bytes of a row of a panel. Offsets
/// are read for several copies at a time, which hides the latency of shared memory.
template <int threads = kGatherThreads, typename T, int rows, int head_dim>
MOBA_DEVICE void gather_rows(const tile::SwizzledTile128B<T, rows, head_dim>& to, const T* from,
                             const std::int64_t* offsets, int thread) {
  using To = tile::SwizzledTile128B<T, rows, head_dim>;
  constexpr int kStep = threads / 8, kSteps = (rows + kStep - 1) / kStep, kBatch = threads == ptx::kLanes ? 8 : 2;
  static_assert(kStep % 8 == 4, "every second row of a thread has the same swizzle");
  thread = ptx::opaque(thread);
  const int row = thread / 8, vec = thread % 8;
  const std::uint32_t starts[2] = {To::start(row, vec), To::start(row + kStep, vec)};
  const T* const vec_from = ptx::opaque(from + vec * tile::kVecElements);
  MOBA_NO_UNROLL
  for (int first = 0; first < kSteps; first += kBatch) {
    std::int64_t batch[kBatch];
    MOBA_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int r = row + (first + i) * kStep;
      if (r < rows) batch[i] = offsets[r];
    }
    MOBA_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int step = first + i;
      if (row + step * kStep >= rows) break;
      const T* const row_from = vec_from + batch[i];
      const bool exists = static_cast<std::int32_t>(batch[i]) != kNoRow;  // offsets are multiples of 8
      MOBA_UNROLL
      for (int panel = 0; panel < To::kPanels; ++panel) {
        ptx::cp_async_16(to.data,
                         starts[step % 2] + step / 2 * 2 * kStep * To::kRowBytes + panel * To::kPanelBytes,
                         row_from + panel * To::kColumns, exists);
      }
    }
  }
}

/// Arrives for a warp after all of its lanes have read the stage: syncwarp orders their reads before the
/// arrival, which releases them.
MOBA_DEVICE void consumer_release(ptx::Mbarrier& empty) {
  ptx::syncwarp();
  if (ptx::lane() < kReleasingLanes) ptx::mbarrier_arrive(&empty);
}

/// Waits for this thread's cp.async copies, publishes them to wgmma and arrives.
MOBA_DEVICE void producer_commit(ptx::Mbarrier& full) {
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::fence_proxy_async();
  ptx::mbarrier_arrive(&full);
}

/// Body of a warp-specialised kernel. One thread calls init(), which initialises the barriers; then the
/// producer warpgroup calls produce() and the consumers consume(warpgroup).
template <int producer_registers, int consumer_registers, typename Init, typename Produce, typename Consume>
MOBA_DEVICE void specialise_warpgroups(Init&& init, Produce&& produce, Consume&& consume) {
  if (ptx::thread() == 0) {
    init();
    ptx::fence_proxy_async();
  }
  ptx::syncthreads();
  const int warpgroup = warp_uniform(ptx::thread() / ptx::kWarpgroupThreads);
  if (warpgroup == 0) {
    ptx::warpgroup_reg_dealloc<producer_registers>();
    produce();
  } else {
    ptx::warpgroup_reg_alloc<consumer_registers>();
    consume(warpgroup - 1);
  }
}

/// The same, with a producer of which one thread calls load() and three warps gather(thread).
template <int producer_registers, int consumer_registers, typename Init, typename Load, typename Gather,
          typename Consume>
MOBA_DEVICE void specialise_warpgroups(Init&& init, Load&& load, Gather&& gather, Consume&& consume) {
  specialise_warpgroups<producer_registers, consumer_registers>(
      init,
      [&] {
        if (ptx::thread() == 0) load();
        if (ptx::warp() > 0) gather(ptx::thread() - ptx::kLanes);
      },
      consume);
}

/// Barrier of one consumer warpgroup.
MOBA_DEVICE void warpgroup_sync(int warpgroup) {
  ptx::bar_sync(kWarpgroupSync + warpgroup, ptx::kWarpgroupThreads);
}

/// Waits until this warpgroup may issue products; `pingpong_arrive` lets the other one issue.
MOBA_DEVICE void pingpong_wait(int warpgroup) {
  ptx::bar_sync(kPingpong + warpgroup, kConsumerWarpgroups * ptx::kWarpgroupThreads);
}
MOBA_DEVICE void pingpong_arrive(int warpgroup) {
  ptx::bar_arrive(kPingpong + 1 - warpgroup, kConsumerWarpgroups * ptx::kWarpgroupThreads);
}

/// Barrier of both consumer warpgroups.
MOBA_DEVICE void consumer_sync() {
  ptx::bar_sync(kConsumerSync, kConsumerWarpgroups * ptx::kWarpgroupThreads);
}

/// tile::isolate_nonfinite by all consumers, in a tile of keys that TMA has loaded and wgmma will read.
template <typename T, int rows, int head_dim>
MOBA_DEVICE void isolate_nonfinite(const tile::SwizzledTile128B<T, rows, head_dim>& tile, float* poison) {
  tile::isolate_nonfinite<kConsumerWarpgroups * ptx::kWarpgroupThreads, rows>(
      tile, ptx::thread() - ptx::kWarpgroupThreads, poison);
  ptx::fence_proxy_async();
  consumer_sync();
}

/// Zeroes the rows from `valid` on, which belong to other blocks: 0 * inf is not 0. Each warpgroup writes
/// them for itself.
template <typename T, int rows, int head_dim>
MOBA_DEVICE void zero_rows_from(const tile::SwizzledTile128B<T, rows, head_dim>& tile, int valid,
                                int warpgroup) {
  constexpr int kVecs = head_dim / tile::kVecElements;
  for (int i = valid * kVecs + ptx::thread() % ptx::kWarpgroupThreads; i < rows * kVecs;
       i += ptx::kWarpgroupThreads)
    ptx::zero_vec(tile.data, tile.start(i / kVecs, i % kVecs));
  ptx::fence_proxy_async();
  warpgroup_sync(warpgroup);
}

/// Issues S = A B^T of the 64 rows of `left` from `row` on with all rows of `right`.
template <typename T, int head_dim, int left_rows, int rows>
MOBA_DEVICE void issue_qk(float (&products)[rows / 8][4],
                          const tile::SwizzledTile128B<T, left_rows, head_dim>& left, int row,
                          const tile::SwizzledTile128B<T, rows, head_dim>& right) {
  MOBA_UNROLL
  for (int step = 0; step < head_dim / 16; ++step)
    ptx::wgmma_ss<T>(products, left.k_major_descriptor(row, step), right.k_major_descriptor(0, step),
                     step > 0);
  ptx::wgmma_commit();
}

/// Converts P from the accumulator layout to the register A operand of wgmma.
template <typename T, int tiles>
MOBA_DEVICE void pack_p_as_a_operand(std::uint32_t (&left)[tiles / 2][4], const float (&probs)[tiles][4]) {
  MOBA_UNROLL
  for (int k = 0; k < tiles / 2; ++k) {
    MOBA_UNROLL
    for (int r = 0; r < 4; ++r) {
      const float(&w)[4] = probs[2 * k + r / 2];
      left[k][r] = ptx::pack<T>(w[r % 2 * 2], w[r % 2 * 2 + 1]);
    }
  }
}

/// Issues sums += P V, with P in registers. `left` must stay unchanged until wgmma_wait.
template <typename T, int head_dim, int rows>
MOBA_DEVICE void issue_pv(float (&sums)[head_dim / 8][4], const std::uint32_t (&left)[rows / 16][4],
                          const tile::SwizzledTile128B<T, rows, head_dim>& of) {
  MOBA_UNROLL
  for (int k = 0; k < rows / 16; ++k) ptx::wgmma_rs<T>(sums, left[k], of.mn_major_descriptor(16 * k));
  ptx::wgmma_commit();
}

}  // namespace moba::cuda::sm90
