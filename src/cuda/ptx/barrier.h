#pragma once

#include "cuda/ptx/device.h"

/// Barriers of a thread block; they order memory accesses of the participating threads.
namespace moba::cuda::ptx {

/// Waits for all threads of the block.
MOBA_DEVICE void syncthreads() {
  __syncthreads();
}
/// Waits for `threads` threads, in full warps, at barrier `id` in 1 to 15.
MOBA_DEVICE void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/// Arrives at barrier `id` without waiting.
MOBA_DEVICE void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace moba::cuda::ptx
