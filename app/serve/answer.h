#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "app/logprobs.h"
#include "app/serve/engine_thread.h"
#include "app/serve/evidence.h"
#include "app/serve/openai_request.h"
#include "app/serve/served_model.h"
#include "llm/engine/engine.h"

namespace moba::app {

/// A part of one of a request's answers.
struct AnswerPart {
  std::size_t answer = 0;
  /// Complete UTF-8 that no stop sequence can still remove.
  std::string text{};
  /// Those of the tokens since the part before; NaN for the first token of a prompt.
  std::vector<TokenLogprobs> logprobs{};
  /// How far the prompt is read, instead of text.
  std::optional<PromptProgress> progress{};
  /// With the last part.
  std::optional<llm::Finish> finish{};
  std::optional<Evidence> evidence{};
  llm::RequestUsage usage{};
  /// Why there is no answer, instead of all else.
  std::string error{};
};

/// Parts of answers from the engine's thread to another one.
class AnswerQueue {
 public:
  void push(AnswerPart part);
  std::vector<AnswerPart> take();
  /// Sets what push() calls after it. Calls it at once if there are parts.
  void on_ready(std::function<void()> ready);

 private:
  std::mutex mutex_;
  std::vector<AnswerPart> parts_;
  std::function<void()> ready_;
};

/// Returns a job for each answer of a request, in the order of their indices, whose events come to `queue`.
std::vector<EngineJob> jobs_for(const CompletionRequest& request, const ServedModel& model,
                                const std::shared_ptr<AnswerQueue>& queue);

}  // namespace moba::app
