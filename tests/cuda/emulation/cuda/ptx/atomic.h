#pragma once

#include "cuda/ptx/device.h"

/// Replaces src/cuda/ptx/atomic.h: atomic additions of fibers, of which one runs at a time.
namespace moba::cuda::ptx {

MOBA_DEVICE std::uint32_t atomic_add(std::uint32_t* to, std::uint32_t value) {
  const std::uint32_t before = *to;
  *to = before + value;
  return before;
}

}  // namespace moba::cuda::ptx
