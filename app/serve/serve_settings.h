#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "app/engine_flags.h"
#include "app/serve/http_server.h"

namespace moba::app {

/// The variables of the flags of `moba serve`.
struct ServeSettings : EngineFlags {
  HttpSettings http;
  std::int64_t port = 8080, max_body = std::int64_t{32} << 20;
  std::optional<std::string> api_key_file;
  std::optional<std::string> alias;
  std::int64_t parallel = 8, queue = 64;
  std::int64_t cache_bytes = std::int64_t{4} << 30;
  /// Milliseconds; 0: no limit.
  std::int64_t max_step = 250;
};

void add_flags(FlagTable& flags, ServeSettings& settings);

/// Checks the flags against each other. Throws UsageError.
void complete(ServeSettings& settings);

}  // namespace moba::app
