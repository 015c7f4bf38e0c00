#pragma once

#include "cuda/ptx/device.h"

/// Replaces src/cuda/ptx/barrier.h: barriers of the emulated block.
namespace moba::cuda::ptx {

MOBA_DEVICE void barrier() {
  emulation::barrier_sync(0, emulation::here().threads);
}
MOBA_DEVICE void named_barrier(int id, int threads) {
  emulation::barrier_sync(id, threads);
}
MOBA_DEVICE void named_barrier_arrive(int id, int threads) {
  emulation::barrier_arrive(id, threads);
}

}  // namespace moba::cuda::ptx
