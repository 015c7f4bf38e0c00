#pragma once

#include "cuda/ptx/device.h"

/// Atomic additions of integers, whose order cannot show in a result. There are none of floats.
namespace moba::cuda::ptx {

/// Adds to global or shared memory and gives what was there before.
MOBA_DEVICE std::uint32_t atomic_add(std::uint32_t* to, std::uint32_t value) {
#if defined(MOBA_CUDA_EMULATION)
  const std::uint32_t before = *to;
  *to = before + value;
  return before;
#else
  return atomicAdd(to, value);
#endif
}

}  // namespace moba::cuda::ptx
