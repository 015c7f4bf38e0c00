#pragma once

#include <string>

namespace moba::app {

/// Returns the text of --version: version and build, instruction sets of the CPU and of the build, GPU
/// architectures.
std::string version_text();

}  // namespace moba::app
