#pragma once

#include "cuda/ptx/device.h"

/// Integer atomics, where the order of additions cannot change a result. Floating-point atomics are not
/// used.
namespace moba::cuda::ptx {

/// Adds to global or shared memory and returns the previous value.
MOBA_DEVICE std::uint32_t atomic_add(std::uint32_t* to, std::uint32_t value) {
  return atomicAdd(to, value);
}
/// Adds to shared memory unless `value` is 0, and returns the previous value, or 0. An atomic_add in a branch
/// would compute the address of shared memory in each.
MOBA_DEVICE std::uint32_t atomic_add_nonzero(std::uint32_t* to, std::uint32_t value) {
  std::uint32_t before = 0;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p atom.shared.add.u32 %0, [%1], %2; }"
               : "+r"(before)
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(to))), "r"(value)
               : "memory");
  return before;
}
/// The same in global memory, with acquire and release semantics for the device: after a barrier of the
/// block, its threads see what blocks that added before have written before theirs.
MOBA_DEVICE std::uint32_t atomic_add_acq_rel(std::uint32_t* to, std::uint32_t value) {
  std::uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(to)), "r"(value)
               : "memory");
  return before;
}

}  // namespace moba::cuda::ptx
