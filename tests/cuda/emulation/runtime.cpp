// Runtime of the emulated device: its own memory, and launches that return after the kernel has ended.
#include "cuda/runtime.h"

#include <cstring>
#include <stdexcept>

#include "cuda/architectures.h"
#include "emulation/memory.h"
#include "moba/error.h"

namespace moba::cuda {

Hardware current_hardware() {
  const int capability = emulation::capability();
  return {.multiprocessors = 2,
          .capability = capability,
          .shared_bytes = std::size_t{capability >= 90 ? 227U : 163U} << 10};
}

std::string_view built_architectures() {
  return "80-real,90a-real,90-virtual";
}

bool is_on_device(const void* pointer) {
  return emulation::is_device_memory(pointer);
}

TensorMap tensor_map(const Tensor& t, int rows) {
  TensorMap map{.data = static_cast<const std::byte*>(t.data), .rows = rows};
  for (int i = 0; i < 3; ++i) map.sizes[i] = t.sizes[i];
  for (int i = 0; i < 2; ++i) map.strides[i] = 2 * t.strides[i];
  return map;
}

void Stream::fill(void* to, int value, std::size_t bytes) {
  if (bytes > 0 && !is_on_device(to)) throw DeviceFailure{"memory cannot be set: it is the host's"};
  std::memset(to, value, bytes);
}

std::byte* Stream::allocate(std::size_t bytes) {
  void* memory = scratch_->allocate ? scratch_->allocate(bytes) : emulation::allocate(bytes);
  if (memory == nullptr)
    throw DeviceFailure{"scratch gave no memory for " + std::to_string(bytes) + " bytes"};
  if (!is_on_device(memory)) throw std::logic_error("scratch gave memory of the host");
  std::memset(memory, 0xFF, bytes);  // NaN, to detect reads before writes
  return static_cast<std::byte*>(memory);
}

void Stream::release(std::byte* memory, std::size_t bytes) noexcept {
  if (scratch_->release) {
    scratch_->release(memory, bytes);
  } else {
    emulation::release(memory);
  }
}

}  // namespace moba::cuda
