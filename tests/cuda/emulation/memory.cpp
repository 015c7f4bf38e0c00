#include "emulation/memory.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <new>

namespace moba::cuda::emulation {
namespace {

constexpr std::align_val_t kAlignment{256};

/// Ranges of device memory of all threads.
class Registry {
 public:
  void add(const void* first, std::size_t bytes) {
    const std::scoped_lock lock(mutex_);
    const auto begin = reinterpret_cast<std::uintptr_t>(first);
    ends_[begin] = begin + bytes;
    changes_.fetch_add(1, std::memory_order_release);
  }
  void remove(const void* first) {
    const std::scoped_lock lock(mutex_);
    ends_.erase(reinterpret_cast<std::uintptr_t>(first));
    changes_.fetch_add(1, std::memory_order_release);
  }
  bool contains(const void* pointer) {
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    // Copies ask for every 16 bytes, most of them in the range of the one before.
    struct Range {
      std::uint64_t changes = 0;
      std::uintptr_t begin = 0, end = 0;
    };
    thread_local Range last;
    if (last.changes == changes_.load(std::memory_order_acquire) && last.begin <= address &&
        address < last.end)
      return true;
    const std::scoped_lock lock(mutex_);
    auto found = ends_.upper_bound(address);
    if (found == ends_.begin()) return false;
    --found;
    if (address >= found->second) return false;
    last = {changes_.load(std::memory_order_relaxed), found->first, found->second};
    return true;
  }

 private:
  std::mutex mutex_;
  std::map<std::uintptr_t, std::uintptr_t> ends_;  // of ranges, by their first addresses
  std::atomic<std::uint64_t> changes_{0};
};

/// Never destroyed: objects of static duration may release memory later.
Registry& registry() {
  static auto* const instance = new Registry;
  return *instance;
}

}  // namespace

void* allocate(std::size_t bytes) {
  // Exactly as large as requested, so that AddressSanitizer detects accesses outside.
  bytes = std::max<std::size_t>(bytes, 1);
  void* const memory = ::operator new(bytes, kAlignment);
  registry().add(memory, bytes);
  return memory;
}

void release(void* memory) noexcept {
  registry().remove(memory);
  ::operator delete(memory, kAlignment);
}

bool is_device_memory(const void* pointer) {
  return registry().contains(pointer);
}

DeviceRange::DeviceRange(const void* first, std::size_t bytes) : first_(first) {
  registry().add(first, bytes);
}

DeviceRange::~DeviceRange() {
  registry().remove(first_);
}

}  // namespace moba::cuda::emulation
