#include <cmath>
#include <limits>
#include <vector>

#include "reference/rows.h"
#include "reference/stages.h"

namespace moba::reference {
namespace {

constexpr double kNegInf = -std::numeric_limits<double>::infinity();

std::int64_t worker_doubles(const Call& call) {
  return 3 * call.head_dim + max_attended_keys(call);
}

/// Sums the weights of a row, `weights` divided by `sum`, over ranges of its keys.
void store_weights(const Call& call, const SliceSelection& selection, const Row& row, const double* weights,
                   double sum, const KeyWeights& to) {
  const std::int64_t ranges = (to.keys + to.range - 1) / to.range;
  float* row_sums = to.data + row.q_head * ranges;
  std::vector<double> sums(static_cast<std::size_t>(ranges));
  for_each_key_range(call, selection, row, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token, ++weights) {
      if (token < to.keys && sum > 0) sums[static_cast<std::size_t>(token / to.range)] += *weights / sum;
    }
  });
  std::copy(sums.begin(), sums.end(), row_sums);
}

/// One softmax over all keys that a row attends to.
void attend_row(const Call& call, const SliceSelection& selection, const Row& row, double* memory,
                const Outputs& outputs) {
  const SequenceView& s = row.sequence;
  const std::int64_t depth = call.head_dim;
  double *query = memory, *other = query + depth, *out = other + depth, *weights = out + depth;

  load_f64(call, call.q, row, query);
  double largest = kNegInf;
  std::int64_t count = 0;
  for_each_key_range(call, selection, row, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token) {
      load_key(call, s, row.kv_head, token, other);
      weights[count] = call.scale * dot(query, other, depth);
      largest = std::max(largest, weights[count++]);
    }
  });
  if (largest == kNegInf) largest = 0;  // nothing to see, or nothing above -inf: the weights are 0

  double sum = 0;
  for (std::int64_t i = 0; i < count; ++i) sum += weights[i] = std::exp(weights[i] - largest);

  if (!outputs.weights.empty() && outputs.weights[row.sequence_index].data != nullptr)
    store_weights(call, selection, row, weights, sum, outputs.weights[row.sequence_index]);

  std::fill_n(out, depth, 0.0);
  count = 0;
  for_each_key_range(call, selection, row, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token) {
      load_value(call, s, row.kv_head, token, other);
      const double weight = weights[count++];
      for (std::int64_t d = 0; d < depth; ++d) out[d] += weight * other[d];
    }
  });

  const std::int64_t offset = Call::offset(outputs.out, s, row.query, row.q_head);
  for (std::int64_t d = 0; d < depth; ++d) {
    store(outputs.out.data, outputs.out.dtype, offset + d, sum == 0 ? 0 : out[d] / sum);
  }
  if (outputs.lse != nullptr) {
    outputs.lse[row.q_head * call.tokens + row.token()] =
        static_cast<float>(sum == 0 ? kNegInf : largest + std::log(sum));
  }
}

}  // namespace

std::size_t attend_bytes(const Call& call) {
  return static_cast<std::size_t>(worker_doubles(call)) * sizeof(double);
}

void attend(const Call& call, const SliceSelection& selection, const Plan& /*by block; rows are walked here*/,
            const Outputs& outputs, Context& context) {
  const std::int64_t size = worker_doubles(call);
  const Buffer<double> memory(context.scratch, context.parallel.threads * size);
  for_each_row(call, selection.slice, context, [&](const Row& row, int worker) {
    attend_row(call, selection, row, worker_slice(memory, worker, size), outputs);
  });
}

}  // namespace moba::reference
