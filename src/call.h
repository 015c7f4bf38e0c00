#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "moba/attention.h"
#include "scratch.h"

/// A checked call and the data between its stages, as plain data, with the letters of docs/mathematics.md.
namespace moba {

/// Rows of keys or values of one head, `stride` elements apart. `scales`, one per row, for i8 alone.
struct Rows {
  const std::byte* data = nullptr;
  std::int64_t stride = 0;
  std::int64_t count = 0;
  const float* scales = nullptr;
};

/// Memory layout of keys or values: pages of `page_tokens` tokens, the same for all sequences. A plain tensor
/// is one page per sequence.
struct KvLayout {
  DType dtype = DType::f32;
  std::int64_t page_tokens = 1;
  std::int64_t token_stride = 0, head_stride = 0;  // elements
  std::size_t scale_offset = 0;  // bytes from the first row to the f32 scales [Hkv, page_tokens]; i8 alone
  std::size_t page_offset = 0;   // bytes from a page's start to its first row
};

struct SequenceView {
  std::int64_t q_begin = 0;            // its first query among the packed ones
  std::int64_t queries = 0, keys = 0;  // Lq, Lk
  std::span<const std::byte*const> k_pages{}, v_pages{};
  std::int64_t first_row = 0;  // of its first key in the first page

  /// Key position of query i: bottom-right aligned (semantics: causal, `p`). Negative: the query sees nothing
  /// when causal.
  std::int64_t position(std::int64_t query) const { return query + keys - queries; }
};

/// Shape and routing of a call on any device. `routing` is normalised: when top_k covers every block of every
/// sequence, block_size is the longest sequence and top_k is 1, so that dense attention is the one-block case
/// of everything below. With the caller's selection it never takes place, and top_k is not read.
struct CallShape {
  Routing routing{};
  Routing requested{};    // as the caller gave it
  bool is_dense = false;  // the normalisation took place
  float scale = 1;
  std::int64_t tokens = 0;  // Tq
  std::int64_t q_heads = 0, kv_heads = 0, heads_per_kv = 1, head_dim = 0;
  std::int64_t max_seqlen_k = 0;     // most keys in any sequence
  std::int64_t selection_width = 0;  // blocks in a row of the selection

  /// Whether the caller selects the blocks, so that no gate runs.
  bool is_selected() const { return routing.selection.heads > 0; }
  /// Routed blocks of a query: those of its row of the selection, except a causal query's own block.
  std::int64_t width() const {
    return is_dense ? 0 : std::max<std::int64_t>(selection_width - (routing.causal ? 1 : 0), 0);
  }
  /// Whether there are rows of a selection, and whether the gate writes them.
  bool is_routed() const { return width() > 0; }
  bool needs_scores() const { return is_routed() && !is_selected(); }
};

/// Normalises the routing of a call whose longest sequence has `max_seqlen_k` keys.
CallShape shape_of(const Tensor& q, std::int64_t kv_heads, std::int64_t max_seqlen_k, const Routing& routing);

/// A checked call on the host.
struct Call : CallShape {
  Tensor q{};  // [Tq, Hq, D]
  KvLayout k{}, v{};
  std::vector<SequenceView> sequences{};
  std::vector<const std::byte*> page_storage{};

  std::int64_t blocks(const SequenceView& s) const {
    return (s.keys + routing.block_size - 1) / routing.block_size;
  }
  /// Blocks whose mean the gate may need: the ragged tail is a candidate only when not causal.
  std::int64_t candidate_blocks(const SequenceView& s) const {
    return routing.causal ? s.keys / routing.block_size : blocks(s);
  }
  /// Block of query i, -1 before the first key. Also the number of its candidates when causal.
  std::int64_t own_block(const SequenceView& s, std::int64_t query) const {
    const std::int64_t p = s.position(query);
    return p < 0 ? -1 : p / routing.block_size;
  }
  /// Blocks of a query that the plan lists: those it is routed to, or the one of non-causal dense
  /// attention.
  std::int64_t listed_width() const { return is_dense && !routing.causal ? 1 : width(); }

  Rows keys(const SequenceView& s, std::int64_t head, std::int64_t first) const {
    return rows(k, s.k_pages, s, head, first);
  }
  Rows values(const SequenceView& s, std::int64_t head, std::int64_t first) const {
    return rows(v, s.v_pages, s, head, first);
  }
  /// Element offset of query `i` of sequence `s` at `head` in any [Tq, Hq, D] tensor.
  static std::int64_t offset(const Tensor& t, const SequenceView& s, std::int64_t query, std::int64_t head) {
    return (s.q_begin + query) * t.strides[0] + head * t.strides[1];
  }

