#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llm/engine/page_pool.h"

namespace moba::llm {

/// Pages of prompts by their tokens: a radix tree with one page an edge, and one tree for each way to read
/// tokens (`variant`), since keys and values depend on the attention of the layers before. Not thread-safe.
class PrefixCache {
 public:
  explicit PrefixCache(std::int64_t page_tokens) : page_tokens_(page_tokens) {}

  /// Returns the pages of the longest cached prefix of `tokens`, now the most recently used.
  std::vector<Page> match(std::string_view variant, std::span<const std::int32_t> tokens);
  /// Caches `pages`, which hold `tokens` from the first on. Where a page of the same tokens is cached, it
  /// replaces that of the caller.
  void insert(std::string_view variant, std::span<const std::int32_t> tokens, std::span<Page> pages);
  /// Drops the least recently used page that has no other owner and no cached continuation. Returns false if
  /// there is none.
  bool evict();

  /// Returns the number of cached pages.
  std::int64_t pages() const { return static_cast<std::int64_t>(nodes_.size()); }
  /// Returns the number of cached pages without another owner.
  std::int64_t idle_pages() const;

 private:
  struct Less {
    using is_transparent = void;
    bool operator()(std::span<const std::int32_t> a, std::span<const std::int32_t> b) const;
  };
  struct Node;
  using Children = std::map<std::vector<std::int32_t>, Node*, Less>;
  struct Node {
    Children* siblings = nullptr;
    Children::iterator place{};
    Page page;
    Children children;
    std::list<Node>::iterator self{};
  };

  Children& roots(std::string_view variant);
  std::span<const std::int32_t> page_of(std::span<const std::int32_t> tokens, std::size_t index) const;
  /// Marks a path as used now, the first page last, so that every page is more recent than its continuations.
  void touch(std::span<Node* const> path);

  std::int64_t page_tokens_;
  std::map<std::string, Children, std::less<>> roots_;
  std::list<Node> nodes_;  // the most recently used first
};

}  // namespace moba::llm
