#include "app/version.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "moba/attention.h"
#include "moba/build_info.h"
#include "src/cpu_features.h"

namespace moba::app {
namespace {

std::string used_text() {
  const std::string target = cpu_target();
  if (target.empty()) return "none: this CPU lacks that of MOBA_CPU_TARGET";
  if (target != "AVX3") return target;
  switch (bf16_unit()) {
    case Bf16Unit::amx:
      return target + ", AMX for bf16";
    case Bf16Unit::avx512_bf16:
      return target + ", AVX512-BF16";
    case Bf16Unit::none:
      return target;
  }
  return target;
}

}  // namespace

std::string version_text() {
  const BuildInfo build = build_info();
  const auto& architectures = build.cuda_architectures;
  return fmt::format(
      "moba {}\n"
      "build               {}, {}\n"
      "instruction sets    {}\n"
      "in use              {}\n"
      "CUDA architectures  {}",
      build.version, build.type, build.compiler, fmt::join(cpu_targets(), ", "), used_text(),
      architectures.empty() ? "none" : fmt::format("{}", fmt::join(architectures, ", ")));
}

}  // namespace moba::app
