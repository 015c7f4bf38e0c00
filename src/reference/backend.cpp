#include "backend.h"

#include "reference/stages.h"
#include "selection.h"

namespace moba {
namespace {

std::string refuses(const Call& call) {
  return call.q.device == Device::cpu ? "" : "expected CPU tensors, got CUDA tensors";
}

std::size_t routing_bytes(const Call& call, const WorkSlice& slice) {
  return reference::centroids_bytes(call, slice.heads()) + selection_bytes(call, slice);
}

std::size_t workspace(const Call& call, const WorkSlice& slice, int threads) {
  const auto workers = static_cast<std::size_t>(threads);
  return routing_bytes(call, slice) +
         std::max(workers * reference::gate_bytes(call),
                  reference::plan_bytes(call, slice) + workers * reference::attend_bytes(call));
}

std::size_t workspace_backward(const Call& call, const WorkSlice& slice, int threads) {
  const auto workers = static_cast<std::size_t>(threads);
  return routing_bytes(call, slice) + std::max(workers * reference::gate_bytes(call),
                                               reference::plan_bytes(call, slice) +
                                                   reference::attend_backward_bytes(call, slice, threads));
}

}  // namespace

const Backend reference_backend{
    .name = "reference",
    .refuses = refuses,
    .workspace = workspace,
    .append = reference::append,
    .centroids = reference::centroids,
    .features = reference::features,
    .gate = reference::gate,
    .plan = reference::plan,
    .attend = reference::attend,
    .plan_backward = reference::plan,
    .attend_backward = reference::attend_backward,
    .workspace_backward = workspace_backward,
    .decode = reference::decode,
};

}  // namespace moba
