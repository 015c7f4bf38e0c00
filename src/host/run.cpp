#include "host/run.h"

#include <algorithm>

#include "split.h"

namespace moba::host {

Run::Run(const Problem& problem, const Execution& execution)
    : problem_(problem),
      execution_(execution),
      backend_(choose_backend(execution.backend, problem)),
      parallel_(execution.parallel.run ? execution.parallel : openmp()),
      scratch_(execution.scratch),
      context_{parallel_, scratch_, execution.workspace_bytes.value_or(kHostWorkspace)} {}

Run::~Run() {
  if (execution_.profile == nullptr) return;
  Profile& total = *execution_.profile;
  total.centroids += profile_.centroids;
  total.gate += profile_.gate;
  total.plan += profile_.plan;
  total.attend += profile_.attend;
  total.workspace_bytes = std::max(total.workspace_bytes, scratch_.peak());
}

template <typename Stage>
auto Run::timed(double Profile::*seconds, Stage&& stage) {
  struct Stopwatch {
    double& total;
    std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
    ~Stopwatch() { total += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); }
  };
  const Stopwatch stopwatch{profile_.*seconds};
  return stage();
}

std::vector<WorkSlice> Run::forward_slices() const {
  if (problem_.tokens == 0) return {};
  return split_within(context_.budget, problem_.kv_heads, problem_.tokens, [&](const WorkSlice& slice) {
    return backend_.workspace(problem_, slice, parallel_.threads);
  });
}

std::vector<WorkSlice> Run::backward_slices() const {
  return split_heads_within(context_.budget, problem_.kv_heads, problem_.tokens, [&](const WorkSlice& slice) {
    return backend_.workspace_backward(problem_, slice, parallel_.threads);
  });
}

Means Run::centroids(const WorkSlice& slice) {
  if (!problem_.needs_scores()) return {};
  return timed(&Profile::centroids,
               [&] { return backend_.centroids(problem_, slice.head0, slice.head1, context_); });
}

Selection Run::gate(const Means& means, const WorkSlice& slice) {
  return timed(&Profile::gate, [&] { return backend_.gate(problem_, means, slice, context_); });
}

Plan Run::plan(const Selection& selection) {
  return timed(&Profile::plan, [&] { return backend_.plan(problem_, selection, context_); });
}

void Run::attend(const Selection& selection, const Plan& plan, const Outputs& outputs) {
  timed(&Profile::attend, [&] { backend_.attend(problem_, selection, plan, outputs, context_); });
}

Plan Run::plan_backward(const Selection& selection) {
  return timed(&Profile::plan, [&] { return backend_.plan_backward(problem_, selection, context_); });
}

void Run::attend_backward(const Selection& selection, const Plan& plan, const Backward& backward) {
  timed(&Profile::attend, [&] { backend_.attend_backward(problem_, selection, plan, backward, context_); });
}

void Run::decode(const Means& means, const Outputs& outputs) {
  timed(&Profile::attend, [&] { backend_.decode(problem_, means, outputs, context_); });
}

}  // namespace moba::host
