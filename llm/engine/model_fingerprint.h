#pragma once

#include <string>

#include "llm/formats/weights.h"
#include "llm/model/arithmetic.h"

namespace moba::llm {

/// Returns a text that differs for models of different weights: a SHA-256 of the configuration and of each
/// tensor its name, shape, storage and its first and last bytes, since reading all of them would take as long
/// as loading the model.
std::string weights_fingerprint(const Weights& weights);
/// Returns a text that differs for models whose keys and values differ: the same with the
/// arithmetic.
std::string model_fingerprint(const Weights& weights, const Arithmetic& arithmetic);

}  // namespace moba::llm
