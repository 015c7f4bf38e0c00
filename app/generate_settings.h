#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "app/engine_flags.h"
#include "llm/session/choose_attention.h"
#include "llm/session/sampler.h"

namespace moba::app {

/// The variables of the flags of `moba generate`, and after complete() the settings of a run.
struct GenerateSettings : EngineFlags {
  /// At least one of the two. A file alone is the prompt; with a prompt it is the document before the
  /// question.
  std::optional<std::string> prompt, file;
  /// Tokens to generate; -1: until the end token, or until the context is full.
  std::int64_t predict = -1;
  /// The reason for the attention in prefill, once it is chosen.
  llm::AttentionReason reason = llm::AttentionReason::requested;
  bool chat = true, ignore_eos = false, json = false;
  /// Likeliest tokens whose log-probabilities are in the JSON, for each generated token; 0: none.
  std::int64_t logprobs = 0;
  llm::Sampling sampling;
};

void add_flags(FlagTable& flags, GenerateSettings& settings);

/// Fills in the defaults that depend neither on the model nor on the prompt and checks the flags against each
/// other. Throws UsageError.
void complete(const FlagTable& flags, GenerateSettings& settings);

}  // namespace moba::app
