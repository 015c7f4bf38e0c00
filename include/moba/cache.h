#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "moba/attention.h"

namespace moba {

struct CacheState;  // internal

/// Keys and values of past tokens, in pages of one block each, with the mean of every complete block kept
/// beside it, so that a decoded token is routed without reading the keys again. Holds several independent
/// sequences of one layer.
class MOBA_EXPORT KvCache {
 public:
  struct Shape {
    std::int64_t kv_heads = 1;
    std::int64_t head_dim = 64;
    /// The block size of every routing used with this cache, except dense attention (top_k = kEverything) and
    /// the caller's selections.
    std::int64_t block_size = 512;
    /// The storage type of keys and values: f32, bf16, f16, or i8 with one f32 scale a row.
    DType dtype = DType::f32;
    std::int64_t sequences = 1;
    /// Whether the largest and the smallest value of every channel of a block are kept beside its mean.
    bool extremes = false;
  };

  explicit KvCache(const Shape& shape);
  ~KvCache();
  KvCache(KvCache&&) noexcept;
  KvCache& operator=(KvCache&&) noexcept;

  const Shape& shape() const;
  /// Tokens held by a sequence.
  std::int64_t length(std::int64_t sequence = 0) const;
  /// Bytes of all pages, features and scales.
  std::size_t bytes() const;
  /// Views of the features of a sequence's complete blocks, [blocks, Hkv, D] in f32, until the sequence
  /// changes. `max` and `min` are empty unless Shape::extremes.
  BlockFeatures features(std::int64_t sequence = 0) const;

  /// Adds tokens at the end: `k` and `v` [n, Hkv, D] in f32, bf16 or f16, converted to the cache's dtype. Of
  /// `execution`, the backend and the threads are used.
  void append(const Tensor& k, const Tensor& v, std::int64_t sequence = 0, const Execution& execution = {});
  /// Drops all but the first `tokens`.
  void truncate(std::int64_t tokens, std::int64_t sequence = 0);

