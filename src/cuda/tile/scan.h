#pragma once

#include "cuda/ptx/barrier.h"
#include "cuda/ptx/warp.h"

namespace moba::cuda::tile {

template <typename T>
struct Scanned {
  T before{}, total{};
};

/// Exclusive prefix sum over the threads of a block, and the total. `shared` has room for one T per warp;
/// all threads of the block call it, and `shared` may be reused at once.
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
