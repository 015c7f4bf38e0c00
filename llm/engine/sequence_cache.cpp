#include "llm/engine/sequence_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "llm/error.h"

namespace moba::llm {
namespace {

/// Smaller blocks share a page: attention reads at least this many keys at a time.
constexpr std::int64_t kMinPageTokens = 64;
/// Pages where a block is longer than any sequence.
constexpr std::int64_t kPageTokensWithoutBlocks = 256;
/// Longest page of layers with different block sizes.
constexpr std::int64_t kMaxSharedPage = 4096;
constexpr std::size_t kAlignment = 64;

/// Returns the least multiple of all block sizes that is long enough. Blocks beyond the context need no page.
std::int64_t page_tokens_for(std::span<const std::int64_t> block_sizes, std::int64_t context) {
  std::int64_t blocks = 1;
  bool has_blocks = false;
  for (const std::int64_t block_size : block_sizes) {
    if (block_size > context) continue;
    has_blocks = true;
    const std::int64_t both = std::lcm(blocks, block_size);
    if (both > std::max(kMaxSharedPage, std::max(blocks, block_size))) {
      throw UsageError(fmt::format(
          "block_sizes: expected sizes with a common multiple of at most {}, got {} and {} in two layers",
          kMaxSharedPage, blocks, block_size));
    }
    blocks = both;
  }
  if (!has_blocks) return kPageTokensWithoutBlocks;
  return blocks >= kMinPageTokens ? blocks : (kMinPageTokens + blocks - 1) / blocks * blocks;
}

}  // namespace

PageFormat::PageFormat(const ModelConfig& config, std::span<const std::int64_t> block_sizes, DType dtype,
                       std::int64_t context)
    : page_tokens(page_tokens_for(block_sizes, context)) {
  std::size_t offset = 0;
  for (std::int64_t i = 0; i < config.layers; ++i) {
    layers.push_back({.kv_heads = config.kv_heads,
                      .head_dim = config.head_dim,
                      .block_size = block_sizes[block_sizes.size() == 1 ? 0 : static_cast<std::size_t>(i)],
                      .page_tokens = page_tokens,
                      .dtype = dtype,
                      .offset = offset});
    offset += page_bytes(layers.back());
  }
  for (std::int64_t i = 0; i < config.layers; ++i) {
    means_offsets_.push_back(offset);
    offset += static_cast<std::size_t>(means_size(i)) * sizeof(float);
  }
  bytes = (offset + kAlignment - 1) / kAlignment * kAlignment;
}

float* PageFormat::means(std::byte* page, std::int64_t layer) const {
  return reinterpret_cast<float*>(page + means_offsets_[static_cast<std::size_t>(layer)]);
}

void SequenceCache::add(Page page) {
  memory_.push_back(page.get());
  pages_.push_back(std::move(page));
}

void SequenceCache::prepare(std::int64_t tokens) {
  means_.resize(format_->layers.size());
  for (std::size_t layer = 0; layer < means_.size(); ++layer) {
    const std::int64_t blocks = (length_ + tokens) / format_->layers[layer].block_size;
    means_[layer].resize(static_cast<std::size_t>((blocks + 1) * format_->mean_size()));
  }
}

PagedSequence SequenceCache::view(std::int64_t layer, std::int64_t length) {
  return {.length = length, .pages = memory_, .means = means_[static_cast<std::size_t>(layer)].data()};
}

void SequenceCache::advance(std::int64_t tokens) {
  const std::int64_t size = format_->mean_size(), begin = length_;
  length_ += tokens;
  for (std::int64_t layer = 0; layer < format_->layer_count(); ++layer) {
    const std::int64_t block_size = format_->block_size(layer), per_page = format_->page_tokens / block_size;
    for (std::int64_t block = begin / block_size; block < length_ / block_size; ++block) {
      const float* mean = means_[static_cast<std::size_t>(layer)].data() + block * size;
      float* means = format_->means(memory_[static_cast<std::size_t>(block / per_page)], layer);
      std::copy_n(mean, size, means + block % per_page * size);
    }
  }
}

void SequenceCache::adopt(std::span<const Page> pages) {
  const std::int64_t kept = length_ / format_->page_tokens;
  pages_.resize(static_cast<std::size_t>(kept));
  memory_.resize(pages_.size());
  length_ = (kept + static_cast<std::int64_t>(pages.size())) * format_->page_tokens;
  prepare(0);
  for (const Page& page : pages) {
    add(page);
    for (std::int64_t layer = 0; layer < format_->layer_count(); ++layer) {
      const std::int64_t size = format_->means_size(layer), at = (this->pages() - 1) * size;
      std::copy_n(format_->means(memory_.back(), layer), size,
                  means_[static_cast<std::size_t>(layer)].begin() + at);
    }
  }
  for (std::vector<float>& means : means_)
    std::fill(means.end() - format_->mean_size(), means.end(), 0.0F);  // the block that begins
}

std::vector<Page> SequenceCache::copy_pages(std::int64_t first, std::int64_t last) const {
  return {pages_.begin() + first, pages_.begin() + last};
}

void SequenceCache::replace(std::int64_t first, std::span<const Page> pages) {
  for (std::size_t i = 0; i < pages.size(); ++i) {
    const std::size_t at = static_cast<std::size_t>(first) + i;
    pages_[at] = pages[i];
    memory_[at] = pages[i].get();
  }
}

void SequenceCache::clear() {
  *this = SequenceCache(*format_);
}

}  // namespace moba::llm
