#pragma once

#include <functional>
#include <string>
#include <vector>

#include "app/bench/row.h"

namespace moba::bench {

/// Verifies, then times all variants, alternating between them: one row per variant. `progress` receives a
/// line before each step. Throws llm::DataError when a result is wrong or changes from run to run.
std::vector<Row> measure(const Setting& setting, const std::vector<Variant>& variants,
                         const Conditions& conditions,
                         const std::function<void(const std::string&)>& progress);

}  // namespace moba::bench
