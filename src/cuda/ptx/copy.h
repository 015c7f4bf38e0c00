#pragma once

#include "cuda/ptx/device.h"

/// Copies of 16 bytes. cp.async copies from global to shared memory; a thread sees its own copies after
/// `cp_async_wait`, those of other threads after a barrier that follows it.
namespace moba::cuda::ptx {

struct alignas(16) Vec16 {
  std::uint32_t x, y, z, w;
};

/// Copies 16 bytes to shared + offset; writes zeros and does not read `from` unless `valid`.
MOBA_DEVICE void cp_async_16(void* shared, std::uint32_t offset, const void* from, bool valid) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared)) + offset;
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
}
/// Closes the current group of copies.
MOBA_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most the newest `pending` groups of this thread are in flight.
template <int pending>
MOBA_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
/// Zeroes 16 bytes at shared + offset.
MOBA_DEVICE void zero_vec(std::byte* shared, std::uint32_t offset) {
  *reinterpret_cast<Vec16*>(shared + offset) = {0, 0, 0, 0};
}
/// Stores 8 bytes to shared + offset where `stores`, without a branch.
MOBA_DEVICE void store_pair_if(bool stores, void* shared, std::uint32_t offset, float first,
                               std::int32_t second) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared)) + offset;
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.shared.v2.b32 [%1], {%2, %3};\n}" ::"r"(
                   static_cast<std::uint32_t>(stores)),
               "r"(address), "r"(__float_as_uint(first)), "r"(second)
               : "memory");
}
/// Stores {value, number} to shared + offset and adds `step` to `offset` if value >= limit, without a branch.
MOBA_DEVICE void append_if_ge(float value, float limit, std::int32_t number, void* shared,
                              std::uint32_t& offset, std::uint32_t step) {
  const auto base = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "{\n.reg .pred p;\n.reg .u32 address;\nadd.u32 address, %4, %0;\nsetp.ge.f32 p, %1, %2;\n"
      "@p st.shared.v2.b32 [address], {%6, %3};\n@p add.u32 %0, %0, %5;\n}"
      : "+r"(offset)
      : "f"(value), "f"(limit), "r"(number), "r"(base), "r"(step), "r"(__float_as_uint(value))
      : "memory");
}
/// Loads from global memory that is read once (no L1 allocation).
MOBA_DEVICE Vec16 load_streaming(const void* from) {
  Vec16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

}  // namespace moba::cuda::ptx
