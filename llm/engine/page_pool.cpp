#include "llm/engine/page_pool.h"

#include <sys/mman.h>

#include <new>
#include <utility>
#include <vector>

namespace moba::llm {

struct PagePool::State {
  /// Large pages lie on huge ones of the system, so that decode does not miss the TLB in every row.
  static constexpr std::align_val_t kAlignment{std::size_t{2} << 20}, kSmallAlignment{64};

  struct Delete {
    std::align_val_t alignment;
    void operator()(std::byte* memory) const { ::operator delete(memory, alignment); }
  };
  using Memory = std::unique_ptr<std::byte, Delete>;

  std::size_t page_bytes = 0;
  std::int64_t max_pages = 0, used = 0;
  std::vector<Memory> free;

  Memory take() {
    if (free.empty()) return create();
    Memory memory = std::move(free.back());
    free.pop_back();
    return memory;
  }
  std::align_val_t alignment() const {
    return page_bytes < static_cast<std::size_t>(kAlignment) ? kSmallAlignment : kAlignment;
  }

 private:
  Memory create() const {
    // Whole huge pages: the system backs the rest of one with small pages.
    const auto step = static_cast<std::size_t>(alignment());
    const std::size_t bytes = (page_bytes + step - 1) / step * step;
    Memory memory(static_cast<std::byte*>(::operator new(bytes, alignment())), Delete{alignment()});
    if (alignment() == kAlignment) madvise(memory.get(), bytes, MADV_HUGEPAGE);  // may fail
    return memory;
  }
};

PagePool::PagePool(std::size_t page_bytes, std::int64_t max_pages) : state_(std::make_shared<State>()) {
  state_->page_bytes = page_bytes;
  state_->max_pages = max_pages;
}

Page PagePool::allocate() {
  if (state_->used == state_->max_pages) return nullptr;
  State::Memory memory = state_->take();
  state_->free.reserve(static_cast<std::size_t>(state_->used) + state_->free.size() +
                       1);  // freeing cannot throw
  ++state_->used;
  return {memory.release(), [state = state_](std::byte* freed) {
            state->free.emplace_back(freed, State::Delete{state->alignment()});
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
