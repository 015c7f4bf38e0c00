#include "llm/engine/sequence_cache.h"

#include <algorithm>
#include <utility>

namespace moba::llm {
namespace {

/// Smaller blocks share a page: attention reads at least this many keys at a time.
constexpr std::int64_t kMinPageTokens = 64;
/// Pages where a block is longer than any sequence.
constexpr std::int64_t kPageTokensWithoutBlocks = 256;
constexpr std::size_t kAlignment = 64;

std::int64_t page_tokens_for(std::int64_t block_size, std::int64_t context) {
  if (block_size > context) return kPageTokensWithoutBlocks;
  return block_size >= kMinPageTokens ? block_size
                                      : (kMinPageTokens + block_size - 1) / block_size * block_size;
}

}  // namespace

PageFormat::PageFormat(const ModelConfig& config, std::int64_t block_size, DType dtype, std::int64_t context)
    : layers(config.layers),
      page_tokens(page_tokens_for(block_size, context)),
      first_layer{.kv_heads = config.kv_heads,
                  .head_dim = config.head_dim,
                  .block_size = block_size,
                  .page_tokens = page_tokens,
                  .dtype = dtype},
      layer_bytes(page_bytes(first_layer)) {
  const std::size_t all_means = static_cast<std::size_t>(layers * means_size()) * sizeof(float);
  bytes =
      static_cast<std::size_t>(layers) * layer_bytes + (all_means + kAlignment - 1) / kAlignment * kAlignment;
}

PageLayout PageFormat::layer(std::int64_t index) const {
  PageLayout layout = first_layer;
  layout.offset = static_cast<std::size_t>(index) * layer_bytes;
  return layout;
}

float* PageFormat::means(std::byte* page, std::int64_t layer) const {
  return reinterpret_cast<float*>(page + static_cast<std::size_t>(layers) * layer_bytes) +
         layer * means_size();
}

void SequenceCache::add(Page page) {
  memory_.push_back(page.get());
  pages_.push_back(std::move(page));
}

void SequenceCache::prepare(std::int64_t tokens) {
  means_.resize(static_cast<std::size_t>(format_->layers));
  const std::int64_t blocks = (length_ + tokens) / format_->first_layer.block_size;
  for (std::vector<float>& means : means_)
    means.resize(static_cast<std::size_t>((blocks + 1) * format_->mean_size()));
}

PagedSequence SequenceCache::view(std::int64_t layer, std::int64_t length) {
  return {.length = length, .pages = memory_, .means = means_[static_cast<std::size_t>(layer)].data()};
}

void SequenceCache::advance(std::int64_t tokens) {
  const std::int64_t block_size = format_->first_layer.block_size, size = format_->mean_size(),
                     per_page = format_->page_tokens / block_size;
  const std::int64_t first = length_ / block_size;
  length_ += tokens;
  for (std::int64_t block = first; block < length_ / block_size; ++block) {
    for (std::int64_t layer = 0; layer < format_->layers; ++layer) {
      const float* mean = means_[static_cast<std::size_t>(layer)].data() + block * size;
      float* means = format_->means(memory_[static_cast<std::size_t>(block / per_page)], layer);
      std::copy_n(mean, size, means + block % per_page * size);
    }
  }
}

void SequenceCache::adopt(std::span<const Page> pages) {
  const std::int64_t kept = length_ / format_->page_tokens, size = format_->means_size();
  pages_.resize(static_cast<std::size_t>(kept));
  memory_.resize(pages_.size());
  length_ = (kept + static_cast<std::int64_t>(pages.size())) * format_->page_tokens;
  prepare(0);
  for (const Page& page : pages) {
    add(page);
    const std::int64_t at = (this->pages() - 1) * size;
    for (std::int64_t layer = 0; layer < format_->layers; ++layer) {
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
