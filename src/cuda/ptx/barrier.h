#pragma once

#include "cuda/ptx/device.h"

/// Where threads of a block wait for each other. Memory written before is seen behind.
namespace moba::cuda::ptx {

/// All threads of the block.
MOBA_DEVICE void syncthreads() {
  __syncthreads();
}
/// `threads` threads, in whole warps, at barrier `id` in 1 to 15.
MOBA_DEVICE void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/// Counts as having come to it, without waiting.
MOBA_DEVICE void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace moba::cuda::ptx
