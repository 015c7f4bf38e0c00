#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "backend.h"
#include "number.h"

/// Rows of a call as double, and the keys that a query attends to.
namespace moba::reference {

/// One query at one query head.
struct Row {
  std::size_t sequence_index;
  const SequenceView& sequence;
  std::int64_t query;    // within the sequence
  std::int64_t kv_head;  // the head it reads
  std::int64_t member;   // index among the kv head's query heads
  std::int64_t q_head;

  std::int64_t token() const { return sequence.q_begin + query; }
};

/// Calls body(row, worker) for every row of the slice, spread over the threads.
template <typename Body>
void for_each_row(const Call& call, const WorkSlice& slice, Context& context, Body&& body) {
  for (std::size_t index = 0; index < call.sequences.size(); ++index) {
    const SequenceView& s = call.sequences[index];
    const auto [first, last] = slice.queries_of(s);
    const std::int64_t queries = last - first, begin = first;
    context.parallel.run(queries * slice.heads() * call.heads_per_kv, [&](std::int64_t task, int worker) {
      const std::int64_t q_head = slice.head0 * call.heads_per_kv + task / queries;
      body(Row{index, s, begin + task % queries, q_head / call.heads_per_kv, q_head % call.heads_per_kv,
               q_head},
           worker);
    });
  }
}

/// Calls visit(block) for every block that a query selected by score, ascending.
template <typename Visit>
void for_each_scored_block(const Call& call, const SliceSelection& selection, const SequenceView& s,
                           std::int64_t query, std::int64_t q_head, Visit&& visit) {
  const std::int64_t width = std::min(call.listed_width(), selection.rows.stride);
  const std::int64_t own = call.routing.causal ? call.own_block(s, query) : -1;
  const std::int32_t* selected = selection.of(q_head, s.q_begin + query);
  for (std::int64_t i = 0; i < width && selected[i] >= 0; ++i) {
    if (selected[i] != own) visit(selected[i]);
  }
}

/// Calls visit(begin, end) for every contiguous range of keys that a row attends to, ascending.
template <typename Visit>
void for_each_key_range(const Call& call, const SliceSelection& selection, const Row& row, Visit&& visit) {
  const SequenceView& s = row.sequence;
  const std::int64_t block_size = call.routing.block_size;
  for_each_scored_block(call, selection, s, row.query, row.q_head, [&](std::int64_t block) {
    visit(block * block_size, std::min((block + 1) * block_size, s.keys));
  });
  const std::int64_t own = call.own_block(s, row.query);
  if (call.routing.causal && own >= 0) visit(own * block_size, s.position(row.query) + 1);
}

/// Returns the maximum number of keys that any row attends to.
inline std::int64_t max_attended_keys(const Call& call) {
  return std::min(call.max_seqlen_k, (call.listed_width() + 1) * call.routing.block_size);
}

inline void load_f64(const Call& call, const Tensor& t, const Row& row, double* to) {
  const std::int64_t offset = Call::offset(t, row.sequence, row.query, row.q_head);
  for (std::int64_t d = 0; d < call.head_dim; ++d) to[d] = load(t.data, t.dtype, offset + d);
}

inline void load_f64(const Call& call, const Rows& rows, DType dtype, double* to) {
  const double scale = rows.scales == nullptr ? 1 : *rows.scales;
  for (std::int64_t d = 0; d < call.head_dim; ++d) to[d] = load(rows.data, dtype, d) * scale;
}

inline void load_key(const Call& call, const SequenceView& s, std::int64_t head, std::int64_t token,
                     double* to) {
  load_f64(call, call.keys(s, head, token), call.k.dtype, to);
}

inline void load_value(const Call& call, const SequenceView& s, std::int64_t head, std::int64_t token,
                       double* to) {
  load_f64(call, call.values(s, head, token), call.v.dtype, to);
}

inline void begin_extremes(const FeatureRows& to, std::int64_t head_dim) {
  if (to.max != nullptr) std::fill_n(to.max, head_dim, -std::numeric_limits<float>::infinity());
  if (to.min != nullptr) std::fill_n(to.min, head_dim, std::numeric_limits<float>::infinity());
}

/// NaN stays.
inline void add_to_extremes(const FeatureRows& to, std::int64_t d, float value) {
  if (to.max != nullptr && (value > to.max[d] || std::isnan(value))) to.max[d] = value;
  if (to.min != nullptr && (value < to.min[d] || std::isnan(value))) to.min[d] = value;
}

inline double dot(const double* a, const double* b, std::int64_t size) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

/// Returns a worker's slice of `buffer`, which holds one of `size` elements per worker.
template <typename T>
T* worker_slice(const Buffer<T>& buffer, int worker, std::int64_t size) {
  return buffer.data() + worker * size;
}

}  // namespace moba::reference
