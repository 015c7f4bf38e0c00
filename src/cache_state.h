#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "moba/cache.h"
#include "problem.h"

namespace moba {

struct KvCache::State {
  /// One allocation holds the keys of a page, then its values: each [Hkv, page_tokens, D], for i8 followed by
  /// f32 scales [Hkv, page_tokens].
  struct Page {
    struct Free {
      void operator()(std::byte* memory) const;
    };
    std::unique_ptr<std::byte[], Free> memory;
  };

  struct Sequence {
    std::int64_t length = 0;
    std::vector<Page> pages;
    std::vector<const std::byte*> k_pages, v_pages;
    std::vector<float> means;  // [complete blocks, Hkv, D]
    std::vector<float> sum;    // [Hkv, D], of the keys of the block that is being filled
  };

  Shape shape;
  std::int64_t page_tokens = 0;
  std::size_t scale_offset = 0, half_page_bytes = 0;
  std::vector<Sequence> sequences;

  KvLayout layout() const;
};

Problem cached_problem(const Tensor& q, const KvCache& cache, std::int64_t sequence, const Routing& routing);
Problem decode_problem(const Tensor& q, const KvCache& cache, const Routing& routing);
Problem decode_problem(const Tensor& q, std::span<const CachedSequence> sequences, const Routing& routing);
/// Views of the means kept in the cache: of one sequence, or of all.
Means cached_means(const KvCache& cache, std::int64_t sequence);
Means cached_means(const KvCache& cache);
Means cached_means(std::span<const CachedSequence> sequences);

}  // namespace moba
