// Gradients in two passes that share only two values per row: by row for dq, then by key for dk and dv.
// Probabilities are recomputed in double instead of read from the rounded `out` and `lse`, so that this is an
// oracle for backends that read them. Where the caller selects, `out` and `lse` are read: the softmax may
// have more keys than the call.
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "reference/rows.h"
#include "reference/stages.h"

namespace moba::reference {
namespace {

/// Sums of one row: the logarithm of its softmax denominator, and the sum over the keys of probability times
/// its gradient.
struct RowSums {
  double lse = 0, delta = 0;
};

struct BackwardPass {
  const Call& call;
  const SliceSelection& selection;
  const Backward& backward;
  const Buffer<RowSums>& sums;

  RowSums& sums_of(std::int64_t q_head, std::int64_t token) const {
    return sums.data()[(q_head - selection.slice.head0 * call.heads_per_kv) * call.tokens + token];
  }
};

std::int64_t row_doubles(const Call& call) {
  return 5 * call.head_dim + 2 * max_attended_keys(call);
}
std::int64_t key_doubles(const Call& call) {
  return 6 * call.head_dim;
}
std::int64_t worker_doubles(const Call& call) {
  return std::max(row_doubles(call), key_doubles(call));
}

/// The sums that the forward pass left in `lse` and `out`. `out` is scratch memory for a row.
RowSums saved_sums(const BackwardPass& w, const Row& row, const double* d_out, double* out) {
  load_f64(w.call, w.backward.out, row, out);
  return {w.backward.lse[row.q_head * w.call.tokens + row.token()], dot(d_out, out, w.call.head_dim)};
}

/// dq = scale * sum over keys of p (dp - delta) k, with p = exp(logit - lse), dp = <d_out, v>, delta = sum of
/// p dp.
void backward_dq(const BackwardPass& w, const Row& row, double* memory) {
  const Call& call = w.call;
  const std::int64_t depth = call.head_dim;
  double *query = memory, *d_out = query + depth, *key = d_out + depth, *value = key + depth;
  double *dq = value + depth, *logits = dq + depth, *dp = logits + max_attended_keys(call);

  load_f64(call, call.q, row, query);
  load_f64(call, w.backward.d_out, row, d_out);
  const auto each_key = [&](auto&& visit) {
    std::int64_t index = 0;
    for_each_key_range(call, w.selection, row, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t token = begin; token < end; ++token) visit(token, index++);
    });
  };
  double largest = -std::numeric_limits<double>::infinity();
  each_key([&](std::int64_t token, std::int64_t i) {
    load_key(call, row.sequence, row.kv_head, token, key);
    load_value(call, row.sequence, row.kv_head, token, value);
    logits[i] = call.scale * dot(query, key, depth);
    dp[i] = dot(d_out, value, depth);
    largest = std::max(largest, logits[i]);
  });
  if (std::isinf(largest) && largest < 0) largest = 0;
  double sum = 0, weighted = 0;
  each_key([&](std::int64_t, std::int64_t i) {
    const double weight = std::exp(logits[i] - largest);
    sum += weight;
    weighted += weight * dp[i];
  });
  // A row that sees nothing has out = 0 whatever the inputs: p = exp(logit - inf) = 0 makes its gradients 0.
  RowSums sums = sum == 0 ? RowSums{std::numeric_limits<double>::infinity(), 0}
                          : RowSums{largest + std::log(sum), weighted / sum};
  if (call.is_selected() && sum != 0) sums = saved_sums(w, row, d_out, value);
  w.sums_of(row.q_head, row.token()) = sums;

  std::fill_n(dq, depth, 0.0);
  each_key([&](std::int64_t token, std::int64_t i) {
    load_key(call, row.sequence, row.kv_head, token, key);
    const double d_logit = std::exp(logits[i] - sums.lse) * (dp[i] - sums.delta);
    for (std::int64_t d = 0; d < depth; ++d) dq[d] += call.scale * d_logit * key[d];
  });
  const Tensor& to = w.backward.gradients.dq;
  const std::int64_t offset = Call::offset(to, row.sequence, row.query, row.q_head);
  for (std::int64_t d = 0; d < depth; ++d) store(to.data, to.dtype, offset + d, dq[d]);
}

