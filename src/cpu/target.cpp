// Selects the instruction set of the kernels: the best that Highway finds, or the one that MOBA_CPU_TARGET
// names.
#include <hwy/highway.h>
#include <hwy/targets.h>

#include <cstdlib>
#include <string_view>

#include "cpu/stages.h"

namespace moba::cpu {
namespace {

/// The targets the kernels are compiled for and this CPU runs, as Highway's bits.
std::int64_t available() {
  return hwy::SupportedTargets() & HWY_TARGETS;
}

std::int64_t lowest_bit(std::int64_t bits) {
  return bits & -bits;
}

std::string names(std::int64_t targets) {
  std::string list;
  for (; targets != 0; targets &= targets - 1) {
    list += (list.empty() ? "" : ", ") + std::string(hwy::TargetName(lowest_bit(targets)));
  }
  return list;
}

std::string choose_target() {
  const char* forced = std::getenv("MOBA_CPU_TARGET");
  if (forced != nullptr && *forced != '\0') {
    std::int64_t wanted = available();
    while (wanted != 0 && std::string_view(hwy::TargetName(lowest_bit(wanted))) != forced)
      wanted &= wanted - 1;
    if (wanted == 0)
      return "expected MOBA_CPU_TARGET to be one of " + names(available()) + ", got \"" +
             std::string(forced) + "\"";
    hwy::SetSupportedTargetsForTest(lowest_bit(wanted));
  }
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  return {};
}

}  // namespace

const std::string& target_refusal() {
  static const std::string refusal = choose_target();
  return refusal;
}

}  // namespace moba::cpu

namespace moba {

std::string cpu_target() {
  if (!cpu::target_refusal().empty()) return {};
  return hwy::TargetName(cpu::lowest_bit(cpu::available()));
}

}  // namespace moba
