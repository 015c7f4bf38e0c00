#pragma once

#include "cuda/ptx/device.h"

/// Atomic additions of integers, whose order cannot show in a result. There are none of floats.
namespace moba::cuda::ptx {

/// Adds to global or shared memory and gives what was there before.
MOBA_DEVICE std::uint32_t atomic_add(std::uint32_t* to, std::uint32_t value) {
  return atomicAdd(to, value);
}

}  // namespace moba::cuda::ptx
