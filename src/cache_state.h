#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#include "call.h"
#include "moba/cache.h"
#include "scratch.h"

namespace moba {

/// Allocator of a cache: memory is not initialised, and large blocks lie on huge pages.
template <typename T>
struct CacheAllocator {
  using value_type = T;

  CacheAllocator() = default;
  template <typename U>
  explicit CacheAllocator(const CacheAllocator<U>& /*other*/) {}
  T* allocate(std::size_t count) {
    const std::size_t bytes = whole(count * sizeof(T));
    void* memory = ::operator new(bytes, alignment(bytes));
    prefer_huge_pages(memory, bytes);
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, std::size_t count) {
    ::operator delete(memory, alignment(whole(count * sizeof(T))));
  }
  template <typename U>
  void construct(U* value) {
    ::new (static_cast<void*>(value)) U;
  }
  bool operator==(const CacheAllocator&) const = default;

 private:
  static std::size_t whole(std::size_t bytes) {
    return bytes < kHugePage ? bytes : (bytes + kHugePage - 1) / kHugePage * kHugePage;
  }
  static std::align_val_t alignment(std::size_t bytes) {
    return std::align_val_t{bytes < kHugePage ? Scratch::kAlignment : kHugePage};
  }
};

/// State of a KvCache.
struct CacheState {
  /// Pages in one allocation. Each holds its keys, then its values: each [Hkv, page_tokens, D], for i8
  /// followed by f32 scales [Hkv, page_tokens].
  using Slab = std::vector<std::byte, CacheAllocator<std::byte>>;

  struct Sequence {
    std::int64_t length = 0;
    std::vector<Slab> slabs;
    std::vector<const std::byte*> k_pages, v_pages;  // those in use, slab after slab
    /// [complete blocks + 1, Hkv, D]: the last is the sum of the keys of the block that is being filled.
    std::vector<float, CacheAllocator<float>> means;
    /// The same of the extremes; empty unless Shape::extremes.
    std::vector<float, CacheAllocator<float>> max, min;
  };

  KvCache::Shape shape;
  std::int64_t page_tokens = 0;
  std::size_t scale_offset = 0, half_page_bytes = 0;
  std::vector<Sequence> sequences;

  std::size_t page_bytes() const { return 2 * half_page_bytes; }
  /// Resizes the pages in use and the features to `tokens` tokens; sums that are new are 0.
  void resize(Sequence& sequence, std::int64_t tokens) const;

  KvLayout layout() const;
};

const CacheState& state_of(const KvCache& cache);

Call cached_call(const Tensor& q, const KvCache& cache, std::int64_t sequence, const Routing& routing);
Call decode_call(const Tensor& q, const KvCache& cache, const Routing& routing);
Call cached_call(const Tensor& q, const PageLayout& layout, const PagedSequence& sequence,
                 const Routing& routing);
Call decode_call(const Tensor& q, const PageLayout& layout, std::span<const PagedSequence> sequences,
                 const Routing& routing);
/// Views of the means kept in the cache: of one sequence, or of all.
BlockMeans cached_means(const KvCache& cache, std::int64_t sequence);
BlockMeans cached_means(const KvCache& cache);
BlockMeans cached_means(const PageLayout& layout, std::span<const PagedSequence> sequences);

}  // namespace moba
