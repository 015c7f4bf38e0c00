#include "moba/attention.h"

#include <utility>

#include "backend.h"
#include "cache_state.h"
#include "checks.h"
#include "groups.h"

namespace moba {
namespace {

/// The flow: average the keys of each block, score every query against those averages and keep the best,
/// invert the routing, attend inside the chosen blocks. `cached` are the means of a KV cache, if there is
/// one.
void run(const Problem& problem, const Means* cached, const Outputs& outputs, const Execution& execution) {
  const Backend& backend = choose_backend(execution.backend, problem);
  const Parallel parallel = execution.parallel.run ? execution.parallel : openmp();
  Scratch scratch(execution.scratch);
  const std::size_t budget = execution.workspace_bytes.value_or(kHostWorkspace);
  Context context{parallel, scratch, budget};
  Profile profile;

  for (const HeadGroup& heads : groups_within(backend, problem, parallel.threads, budget)) {
    const Means computed = timed(&Profile::centroids, profile, [&] {
      return cached != nullptr || !problem.needs_scores()
                 ? Means{}
                 : backend.centroids(problem, heads.head0, heads.head1, context);
    });
    const Means& means = cached != nullptr ? *cached : computed;

    for (const WorkSlice& group : heads.groups) {
      const Selection selection =
          timed(&Profile::gate, profile, [&] { return backend.gate(problem, means, group, context); });
      if (outputs.selection != nullptr) write_selection(problem, selection, outputs.selection);
      if (outputs.out.data == nullptr) continue;  // the routing alone was asked for

      const Plan plan =
          timed(&Profile::plan, profile, [&] { return backend.plan(problem, selection, context); });
      timed(&Profile::attend, profile, [&] { backend.attend(problem, selection, plan, outputs, context); });
    }
  }
  add_profile(execution, profile, scratch);
}

void run_decode(const Problem& problem, const Means& means, const Outputs& outputs,
                const Execution& execution) {
  const Backend& backend = choose_backend(execution.backend, problem);
  const Parallel parallel = execution.parallel.run ? execution.parallel : openmp();
  Scratch scratch(execution.scratch);
  Context context{parallel, scratch, execution.workspace_bytes.value_or(kHostWorkspace)};
  Profile profile;
  timed(&Profile::attend, profile, [&] { backend.decode(problem, means, outputs, context); });
  add_profile(execution, profile, scratch);
}

}  // namespace

void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& sequences,
               const Routing& routing, const Outputs& outputs, const Execution& execution) {
  named("attention", [&] {
    check_attention(q, k, v, sequences, routing);
    check_outputs(q, outputs);
    check_apart_from_keys(outputs, k, v);
    check_execution(execution);
    if (const DeviceFlow* device = device_flow(q, execution))
      return device->attention("attention", q, k, v, batch_of(sequences), routing, outputs, execution);
    run(make_problem(q, k, v, sequences, routing), nullptr, outputs, execution);
  });
}

void select_blocks(const Tensor& q, const Tensor& k, const Sequences& sequences, const Routing& routing,
                   std::int32_t* selection, const Execution& execution) {
  named("select_blocks", [&] {
    check_attention(q, k, k, sequences, routing);
    check_execution(execution);
    check_selected(selection);
    if (const DeviceFlow* device = device_flow(q, execution)) {
      return device->attention("select_blocks", q, k, k, batch_of(sequences), routing,
                               {.selection = selection}, execution);
    }
    run(make_problem(q, k, k, sequences, routing), nullptr, {.selection = selection}, execution);
  });
}

void attention(const Tensor& q, const KvCache& cache, std::int64_t sequence, const Routing& routing,
               const Outputs& outputs, const Execution& execution) {
  named("attention", [&] {
    check_sequence(cache, sequence);
    check_cached(q, cache, routing);
    check_outputs(q, outputs);
    check_execution(execution);
    const Problem problem = cached_problem(q, cache, sequence, routing);
    const Means means = cached_means(cache, sequence);
    run(problem, &means, outputs, execution);
  });
}

void decode(const Tensor& q, const KvCache& cache, const Routing& routing, const Outputs& outputs,
            const Execution& execution) {
  named("decode", [&] {
    check_cached(q, cache, routing);
    check_decode(q, cache.shape().sequences, outputs);
    check_outputs(q, outputs);
    check_execution(execution);
    run_decode(decode_problem(q, cache, routing), cached_means(cache), outputs, execution);
  });
}

void decode(const Tensor& q, std::span<const CachedSequence> sequences, const Routing& routing,
            const Outputs& outputs, const Execution& execution) {
  named("decode", [&] {
    check_cached(q, sequences, routing);
    check_decode(q, static_cast<std::int64_t>(sequences.size()), outputs);
    check_outputs(q, outputs);
    check_execution(execution);
    run_decode(decode_problem(q, sequences, routing), cached_means(sequences), outputs, execution);
  });
}

}  // namespace moba
