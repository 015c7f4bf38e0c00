#include "app/serve/completion.h"

#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <random>
#include <utility>

#include "app/serve/answer.h"
#include "app/serve/openai_response.h"

namespace moba::app {
namespace {

/// The answers to one request, as a whole or as a stream.
class Completion : public PendingResponse {
 public:
  Completion(CompletionRequest request, const ServedModel& model, EngineThread& engine);
  ~Completion() override { engine_.cancel(ids_); }
  Completion(const Completion&) = delete;
  Completion& operator=(const Completion&) = delete;

  void on_ready(std::function<void()> ready) override { queue_->on_ready(std::move(ready)); }
  Part next() override;

 private:
  void add(AnswerPart part, std::string& events);
  void finish(std::size_t answer, const llm::RequestUsage& usage);
  OrderedJson usage() const { return usage_json(prompt_tokens_, cached_tokens_, completion_tokens_); }
  std::string event(OrderedJson json) const;

  const ServedModel& model_;
  EngineThread& engine_;
  CompletionRequest request_;  // without its prompts
  ResponseHead head_;
  std::shared_ptr<AnswerQueue> queue_ = std::make_shared<AnswerQueue>();
  std::vector<EngineThread::Id> ids_;
  std::vector<ChoiceText> choices_;    // for a stream without their texts
  std::vector<std::int64_t> offsets_;  // of the next token in the text of a choice
  std::size_t unfinished_;
  std::int64_t prompt_tokens_ = 0, cached_tokens_ = 0, completion_tokens_ = 0;
  OrderedJson timings_;  // of a lone answer
  bool is_begun_ = false;
};

std::string random_id(bool is_chat) {
  std::random_device random;
  return fmt::format("{}-{:08x}{:08x}{:08x}", is_chat ? "chatcmpl" : "cmpl", random(), random(), random());
}

Completion::Completion(CompletionRequest request, const ServedModel& model, EngineThread& engine)
    : model_(model),
      engine_(engine),
      request_(std::move(request)),
      head_{request_.is_chat, random_id(request_.is_chat), model.name, std::time(nullptr)},
      offsets_(request_.answers()),
      unfinished_(request_.answers()) {
  for (std::size_t i = 0; i < unfinished_; ++i) choices_.push_back({.index = i});
  try {
    ids_ = engine.submit(jobs_for(request_, model, queue_));
  } catch (const llm::QueueFull& error) {
    throw HttpError(429, error.what(), {.code = "queue_full", .fields = {{"Retry-After", "1"}}});
  } catch (const EngineStopped& error) {
    throw HttpError(503, error.what());
  }
  request_.prompts.clear();
}

std::string Completion::event(OrderedJson json) const {
  if (request_.include_usage && !json.contains("usage")) json["usage"] = nullptr;
  return fmt::format("data: {}\n\n", dump(json));
}

void Completion::finish(std::size_t answer, const llm::RequestUsage& usage) {
  --unfinished_;
  completion_tokens_ += usage.generated_tokens;
  if (static_cast<std::int64_t>(answer) % request_.n == 0) {  // the first answer to its prompt
    prompt_tokens_ += usage.prompt_tokens;
    cached_tokens_ += usage.cached_tokens;
  }
  if (choices_.size() == 1) timings_ = timings_json(usage);
}

/// Adds a part to its choice, or as an event of a stream.
void Completion::add(AnswerPart part, std::string& events) {
  ChoiceText& choice = choices_[part.answer];
  OrderedJson logprobs;
  if (!part.logprobs.empty())
    logprobs = logprobs_json(head_.is_chat, part.logprobs, model_.tokenizer, offsets_[part.answer]);
  if (part.finish) finish(part.answer, part.usage);
  if (part.evidence) choice.evidence = part.evidence->json();
  if (!request_.stream) {
    choice.text += part.text;
    if (!logprobs.is_null()) append_logprobs(choice.logprobs, std::move(logprobs));
    choice.finish = part.finish;
    return;
  }
  choice.text = std::move(part.text);
  choice.logprobs = std::move(logprobs);
  choice.finish = part.finish;
  OrderedJson json = chunk_json(head_, &choice);
  if (part.progress) json["prompt_progress"] = progress_json(*part.progress);
  if (part.finish && !timings_.is_null()) json["timings"] = timings_;
  events += event(std::move(json));
}

PendingResponse::Part Completion::next() {
  Part result;
  if (request_.stream && !std::exchange(is_begun_, true) && head_.is_chat) {
    for (const ChoiceText& choice : choices_) result.events += event(chunk_json(head_, &choice, true));
  }
  for (AnswerPart& part : queue_->take()) {
    if (!part.error.empty() || part.finish == llm::Finish::cancelled) {
      const HttpError error(part.error.empty() ? 503 : 500,
                            part.error.empty() ? "the server is stopping" : part.error);
      if (!request_.stream) return {.whole = error_response(error)};
      result.events += fmt::format("data: {}\n\n", error_json(error));
      result.is_last = true;
      return result;
    }
    add(std::move(part), result.events);
  }
  if (unfinished_ > 0) return result;
  if (request_.stream) {
    if (request_.include_usage) {
      OrderedJson json = chunk_json(head_, nullptr);
      json["usage"] = usage();
      result.events += event(std::move(json));
    }
    result.events += "data: [DONE]\n\n";
    result.is_last = true;
    return result;
  }
  OrderedJson json = whole_json(head_, choices_);
  json["usage"] = usage();
  if (!timings_.is_null()) json["timings"] = timings_;
  return {.whole = HttpResponse{.body = dump(json)}};
}

}  // namespace

std::unique_ptr<PendingResponse> start_completion(CompletionRequest request, const ServedModel& model,
                                                  EngineThread& engine) {
  return std::make_unique<Completion>(std::move(request), model, engine);
}

}  // namespace moba::app
