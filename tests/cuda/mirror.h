#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <type_traits>

#include "moba/attention.h"

/// Device memory of the tests, real or emulated. Tests keep their tensors in host memory; a Mirror copies
/// them to the device and the outputs back.
namespace moba::test {

void* device_allocate(std::size_t bytes);
/// Synchronises with the device, as cudaFree does.
void device_release(void* memory);
void device_transfer(void* to, const void* from, std::size_t bytes);

/// Copies of host memory on the device, for as long as it lives.
class Mirror {
 public:
  /// Copies what a tensor spans, or `count` elements of a list, and returns the tensor or list on the device.
  Tensor read(Tensor t);
  template <typename T>
  T* read(T* list, std::int64_t count) {
    if (list == nullptr) return nullptr;
    auto* const first = reinterpret_cast<std::byte*>(const_cast<std::remove_const_t<T>*>(list));
    return reinterpret_cast<T*>(
        buffers_.emplace_back(first, static_cast<std::size_t>(count) * sizeof(T)).device());
  }
  /// The same for outputs, which copy_back() copies to the host.
  template <typename... What>
  auto write(What... what) {
    const std::size_t before = buffers_.size();
    const auto there = read(what...);
    if (buffers_.size() > before) buffers_.back().written = true;
    return there;
  }
  void copy_back() const;

  /// Calls the caller's allocator, but returns memory of the device.
  Execution context(Execution execution);

 private:
  static constexpr std::uintptr_t kAlignment = 16;

  /// Copy of host memory on the device, at the same offset from a multiple of kAlignment.
  struct Buffer {
    Buffer(std::byte* on_host, std::size_t count);
    ~Buffer() { device_release(memory); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    std::byte* device() const { return memory + shift; }

    std::byte* host;
    std::size_t bytes, shift;
    std::byte* memory;
    bool written = false;
  };

  std::deque<Buffer> buffers_;
  std::map<void*, void*> theirs_;
};

}  // namespace moba::test
