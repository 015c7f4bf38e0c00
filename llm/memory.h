#pragma once

#include <cstdint>
#include <fstream>
#include <string>

namespace moba::llm {

/// Returns the peak resident memory of this process in bytes; getrusage's would include its parent's before
/// exec.
inline std::int64_t peak_rss_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6)) * 1024;
  }
  return 0;
}

}  // namespace moba::llm
