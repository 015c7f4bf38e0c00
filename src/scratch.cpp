#include "scratch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace moba {

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__)
  const auto first = (reinterpret_cast<std::uintptr_t>(memory) + kHugePage - 1) & ~(kHugePage - 1);
  const auto last = (reinterpret_cast<std::uintptr_t>(memory) + bytes) & ~(kHugePage - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

std::byte* Scratch::allocate(std::size_t bytes) {
  void* memory = allocator_->allocate ? allocator_->allocate(bytes)
                                      : ::operator new (bytes, std::align_val_t{kAlignment});
  if (memory == nullptr) throw std::bad_alloc();
  prefer_huge_pages(memory, bytes);
  held_ += bytes;
  peak_ = std::max(peak_, held_);
  return static_cast<std::byte*>(memory);
}

void Scratch::release(std::byte* memory, std::size_t bytes) {
  held_ -= bytes;
  if (allocator_->release) {
    allocator_->release(memory, bytes);
  } else {
    ::operator delete (memory, std::align_val_t{kAlignment});
  }
}

}  // namespace moba
