#include <cmath>
#include <limits>

#include "reference/rows.h"
#include "reference/stages.h"

namespace moba::reference {
namespace {

/// Scratch memory in which a worker selects the blocks of one row.
struct GateScratch {
  Buffer<double> query, scores;
  Buffer<std::int32_t> ranking;
};

std::int64_t max_blocks(const Call& call) {
  return call.max_seqlen_k == 0 ? 0 : (call.max_seqlen_k - 1) / call.routing.block_size + 1;
}

/// <q, mean>, unscaled. NaN counts as -inf.
double score(const Call& call, const double* query, const float* mean) {
  double sum = 0;
  for (std::int64_t d = 0; d < call.head_dim; ++d) sum += query[d] * mean[d];
  return std::isnan(sum) ? -std::numeric_limits<double>::infinity() : sum;
}

/// Selects the blocks of one row: own block (causal, or on request), sinks, then the highest scores; the more
/// recent of equals. Returns their number.
std::int64_t select_row(const Call& call, const BlockMeans& means, const Row& row, double* query,
                        double* scores, std::int32_t* ranking, std::int32_t* selected) {
  const Routing& routing = call.routing;
  const std::int64_t own = call.own_block(row.sequence, row.query);
  const std::int64_t candidates = routing.causal ? std::max<std::int64_t>(own, 0) : call.blocks(row.sequence);
  for (std::int64_t block = 0; block < candidates; ++block) ranking[block] = static_cast<std::int32_t>(block);
  const std::int64_t k = std::min(call.width(), candidates);

  if (k < candidates) {
    load_f64(call, call.q, row, query);
    const float* mean = means.of(row.sequence_index, row.kv_head);
    for (std::int64_t block = 0; block < candidates; ++block, mean += means.block_stride) {
      scores[block] = score(call, query, mean);
    }
    const auto forced = [&](std::int32_t block) {
      if (routing.own_block && !routing.causal && block == own) return 2;
      return block < routing.sink_blocks ? 1 : 0;
    };
    std::partial_sort(ranking, ranking + k, ranking + candidates, [&](std::int32_t a, std::int32_t b) {
      if (forced(a) != forced(b)) return forced(a) > forced(b);
      return scores[a] != scores[b] ? scores[a] > scores[b] : a > b;
    });
    std::sort(ranking, ranking + k);
  }
  std::copy_n(ranking, k, selected);
  if (!routing.causal || own < 0) return k;
  selected[k] = static_cast<std::int32_t>(own);
  return k + 1;
}

}  // namespace

std::size_t gate_bytes(const Call& call) {
  if (!call.needs_scores()) return 0;
  const auto blocks = static_cast<std::size_t>(max_blocks(call));
  return static_cast<std::size_t>(call.head_dim) * sizeof(double) +
         blocks * (sizeof(double) + sizeof(std::int32_t));
}

void gate(const Call& call, const BlockMeans& means, const SliceSelection& selection, Context& context) {
  const std::int64_t blocks = max_blocks(call), threads = context.parallel.threads;
  const GateScratch memory{Buffer<double>(context.scratch, threads * call.head_dim),
                           Buffer<double>(context.scratch, threads * blocks),
                           Buffer<std::int32_t>(context.scratch, threads * blocks)};
  for_each_row(call, selection.slice, context, [&](const Row& row, int worker) {
    std::int32_t* const selected = selection.of(row.q_head, row.token());
    const std::int64_t count = select_row(call, means, row, worker_slice(memory.query, worker, call.head_dim),
                                          worker_slice(memory.scores, worker, blocks),
                                          worker_slice(memory.ranking, worker, blocks), selected);
    std::fill(selected + count, selected + selection.rows.stride, -1);
  });
}

}  // namespace moba::reference
