#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "llm/config.h"
#include "llm/engine/page_pool.h"
#include "moba/cache.h"

namespace moba::llm {

/// The layout of an engine's pages, each with the same tokens of all layers: for each layer keys and values,
/// then for each layer the means of the page's blocks [blocks, Hkv, D] in f32.
struct PageFormat {
  /// `block_sizes`: one for all layers, or one for each. `context`: the longest sequence; blocks beyond it
  /// are never complete. Throws UsageError where a page would have to be too long to hold whole blocks of
  /// every layer.
  PageFormat(const ModelConfig& config, std::span<const std::int64_t> block_sizes, DType dtype,
             std::int64_t context);

  std::int64_t page_tokens;
  std::vector<PageLayout> layers;
  std::size_t bytes;  // of a page

  std::int64_t layer_count() const { return static_cast<std::int64_t>(layers.size()); }
  const PageLayout& layer(std::int64_t index) const { return layers[static_cast<std::size_t>(index)]; }
  std::int64_t block_size(std::int64_t index) const { return layer(index).block_size; }
  /// Floats of one mean, and of the means of one layer in a page.
  std::int64_t mean_size() const { return layers.front().kv_heads * layers.front().head_dim; }
  std::int64_t means_size(std::int64_t index) const { return page_tokens / block_size(index) * mean_size(); }
  float* means(std::byte* page, std::int64_t layer) const;
  std::int64_t pages_for(std::int64_t tokens) const { return (tokens + page_tokens - 1) / page_tokens; }

 private:
  std::vector<std::size_t> means_offsets_;  // by layer, in bytes
};

/// The KV cache of one request: pages, and copies of their means in one piece, which the gate streams.
class SequenceCache {
 public:
  explicit SequenceCache(const PageFormat& format) : format_(&format) {}

  std::int64_t length() const { return length_; }
  std::int64_t pages() const { return static_cast<std::int64_t>(pages_.size()); }
  /// Returns the tokens that the pages have room for.
  std::int64_t capacity() const { return pages() * format_->page_tokens; }

  const Page& page(std::int64_t index) const { return pages_[static_cast<std::size_t>(index)]; }
  void add(Page page);
  /// Makes room for the means of `tokens` more tokens, before they are appended to the layers' views.
  void prepare(std::int64_t tokens);
  /// Returns the pages of a layer as if they held `length` tokens. Valid until the next change.
  PagedSequence view(std::int64_t layer, std::int64_t length);
  /// Counts `tokens` that were appended to every layer, and stores the means of complete blocks in their
  /// pages.
  void advance(std::int64_t tokens);
  /// Continues after its full pages and `pages`, which are full, too, and hold the tokens that follow. Drops
  /// all others.
  void adopt(std::span<const Page> pages);
  /// Returns pages [first, last).
  std::vector<Page> copy_pages(std::int64_t first, std::int64_t last) const;
  /// Replaces the pages from `first` on by others of the same tokens.
  void replace(std::int64_t first, std::span<const Page> pages);
  void clear();

 private:
  const PageFormat* format_;
  std::int64_t length_ = 0;
  std::vector<Page> pages_;
  std::vector<std::byte*> memory_;         // of the pages
  std::vector<std::vector<float>> means_;  // by layer: [complete blocks + 1, Hkv, D]
};

}  // namespace moba::llm
