#include "call.h"

#include <cmath>

#include "backend.h"
#include "moba/cuda.h"

namespace moba {
namespace {

KvLayout layout_of(const Tensor& t) {
  return {.dtype = t.dtype,
          .page_tokens = std::max<std::int64_t>(t.sizes[0], 1),
          .token_stride = t.strides[0],
          .head_stride = t.strides[1]};
}

const std::byte* row_of(const Tensor& t, std::int64_t token) {
  return static_cast<const std::byte*>(t.data) +
         token * t.strides[0] * static_cast<std::int64_t>(size_of(t.dtype));
}

}  // namespace

Sequences one_sequence(std::int64_t tokens) {
  return one_sequence(tokens, tokens);
}

Sequences one_sequence(std::int64_t queries, std::int64_t keys) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  if (queries < 0 || queries > kMax || keys < 0 || keys > kMax) {
    throw Error("one_sequence: queries, keys: expected 0 to " + std::to_string(kMax) + ", got " +
                std::to_string(queries) + " and " + std::to_string(keys));
  }
  return {{0, static_cast<std::int32_t>(queries)}, {0, static_cast<std::int32_t>(keys)}};
}

namespace {

std::int64_t selection_width_of(std::int64_t max_seqlen_k, const Routing& routing) {
  const std::int64_t width = routing.selection.heads > 0 ? routing.selection.width : routing.top_k;
  return std::min(width, max_seqlen_k == 0 ? 0 : (max_seqlen_k - 1) / routing.block_size + 1);
}

}  // namespace

std::int64_t selection_width(const Sequences& sequences, const Routing& routing) {
  return selection_width_of(batch_of(sequences).max_seqlen_k, routing);
}

std::int64_t selection_width(const DeviceSequences& sequences, const Routing& routing) {
  return selection_width_of(sequences.max_seqlen_k, routing);
}

CallShape shape_of(const Tensor& q, std::int64_t kv_heads, std::int64_t max_seqlen_k,
                   const Routing& routing) {
  CallShape shape{.routing = routing,
                  .requested = routing,
                  .tokens = q.sizes[0],
                  .q_heads = q.sizes[1],
                  .kv_heads = kv_heads,
                  .heads_per_kv = q.sizes[1] / kv_heads,
                  .head_dim = q.sizes[2],
                  .max_seqlen_k = max_seqlen_k,
                  .selection_width = selection_width_of(max_seqlen_k, routing)};
  shape.scale = routing.scale.value_or(1 / std::sqrt(static_cast<float>(shape.head_dim)));
  const std::int64_t block_size = std::max<std::int64_t>(max_seqlen_k, 1);
  if (shape.is_selected()) {
    shape.routing.block_size = std::min(routing.block_size, block_size);
  } else if (routing.top_k >= (block_size - 1) / routing.block_size + 1) {
    shape.is_dense = true;
    shape.routing.block_size = block_size;
    shape.routing.top_k = 1;
    shape.routing.sink_blocks = 0;
    shape.routing.own_block = false;
  }
  return shape;
}

void finish_call(Call& call, const Routing& routing, std::int64_t kv_heads) {
  std::int64_t max_seqlen_k = 0;
  for (const SequenceView& s : call.sequences) max_seqlen_k = std::max(max_seqlen_k, s.keys);
  static_cast<CallShape&>(call) = shape_of(call.q, kv_heads, max_seqlen_k, routing);
}

Call make_call(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& sequences,
               const Routing& routing) {
  Call call;
  call.q = q;
  call.k = layout_of(k);
  call.v = layout_of(v);
  const std::size_t count = sequences.cu_seqlens_q.size() - 1;
  call.page_storage.reserve(2 * count);
  for (std::size_t s = 0; s < count; ++s) {
    call.page_storage.push_back(row_of(k, sequences.cu_seqlens_k[s]));
    call.page_storage.push_back(row_of(v, sequences.cu_seqlens_k[s]));
  }
  const std::byte* const* pages = call.page_storage.data();
  for (std::size_t s = 0; s < count; ++s) {
    call.sequences.push_back({.q_begin = sequences.cu_seqlens_q[s],
                              .queries = sequences.cu_seqlens_q[s + 1] - sequences.cu_seqlens_q[s],
                              .keys = sequences.cu_seqlens_k[s + 1] - sequences.cu_seqlens_k[s],
                              .k_pages = {pages + 2 * s, 1},
                              .v_pages = {pages + 2 * s + 1, 1}});
  }
  finish_call(call, routing, k.sizes[1]);
  return call;
}

}  // namespace moba
