#pragma once

#include <cstring>

#include "cuda/ptx/device.h"

/// Replaces src/cuda/ptx/copy.h: asynchronous copies complete when they are issued or when they are waited
/// for.
namespace moba::cuda::ptx {

struct alignas(16) Vec16 {
  std::uint32_t x, y, z, w;
};

MOBA_DEVICE void cp_async_16(void* shared, std::uint32_t offset, const void* from, bool valid) {
  emulation::cp_async(static_cast<std::byte*>(shared) + offset, from, valid ? 16 : 0);
}
MOBA_DEVICE void cp_async_commit() {
  emulation::cp_async_commit();
}
template <int pending>
MOBA_DEVICE void cp_async_wait() {
  emulation::cp_async_wait(pending);
}
MOBA_DEVICE void zero_vec(std::byte* shared, std::uint32_t offset) {
  *reinterpret_cast<Vec16*>(shared + offset) = {0, 0, 0, 0};
  emulation::wrote(shared + offset);
}
MOBA_DEVICE void store_pair_if(bool stores, void* shared, std::uint32_t offset, float first,
                               std::int32_t second) {
  if (!stores) return;
  std::byte* const to = static_cast<std::byte*>(shared) + offset;
  std::memcpy(to, &first, sizeof(first));
  std::memcpy(to + sizeof(first), &second, sizeof(second));
}
MOBA_DEVICE void append_if_ge(float value, float limit, std::int32_t number, void* shared,
                              std::uint32_t& offset, std::uint32_t step) {
  store_pair_if(value >= limit, shared, offset, value, number);
  if (value >= limit) offset += step;
}
MOBA_DEVICE Vec16 load_streaming(const void* from) {
  return *static_cast<const Vec16*>(from);
}

}  // namespace moba::cuda::ptx
