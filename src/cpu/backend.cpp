#include "cpu/sizes.h"
#include "cpu/stages.h"

namespace moba {
namespace {

std::string refuses(const Problem& problem) {
  if (!cpu::target_refusal().empty()) return cpu::target_refusal();
  if (problem.q.device != Device::cpu) return "expected CPU tensors, got CUDA tensors";
  if (problem.q.dtype == DType::f64 || problem.k.dtype == DType::f64)
    return "expected q and k of f32, bf16 or f16, got f64 (which backend \"reference\" takes)";
  if (problem.head_dim > static_cast<std::int64_t>(cpu::kMaxHeadDim)) {
    return "expected q of head_dim up to " + std::to_string(cpu::kMaxHeadDim) + ", got " +
           std::to_string(problem.head_dim);
  }
  return {};
}

std::size_t means_bytes(const Problem& problem, const WorkSlice& slice) {
  std::size_t blocks = 0;
  if (problem.needs_scores()) {
    for (const SequenceView& s : problem.sequences)
      blocks += static_cast<std::size_t>(problem.candidate_blocks(s));
  }
  return blocks * static_cast<std::size_t>(slice.heads() * problem.head_dim) * sizeof(float);
}

std::size_t selection_bytes(const Problem& problem, const WorkSlice& slice) {
  return static_cast<std::size_t>(slice.heads() * slice.tokens() * problem.heads_per_kv * problem.width()) *
         sizeof(std::int32_t);
}

std::size_t workspace(const Problem& problem, const WorkSlice& slice, int threads) {
  const auto workers = static_cast<std::size_t>(threads);
  const std::size_t attending =
      cpu::plan_bytes(problem, slice) + workers * cpu::attend_bytes(problem, cpu::min_range_rows(problem));
  return means_bytes(problem, slice) + selection_bytes(problem, slice) +
         std::max(workers * cpu::gate_bytes(problem) + cpu::screened_bytes(problem, slice.heads()),
                  attending);
}

std::size_t workspace_backward(const Problem& problem, const WorkSlice& slice, int threads) {
  const std::size_t selecting =
      means_bytes(problem, slice) + static_cast<std::size_t>(threads) * cpu::gate_bytes(problem);
  const std::size_t attending =
      cpu::plan_backward_bytes(problem, slice) + cpu::attend_backward_bytes(problem, slice, threads);
  return selection_bytes(problem, slice) + std::max(selecting, attending);
}

}  // namespace

const Backend cpu_backend{
    .name = "cpu",
    .refuses = refuses,
    .workspace = workspace,
    .centroids = cpu::centroids,
    .gate = cpu::gate,
    .plan = cpu::plan,
    .attend = cpu::attend,
    .plan_backward = cpu::plan_backward,
    .attend_backward = cpu::attend_backward,
    .workspace_backward = workspace_backward,
    .decode = cpu::decode,
};

}  // namespace moba
