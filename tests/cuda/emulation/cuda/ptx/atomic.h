#pragma once

#include "cuda/ptx/device.h"

/// Replaces src/cuda/ptx/atomic.h: atomic additions of fibers, of which one runs at a time.
namespace moba::cuda::ptx {

MOBA_DEVICE std::uint32_t atomic_add(std::uint32_t* to, std::uint32_t value) {
  const std::uint32_t before = *to;
  *to = before + value;
  return before;
}
MOBA_DEVICE std::uint32_t atomic_add_nonzero(std::uint32_t* to, std::uint32_t value) {
  return value == 0 ? 0 : atomic_add(to, value);
}
MOBA_DEVICE std::uint32_t atomic_add_acq_rel(std::uint32_t* to, std::uint32_t value) {
  return atomic_add(to, value);
}

}  // namespace moba::cuda::ptx
