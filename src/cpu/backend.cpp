#include "cpu/sizes.h"
#include "cpu/stages.h"
#include "selection.h"

namespace moba {
namespace {

std::string refuses(const Call& call) {
  if (!cpu::target_refusal().empty()) return cpu::target_refusal();
  if (call.q.device != Device::cpu) return "expected CPU tensors, got CUDA tensors";
  if (call.q.dtype == DType::f64 || call.k.dtype == DType::f64)
    return "expected q and k of f32, bf16 or f16, got f64 (which backend \"reference\" takes)";
  if (call.head_dim > static_cast<std::int64_t>(cpu::kMaxHeadDim)) {
    return "expected q of head_dim up to " + std::to_string(cpu::kMaxHeadDim) + ", got " +
           std::to_string(call.head_dim);
  }
  return {};
}

std::size_t means_bytes(const Call& call, const WorkSlice& slice) {
  std::size_t blocks = 0;
  if (call.needs_scores()) {
    for (const SequenceView& s : call.sequences) blocks += static_cast<std::size_t>(call.candidate_blocks(s));
  }
  return blocks * static_cast<std::size_t>(slice.heads() * call.head_dim) * sizeof(float);
}

std::size_t workspace(const Call& call, const WorkSlice& slice, int threads) {
  const auto workers = static_cast<std::size_t>(threads);
  const std::size_t attending =
      cpu::plan_bytes(call, slice, threads) + workers * cpu::attend_bytes(call, cpu::min_range_rows(call));
  return means_bytes(call, slice) + selection_bytes(call, slice) +
         std::max(workers * cpu::gate_bytes(call) + cpu::screened_bytes(call, slice.heads()), attending);
}

std::size_t workspace_backward(const Call& call, const WorkSlice& slice, int threads) {
  const std::size_t selecting =
      means_bytes(call, slice) + static_cast<std::size_t>(threads) * cpu::gate_bytes(call);
  const std::size_t attending =
      cpu::plan_backward_bytes(call, slice) + cpu::attend_backward_bytes(call, slice, threads);
  return selection_bytes(call, slice) + std::max(selecting, attending);
}

}  // namespace

const Backend cpu_backend{
    .name = "cpu",
    .refuses = refuses,
    .workspace = workspace,
    .append = cpu::append,
    .centroids = cpu::centroids,
    .features = cpu::features,
    .gate = cpu::gate,
    .plan = cpu::plan,
    .attend = cpu::attend,
    .plan_backward = cpu::plan_backward,
    .attend_backward = cpu::attend_backward,
    .workspace_backward = workspace_backward,
    .decode = cpu::decode,
};

}  // namespace moba
