#pragma once

#include <cstddef>

/// Memory of the emulated device. It lies in the host's address space, so a registry tells it from the host's
/// own memory, which the device must not reach.
namespace moba::cuda::emulation {

/// Allocates and releases device memory, aligned to 256 bytes as cudaMalloc's. 0 bytes have an address too.
void* allocate(std::size_t bytes);
void release(void* memory) noexcept;

/// Returns whether `pointer` lies in device memory.
bool is_device_memory(const void* pointer);

/// Makes host memory device memory while it lives, for tests with address space that cannot be copied.
class DeviceRange {
 public:
  DeviceRange(const void* first, std::size_t bytes);
  ~DeviceRange();
  DeviceRange(const DeviceRange&) = delete;
  DeviceRange& operator=(const DeviceRange&) = delete;

 private:
  const void* first_;
};

}  // namespace moba::cuda::emulation
