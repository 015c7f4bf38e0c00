#include "moba/cache.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <utility>

#include "cache_state.h"
#include "checks.h"
#include "number.h"

namespace moba {
namespace {

constexpr std::int64_t kMinPageTokens = 64, kMaxPageTokens = 1024;
constexpr std::size_t kMaxSlabBytes = 16 * kHugePage;

/// One block a page; several when blocks are tiny, a part when they are huge.
std::int64_t page_tokens_for(std::int64_t block_size) {
  if (block_size >= kMinPageTokens) return std::min(block_size, kMaxPageTokens);
  return (kMinPageTokens + block_size - 1) / block_size * block_size;
}

/// Rounds one row to the storage dtype and widens it again into `seen`, which is what attention and the means
/// work with.
void store_row(const float* row, std::int64_t size, DType dtype, void* to, float* scale, float* seen) {
  if (dtype == DType::f32) {
    std::copy_n(row, size, static_cast<float*>(to));
    std::copy_n(row, size, seen);
  } else if (dtype == DType::i8) {
    float amax = 0;
    for (std::int64_t d = 0; d < size; ++d) amax = std::max(amax, std::fabs(row[d]));
    *scale = amax / 127;
    const float inverse = amax > 0 ? 127 / amax : 0;
    for (std::int64_t d = 0; d < size; ++d) {
      const auto level = static_cast<std::int8_t>(std::lrint(std::clamp(row[d] * inverse, -127.0F, 127.0F)));
      static_cast<std::int8_t*>(to)[d] = level;
      seen[d] = static_cast<float>(level) * *scale;
    }
  } else {
    for (std::int64_t d = 0; d < size; ++d) {
      store(to, dtype, d, row[d]);
      seen[d] = static_cast<float>(load(to, dtype, d));
    }
  }
}

void widen_row(const Tensor& t, std::int64_t token, std::int64_t head, float* out) {
  const std::int64_t offset = token * t.strides[0] + head * t.strides[1];
  for (std::int64_t d = 0; d < t.sizes[2]; ++d)
    out[d] = static_cast<float>(load(t.data, t.dtype, offset + d));
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
}

KvLayout CacheState::layout() const {
  return {shape.dtype, page_tokens, shape.head_dim, page_tokens * shape.head_dim, scale_offset};
}

KvCache::KvCache(const Shape& shape) {
  named("KvCache", [&] { check_cache_shape(shape); });
  state_ = std::make_unique<CacheState>();
  state_->shape = shape;
  state_->page_tokens = page_tokens_for(shape.block_size);
  const auto rows = static_cast<std::size_t>(shape.kv_heads * state_->page_tokens);
  std::size_t bytes = rows * static_cast<std::size_t>(shape.head_dim) * size_of(shape.dtype);
  if (shape.dtype == DType::i8) {
    bytes = (bytes + sizeof(float) - 1) / sizeof(float) * sizeof(float);
    state_->scale_offset = bytes;
    bytes += rows * sizeof(float);
  }
  state_->half_page_bytes = (bytes + 63) / 64 * 64;
  state_->sequences.resize(static_cast<std::size_t>(shape.sequences));
  for (CacheState::Sequence& s : state_->sequences)
    s.sum.assign(static_cast<std::size_t>(shape.kv_heads * shape.head_dim), 0.0F);
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
    total += (s.means.capacity() + s.sum.capacity()) * sizeof(float);
  }
  return total;
}

void KvCache::append(const Tensor& k, const Tensor& v, std::int64_t sequence) {
  named("KvCache::append", [&] { check_append(*this, k, v, sequence); });
  const auto [kv_heads, head_dim, block_size, dtype, sequences] = state_->shape;
  CacheState::Sequence& s = state_->sequences[static_cast<std::size_t>(sequence)];
  const std::int64_t added = k.sizes[0], page_tokens = state_->page_tokens;

  const std::int64_t row_floats = kv_heads * head_dim;
  s.means.resize(static_cast<std::size_t>((s.length + added) / block_size * row_floats));
  state_->resize(s, s.length + added);

  std::vector<float> row(static_cast<std::size_t>(head_dim)), seen(row.size());
  for (std::int64_t token = 0; token < added; ++token) {
    auto* page = const_cast<std::byte*>(s.k_pages[static_cast<std::size_t>(s.length / page_tokens)]);
    for (const Tensor* t : {&k, &v}) {
      std::byte* half = t == &k ? page : page + state_->half_page_bytes;
      for (std::int64_t head = 0; head < kv_heads; ++head) {
        const std::int64_t slot = head * page_tokens + s.length % page_tokens;
        widen_row(*t, token, head, row.data());
        store_row(row.data(), head_dim, dtype,
                  half + slot * head_dim * static_cast<std::int64_t>(size_of(dtype)),
                  reinterpret_cast<float*>(half + state_->scale_offset) + slot, seen.data());
        if (t == &v) continue;
        float* sum = s.sum.data() + head * head_dim;
        for (std::int64_t d = 0; d < head_dim; ++d) sum[d] += seen[static_cast<std::size_t>(d)];
      }
    }
    ++s.length;
    if (s.length % block_size != 0) continue;
    float* mean = s.means.data() + (s.length / block_size - 1) * row_floats;
    for (std::int64_t i = 0; i < row_floats; ++i) {
      mean[i] = rounded_to(dtype, s.sum[static_cast<std::size_t>(i)] / static_cast<float>(block_size));
    }
    std::fill(s.sum.begin(), s.sum.end(), 0.0F);
  }
}

void KvCache::truncate(std::int64_t tokens, std::int64_t sequence) {
  named("KvCache::truncate", [&] { check_truncate(*this, tokens, sequence); });
  CacheState::Sequence& s = state_->sequences[static_cast<std::size_t>(sequence)];
  if (tokens == s.length) return;
  const auto [kv_heads, head_dim, block_size, dtype, sequences] = state_->shape;
  s.length = tokens;
  state_->resize(s, tokens);
  s.means.resize(static_cast<std::size_t>(tokens / block_size * kv_heads * head_dim));

  std::fill(s.sum.begin(), s.sum.end(), 0.0F);
  const KvLayout layout = state_->layout();
  for (std::int64_t token = tokens / block_size * block_size; token < tokens; ++token) {
    const std::byte* page = s.k_pages[static_cast<std::size_t>(token / layout.page_tokens)];
    for (std::int64_t head = 0; head < kv_heads; ++head) {
      const std::int64_t slot = head * layout.page_tokens + token % layout.page_tokens;
      const float scale =
          dtype == DType::i8 ? reinterpret_cast<const float*>(page + layout.scale_offset)[slot] : 1.0F;
      for (std::int64_t d = 0; d < head_dim; ++d) {
        s.sum[static_cast<std::size_t>(head * head_dim + d)] +=
            static_cast<float>(load(page, dtype, slot * head_dim + d)) * scale;
      }
    }
  }
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

Call decode_call(const Tensor& q, std::span<const CachedSequence> sequences, const Routing& routing) {
  Call call;
  call.q = q;
  call.page_storage.reserve(2 * sequences.size());
  std::int64_t max_seqlen_k = 1;
  for (const CachedSequence& s : sequences) {
    call.page_storage.push_back(static_cast<const std::byte*>(s.k.data));
    call.page_storage.push_back(static_cast<const std::byte*>(s.v.data));
    max_seqlen_k = std::max(max_seqlen_k, s.k.sizes[0]);
  }
  const std::byte* const* pages = call.page_storage.data();
  for (const CachedSequence& s : sequences) {
    call.sequences.push_back({.q_begin = static_cast<std::int64_t>(call.sequences.size()),
                              .queries = 1,
                              .keys = s.k.sizes[0],
                              .k_pages = {pages, 1},
                              .v_pages = {pages + 1, 1}});
    pages += 2;
  }
  const CachedSequence none{.k = {.sizes = {0, 1, 1}}, .v{}, .means{}};
  const CachedSequence& first = sequences.empty() ? none : sequences.front();
  call.k = {first.k.dtype, max_seqlen_k, first.k.strides[0], first.k.strides[1]};
  call.v = {first.v.dtype, max_seqlen_k, first.v.strides[0], first.v.strides[1]};
  finish_call(call, routing, first.k.sizes[1]);
  return call;
}

BlockMeans cached_means(std::span<const CachedSequence> sequences) {
  BlockMeans means;
  for (const CachedSequence& s : sequences) {
    means.base.push_back(static_cast<const float*>(s.means.data));
    means.block_stride = s.means.strides[0];
    means.head_stride = s.means.strides[1];
  }
  return means;
}

}  // namespace moba
