#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "app/session_flags.h"
#include "llm/session/sampler.h"
#include "llm/session/session.h"
#include "moba/tensor.h"

namespace moba::app {

/// The unchecked command line of `moba generate`. Unset where a default
/// applies.
struct GenerateFlags {
  SessionFlags session;
  llm::AttentionMode attention = llm::AttentionMode::full;
  std::optional<std::string> prompt, file;
  std::int64_t predict = -1;
  std::optional<std::int64_t> context;
  double temperature = 0;
  std::optional<std::int64_t> top_k, seed;
  std::optional<double> top_p, min_p;
  bool no_chat = false, ignore_eos = false, json = false;
};

/// The checked settings of a run.
struct GenerateSettings {
  std::string model;
  /// At least one of the two. A file alone is the prompt; with a prompt it is the document before the
  /// question.
  std::optional<std::string> prompt, file;
  /// Tokens to write; -1: until the model ends or the context is full.
  std::int64_t predict = -1;
  /// Tokens of prompt and answer together; 0: as many as the model was trained for.
  std::int64_t context = 0;
  bool chat = true, ignore_eos = false, json = false;
  DType dtype = DType::f32;
  llm::Sampling sampling;
  llm::SessionSettings session;
};

void add_flags(CLI::App& command, GenerateFlags& flags);

/// Throws UsageError, naming the flag, for values out of range and for flags that contradict each other.
GenerateSettings settings_from(const GenerateFlags& flags);

/// The settings in force, under the names of their flags.
nlohmann::ordered_json to_json(const GenerateSettings& settings);

}  // namespace moba::app
