#pragma once

#include <cstdint>
#include <fstream>
#include <string>

namespace moba::llm {

/// Most memory this process has held. getrusage's figure would include what its parent had before exec.
inline std::int64_t peak_rss_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6)) * 1024;
  }
  return 0;
}

}  // namespace moba::llm
