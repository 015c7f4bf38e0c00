#include "app/serve/openai_request.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <random>
#include <utility>

#include "app/serve/http.h"
#include "llm/error.h"
#include "llm/formats/json.h"
#include "llm/session/choose_attention.h"

namespace moba::app {
namespace {

using llm::AttentionMode;
using llm::JsonValue;
using Json = nlohmann::json;

constexpr const char* kBody = "request";
constexpr std::int64_t kMaxCount = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kMaxLogprobs = 20;
constexpr std::size_t kMaxStops = 64;
/// OpenAI's.
constexpr std::int64_t kCompletionTokens = 16;
constexpr double kMaxTemperature = 100, kMaxBias = 100;

/// Calls `parse` and turns its errors, "request: n: expected X, got Y", into those of HTTP.
template <typename Parse>
auto checked(const Parse& parse) {
  try {
    return parse();
  } catch (const std::runtime_error& error) {  // DataError, UsageError
    if (dynamic_cast<const HttpError*>(&error) != nullptr) throw;
    std::string message = error.what();
    const std::string prefix = fmt::format("{}: ", kBody);
    if (!message.starts_with(prefix)) throw HttpError(400, message);
    const std::size_t end = message.find(':', prefix.size());
    std::string param = end == std::string::npos ? "" : message.substr(prefix.size(), end - prefix.size());
    if (param.starts_with("expected")) param.clear();
    throw HttpError(400, param.empty() ? message : message.substr(prefix.size()), {.param = param});
  }
}

std::int64_t integer_of(const JsonValue& value, std::int64_t low, std::int64_t high) {
  const std::int64_t number = value.integer();
  if (number < low || number > high) value.fail(fmt::format("{} to {}", low, high));
  return number;
}

std::int64_t integer_of(const JsonValue& body, const char* name, std::int64_t low, std::int64_t high,
                        std::int64_t otherwise) {
  const auto value = body.find(name);
  return value ? integer_of(*value, low, high) : otherwise;
}

double number_of(const JsonValue& value, double low, double high) {
  const double number = value.number();
  if (!(number >= low && number <= high)) value.fail(fmt::format("{} to {}", low, high));
  return number;
}

double number_of(const JsonValue& body, const char* name, double low, double high, double otherwise) {
  const auto value = body.find(name);
  return value ? number_of(*value, low, high) : otherwise;
}

bool boolean_of(const JsonValue& body, const char* name, bool otherwise = false) {
  const auto value = body.find(name);
  return value ? value->boolean() : otherwise;
}

template <typename T>
void choose(const JsonValue& body, const char* name, std::optional<T>& variable,
            std::initializer_list<std::pair<const char*, std::optional<T>>> words) {
  const auto value = body.find(name);
  if (!value) return;
  std::string listed;
  for (const auto& [word, meaning] : words) {
    if (value->string() == word) {
      variable = meaning;
      return;
    }
    listed += fmt::format("{}{}", listed.empty() ? "" : ", ", word);
  }
  value->fail("one of " + listed);
}

std::vector<std::int32_t> token_ids(const JsonValue& list, const ServedModel& model) {
  std::vector<std::int32_t> ids;
  ids.reserve(list.array().size());
  for (std::size_t i = 0; i < list.array().size(); ++i)
    ids.push_back(static_cast<std::int32_t>(integer_of(list.element(i), 0, model.config.vocab - 1)));
  return ids;
}

void check_model(const JsonValue& body, const ServedModel& model) {
  const auto name = body.find("model");
  if (!name || name->string() == model.name) return;
  throw HttpError(400, fmt::format("model: expected {}, got {}", model.name, name->string()),
                  {.param = "model", .code = "model_not_found"});
}

llm::Sampling sampling_of(const JsonValue& body, const ServedModel& model) {
  llm::Sampling sampling;
  sampling.temperature = number_of(body, "temperature", 0, kMaxTemperature, 1);
  sampling.top_p = number_of(body, "top_p", 0, 1, 1);
  sampling.top_k = std::max<std::int64_t>(0, integer_of(body, "top_k", -1, kMaxCount, 0));
  sampling.min_p = number_of(body, "min_p", 0, 1, 0);
  const auto seed = body.find("seed");
  sampling.seed = seed ? static_cast<std::uint64_t>(seed->integer()) : std::random_device()();
  if (const auto biases = body.find("logit_bias")) {
    for (const auto& [id, bias] : biases->object()) {
      const bool is_number = !id.empty() && id.size() < 10 && id.find_first_not_of("0123456789") == id.npos;
      if (!is_number || std::stoll(id) >= model.config.vocab)
        biases->fail(fmt::format("token ids below {} as names", model.config.vocab), "'" + id + "'");
      if (const auto value = biases->find(id)) {
        sampling.logit_bias.push_back({static_cast<std::int32_t>(std::stoll(id)),
                                       static_cast<float>(number_of(*value, -kMaxBias, kMaxBias))});
      }
    }
  }
  return sampling;
}

std::vector<std::string> stops_of(const JsonValue& body) {
  const auto value = body.find("stop");
  if (!value) return {};
  if (value->value().is_string()) return {value->string()};
  if (!value->value().is_array() || value->array().size() > kMaxStops)
    value->fail(fmt::format("a string or up to {} strings", kMaxStops));
  std::vector<std::string> stops;
  for (std::size_t i = 0; i < value->array().size(); ++i) stops.push_back(value->element(i).string());
  return stops;
}

/// The extensions: attention in prefill and decode, and the routing, whose block sizes are the server's.
struct MobaExtension {
  std::optional<AttentionMode> prefill, decode;
  Routing moba;
  std::vector<Routing> layers;
  std::int64_t full_tail;
};

MobaExtension extension_of(const JsonValue& body, const ServedModel& model) {
  MobaExtension result{model.prefill, model.decode, model.moba, model.layers, model.full_tail};
  const auto moba = body.find("moba");
  if (!moba) return result;
  for (const auto& [name, value] : moba->object()) {
    const auto known = {"attn", "decode", "topk", "sink", "full_tail"};
    if (std::find(known.begin(), known.end(), name) == known.end())
      moba->fail("attn, decode, topk, sink or full_tail", "'" + name + "'");
  }
  choose<AttentionMode>(*moba, "attn", result.prefill,
                        {{"auto", std::nullopt},
                         {"full", AttentionMode::full},
                         {"moba", AttentionMode::moba},
                         {"moba-naive", AttentionMode::moba_naive}});
  choose<AttentionMode>(
      *moba, "decode", result.decode,
      {{"auto", std::nullopt}, {"full", AttentionMode::full}, {"moba", AttentionMode::moba}});
  result.moba.top_k = integer_of(*moba, "topk", 1, kMaxCount, result.moba.top_k);
  const std::int64_t max_sinks = result.moba.top_k - 1;
  result.moba.sink_blocks =
      integer_of(*moba, "sink", 0, max_sinks, std::min(result.moba.sink_blocks, max_sinks));
  for (Routing& routing : result.layers) {
    if (llm::is_full(routing)) continue;
    if (moba->find("topk")) routing.top_k = result.moba.top_k;
    if (moba->find("sink")) routing.sink_blocks = result.moba.sink_blocks;
    routing.sink_blocks = std::min(routing.sink_blocks, routing.top_k - 1);
  }
  result.full_tail = integer_of(*moba, "full_tail", 0, kMaxCount, result.full_tail);
  return result;
}

/// The blocks of requested evidence are those of the routing, or of as many tokens as the request names.
std::optional<std::int64_t> evidence_block_size(const JsonValue& body, const ServedModel& model) {
  constexpr std::int64_t kMinBlock = 16;
  const auto evidence = body.find("evidence");
  if (!evidence) return std::nullopt;
  if (!evidence->value().is_object())
    return evidence->boolean() ? std::optional(std::max(model.moba.block_size, kMinBlock)) : std::nullopt;
  for (const auto& [name, value] : evidence->object())
    if (name != "block_size") evidence->fail("block_size", "'" + name + "'");
  return integer_of(*evidence, "block_size", kMinBlock, kMaxCount,
                    std::max(model.moba.block_size, kMinBlock));
}

struct Prompt {
  std::string text;
  std::vector<std::int32_t> tokens;
  std::vector<llm::TurnText> messages{};
};

/// Completes a request for `prompts`, which are the member `param` of the body.
void fill(CompletionRequest& request, std::vector<Prompt> prompts, const char* param,
          std::optional<std::int64_t> default_tokens, const JsonValue& body, const ServedModel& model) {
  request.stream = boolean_of(body, "stream");
  const bool wants_progress = boolean_of(body, "return_progress");
  request.return_progress = request.stream && wants_progress;
  if (const auto options = body.find("stream_options"))
    request.include_usage = boolean_of(*options, "include_usage");
  request.stop = stops_of(body);
  request.n = integer_of(body, "n", 1, model.max_answers, 1);
  if (static_cast<std::int64_t>(prompts.size()) * request.n > model.max_answers) {
    throw HttpError(400,
                    fmt::format("n: expected at most {} answers to all prompts together, got {}",
                                model.max_answers, static_cast<std::int64_t>(prompts.size()) * request.n),
                    {.param = "n"});
  }
  const llm::Sampling sampling = sampling_of(body, model);
  const MobaExtension extension = extension_of(body, model);
  std::optional<std::int64_t> max_tokens = default_tokens;
  for (const char* name : {"max_tokens", "max_completion_tokens"})
    if (const auto value = body.find(name)) max_tokens = integer_of(*value, 0, kMaxCount);
  const bool ignore_eos = boolean_of(body, "ignore_eos");
  const std::optional<std::int64_t> block_size = evidence_block_size(body, model);

  for (Prompt& prompt : prompts) {
    const auto size = static_cast<std::int64_t>(prompt.tokens.size());
    if (size == 0)
      throw HttpError(400, fmt::format("{}: expected at least one token, got none", param), {.param = param});
    if (size + max_tokens.value_or(0) > model.context) {
      throw HttpError(400,
                      fmt::format("{}: expected at most {} tokens of prompt and answer, got {} and {}", param,
                                  model.context, size, max_tokens.value_or(0)),
                      {.param = param, .code = "context_length_exceeded"});
    }
    const llm::AttentionChoice choice = llm::choose_attention({.prefill = extension.prefill,
                                                               .decode = extension.decode,
                                                               .prompt_tokens = size,
                                                               .moba = extension.moba,
                                                               .calibrated = extension.layers,
                                                               .trained = model.config.moba});
    CompletionPrompt& filled = request.prompts.emplace_back();
    if (block_size) {
      filled.blocks = std::make_shared<const PromptBlocks>(
          prompt_blocks(model.tokenizer, prompt.text, prompt.tokens, prompt.messages, *block_size));
      filled.request.weight_range = *block_size;
    }
    filled.text = std::move(prompt.text);
    filled.request.prompt = std::move(prompt.tokens);
    filled.request.prefill = choice.prefill;
    filled.request.decode = choice.decode;
    filled.request.moba = extension.moba;
    filled.request.layers = extension.layers;
    filled.request.full_tail = extension.full_tail;
    filled.request.sampling = sampling;
    filled.request.max_tokens = max_tokens;
    if (!ignore_eos) filled.request.end_tokens = model.tokenizer.end_tokens();
  }
}

/// Returns the text of a message: a string, or the texts of its parts.
std::string content_of(const JsonValue& message) {
  const auto content = message.find("content");
  if (!content) return "";
  if (content->value().is_string()) return content->string();
  if (!content->value().is_array()) content->fail("a string or an array of parts");
  std::string text;
  for (std::size_t i = 0; i < content->array().size(); ++i) {
    const JsonValue part = content->element(i), type = part.at("type");
    if (type.string() != "text") type.fail("text");
    text += part.at("text").string();
  }
  return text;
}

std::vector<llm::Turn> turns_of(const JsonValue& messages) {
  std::vector<llm::Turn> turns;
  for (std::size_t i = 0; i < messages.array().size(); ++i) {
    const JsonValue message = messages.element(i), role = message.at("role");
    std::string name = role.string();
    if (name == "developer") name = "system";
    if (name != "system" && name != "user" && name != "assistant")
      role.fail("system, developer, user or assistant");
    turns.push_back({name, content_of(message)});
  }
  if (turns.empty()) messages.fail("at least one message", "none");
  return turns;
}

std::vector<Prompt> prompts_of(const JsonValue& value, const ServedModel& model) {
  const auto of_text = [&](const std::string& text) {
    return Prompt{text, model.tokenizer.encode(text, /*add_special=*/true, /*parse_special=*/true)};
  };
  const auto of_ids = [&](const JsonValue& list) {
    Prompt prompt{"", token_ids(list, model)};
    prompt.text = model.tokenizer.decode(prompt.tokens, /*show_special=*/true);
    return prompt;
  };
  constexpr const char* kExpected = "a string, token ids, or an array of these";
  if (value.value().is_string()) return {of_text(value.string())};
  if (!value.value().is_array()) value.fail(kExpected);
  if (value.array().empty()) value.fail(kExpected, "an empty array");
  if (value.array().front().is_number()) return {of_ids(value)};
  if (static_cast<std::int64_t>(value.array().size()) > model.max_answers)
    value.fail(fmt::format("at most {} prompts", model.max_answers));
  std::vector<Prompt> prompts;
  for (std::size_t i = 0; i < value.array().size(); ++i) {
    const JsonValue element = value.element(i);
    if (!element.value().is_string() && !element.value().is_array()) element.fail("a string or token ids");
    prompts.push_back(element.value().is_string() ? of_text(element.string()) : of_ids(element));
  }
  return prompts;
}

}  // namespace

Json parse_body(const std::string& body) {
  return checked([&] {
    Json document = llm::parse_json(body, kBody);
    JsonValue(document, kBody).object();
    return document;
  });
}

CompletionRequest chat_request(const Json& document, const ServedModel& model) {
  return checked([&] {
    const JsonValue body(document, kBody);
    check_model(body, model);
    CompletionRequest request;
    request.is_chat = true;
    const std::int64_t top = integer_of(body, "top_logprobs", 0, kMaxLogprobs, 0);
    if (boolean_of(body, "logprobs")) request.logprobs = top;
    std::vector<Prompt> prompts;
    llm::ChatPrompt chat = llm::chat_prompt(model.tokenizer, turns_of(body.at("messages")));
    prompts.push_back({std::move(chat.text), std::move(chat.ids), std::move(chat.turns)});
    fill(request, std::move(prompts), "messages", std::nullopt, body, model);
    return request;
  });
}

CompletionRequest completion_request(const Json& document, const ServedModel& model) {
  return checked([&] {
    const JsonValue body(document, kBody);
    check_model(body, model);
    CompletionRequest request;
    request.echo = boolean_of(body, "echo");
    if (const auto logprobs = body.find("logprobs"))
      request.logprobs = integer_of(*logprobs, 0, kMaxLogprobs);
    fill(request, prompts_of(body.at("prompt"), model), "prompt", kCompletionTokens, body, model);
    return request;
  });
}

std::vector<std::int32_t> tokenize_request(const Json& document, const ServedModel& model) {
  return checked([&] {
    const JsonValue body(document, kBody);
    return model.tokenizer.encode(body.at("content").string(), boolean_of(body, "add_special"),
                                  boolean_of(body, "parse_special", true));
  });
}

std::vector<std::int32_t> detokenize_request(const Json& document, const ServedModel& model) {
  return checked([&] { return token_ids(JsonValue(document, kBody).at("tokens"), model); });
}

}  // namespace moba::app
