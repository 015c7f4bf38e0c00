#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "llm/config.h"
#include "llm/session/session.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::app {

/// A model as requests see it, and the defaults of their settings.
struct ServedModel {
  std::string name;
  llm::ModelConfig config;
  llm::Tokenizer tokenizer;
  /// Attention; unset: chosen for each prompt.
  std::optional<llm::AttentionMode> prefill, decode;
  Routing moba;
  /// The routing of each layer by a calibration; empty without one.
  std::vector<Routing> layers{};
  std::int64_t full_tail = 0;
  /// Maximum tokens of prompt and answer together.
  std::int64_t context = 0;
  /// Maximum answers of one request.
  std::int64_t max_answers = 1;
  /// Seconds since the epoch at which it was loaded.
  std::int64_t created = 0;
};

}  // namespace moba::app
