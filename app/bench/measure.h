#pragma once

#include <functional>
#include <string>
#include <vector>

#include "app/bench/row.h"

namespace moba::bench {

/// Verifies, then times: one row a choice, in rounds that take the choices in turn. `progress` is told what
/// is going on. Throws llm::DataError when an answer is wrong or changes from run to run.
std::vector<Row> measure(const Setting& setting, const std::vector<Choice>& choices,
                         const Conditions& conditions,
                         const std::function<void(const std::string&)>& progress);

}  // namespace moba::bench
