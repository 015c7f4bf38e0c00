#pragma once

#include <charconv>
#include <string_view>

namespace moba::cuda {

/// The architectures that the kernels of this build are compiled for, separated by commas, in CMake's
/// notation: "80-real" is machine code, "90-virtual" PTX, "80" both.
std::string_view built_architectures();

/// Returns whether code for one architecture of such a list runs on a device of `capability` (10 major +
/// minor). Machine code runs on the same major and the same or a later minor version, PTX on every later
/// device. Code for an architecture with the suffix "a" runs on that one only, with "f" on the same major
/// version.
inline bool runs_on(std::string_view architecture, int capability) {
  int compiled = 0;
  const char* const end = architecture.data() + architecture.size();
  const char* const rest = std::from_chars(architecture.data(), end, compiled).ptr;
  if (compiled == 0) return true;  // "native" and "all": known to nvcc alone
  if (rest != end && *rest == 'a') return capability == compiled;
  const bool is_ptx = (rest == end || *rest == '-') && !architecture.ends_with("-real");
  return capability >= compiled && (is_ptx || capability / 10 == compiled / 10);
}

/// The same for the architectures of a list.
inline bool any_runs_on(std::string_view architectures, int capability) {
  for (;;) {
    const std::size_t comma = architectures.find(',');
    if (runs_on(architectures.substr(0, comma), capability)) return true;
    if (comma == std::string_view::npos) return false;
    architectures.remove_prefix(comma + 1);
  }
}

}  // namespace moba::cuda
