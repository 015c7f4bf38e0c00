#include "moba/cache.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "backend.h"
#include "cache_state.h"
#include "checks.h"
#include "number.h"

namespace moba {
namespace {

constexpr std::int64_t kMinPageTokens = 64, kMaxPageTokens = 1024;
constexpr std::size_t kMaxSlabBytes = 16 * kHugePage;
/// Tokens of one head that a task of `append` stores: enough to amortise its scheduling.
constexpr std::int64_t kTokensPerTask = 256;

/// One block a page; several when blocks are tiny, a part when they are huge.
std::int64_t page_tokens_for(std::int64_t block_size) {
  if (block_size >= kMinPageTokens) return std::min(block_size, kMaxPageTokens);
  return (kMinPageTokens + block_size - 1) / block_size * block_size;
}

/// The keys or the values of a page.
struct PageHalf {
  std::size_t scale_offset = 0, bytes = 0;
};

PageHalf page_half(std::int64_t kv_heads, std::int64_t head_dim, std::int64_t page_tokens, DType dtype) {
  const auto rows = static_cast<std::size_t>(kv_heads * page_tokens);
  PageHalf half{.bytes = rows * static_cast<std::size_t>(head_dim) * size_of(dtype)};
  if (dtype == DType::i8) {
    half.bytes = (half.bytes + sizeof(float) - 1) / sizeof(float) * sizeof(float);
    half.scale_offset = half.bytes;
    half.bytes += rows * sizeof(float);
  }
  half.bytes = (half.bytes + 63) / 64 * 64;
  return half;
}

void append_rows(const Backend& backend, const Append& rows, const Execution& execution) {
  const std::int64_t added = rows.k.sizes[0], kv_heads = rows.k.sizes[1], block_size = rows.block_size;
  const std::int64_t first = rows.first / block_size, last = (rows.first + added - 1) / block_size + 1;
  const std::int64_t step = std::max<std::int64_t>(kTokensPerTask / block_size, 1);
  const std::int64_t tasks = (last - first + step - 1) / step * kv_heads;
  const Parallel::Body append_blocks = [&](std::int64_t task, int) {
    const std::int64_t begin = first + task / kv_heads * step;
    for (std::int64_t block = begin; block < std::min(begin + step, last); ++block)
      backend.append(rows, block, task % kv_heads);
  };
  const Parallel parallel = added < kTokensPerTask ? serial() : threads_of(execution);
  parallel.run(tasks, append_blocks);
}

}  // namespace

/// Memory comes in slabs that hold as many pages as there were before, so that a small cache stays small and
/// a large one lies on huge pages.
void CacheState::resize(Sequence& s, std::int64_t tokens) const {
  const auto pages = static_cast<std::size_t>((tokens + page_tokens - 1) / page_tokens);
  std::size_t held = 0, first = 0;  // pages of all slabs, and of all but the last
  for (const Slab& slab : s.slabs) held += slab.size() / page_bytes();
  while (!s.slabs.empty()) {
    first = held - s.slabs.back().size() / page_bytes();
    if (first < pages) break;
    s.slabs.pop_back();
    held = first;
  }
  s.k_pages.resize(std::min(pages, s.k_pages.size()));
  s.v_pages.resize(s.k_pages.size());
  while (s.k_pages.size() < pages) {
    if (s.k_pages.size() == held) {
      const std::size_t max_pages = std::max<std::size_t>(kMaxSlabBytes / page_bytes(), 1);
      first = held;
      s.slabs.emplace_back(std::clamp<std::size_t>(std::max(pages - held, held), 1, max_pages) *
                           page_bytes());
      held += s.slabs.back().size() / page_bytes();
    }
    const std::byte* page = s.slabs.back().data() + (s.k_pages.size() - first) * page_bytes();
    s.k_pages.push_back(page);
    s.v_pages.push_back(page + half_page_bytes);
  }
  const auto row = static_cast<std::size_t>(shape.kv_heads * shape.head_dim);
  const std::size_t before = s.means.size();
  s.means.resize((static_cast<std::size_t>(tokens / shape.block_size) + 1) * row);
  if (s.means.size() > before)
    std::fill(s.means.begin() + static_cast<std::ptrdiff_t>(before), s.means.end(), 0.0F);
  if (!shape.extremes) return;
  s.max.resize(s.means.size());
  s.min.resize(s.means.size());
}

KvLayout CacheState::layout() const {
  return {shape.dtype, page_tokens, shape.head_dim, page_tokens * shape.head_dim, scale_offset};
}

KvCache::KvCache(const Shape& shape) {
  named("KvCache", [&] { check_cache_shape(shape); });
  state_ = std::make_unique<CacheState>();
  state_->shape = shape;
  state_->page_tokens = page_tokens_for(shape.block_size);
  const PageHalf half = page_half(shape.kv_heads, shape.head_dim, state_->page_tokens, shape.dtype);
  state_->scale_offset = half.scale_offset;
  state_->half_page_bytes = half.bytes;
  state_->sequences.resize(static_cast<std::size_t>(shape.sequences));
  for (CacheState::Sequence& s : state_->sequences) state_->resize(s, 0);
}

const CacheState& state_of(const KvCache& cache) {
  return *cache.state_;
}

KvCache::~KvCache() = default;
KvCache::KvCache(KvCache&&) noexcept = default;
KvCache& KvCache::operator=(KvCache&&) noexcept = default;

const KvCache::Shape& KvCache::shape() const {
  return state_->shape;
}

std::int64_t KvCache::length(std::int64_t sequence) const {
  named("KvCache::length", [&] { check_sequence(*this, sequence); });
  return state_->sequences[static_cast<std::size_t>(sequence)].length;
}

std::size_t KvCache::bytes() const {
  std::size_t total = 0;
  for (const CacheState::Sequence& s : state_->sequences) {
    for (const CacheState::Slab& slab : s.slabs) total += slab.size();
    total += (s.means.capacity() + s.max.capacity() + s.min.capacity()) * sizeof(float);
  }
  return total;
}

void KvCache::append(const Tensor& k, const Tensor& v, std::int64_t sequence, const Execution& execution) {
  const Backend* backend = nullptr;
  named("KvCache::append", [&] {
    check_append(*this, k, v, sequence);
    check_execution(execution);
    backend = &host_backend(execution.backend);
  });
  CacheState::Sequence& s = state_->sequences[static_cast<std::size_t>(sequence)];
  const std::int64_t added = k.sizes[0];
  if (added == 0) return;
  state_->resize(s, s.length + added);
  const Append rows{.k = k,
                    .v = v,
                    .first = s.length,
                    .k_layout = state_->layout(),
                    .v_layout = state_->layout(),
                    .k_pages = s.k_pages,
                    .v_pages = s.v_pages,
                    .block_size = state_->shape.block_size,
                    .means = s.means.data(),
                    .max = s.max.empty() ? nullptr : s.max.data(),
                    .min = s.min.empty() ? nullptr : s.min.data()};
  s.length += added;
  append_rows(*backend, rows, execution);
}

void KvCache::truncate(std::int64_t tokens, std::int64_t sequence) {
  named("KvCache::truncate", [&] { check_truncate(*this, tokens, sequence); });
  CacheState::Sequence& s = state_->sequences[static_cast<std::size_t>(sequence)];
  if (tokens == s.length) return;
  const auto [kv_heads, head_dim, block_size, dtype, sequences, extremes] = state_->shape;
  s.length = tokens;
  state_->resize(s, tokens);

  const std::int64_t row_size = kv_heads * head_dim, first = tokens / block_size * row_size;
  float* sums = s.means.data() + first;
  std::fill(sums, sums + row_size, 0.0F);
  for (std::int64_t token = tokens / block_size * block_size; token < tokens; ++token) {
    for (std::int64_t head = 0; head < kv_heads; ++head) {
      const CacheRow row = cache_row(state_->layout(), s.k_pages, token, head);
      const float scale = row.scale == nullptr ? 1.0F : *row.scale;
      for (std::int64_t d = 0; d < head_dim; ++d) {
        const float value = static_cast<float>(load(row.data, dtype, d)) * scale;
        const std::int64_t at = head * head_dim + d;
        sums[at] += value;
        if (!extremes) continue;
        const bool is_first = token % block_size == 0;
        float &max = s.max[static_cast<std::size_t>(first + at)],
              &min = s.min[static_cast<std::size_t>(first + at)];
        if (is_first || value > max || std::isnan(value)) max = value;
        if (is_first || value < min || std::isnan(value)) min = value;
      }
    }
  }
}

BlockFeatures KvCache::features(std::int64_t sequence) const {
  named("KvCache::features", [&] { check_sequence(*this, sequence); });
  CacheState::Sequence& s = state_->sequences[static_cast<std::size_t>(sequence)];
  const auto view_of = [&](std::vector<float, CacheAllocator<float>>& list) {
    return list.empty() ? Tensor{}
                        : view(list.data(), {s.length / state_->shape.block_size, state_->shape.kv_heads,
                                             state_->shape.head_dim});
  };
  return {.mean = view_of(s.means), .max = view_of(s.max), .min = view_of(s.min)};
}

namespace {

SequenceView view_of(const CacheState::Sequence& s, std::int64_t q_begin, std::int64_t queries) {
  return {
      .q_begin = q_begin, .queries = queries, .keys = s.length, .k_pages = s.k_pages, .v_pages = s.v_pages};
}

BlockMeans means_of(const CacheState& state) {
  return {.head_stride = state.shape.head_dim, .block_stride = state.shape.kv_heads * state.shape.head_dim};
}

}  // namespace

Call cached_call(const Tensor& q, const KvCache& cache, std::int64_t sequence, const Routing& routing) {
  const CacheState& state = state_of(cache);
  Call call;
  call.q = q;
  call.k = call.v = state.layout();
  call.sequences.push_back(view_of(state.sequences[static_cast<std::size_t>(sequence)], 0, q.sizes[0]));
  finish_call(call, routing, state.shape.kv_heads);
  return call;
}

Call decode_call(const Tensor& q, const KvCache& cache, const Routing& routing) {
  const CacheState& state = state_of(cache);
  Call call;
  call.q = q;
  call.k = call.v = state.layout();
  for (const CacheState::Sequence& s : state.sequences) {
    call.sequences.push_back(view_of(s, static_cast<std::int64_t>(call.sequences.size()), 1));
  }
  finish_call(call, routing, state.shape.kv_heads);
  return call;
}

BlockMeans cached_means(const KvCache& cache, std::int64_t sequence) {
  BlockMeans means = means_of(state_of(cache));
  means.base.push_back(state_of(cache).sequences[static_cast<std::size_t>(sequence)].means.data());
  return means;
}

BlockMeans cached_means(const KvCache& cache) {
  BlockMeans means = means_of(state_of(cache));
  for (const CacheState::Sequence& s : state_of(cache).sequences) means.base.push_back(s.means.data());
  return means;
}

namespace {

/// Layouts of keys and of values.
std::pair<KvLayout, KvLayout> layouts_of(const PageLayout& p) {
  const PageHalf half = page_half(p.kv_heads, p.head_dim, p.page_tokens, p.dtype);
  KvLayout k{.dtype = p.dtype,
             .page_tokens = p.page_tokens,
             .token_stride = p.head_dim,
             .head_stride = p.page_tokens * p.head_dim,
             .scale_offset = half.scale_offset,
             .page_offset = p.offset};
  KvLayout v = k;
  v.page_offset += half.bytes;
  return {k, v};
}

}  // namespace

std::size_t page_bytes(const PageLayout& layout) {
  named("page_bytes", [&] { check_page_layout(layout); });
  return 2 * page_half(layout.kv_heads, layout.head_dim, layout.page_tokens, layout.dtype).bytes;
}

void append(const Tensor& k, const Tensor& v, const PageLayout& layout, const PagedSequence& sequence,
            const Execution& execution) {
  const Backend* backend = nullptr;
  named("append", [&] {
    check_append(k, v, layout, sequence);
    check_execution(execution);
    backend = &host_backend(execution.backend);
  });
  if (k.sizes[0] == 0) return;
  const auto [k_layout, v_layout] = layouts_of(layout);
  append_rows(*backend,
              {.k = k,
               .v = v,
               .first = sequence.length,
               .k_layout = k_layout,
               .v_layout = v_layout,
               .k_pages = sequence.pages,
               .v_pages = sequence.pages,
               .block_size = layout.block_size,
               .means = sequence.means,
               .max = sequence.max,
               .min = sequence.min},
              execution);
}

Call decode_call(const Tensor& q, const PageLayout& layout, std::span<const PagedSequence> sequences,
                 const Routing& routing) {
  Call call;
  call.q = q;
  std::tie(call.k, call.v) = layouts_of(layout);
  for (const PagedSequence& s : sequences) {
    call.sequences.push_back({.q_begin = static_cast<std::int64_t>(call.sequences.size()),
                              .queries = 1,
                              .keys = s.length,
                              .k_pages = s.pages,
                              .v_pages = s.pages});
  }
  finish_call(call, routing, layout.kv_heads);
  return call;
}

Call cached_call(const Tensor& q, const PageLayout& layout, const PagedSequence& sequence,
                 const Routing& routing) {
  Call call = decode_call(q, layout, {&sequence, 1}, routing);
  call.sequences.front().queries = q.sizes[0];
  return call;
}

BlockMeans cached_means(const PageLayout& layout, std::span<const PagedSequence> sequences) {
  BlockMeans means{.head_stride = layout.head_dim, .block_stride = layout.kv_heads * layout.head_dim};
  for (const PagedSequence& s : sequences) means.base.push_back(s.means);
  return means;
}

}  // namespace moba
