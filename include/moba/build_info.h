#pragma once

#include <string>
#include <vector>

#include "moba/export.h"

namespace moba {

/// Facts about the build of the library, for bug reports.
struct BuildInfo {
  /// "1.0.0".
  std::string version{};
  /// CMake's build type, such as "Release"; empty if it has none.
  std::string type{};
  /// The C++ compiler with its version.
  std::string compiler{};
  /// GPU architectures of the CUDA kernels in CMake's notation ("80-real", "90-virtual"); empty if the build
  /// has no CUDA backend.
  std::vector<std::string> cuda_architectures{};
};
MOBA_EXPORT BuildInfo build_info();

/// Instruction sets that the "cpu" backend is compiled for and that this CPU has, the best first, by
/// Highway's names ("AVX3", "AVX2", ...). `cpu_target()` is the one in use.
MOBA_EXPORT std::vector<std::string> cpu_targets();

}  // namespace moba
