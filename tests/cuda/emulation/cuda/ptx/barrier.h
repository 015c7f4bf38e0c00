#pragma once

#include "cuda/ptx/device.h"

/// Replaces src/cuda/ptx/barrier.h: barriers of the emulated block.
namespace moba::cuda::ptx {

MOBA_DEVICE void syncthreads() {
  emulation::barrier_sync(0, emulation::here().threads);
}
MOBA_DEVICE void bar_sync(int id, int threads) {
  emulation::barrier_sync(id, threads);
}
MOBA_DEVICE void bar_arrive(int id, int threads) {
  emulation::barrier_arrive(id, threads);
}

}  // namespace moba::cuda::ptx