/// Calls visit(query, member) for every row that attends to key `token`: the rows that selected its block,
/// then those whose own block it is.
template <typename Visit>
void for_each_attending_row(const BackwardPass& w, const Plan& plan, const Range& range, std::int64_t token,
                            Visit&& visit) {
  const Call& call = w.call;
  const SequenceView& s = call.sequences[static_cast<std::size_t>(range.sequence)];
  const std::int64_t block_size = call.routing.block_size, block = token / block_size;
  for (const std::uint32_t row : plan.rows_of(range, block)) {
    visit(range.q0 + row / call.heads_per_kv, row % call.heads_per_kv);
  }
  if (!call.routing.causal) return;
  const std::int64_t first = std::max<std::int64_t>(token - s.position(0), 0);
  const std::int64_t last = std::min((block + 1) * block_size, s.keys) - s.position(0);
  for (std::int64_t query = first; query < last; ++query) {
    for (std::int64_t member = 0; member < call.heads_per_kv; ++member) visit(query, member);
  }
}

/// dv = sum over rows of p d_out, dk = scale * sum over rows of p (dp - delta) q.
void backward_dk_dv(const BackwardPass& w, const Plan& plan, const Range& range, std::int64_t first_token,
                    std::int64_t token, double* memory) {
  const Call& call = w.call;
  const auto index = static_cast<std::size_t>(range.sequence);
  const SequenceView& s = call.sequences[index];
  const std::int64_t depth = call.head_dim;
  double *key = memory, *value = key + depth, *query = value + depth, *d_out = query + depth;
  double *dk = d_out + depth, *dv = dk + depth;

  load_key(call, s, range.head, token, key);
  load_value(call, s, range.head, token, value);
  std::fill_n(dk, 2 * depth, 0.0);
  for_each_attending_row(w, plan, range, token, [&](std::int64_t q, std::int64_t member) {
    const Row row{index, s, q, range.head, member, range.head * call.heads_per_kv + member};
    load_f64(call, call.q, row, query);
    load_f64(call, w.backward.d_out, row, d_out);
    const RowSums& sums = w.sums_of(row.q_head, row.token());
    const double p = std::exp(call.scale * dot(query, key, depth) - sums.lse);
    const double d_logit = p * (dot(d_out, value, depth) - sums.delta);
    for (std::int64_t d = 0; d < depth; ++d) {
      dk[d] += call.scale * d_logit * query[d];
      dv[d] += p * d_out[d];
    }
  });
  for (const auto& [to, from] :
       {std::pair(&w.backward.gradients.dk, dk), std::pair(&w.backward.gradients.dv, dv)}) {
    const std::int64_t offset = (first_token + token) * to->strides[0] + range.head * to->strides[1];
    for (std::int64_t d = 0; d < depth; ++d) store(to->data, to->dtype, offset + d, from[d]);
  }
}

}  // namespace

std::size_t attend_backward_bytes(const Call& call, const WorkSlice& slice, int threads) {
  const auto rows = static_cast<std::size_t>(slice.heads() * call.heads_per_kv * call.tokens);
  return rows * sizeof(RowSums) + static_cast<std::size_t>(threads * worker_doubles(call)) * sizeof(double);
}

void attend_backward(const Call& call, const SliceSelection& selection, const Plan& plan,
                     const Backward& backward, Context& context) {
  const WorkSlice& slice = selection.slice;
  const std::int64_t size = worker_doubles(call);
  const Buffer<double> memory(context.scratch, context.parallel.threads * size);
  const Buffer<RowSums> sums(context.scratch, slice.heads() * call.heads_per_kv * call.tokens);
  const BackwardPass pass{call, selection, backward, sums};
  for_each_row(call, slice, context, [&](const Row& row, int worker) {
    backward_dq(pass, row, worker_slice(memory, worker, size));
  });
  std::vector<std::int64_t> first_token{0};  // of each sequence, among the packed keys
  for (const SequenceView& s : call.sequences) first_token.push_back(first_token.back() + s.keys);
  for (const Range& range : plan.ranges) {
    const auto index = static_cast<std::size_t>(range.sequence);
    context.parallel.run(call.sequences[index].keys, [&](std::int64_t token, int worker) {
      backward_dk_dv(pass, plan, range, first_token[index], token, worker_slice(memory, worker, size));
    });
  }
}

}  // namespace moba::reference
