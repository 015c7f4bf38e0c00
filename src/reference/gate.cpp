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

std::int64_t max_blocks(const Problem& problem) {
  return problem.max_seqlen_k == 0 ? 0 : (problem.max_seqlen_k - 1) / problem.routing.block_size + 1;
}

/// <q, mean>, unscaled. NaN counts as -inf.
double score(const Problem& problem, const double* query, const float* mean) {
  double sum = 0;
  for (std::int64_t d = 0; d < problem.head_dim; ++d) sum += query[d] * mean[d];
  return std::isnan(sum) ? -std::numeric_limits<double>::infinity() : sum;
}

/// Selects the blocks of one row: own block (non-causal, on request), sinks, then the highest scores; the
/// more recent of equals.
void select_row(const Problem& problem, const Means& means, const Row& row, std::int64_t width, double* query,
                double* scores, std::int32_t* ranking, std::int32_t* selected) {
  const Routing& routing = problem.routing;
  const std::int64_t own = problem.own_block(row.sequence, row.query);
  const std::int64_t candidates =
      routing.causal ? std::max<std::int64_t>(own, 0) : problem.blocks(row.sequence);
  for (std::int64_t block = 0; block < candidates; ++block) ranking[block] = static_cast<std::int32_t>(block);
  const std::int64_t k = std::min(width, candidates);

  if (k < candidates) {
    load_f64(problem, problem.q, row, query);
    const float* mean = means.of(row.sequence_index, row.kv_head);
    for (std::int64_t block = 0; block < candidates; ++block, mean += means.block_stride) {
      scores[block] = score(problem, query, mean);
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
  std::fill(std::copy_n(ranking, k, selected), selected + width, -1);
}

}  // namespace

std::size_t gate_bytes(const Problem& problem) {
  const auto blocks = static_cast<std::size_t>(max_blocks(problem));
  return static_cast<std::size_t>(problem.head_dim) * sizeof(double) +
         blocks * (sizeof(double) + sizeof(std::int32_t));
}

std::size_t selection_bytes(const Problem& problem, const WorkSlice& slice) {
  return static_cast<std::size_t>(slice.heads() * slice.tokens() * problem.heads_per_kv * problem.width()) *
         sizeof(std::int32_t);
}

Selection gate(const Problem& problem, const Means& means, const WorkSlice& slice, Context& context) {
  Selection selection{slice, problem.heads_per_kv, problem.width(), {}};
  if (selection.width == 0) return selection;
  selection.blocks = Buffer<std::int32_t>(
      context.scratch, slice.heads() * slice.tokens() * problem.heads_per_kv * selection.width);

  const std::int64_t blocks = max_blocks(problem), threads = context.parallel.threads;
  const GateScratch memory{Buffer<double>(context.scratch, threads * problem.head_dim),
                           Buffer<double>(context.scratch, threads * blocks),
                           Buffer<std::int32_t>(context.scratch, threads * blocks)};
  for_each_row(problem, slice, context, [&](const Row& row, int worker) {
    select_row(problem, means, row, selection.width, worker_slice(memory.query, worker, problem.head_dim),
               worker_slice(memory.scores, worker, blocks), worker_slice(memory.ranking, worker, blocks),
               selection.of(row.kv_head, row.token()) + row.member * selection.width);
  });
  return selection;
}

}  // namespace moba::reference
