// Selects the instruction set of the kernels: the best that Highway finds, or the one that MOBA_CPU_TARGET
// names.
#include <hwy/highway.h>
#include <hwy/targets.h>

#include <cstdlib>
#include <string_view>

#include "cpu/stages.h"
#include "moba/build_info.h"

namespace moba::cpu {
namespace {

/// The targets the kernels are compiled for and this CPU runs, as Highway's bits.
std::int64_t available() {
  static const std::int64_t targets = hwy::SupportedTargets() & HWY_TARGETS;  // before one of them is forced
  return targets;
}

std::int64_t lowest_bit(std::int64_t bits) {
  return bits & -bits;
}

std::string list_of(const std::vector<std::string>& names) {
  std::string list;
  for (const std::string& name : names) list += (list.empty() ? "" : ", ") + name;
  return list;
}

std::string choose_target() {
  const std::vector<std::string> names = cpu_targets();
  const char* forced = std::getenv("MOBA_CPU_TARGET");
  if (forced != nullptr && *forced != '\0') {
    std::int64_t wanted = available();
    while (wanted != 0 && std::string_view(hwy::TargetName(lowest_bit(wanted))) != forced)
      wanted &= wanted - 1;
    if (wanted == 0)
      return "expected MOBA_CPU_TARGET to be one of " + list_of(names) + ", got \"" + std::string(forced) +
             "\"";
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
  return hwy::TargetName(cpu::lowest_bit(hwy::SupportedTargets() & HWY_TARGETS));
}

std::vector<std::string> cpu_targets() {
  std::vector<std::string> names;
  for (std::int64_t targets = cpu::available(); targets != 0; targets &= targets - 1)
    names.emplace_back(hwy::TargetName(cpu::lowest_bit(targets)));
  return names;
}

}  // namespace moba
