#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "moba/tensor.h"

/// Macros and built-in values of kernels. The tests replace the headers of `ptx/` by
/// tests/cuda/emulation/cuda/ptx and compile the same kernels for the host.
#if defined(__CUDACC__)
#define MOBA_DEVICE __device__ __forceinline__
/// Declares a kernel of at most `threads` threads that fits `blocks_per_multiprocessor` blocks on a
/// multiprocessor.
#define MOBA_KERNEL(threads, blocks_per_multiprocessor) \
  __global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
/// Qualifies the single parameter of a kernel, a plain struct.
#define MOBA_GRID_CONSTANT const __grid_constant__
#define MOBA_UNROLL _Pragma("unroll")
#define MOBA_NO_UNROLL _Pragma("unroll 1")
#endif

/// Qualifies functions of host and device.
#if defined(__CUDACC__)
#define MOBA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MOBA_HOST_DEVICE inline
#endif

#if defined(MOBA_DEVICE)
namespace moba::cuda::ptx {

constexpr int kLanes = 32;

MOBA_DEVICE int thread() {
  return static_cast<int>(threadIdx.x);
}
MOBA_DEVICE unsigned block_x() {
  return blockIdx.x;
}
MOBA_DEVICE unsigned block_y() {
  return blockIdx.y;
}
MOBA_DEVICE unsigned blocks_x() {
  return gridDim.x;
}
MOBA_DEVICE std::byte* shared() {
  extern __shared__ __align__(1024) std::byte memory[];
  return memory;
}

/// Hides the value from the optimiser: what depends on it is recomputed instead of kept in registers across
/// loop iterations.
MOBA_DEVICE int opaque(int number) {
  asm volatile("" : "+r"(number));
  return number;
}
/// The same of an address, to which offsets are then added in one step.
template <typename T>
MOBA_DEVICE T* opaque(T* address) {
  asm volatile("" : "+l"(address));
  return address;
}

MOBA_DEVICE int lane() {
  return thread() % kLanes;
}
MOBA_DEVICE int warp() {
  return thread() / kLanes;
}

}  // namespace moba::cuda::ptx
#endif
