#include "backend.h"

#include "reference/stages.h"

namespace moba {
namespace {

std::string refuses(const Problem& problem) {
  return problem.q.device == Device::cpu ? "" : "expected CPU tensors, got CUDA tensors";
}

std::size_t routing_bytes(const Problem& problem, const WorkSlice& slice) {
  return reference::centroids_bytes(problem, slice.heads()) + reference::selection_bytes(problem, slice);
}

std::size_t workspace(const Problem& problem, const WorkSlice& slice, int threads) {
  const auto workers = static_cast<std::size_t>(threads);
  return routing_bytes(problem, slice) +
         std::max(workers * reference::gate_bytes(problem),
                  reference::plan_bytes(problem, slice) + workers * reference::attend_bytes(problem));
}

std::size_t workspace_backward(const Problem& problem, const WorkSlice& slice, int threads) {
  const auto workers = static_cast<std::size_t>(threads);
  return routing_bytes(problem, slice) +
         std::max(workers * reference::gate_bytes(problem),
                  reference::plan_bytes(problem, slice) +
                      reference::attend_backward_bytes(problem, slice, threads));
}

}  // namespace

const Backend reference_backend{
    .name = "reference",
    .refuses = refuses,
    .workspace = workspace,
    .centroids = reference::centroids,
    .gate = reference::gate,
    .plan = reference::plan,
    .attend = reference::attend,
    .plan_backward = reference::plan,
    .attend_backward = reference::attend_backward,
    .workspace_backward = workspace_backward,
    .decode = reference::decode,
};

}  // namespace moba
