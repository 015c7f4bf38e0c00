#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace moba::llm {

/// A page of the KV cache, shared by sequences and the prefix cache; the last owner frees it.
using Page = std::shared_ptr<std::byte>;

/// Pages of one size, up to a limit. Memory of freed pages is kept for later ones. Pages may outlive the
/// pool. Not thread-safe.
class PagePool {
 public:
  PagePool(std::size_t page_bytes, std::int64_t max_pages);

  /// Returns a page of unspecified content, or null if max_pages() pages are in use.
  Page allocate();

  std::size_t page_bytes() const;
  std::int64_t max_pages() const;
  /// Returns the number of pages that have an owner.
  std::int64_t used() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace moba::llm
