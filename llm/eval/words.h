#pragma once

#include <string>

#include "llm/eval/random.h"

namespace moba::llm::eval {

/// Returns a name for a fact, such as "amber-otter": one of about sixty thousand.
std::string random_name(Random& random);

}  // namespace moba::llm::eval
