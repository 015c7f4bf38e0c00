#include "backend.h"
#include "checks.h"
#include "groups.h"

namespace moba {

void attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Saved& saved, const Sequences& sequences, const Routing& routing,
                        const Gradients& gradients, const Execution& execution) {
  named("attention_backward", [&] {
    check_attention(q, k, v, sequences, routing);
    check_backward(d_out, q, k, v, saved, gradients);
    check_execution(execution);
    if (const DeviceFlow* device = device_flow(q, execution)) {
      return device->attention_backward("attention_backward", d_out, q, k, v, saved, batch_of(sequences),
                                        routing, gradients, execution);
    }

    const Problem problem = make_problem(q, k, v, sequences, routing);
    check_saved_selection(problem, saved.selection);
    const Backend& backend = choose_backend(execution.backend, problem);
    const Parallel parallel = execution.parallel.run ? execution.parallel : openmp();
    Scratch scratch(execution.scratch);
    const std::size_t budget = execution.workspace_bytes.value_or(kHostWorkspace);
    Context context{parallel, scratch, budget};
    const Backward backward{d_out, saved.out, saved.lse, gradients};
    Profile profile;

    for (const WorkSlice& group : head_groups_within(backend, problem, parallel.threads, budget)) {
      const auto select = [&] {
        if (saved.selection != nullptr) return read_selection(problem, group, saved.selection, scratch);
        const Means means =
            problem.needs_scores()
                ? timed(&Profile::centroids, profile,
                        [&] { return backend.centroids(problem, group.head0, group.head1, context); })
                : Means{};
        return timed(&Profile::gate, profile, [&] { return backend.gate(problem, means, group, context); });
      };
      const Selection selection = select();
      const Plan plan =
          timed(&Profile::plan, profile, [&] { return backend.plan_backward(problem, selection, context); });
      timed(&Profile::attend, profile,
            [&] { backend.attend_backward(problem, selection, plan, backward, context); });
    }
    add_profile(execution, profile, scratch);
  });
}

}  // namespace moba
