#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "moba/tensor.h"

/// What a kernel is written in. The same source is compiled by nvcc for the device and, with
/// MOBA_CUDA_EMULATION, by the host's compiler for the tests; nothing above `ptx/` knows which.
#if defined(MOBA_CUDA_EMULATION)
#include "cuda/emulation/block.h"
#define MOBA_DEVICE inline
#define MOBA_KERNEL(threads, blocks_per_multiprocessor) void
#define MOBA_GRID_CONSTANT const
#define MOBA_UNROLL
#elif defined(__CUDACC__)
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

#if defined(MOBA_CUDA_EMULATION)

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

#else

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

#endif

/// The same number, of which the compiler knows nothing any more: what follows from it is computed again
/// instead of held in registers from one turn of a loop to the next.
MOBA_DEVICE int forgotten(int number) {
#if !defined(MOBA_CUDA_EMULATION)
  asm volatile("" : "+r"(number));
#endif
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