 private:
  friend const CacheState& state_of(const KvCache& cache);
  std::unique_ptr<CacheState> state_;
};

/// Computes `attention` of new queries over a cache that already holds their own keys (chunked prefill): `q`
/// [n, Hq, D] are the last n tokens of `sequence`.
MOBA_EXPORT void attention(const Tensor& q, const KvCache& cache, std::int64_t sequence,
                           const Routing& routing, const Outputs& outputs, const Execution& execution = {});

/// Decodes one new token for every sequence of the cache: `q` and `outputs.out` [sequences, Hq, D],
/// `outputs.lse` [Hq, sequences]. Each query is the last token of its sequence, whose key the cache already
/// holds. An empty sequence gets 0. `outputs.selection` must be null. A selection of the caller has a row for
/// each sequence, [heads, sequences, stride].
MOBA_EXPORT void decode(const Tensor& q, const KvCache& cache, const Routing& routing, const Outputs& outputs,
                        const Execution& execution = {});

/// Keys and values of many sequences in pages of one tensor, as serving engines keep them, all in host memory
/// or all in device memory. The caller owns all of it: it writes the keys and values of new tokens, then
/// `lengths`, and calls `update_means`. Lowering a length drops tokens. A device alone reads the lists in its
/// memory, hence they are not checked there.
struct PagedCache {
  /// [pages, page_tokens, Hkv, D] of one dtype, any strides but of the last dimension.
  Tensor k{}, v{};
  /// [pages, blocks that a page can end, Hkv, D], f32 on the host, in the dtype of k on a device: the mean
  /// key of a complete block, rounded to the dtype of k, at the page where the block ends. Sequences that
  /// share that page share the whole block. Not read, and may be empty, if nothing is selected by score:
  /// top_k is 1 or covers every block, or the caller selects.
  Tensor means{};
  /// [sequences, table_stride]: page i of a sequence holds its tokens from i x page_tokens on. Entries after
  /// a sequence's last token are not read. If null, page i of sequence s is page s x table_stride + i.
  const std::int32_t* page_table = nullptr;
  std::int64_t table_stride = 0;
  /// [sequences], tokens that each holds, 0 included.
  const std::int32_t* lengths = nullptr;
  /// [sequences], the number of leading padding tokens, which no query sees; may be null: none. Blocks are
  /// counted from the first token after the padding, and their means lie as if there were none.
  const std::int32_t* starts = nullptr;
  std::int64_t sequences = 0;
  /// At least the longest length.
  std::int64_t max_seqlen_k = 0;
};

/// Computes `attention` of new queries over a cache that already holds their keys (chunked prefill, mixed
/// batches): queries [cu_seqlens_q[s], cu_seqlens_q[s + 1]) of `q` [Tq, Hq, D] are the last tokens of
/// sequence s. `cu_seqlens_q` [sequences + 1] lies in host memory, as all of the cache: a device has `decode`
/// alone. A row of a selection has min(top_k, blocks of `max_seqlen_k` keys) entries. If blocks are selected,
/// page_tokens divides the block size, is a multiple of it, or is at least `max_seqlen_k`.
MOBA_EXPORT void attention(const Tensor& q, const std::int32_t* cu_seqlens_q, const PagedCache& cache,
                           const Routing& routing, const Outputs& outputs, const Execution& execution = {});

/// Decodes one new token for every sequence, as `decode` on a KvCache: `q` and `outputs.out`
/// [sequences, Hq, D], `outputs.lse` [Hq, sequences]. Each query is the last token of its sequence, whose key
/// the cache already holds. `outputs.selection` must be null. Pages and blocks fit as in `attention` above.
MOBA_EXPORT void decode(const Tensor& q, const PagedCache& cache, const Routing& routing,
                        const Outputs& outputs, const Execution& execution = {});

/// Computes the means of the blocks that tokens have completed since sequences held `before` [sequences] of
/// them (null: none), at most `max_added` each.
MOBA_EXPORT void update_means(const PagedCache& cache, std::int64_t block_size, const std::int32_t* before,
                              std::int64_t max_added, const Execution& execution = {});

/// Layout of one layer in pages of the caller's memory, for hosts that share pages among sequences. A page
/// holds, `offset` bytes after its start, keys and then values of page_tokens tokens.
struct PageLayout {
  std::int64_t kv_heads = 1;
  std::int64_t head_dim = 64;
  /// As in KvCache::Shape.
  std::int64_t block_size = 512;
  std::int64_t page_tokens = 512;
  DType dtype = DType::f32;
  /// A multiple of 64.
  std::size_t offset = 0;
};

/// Bytes that one layer takes in a page, a multiple of 64.
MOBA_EXPORT std::size_t page_bytes(const PageLayout& layout);

/// One sequence in such pages.
struct PagedSequence {
  /// Tokens held.
  std::int64_t length = 0;
  /// Page i holds the tokens from i x page_tokens on. Each starts at a multiple of 64 bytes. May be longer
  /// than needed.
  std::span<std::byte* const> pages{};
  /// [complete blocks + 1, Hkv, D]: the mean key of every complete block, rounded to the dtype of the layout,
  /// then the sum of the keys of the block that is being filled, 0 if it is empty. Kept by `append`.
  float* means = nullptr;
  /// The same for the largest and the smallest value of every channel, of complete blocks and then of the one
  /// that is being filled. Kept by `append` unless null.
  float *max = nullptr, *min = nullptr;
};

/// `KvCache::append` with pages of the caller: writes tokens [length, length + n) of `sequence`, for which
/// the pages and the means have room. The rows of means of blocks that the tokens begin must be 0.
MOBA_EXPORT void append(const Tensor& k, const Tensor& v, const PageLayout& layout,
                        const PagedSequence& sequence, const Execution& execution = {});

/// `attention` of the last n tokens of a KvCache, with pages of the caller.
MOBA_EXPORT void attention(const Tensor& q, const PageLayout& layout, const PagedSequence& sequence,
                           const Routing& routing, const Outputs& outputs, const Execution& execution = {});

/// `decode` of one token for each of `sequences`, with pages of the caller.
MOBA_EXPORT void decode(const Tensor& q, const PageLayout& layout, std::span<const PagedSequence> sequences,
                        const Routing& routing, const Outputs& outputs, const Execution& execution = {});

}  // namespace moba
