#include "paged_cache.h"

#include <algorithm>

#include "checks.h"
#include "host/run.h"

namespace moba {
namespace {

/// Tokens [first, first + keys) of a sequence, counted from the start of its pages, and its queries.
struct Part {
  std::int64_t first = 0, keys = 0, q_begin = 0, queries = 0;
};

std::int64_t start_of(const PagedCache& cache, std::int64_t sequence) {
  return cache.starts == nullptr ? 0 : cache.starts[sequence];
}

/// Returns the page that holds a token, counted from the start of the sequence's pages.
std::int64_t page_at(const PagedCache& cache, std::int64_t sequence, std::int64_t token) {
  const std::int64_t index = sequence * cache.table_stride + token / cache.k.sizes[1];
  return cache.page_table == nullptr ? index : cache.page_table[index];
}

template <typename T>
T* element_of(const Tensor& t, std::int64_t offset) {
  return reinterpret_cast<T*>(static_cast<std::byte*>(t.data) +
                              offset * static_cast<std::int64_t>(size_of(t.dtype)));
}

/// Returns the mean of a block at kv head 0. Padding does not move means.
float* mean_of(const PagedCache& cache, std::int64_t sequence, std::int64_t block, std::int64_t block_size) {
  const std::int64_t last = (block + 1) * block_size - 1;
  const Tensor& means = cache.means;
  return element_of<float>(means, page_at(cache, sequence, last) * means.strides[0] +
                                      last % cache.k.sizes[1] / block_size * means.strides[1]);
}

KvLayout layout_of(const Tensor& t) {
  return {.dtype = t.dtype,
          .page_tokens = std::max<std::int64_t>(t.sizes[1], 1),
          .token_stride = t.strides[1],
          .head_stride = t.strides[2]};
}

/// Adds the parts of all sequences to a call, with pointers to their pages.
void add_sequences(Call& call, const PagedCache& cache, const std::vector<Part>& parts) {
  call.k = layout_of(cache.k);
  call.v = layout_of(cache.v);
  const auto pages_of = [&](const Part& part) {
    const std::int64_t before = part.first / call.k.page_tokens * call.k.page_tokens;
    return part.keys == 0 ? 0 : (part.first + part.keys - before - 1) / call.k.page_tokens + 1;
  };
  std::int64_t total = 0;
  for (const Part& part : parts) total += pages_of(part);
  call.page_storage.resize(static_cast<std::size_t>(2 * total));
  const std::byte **k_page = call.page_storage.data(), **v_page = k_page + total;
  for (std::size_t s = 0; s < parts.size(); ++s) {
    const Part& part = parts[s];
    const auto count = static_cast<std::size_t>(pages_of(part));
    call.sequences.push_back({.q_begin = part.q_begin,
                              .queries = part.queries,
                              .keys = part.keys,
                              .k_pages = {k_page, count},
                              .v_pages = {v_page, count},
                              .first_row = part.first % call.k.page_tokens});
    for (std::size_t i = 0; i < count; ++i) {
      const std::int64_t page = page_at(cache, static_cast<std::int64_t>(s),
                                        part.first + static_cast<std::int64_t>(i) * call.k.page_tokens);
      *k_page++ = element_of<const std::byte>(cache.k, page * cache.k.strides[0]);
      *v_page++ = element_of<const std::byte>(cache.v, page * cache.v.strides[0]);
    }
  }
}

}  // namespace

Call paged_call(const Tensor& q, const std::int32_t* cu_seqlens_q, const PagedCache& cache,
                const Routing& routing) {
  std::vector<Part> parts;
  for (std::int64_t s = 0; s < cache.sequences; ++s) {
    const std::int64_t begin = cu_seqlens_q == nullptr ? s : cu_seqlens_q[s],
                       end = cu_seqlens_q == nullptr ? s + 1 : cu_seqlens_q[s + 1],
                       first = start_of(cache, s);
    parts.push_back(
        {.first = first, .keys = cache.lengths[s] - first, .q_begin = begin, .queries = end - begin});
  }
  Call call;
  call.q = q;
  add_sequences(call, cache, parts);
  static_cast<CallShape&>(call) = shape_of(q, cache.k.sizes[2], cache.max_seqlen_k, routing);
  return call;
}

BlockMeans paged_means(const Call& call, const PagedCache& cache, Scratch& scratch,
                       const Execution& execution) {
  if (!call.needs_scores()) return {};
  const Tensor& means = cache.means;
  const std::int64_t block_size = call.routing.block_size, heads = call.kv_heads, head_dim = call.head_dim;
  if (cache.max_seqlen_k <= cache.k.sizes[1]) {
    BlockMeans views{.head_stride = means.strides[2], .block_stride = means.strides[1]};
    for (std::int64_t s = 0; s < cache.sequences; ++s) views.base.push_back(mean_of(cache, s, 0, block_size));
    return views;
  }
  std::int64_t total = 0;
  for (const SequenceView& s : call.sequences) total += call.candidate_blocks(s);
  BlockMeans copies{.head_stride = head_dim,
                    .block_stride = heads * head_dim,
                    .storage = Buffer<float>(scratch, total * heads * head_dim)};
  const Parallel parallel = threads_of(execution);
  float* base = copies.storage.data();
  for (std::int64_t s = 0; s < cache.sequences; ++s) {
    constexpr std::int64_t kBlocksPerTask = 256;  // enough to amortise its scheduling
    const std::int64_t blocks = call.candidate_blocks(call.sequences[static_cast<std::size_t>(s)]);
    parallel.run((blocks + kBlocksPerTask - 1) / kBlocksPerTask, [&](std::int64_t task, int) {
      const std::int64_t begin = task * kBlocksPerTask, end = std::min(begin + kBlocksPerTask, blocks);
      for (std::int64_t block = begin; block < end; ++block) {
        const float* from = mean_of(cache, s, block, block_size);
        for (std::int64_t head = 0; head < heads; ++head)
          std::copy_n(from + head * means.strides[2], head_dim,
                      base + block * copies.block_stride + head * head_dim);
      }
    });
    copies.base.push_back(base);
    base += blocks * copies.block_stride;
  }
  return copies;
}

namespace host {

void update_means(const PagedCache& cache, std::int64_t block_size, const std::int32_t* before,
                  const Execution& execution) {
  std::vector<Part> parts;
  std::int64_t max_keys = 0;
  for (std::int64_t s = 0; s < cache.sequences; ++s) {
    const std::int64_t start = start_of(cache, s);
    const auto blocks_of = [&](std::int64_t tokens) {
      return std::max<std::int64_t>(tokens - start, 0) / block_size;
    };
    const std::int64_t first = before == nullptr ? 0 : blocks_of(before[s]);
    const std::int64_t keys = std::max<std::int64_t>(blocks_of(cache.lengths[s]) - first, 0) * block_size;
    parts.push_back({.first = start + first * block_size, .keys = keys});
    max_keys = std::max(max_keys, keys);
  }

  const Tensor page = page_of(cache.k);
  const std::int64_t heads = cache.k.sizes[2], head_dim = cache.k.sizes[3];
  Call call;
  call.q = page;
  add_sequences(call, cache, parts);
  static_cast<CallShape&>(call) = shape_of(page, heads, max_keys, {.block_size = block_size, .top_k = 1});
  Run run(call, execution);
  if (max_keys == 0) return;
  const BlockMeans means = run.centroids();
  for (std::size_t s = 0; s < parts.size(); ++s) {
    const auto sequence = static_cast<std::int64_t>(s);
    const std::int64_t first = (parts[s].first - start_of(cache, sequence)) / block_size;
    for (std::int64_t block = 0; block < parts[s].keys / block_size; ++block) {
      float* to = mean_of(cache, sequence, first + block, block_size);
      for (std::int64_t head = 0; head < heads; ++head)
        std::copy_n(means.of(s, head) + block * means.block_stride, head_dim,
                    to + head * cache.means.strides[2]);
    }
  }
}

}  // namespace host
}  // namespace moba
