#include "backend.h"
#include "checks.h"
#include "groups.h"

namespace moba {
namespace {

/// The fast CPU backend has no gradient of its own yet: the reference computes it from the same routing.
const Backend& gradient_backend(const Backend& backend) {
  return backend.attend_backward != nullptr ? backend : reference_backend;
}

}  // namespace

void attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Saved& saved, const Sequences& sequences, const Routing& routing,
                        const Gradients& gradients, const Execution& execution) {
  constexpr std::string_view function = "attention_backward";
  check_attention(function, q, k, v, sequences, routing);
  check_backward(function, d_out, q, k, v, saved, gradients);
  check_execution(function, execution);

  const Problem problem = make_problem(q, k, v, sequences, routing);
  const Backend& backend = choose_backend(execution.backend, problem, function);
  const Backend& gradient = gradient_backend(backend);
  const Parallel parallel = execution.parallel.run ? execution.parallel : openmp();
  Scratch scratch(execution.scratch);
  Resources resources{parallel, scratch, execution.workspace_bytes};
  const Backward backward{d_out, saved.out, saved.lse, gradients};

  for (const Group& group :
       head_groups_within(function, gradient, problem, parallel.threads, execution.workspace_bytes)) {
    const auto select = [&] {
      if (saved.selection != nullptr)
        return read_selection(function, problem, group, saved.selection, scratch);
      const Means means =
          problem.needs_scores() ? backend.centroids(problem, group.head0, group.head1, resources) : Means{};
      return backend.gate(problem, means, group, resources);
    };
    const Selection selection = select();
    const Plan plan = gradient.plan(problem, selection, resources);
    gradient.attend_backward(problem, selection, plan, backward, resources);
  }
}

}  // namespace moba
