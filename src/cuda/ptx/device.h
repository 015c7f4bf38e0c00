#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "moba/tensor.h"

/// The vocabulary of kernels. The tests replace the headers of `ptx/` by tests/cuda/emulation/cuda/ptx and
/// compile the same kernels for the host.
#if defined(__CUDACC__)
#define MOBA_DEVICE __device__ __forceinline__
/// A kernel of at most `threads` threads, compiled so that as many blocks fit on a multiprocessor.
#define MOBA_KERNEL(threads, blocks_per_multiprocessor) \
  __global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
/// Before the one parameter of a kernel, a plain struct.
#define MOBA_GRID_CONSTANT const __grid_constant__
#define MOBA_UNROLL _Pragma("unroll")
#endif

/// For what host and device compute alike.
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

/// The same number, of which the compiler knows nothing any more: what follows from it is computed again
/// instead of held in registers from one turn of a loop to the next.
MOBA_DEVICE int opaque(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

MOBA_DEVICE int lane() {
  return thread() % kLanes;
}
MOBA_DEVICE int warp() {
  return thread() / kLanes;
}

}  // namespace moba::cuda::ptx
#endif
