#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "emulation/block.h"
#include "moba/tensor.h"

/// Replaces src/cuda/ptx/device.h: a kernel is a plain function, whose threads are fibers.
#define MOBA_DEVICE inline
#define MOBA_KERNEL(threads, blocks_per_multiprocessor) void
#define MOBA_GRID_CONSTANT const
#define MOBA_UNROLL
#define MOBA_NO_UNROLL
#define MOBA_HOST_DEVICE inline

namespace moba::cuda::ptx {

constexpr int kLanes = 32;

MOBA_DEVICE int thread() {
  return emulation::here().thread;
}
MOBA_DEVICE unsigned block_x() {
  return emulation::here().block.x;
}
MOBA_DEVICE unsigned block_y() {
  return emulation::here().block.y;
}
MOBA_DEVICE unsigned blocks_x() {
  return emulation::here().grid.x;
}
/// The block's dynamic shared memory, aligned to 1024 bytes.
MOBA_DEVICE std::byte* shared() {
  return emulation::here().shared;
}

MOBA_DEVICE int opaque(int number) {
  return number;
}
template <typename T>
MOBA_DEVICE T* opaque(T* address) {
  return address;
}

MOBA_DEVICE int lane() {
  return thread() % kLanes;
}
MOBA_DEVICE int warp() {
  return thread() / kLanes;
}

}  // namespace moba::cuda::ptx
