#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "app/serve/evidence.h"
#include "app/serve/served_model.h"
#include "llm/engine/engine.h"

namespace moba::app {

/// A prompt as text, for `echo`, and as a request to the engine without receivers.
struct CompletionPrompt {
  std::string text;
  llm::Request request;
  /// Set if evidence is requested.
  std::shared_ptr<const PromptBlocks> blocks{};
};

/// A request to /v1/chat/completions or /v1/completions.
struct CompletionRequest {
  bool is_chat = false;
  std::vector<CompletionPrompt> prompts;
  /// Answers for each prompt.
  std::int64_t n = 1;
  std::vector<std::string> stop;
  /// Likeliest tokens whose log-probabilities are given with each token's own; unset: none at all.
  std::optional<std::int64_t> logprobs;
  bool echo = false, stream = false, include_usage = false, return_progress = false;

  std::size_t answers() const { return prompts.size() * static_cast<std::size_t>(n); }
};

/// Parses the body of a request. Members that are not known are ignored, null is as good as none. Throws
/// HttpError, status 400.
nlohmann::json parse_body(const std::string& body);
CompletionRequest chat_request(const nlohmann::json& body, const ServedModel& model);
CompletionRequest completion_request(const nlohmann::json& body, const ServedModel& model);

/// Parses a request to /tokenize or /detokenize.
std::vector<std::int32_t> tokenize_request(const nlohmann::json& body, const ServedModel& model);
std::vector<std::int32_t> detokenize_request(const nlohmann::json& body, const ServedModel& model);

}  // namespace moba::app
