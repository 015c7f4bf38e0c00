#pragma once

#include "cuda/ptx/device.h"

/// Integer atomics, where the order of additions cannot change a result. Floating-point atomics are not
/// used.
namespace moba::cuda::ptx {

/// Adds to global or shared memory and returns the previous value.
MOBA_DEVICE std::uint32_t atomic_add(std::uint32_t* to, std::uint32_t value) {
  return atomicAdd(to, value);
}

}  // namespace moba::cuda::ptx
