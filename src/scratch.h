#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#include "moba/execution.h"

namespace moba {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
/// Advises huge pages for large memory with scattered reads, where small pages would miss the TLB for each
/// row.
void prefer_huge_pages(void* memory, std::size_t bytes);

/// Scratch memory of one call: taken from the caller's allocator, given back when its buffer goes, and
/// counted. Used by one thread at a time; buffers are taken before parallel work begins.
class Scratch {
 public:
  static constexpr std::size_t kAlignment = 64;

  explicit Scratch(const Allocator& allocator) : allocator_(&allocator) {}

  std::byte* allocate(std::size_t bytes);
  void release(std::byte* memory, std::size_t bytes);
  std::size_t held() const { return held_; }
  std::size_t peak() const { return peak_; }

 private:
  const Allocator* allocator_;
  std::size_t held_ = 0, peak_ = 0;
};

/// `size` uninitialised values, 64-byte aligned.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Scratch& scratch, std::int64_t size)
      : scratch_(&scratch), size_(static_cast<std::size_t>(std::max<std::int64_t>(size, 0))) {
    if (size_ > 0) data_ = reinterpret_cast<T*>(scratch.allocate(size_ * sizeof(T)));
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(scratch_, other.scratch_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) scratch_->release(reinterpret_cast<std::byte*>(data_), size_ * sizeof(T));
  }

  T* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  Scratch* scratch_ = nullptr;
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace moba
