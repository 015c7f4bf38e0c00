#pragma once

#include <string>

namespace moba::app {

struct InfoOptions {
  std::string model;     // a GGUF file or a Hugging Face folder
  bool tensors = false;  // each of them too
  bool json = false;
};

/// Prints what a weights file holds, from its headers alone. Returns the exit code; throws DataError.
int run_info(const InfoOptions& options);

}  // namespace moba::app
