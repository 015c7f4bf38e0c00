#pragma once

#include <string>

#include "llm/formats/weights.h"
#include "llm/model/arithmetic.h"

namespace moba::llm {

/// Returns a text that differs for models whose keys and values differ: a SHA-256 of the configuration, the
/// arithmetic and of each tensor its name, shape, storage and its first and last bytes, since reading all of
/// them would take as long as loading the model.
std::string model_fingerprint(const Weights& weights, const Arithmetic& arithmetic);

}  // namespace moba::llm
