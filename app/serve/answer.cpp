#include "app/serve/answer.h"

#include <limits>
#include <utility>

#include "llm/session/stop_text.h"
#include "llm/session/text_stream.h"
#include "src/stopwatch.h"

namespace moba::app {
namespace {

/// Makes parts of the events of one answer.
class AnswerWriter {
 public:
  AnswerWriter(std::size_t answer, const CompletionRequest& request, const ServedModel& model,
               std::shared_ptr<AnswerQueue> queue)
      : answer_(answer),
        logprobs_(request.logprobs),
        vocab_(static_cast<std::size_t>(model.config.vocab)),
        tokenizer_(model.tokenizer),
        stop_(request.stop),
        queue_(std::move(queue)) {}

  void give_evidence(std::shared_ptr<const PromptBlocks> blocks) { evidence_.emplace(std::move(blocks)); }

  void echo(const CompletionPrompt& prompt) {
    AnswerPart part{.answer = answer_, .text = prompt.text};
    const double none = std::numeric_limits<double>::quiet_NaN();
    if (logprobs_) part.logprobs.push_back({{prompt.request.prompt.front(), none}, {}});
    queue_->push(std::move(part));
  }

  void prompt_logits(std::span<const std::int32_t> prompt, std::int64_t first,
                     std::span<const float> logits) {
    AnswerPart part{.answer = answer_};
    for (std::size_t row = 0; row * vocab_ < logits.size(); ++row) {
      const std::size_t next = static_cast<std::size_t>(first) + row + 1;
      if (next < prompt.size())
        part.logprobs.push_back(logprobs_of(prompt[next], logits.subspan(row * vocab_, vocab_), *logprobs_));
    }
    if (!part.logprobs.empty()) queue_->push(std::move(part));
  }

  /// Reports the first and the last step and some of those between.
  void progress(double tokens_read, const llm::RequestUsage& usage) {
    constexpr double kSeconds = 0.1;
    const bool is_last = tokens_read >= static_cast<double>(usage.prompt_tokens);
    if (!begin_) begin_.emplace();
    if (reported_ && !is_last && reported_->seconds() < kSeconds) return;
    reported_.emplace();
    AnswerPart part{.answer = answer_};
    part.progress = PromptProgress{.total = usage.prompt_tokens,
                                   .cache = usage.cached_tokens,
                                   .processed = static_cast<std::int64_t>(tokens_read),
                                   .seconds = begin_->seconds()};
    queue_->push(std::move(part));
  }

  void weights(std::span<const float> weights) { weights_.assign(weights.begin(), weights.end()); }

  bool token(std::int32_t token, std::span<const float> logits) {
    const std::string text = stream_.push(tokenizer_.piece(token));
    if (evidence_) evidence_->add(weights_, text);
    AnswerPart part{.answer = answer_, .text = stop_.push(text)};
    bytes_ += part.text.size();
    if (logprobs_) part.logprobs.push_back(logprobs_of(token, logits, *logprobs_));
    if (!part.text.empty() || logprobs_) queue_->push(std::move(part));
    return !stop_.found();
  }

  void finish(llm::Finish finish, const llm::RequestUsage& usage) {
    std::string text = stop_.push(stream_.finish());
    text += stop_.finish();
    if (evidence_) evidence_->finish(bytes_ + text.size());
    queue_->push({.answer = answer_,
                  .text = std::move(text),
                  .finish = finish,
                  .evidence = std::move(evidence_),
                  .usage = usage});
  }

  void fail(const std::string& message) { queue_->push({.answer = answer_, .error = message}); }

 private:
  std::size_t answer_;
  std::optional<std::int64_t> logprobs_;
  std::size_t vocab_;
  llm::Tokenizer tokenizer_;
  llm::TextStream stream_;
  llm::StopText stop_;
  std::size_t bytes_ = 0;  // of the text that is sent
  std::optional<Evidence> evidence_;
  std::vector<float> weights_;  // of the next token
  std::optional<Stopwatch> begin_, reported_;
  std::shared_ptr<AnswerQueue> queue_;
};

}  // namespace

void AnswerQueue::push(AnswerPart part) {
  std::function<void()> ready;
  {
    const std::lock_guard lock(mutex_);
    parts_.push_back(std::move(part));
    if (parts_.size() == 1) ready = ready_;
  }
  if (ready) ready();
}

std::vector<AnswerPart> AnswerQueue::take() {
  const std::lock_guard lock(mutex_);
  return std::exchange(parts_, {});
}

void AnswerQueue::on_ready(std::function<void()> ready) {
  const std::lock_guard lock(mutex_);
  ready_ = std::move(ready);
  if (!parts_.empty()) ready_();
}

std::vector<EngineJob> jobs_for(const CompletionRequest& request, const ServedModel& model,
                                const std::shared_ptr<AnswerQueue>& queue) {
  std::vector<EngineJob> jobs;
  for (const CompletionPrompt& prompt : request.prompts) {
    for (std::int64_t i = 0; i < request.n; ++i) {
      const auto writer = std::make_shared<AnswerWriter>(jobs.size(), request, model, queue);
      EngineJob& job = jobs.emplace_back(EngineJob{.request = prompt.request});
      job.request.sampling.seed += static_cast<std::uint64_t>(i);
      if (request.echo) writer->echo(prompt);
      if (request.echo && request.logprobs) {
        job.request.on_prompt_logits = [writer, tokens = prompt.request.prompt](
                                           std::int64_t first, std::span<const float> logits) {
          writer->prompt_logits(tokens, first, logits);
        };
      }
      if (request.return_progress) {
        job.request.on_progress = [writer](double tokens_read, const llm::RequestUsage& usage) {
          writer->progress(tokens_read, usage);
        };
      }
      if (prompt.blocks) {
        writer->give_evidence(prompt.blocks);
        job.request.on_weights = [writer](std::span<const float> weights) { writer->weights(weights); };
      }
      job.request.on_token = [writer](std::int32_t token, std::span<const float> logits) {
        return writer->token(token, logits);
      };
      job.request.on_finish = [writer](llm::Finish finish, const llm::RequestUsage& usage) {
        writer->finish(finish, usage);
      };
      job.on_error = [writer](const std::string& message) { writer->fail(message); };
    }
  }
  return jobs;
}

}  // namespace moba::app
