#include "problem.h"

#include <cmath>

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
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  if (queries < 0 || queries > kMost || keys < 0 || keys > kMost) {
    throw Error("one_sequence: queries, keys: expected 0 to " + std::to_string(kMost) + ", got " +
                std::to_string(queries) + " and " + std::to_string(keys));
  }
  return {{0, static_cast<std::int32_t>(queries)}, {0, static_cast<std::int32_t>(keys)}};
}

std::int64_t selection_width(const Sequences& sequences, const Routing& routing) {
  std::int64_t longest = 0;
  for (std::size_t s = 0; s + 1 < sequences.cu_seqlens_k.size(); ++s) {
    longest = std::max(longest, std::int64_t{sequences.cu_seqlens_k[s + 1]} - sequences.cu_seqlens_k[s]);
  }
  return std::min(routing.top_k, longest == 0 ? 0 : (longest - 1) / routing.block_size + 1);
}

std::int64_t selection_width(const DeviceSequences& sequences, const Routing& routing) {
  return std::min(routing.top_k,
                  sequences.max_seqlen_k == 0 ? 0 : (sequences.max_seqlen_k - 1) / routing.block_size + 1);
}

void finish_problem(Problem& problem, const Routing& routing, std::int64_t kv_heads) {
  problem.tokens = problem.q.sizes[0];
  problem.q_heads = problem.q.sizes[1];
  problem.head_dim = problem.q.sizes[2];
  problem.kv_heads = kv_heads;
  problem.heads_per_kv = problem.q_heads / kv_heads;
  for (const SequenceView& s : problem.sequences)
    problem.max_seqlen_k = std::max(problem.max_seqlen_k, s.keys);
  problem.requested = problem.routing = routing;
  problem.scale = routing.scale.value_or(1 / std::sqrt(static_cast<float>(problem.head_dim)));

  const std::int64_t longest = std::max<std::int64_t>(problem.max_seqlen_k, 1);
  if (routing.top_k >= (longest - 1) / routing.block_size + 1) {
    problem.is_dense = true;
    problem.routing.block_size = longest;
    problem.routing.top_k = 1;
    problem.routing.sink_blocks = 0;
    problem.routing.own_block = false;
  }
}

Problem make_problem(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& sequences,
                     const Routing& routing) {
  Problem problem{.q = q, .k = layout_of(k), .v = layout_of(v)};
  const std::size_t count = sequences.cu_seqlens_q.size() - 1;
  problem.page_storage.reserve(2 * count);
  for (std::size_t s = 0; s < count; ++s) {
    problem.page_storage.push_back(row_of(k, sequences.cu_seqlens_k[s]));
    problem.page_storage.push_back(row_of(v, sequences.cu_seqlens_k[s]));
  }
  const std::byte* const* pages = problem.page_storage.data();
  for (std::size_t s = 0; s < count; ++s) {
    problem.sequences.push_back({.q_begin = sequences.cu_seqlens_q[s],
                                 .queries = sequences.cu_seqlens_q[s + 1] - sequences.cu_seqlens_q[s],
                                 .keys = sequences.cu_seqlens_k[s + 1] - sequences.cu_seqlens_k[s],
                                 .k_pages = {pages + 2 * s, 1},
                                 .v_pages = {pages + 2 * s + 1, 1}});
  }
  finish_problem(problem, routing, k.sizes[1]);
  return problem;
}

}  // namespace moba
