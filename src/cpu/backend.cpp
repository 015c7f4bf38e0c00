#include "cpu/sizes.h"
#include "cpu/stages.h"

namespace moba {
namespace {

std::string refuses(const Problem& problem) {
  if (problem.q.device != Device::cpu) return "works on CPU tensors";
  if (problem.q.dtype == DType::f64 || problem.k.dtype == DType::f64)
    return "takes f32, bf16 and f16; f64 needs \"reference\"";
  if (problem.head_dim > static_cast<std::int64_t>(cpu::kMaxHeadDim)) {
    return "takes head_dim up to " + std::to_string(cpu::kMaxHeadDim) + "; q has " +
           std::to_string(problem.head_dim);
  }
  return {};
}

std::size_t workspace(const Problem& problem, const Group& group, int threads) {
  std::size_t means = 0;
  if (problem.needs_scores()) {
    for (const SequenceView& s : problem.sequences)
      means += static_cast<std::size_t>(problem.candidate_blocks(s));
    means *= static_cast<std::size_t>(group.heads() * problem.head_dim) * sizeof(float);
  }
  const std::size_t selection =
      static_cast<std::size_t>(group.heads() * group.tokens() * problem.group * problem.width()) *
      sizeof(std::int32_t);
  const auto workers = static_cast<std::size_t>(threads);
  const std::size_t attending =
      cpu::plan_bytes(problem, group) + workers * cpu::attend_bytes(problem, cpu::min_range_rows(problem));
  return means + selection + std::max(workers * cpu::gate_bytes(problem), attending);
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
    .attend_backward = nullptr,
    .workspace_backward = nullptr,
    .decode = cpu::decode,
};

}  // namespace moba
