#pragma once

#include "cuda/ptx/barrier.h"
#include "cuda/ptx/warp.h"

namespace moba::cuda::tile {

template <typename T>
struct Scanned {
  T before{}, total{};
};

/// Exclusive prefix sum over the lanes of a warp, and the total.
template <typename T>
MOBA_DEVICE Scanned<T> scan_warp(T value) {
  T sum = value;
  MOBA_UNROLL
  for (int distance = 1; distance < ptx::kLanes; distance *= 2) {
    const T below = ptx::shfl_up(sum, distance);
    if (ptx::lane() >= distance) sum += below;
  }
  return {sum - value, ptx::shfl(sum, ptx::kLanes - 1)};
}

/// Exclusive prefix sum over the threads of a block, and the total. `shared` has room for one T per warp;
/// all threads of the block call it, and `shared` may be reused at once.
template <int threads, typename T>
MOBA_DEVICE Scanned<T> scan(T value, T* shared) {
  constexpr int kWarps = threads / ptx::kLanes;
  const Scanned<T> own = scan_warp(value);
  if (ptx::lane() == 0) shared[ptx::warp()] = own.total;
  ptx::syncthreads();
  Scanned<T> result{own.before, T{}};
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp == ptx::warp()) result.before += result.total;
    result.total += shared[warp];
  }
  ptx::syncthreads();
  return result;
}

}  // namespace moba::cuda::tile