 private:
  /// The rows from `first` to the end of its page or of the sequence.
  static Rows rows(const KvLayout& layout, std::span<const std::byte* const> pages, const SequenceView& s,
                   std::int64_t head, std::int64_t first) {
    const std::int64_t at = s.first_row + first, page = at / layout.page_tokens,
                       row = at % layout.page_tokens;
    const std::byte* base = pages[static_cast<std::size_t>(page)] + layout.page_offset;
    const std::int64_t element = head * layout.head_stride + row * layout.token_stride;
    const auto* scales =
        layout.scale_offset == 0
            ? nullptr
            : reinterpret_cast<const float*>(base + layout.scale_offset) + head * layout.page_tokens + row;
    return {base + element * static_cast<std::int64_t>(size_of(layout.dtype)), layout.token_stride,
            std::min(layout.page_tokens - row, s.keys - first), scales};
  }
};

/// A slice of a call that is processed at a time, so that scratch memory stays within its budget: kv heads
/// [head0, head1) and packed queries [token0, token1).
struct WorkSlice {
  std::int64_t head0 = 0, head1 = 0, token0 = 0, token1 = 0;

  std::int64_t heads() const { return head1 - head0; }
  std::int64_t tokens() const { return token1 - token0; }
  /// The queries [first, last) of `s` that belong to this slice, counted within the sequence.
  std::pair<std::int64_t, std::int64_t> queries_of(const SequenceView& s) const {
    const std::int64_t first = std::clamp<std::int64_t>(token0 - s.q_begin, 0, s.queries);
    const std::int64_t last = std::clamp<std::int64_t>(token1 - s.q_begin, 0, s.queries);
    return {first, last};
  }
};

/// Means of the candidate blocks, f32 (already rounded to the dtype of k): mean of block j of sequence s
/// at kv head h is `of(s, h) + j * block_stride`, D values.
struct BlockMeans {
  std::vector<const float*> base{};  // by sequence, at kv head `head0`
  std::int64_t head0 = 0, head_stride = 0, block_stride = 0;
  Buffer<float> storage{};

  const float* of(std::size_t sequence, std::int64_t head) const {
    return base[sequence] + (head - head0) * head_stride;
  }
};

/// Rows of a selection, in the form of Outputs::selection or, with `heads_per_row`, of Routing::selection,
/// for query heads from `head0` and packed tokens from `token0` on; in the caller's memory or in scratch
/// memory.
struct SelectionRows {
  std::int32_t* blocks = nullptr;  // [heads, tokens, stride]
  std::int64_t head0 = 0, token0 = 0, tokens = 0, stride = 0;
  std::int64_t heads_per_row = 1;  // query heads that share a row; head0 is 0 if more than one

  constexpr std::int32_t* of(std::int64_t q_head, std::int64_t token) const {
    const std::int64_t head = heads_per_row == 1 ? q_head : q_head / heads_per_row;
    return blocks + ((head - head0) * tokens + token - token0) * stride;
  }
};

/// The selection of a slice's queries. Causal calls that are not routed have none: every query attends to its
/// own block.
struct SliceSelection {
  WorkSlice slice{};
  SelectionRows rows{};
  Buffer<std::int32_t> storage{};

  std::int32_t* of(std::int64_t q_head, std::int64_t token) const { return rows.of(q_head, token); }
};

/// Consecutive queries [q0, q1) of one sequence at one kv head, owned by one worker. A row is a (query, head
/// of the kv head) pair: row = (query - q0) * heads_per_kv + head.
struct Range {
  std::int64_t sequence = 0, head = 0, q0 = 0, q1 = 0;
  std::int64_t first_offset = 0;  // into Plan::offsets: blocks of the sequence + 1 entries
  std::int64_t first_row = 0;     // into Plan::rows
};

/// The selection inverted: for every range and every block, the rows that selected it, ascending. Ranges are
/// in the order in which they should start.
struct Plan {
  std::vector<Range> ranges{};
  Buffer<std::uint32_t> offsets{}, rows{};

  std::span<const std::uint32_t> rows_of(const Range& range, std::int64_t block) const {
    const std::uint32_t* offset = offsets.data() + range.first_offset + block;
    return {rows.data() + range.first_row + offset[0], offset[1] - offset[0]};
  }
};

/// Builds the call on plain tensors from checked arguments.
Call make_call(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& sequences,
               const Routing& routing);
/// Sets the shape of a call from its q, its sequences and the routing.
void finish_call(Call& call, const Routing& routing, std::int64_t kv_heads);

}  // namespace moba
