#pragma once

#include "cuda/ptx/barrier.h"
#include "cuda/ptx/warp.h"

namespace moba::cuda::tile {

template <typename T>
struct Scanned {
  T before{}, total{};
};

/// The sum of the values of the threads before this one, and of all. `shared` has room for a T a warp; every
/// thread of the block comes, and it may be used again at once.
template <int threads, typename T>
MOBA_DEVICE Scanned<T> scan(T value, T* shared) {
  constexpr int kWarps = threads / ptx::kLanes;
  T sum = value;
  MOBA_UNROLL
  for (int distance = 1; distance < ptx::kLanes; distance *= 2) {
    const T below = ptx::shfl_up(sum, distance);
    if (ptx::lane() >= distance) sum += below;
  }
  if (ptx::lane() == ptx::kLanes - 1) shared[ptx::warp()] = sum;
  ptx::syncthreads();
  Scanned<T> result{sum - value, T{}};
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp == ptx::warp()) result.before += result.total;
    result.total += shared[warp];
  }
  ptx::syncthreads();
  return result;
}

}  // namespace moba::cuda::tile
