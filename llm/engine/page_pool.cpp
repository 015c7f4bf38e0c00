#include "llm/engine/page_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <vector>

namespace moba::llm {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20, kSlabBytes = std::size_t{32} << 20;

std::size_t round_up(std::size_t bytes, std::size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

/// Memory from the system, not the heap: pages live long, and between the temporary tensors of a step they
/// would keep the heap from shrinking. It lies on huge pages, so that decode does not miss the TLB in every
/// row.
class Slab {
 public:
  explicit Slab(std::size_t bytes) : bytes_(bytes + kHugePage) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    madvise(memory_, bytes_, MADV_HUGEPAGE);  // may fail
  }
  ~Slab() { munmap(memory_, bytes_); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  std::byte* begin() const {
    return reinterpret_cast<std::byte*>(round_up(reinterpret_cast<std::uintptr_t>(memory_), kHugePage));
  }

 private:
  void* memory_;
  std::size_t bytes_;
};

}  // namespace

struct PagePool::State {
  std::size_t page_bytes = 0;
  std::int64_t max_pages = 0, used = 0, created = 0;
  std::vector<std::unique_ptr<Slab>> slabs;
  std::vector<std::byte*> free;

  std::byte* take() {
    if (free.empty()) return create();
    std::byte* memory = free.back();
    free.pop_back();
    return memory;
  }

 private:
  std::byte* create() {
    const std::size_t stride = round_up(page_bytes, page_bytes < kHugePage ? 64 : kHugePage);
    const auto per_slab = static_cast<std::int64_t>(std::max<std::size_t>(kSlabBytes / stride, 1));
    if (created % per_slab == 0) {
      const std::int64_t pages = std::min(per_slab, max_pages - created);
      free.reserve(static_cast<std::size_t>(created + pages));  // freeing cannot throw
      slabs.push_back(std::make_unique<Slab>(static_cast<std::size_t>(pages) * stride));
    }
    return slabs.back()->begin() + static_cast<std::size_t>(created++ % per_slab) * stride;
  }
};

PagePool::PagePool(std::size_t page_bytes, std::int64_t max_pages) : state_(std::make_shared<State>()) {
  state_->page_bytes = page_bytes;
  state_->max_pages = max_pages;
}

Page PagePool::allocate() {
  if (state_->used == state_->max_pages) return nullptr;
  std::byte* memory = state_->take();
  ++state_->used;
  return {memory, [state = state_](std::byte* freed) {
            state->free.push_back(freed);
            --state->used;
          }};
}

std::size_t PagePool::page_bytes() const {
  return state_->page_bytes;
}
std::int64_t PagePool::max_pages() const {
  return state_->max_pages;
}
std::int64_t PagePool::used() const {
  return state_->used;
}

}  // namespace moba::llm
