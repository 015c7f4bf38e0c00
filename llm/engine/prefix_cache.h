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
 private:
  struct Less {
    using is_transparent = void;
    bool operator()(std::span<const std::int32_t> a, std::span<const std::int32_t> b) const;
  };
  struct Node;
  using Children = std::map<std::vector<std::int32_t>, Node*, Less>;

 public:
  /// A cached prefix: none yet, or up to a page. Valid while its pages have another owner.
  class Place {
    friend PrefixCache;
    Children* children_ = nullptr;
    Node* node_ = nullptr;  // of the last page
  };

  explicit PrefixCache(std::int64_t page_tokens) : page_tokens_(page_tokens) {}

  /// Returns the empty prefix of a variant.
  Place root(std::string_view variant);
  /// Returns the cached pages of `tokens`, which follow `place`, up to the first one that is missing, and
  /// moves `place` after them.
  std::vector<Page> match(Place& place, std::span<const std::int32_t> tokens) const;
  /// Caches `pages`, which hold `tokens` and follow `place`, and moves `place` after them. Where a page of
  /// the same tokens is cached, it replaces that of the caller.
  void insert(Place& place, std::span<const std::int32_t> tokens, std::span<Page> pages);
  /// Marks the pages of a prefix as used now, each more recently than the next.
  void touch(const Place& place);
  /// Drops the least recently used page that has no other owner and no cached continuation. Returns false if
  /// there is none.
  bool evict();

  /// Returns the number of cached pages.
  std::int64_t pages() const { return static_cast<std::int64_t>(nodes_.size()); }
  /// Returns the number of cached pages without another owner.
  std::int64_t idle_pages() const;

 private:
  struct Node {
    Node* parent = nullptr;
    Children* siblings = nullptr;
    Children::iterator place{};
    Page page;
    Children children;
    std::list<Node>::iterator self{};
  };

  std::span<const std::int32_t> page_of(std::span<const std::int32_t> tokens, std::size_t index) const;

  std::int64_t page_tokens_;
  std::map<std::string, Children, std::less<>> roots_;
  std::list<Node> nodes_;  // the most recently used first
};

}  // namespace moba::llm
