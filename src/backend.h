#pragma once

#include <span>
#include <string>
#include <string_view>

#include "problem.h"

namespace moba {

/// What `attend` writes, and what its gradient reads and writes: the public structs, checked.
struct Backward {
  Tensor d_out;
  Tensor out;
  const float* lse = nullptr;
  Gradients gradients;
};

/// The means to work with: threads, scratch memory.
struct Resources {
  const Parallel& parallel;
  Scratch& scratch;
  std::size_t budget;
};

/// One implementation of the six stages. The reference, CPU and CUDA tables are all there are;
/// `choose_backend` picks.
struct Backend {
  std::string_view name;
  /// Why this backend cannot solve the problem; empty when it can.
  std::string (*refuses)(const Problem& problem);
  /// Scratch bytes that the stages below take for a group of this shape.
  std::size_t (*workspace)(const Problem& problem, const Group& group, int threads);

  Means (*centroids)(const Problem& problem, std::int64_t head0, std::int64_t head1, Resources& resources);
  Selection (*gate)(const Problem& problem, const Means& means, const Group& group, Resources& resources);
  Plan (*plan)(const Problem& problem, const Selection& selection, Resources& resources);
  void (*attend)(const Problem& problem, const Selection& selection, const Plan& plan, const Outputs& outputs,
                 Resources& resources);
  /// The same with the ranges that `attend_backward` wants.
  Plan (*plan_backward)(const Problem& problem, const Selection& selection, Resources& resources);
  /// Adds nothing: writes dq of the group's queries and heads, and dk, dv of the group's heads. The group
  /// spans all tokens.
  void (*attend_backward)(const Problem& problem, const Selection& selection, const Plan& plan,
                          const Backward& backward, Resources& resources);
  std::size_t (*workspace_backward)(const Problem& problem, const Group& group, int threads);
  /// One query a sequence; `means` are the cache's.
  void (*decode)(const Problem& problem, const Means& means, const Outputs& outputs, Resources& resources);
};

extern const Backend reference_backend;
extern const Backend cpu_backend;

/// The backend of that name, or by MOBA_BACKEND, or the default. Throws Error naming `function` when there is
/// none, or when it refuses the problem.
const Backend& choose_backend(const std::string& name, const Problem& problem, std::string_view function);

}  // namespace moba
