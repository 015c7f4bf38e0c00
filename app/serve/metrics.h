#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "llm/engine/engine.h"

namespace moba::app {

/// Returns a server's state in the text format of Prometheus. `responses`: their number by status.
std::string metrics_text(const llm::EngineStatistics& engine,
                         const std::map<unsigned, std::int64_t>& responses);

}  // namespace moba::app
