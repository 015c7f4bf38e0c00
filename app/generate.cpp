#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "app/commands.h"
#include "app/document.h"
#include "app/generate_settings.h"
#include "app/logprobs.h"
#include "app/program.h"
#include "app/progress.h"
#include "llm/engine/engine.h"
#include "llm/error.h"
#include "llm/formats/weights.h"
#include "llm/memory.h"
#include "llm/session/session_memory.h"
#include "llm/session/text_stream.h"
#include "llm/tokenizer/tokenizer.h"
#include "src/stopwatch.h"

namespace moba::app {
namespace {

using llm::UsageError;

/// Prompts beyond this many tokens are worth advice on attention.
constexpr std::int64_t kLongPrompt = 4096;

/// Returns the name of the end of an answer; the program stops one only if the user interrupts it.
std::string_view finish_name(llm::Finish finish) {
  return finish == llm::Finish::stopped ? "interrupted" : llm::name_of(finish);
}

struct Generation {
  std::vector<std::int32_t> prompt, generated;
  std::string text;
  double load_seconds = 0;
  llm::RequestUsage usage;
  llm::Finish finish = llm::Finish::length;
  Json logprobs = Json::array();
};

Json logprobs_json(const TokenLogprobs& logprobs, const llm::Tokenizer& tokenizer) {
  const auto entry = [&](const TokenLogprob& of) {
    return Json{{"id", of.id}, {"token", tokenizer.piece(of.id)}, {"logprob", of.logprob}};
  };
  Json json = entry(logprobs.token);
  for (const TokenLogprob& top : logprobs.top) json["top_logprobs"].push_back(entry(top));
  return json;
}

std::string prompt_text(const GenerateSettings& settings) {
  if (!settings.file) return *settings.prompt;
  const std::string document = read_document(*settings.file);
  return settings.prompt ? document + "\n\n" + *settings.prompt : document;
}

std::vector<std::int32_t> prompt_tokens(const GenerateSettings& settings, const llm::Tokenizer& tokenizer) {
  const std::string text = prompt_text(settings);
  std::vector<std::int32_t> ids = settings.chat
                                      ? apply_chat_template(tokenizer, {{"user", text}})
                                      : tokenizer.encode(text, /*add_special=*/true, /*parse_special=*/true);
  const char* flag = settings.file ? "-f/--file" : "-p/--prompt";
  if (ids.empty()) throw UsageError(fmt::format("{}: expected at least one token, got an empty text", flag));
  if (static_cast<std::int64_t>(ids.size()) > settings.context) {
    throw UsageError(fmt::format("{}: expected at most {} tokens (-c/--ctx-size), got {}", flag,
                                 settings.context, ids.size()));
  }
  return ids;
}

/// Chooses the attention where it is left to the program, and says so if that may be worth a flag.
void choose_attention(GenerateSettings& settings, const llm::ModelConfig& config, std::int64_t prompt) {
  const llm::AttentionChoice choice = llm::choose_attention({.prefill = settings.prefill,
                                                             .decode = settings.decode,
                                                             .prompt_tokens = prompt,
                                                             .moba = settings.session.moba,
                                                             .calibrated = settings.session.layers,
                                                             .trained = config.moba});
  settings.session.prefill = choice.prefill;
  settings.session.decode = choice.decode;
  settings.reason = choice.reason;
  if (choice.reason == llm::AttentionReason::not_trained && prompt > kLongPrompt) {
    std::fprintf(
        stderr,
        "note: --attn moba reads long prompts faster; this model was not trained with it: `moba calibrate` "
        "finds where it may be used, `moba eval` checks its quality\n");
  }
}

llm::Request request_for(const GenerateSettings& settings, const llm::Tokenizer& tokenizer) {
  llm::Request request;
  request.prefill = settings.session.prefill;
  request.decode = settings.session.decode;
  request.moba = settings.session.moba;
  request.layers = settings.session.layers;
  request.full_tail = settings.session.full_tail;
  request.sampling = settings.sampling;
  if (settings.predict >= 0) request.max_tokens = settings.predict;
  if (!settings.ignore_eos) request.end_tokens = tokenizer.end_tokens();
  return request;
}

/// Reads the prompt and writes the answer, until one of its tokens, the user or a limit ends it.
Generation generate(const GenerateSettings& settings, const llm::Weights& weights,
                    const llm::Tokenizer& tokenizer, std::vector<std::int32_t> prompt) {
  Generation result;
  result.prompt = std::move(prompt);

  llm::use_threads(settings.session.threads);
  const Stopwatch load;
  llm::EngineSettings for_engine = engine_settings(settings, weights, "generate");
  for_engine.cache_bytes = std::numeric_limits<std::size_t>::max();  // check_memory() has decided
  llm::Engine engine(llm::Model::load(weights, settings.arithmetic), std::move(for_engine));
  result.load_seconds = load.seconds();

  note_interrupts();
  std::optional<ProgressLine> progress;
  progress.emplace("reading", static_cast<double>(result.prompt.size()));
  llm::TextStream stream;
  const auto emit = [&](const std::string& text) {
    progress.reset();
    result.text += text;
    if (!settings.json) print(text);
  };
  llm::Request request = request_for(settings, tokenizer);
  request.prompt = result.prompt;
  request.on_progress = [&](double tokens_read, const llm::RequestUsage&) { (*progress)(tokens_read); };
  request.on_token = [&](std::int32_t token, std::span<const float> logits) {
    result.generated.push_back(token);
    if (settings.logprobs > 0)
      result.logprobs.push_back(logprobs_json(logprobs_of(token, logits, settings.logprobs), tokenizer));
    emit(stream.push(tokenizer.piece(token)));
    return !interrupt_requested();
  };
  request.on_finish = [&](llm::Finish finish, const llm::RequestUsage& usage) {
    result.finish = finish;
    result.usage = usage;
  };
  engine.submit(std::move(request));
  while (engine.step()) {
  }
  emit(stream.finish());
  return result;
}

void print_json(const Json& settings, const Generation& result) {
  Json json{{"text", result.text},
            {"finish", finish_name(result.finish)},
            {"prompt_ids", result.prompt},
            {"generated_ids", result.generated},
            {"cached_tokens", result.usage.cached_tokens},
            {"load_seconds", result.load_seconds},
            {"prefill_seconds", result.usage.prefill_seconds},
            {"decode_seconds", result.usage.decode_seconds},
            {"attention_seconds", result.usage.attention.prefill},
            {"decode_attention_seconds", result.usage.attention.decode},
            {"peak_rss_bytes", llm::peak_rss_bytes()},
            {"settings", settings}};
  if (!result.logprobs.empty()) json["logprobs"] = result.logprobs;
  print(json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

/// "full attention", or "moba attention, full in decode".
std::string attention_text(const llm::SessionSettings& session) {
  const std::string prefill = fmt::format("{} attention", name_of(session.prefill));
  return session.prefill == session.decode
             ? prefill
             : fmt::format("{}, {} in decode", prefill, name_of(session.decode));
}

void print_summary(const GenerateSettings& settings, const Generation& result) {
  const auto prompt = static_cast<double>(result.prompt.size());
  const auto generated = static_cast<double>(result.generated.size());
  const auto rate = [](double tokens, double seconds) { return seconds > 0 ? tokens / seconds : 0.0; };
  const std::string line = fmt::format(
      "prompt {} tokens in {:.2f} s ({:.0f}/s, attention {:.2f} s); answer {} tokens in {:.2f} s ({:.1f}/s); "
      "{}, KV cache {}, {}; peak memory {:.2f} GiB\n",
      result.prompt.size(), result.usage.prefill_seconds, rate(prompt, result.usage.prefill_seconds),
      result.usage.attention.prefill, result.generated.size(), result.usage.decode_seconds,
      rate(generated, result.usage.decode_seconds), name_of(settings.arithmetic.dtype),
      name_of(settings.session.kv_dtype.value()), attention_text(settings.session),
      static_cast<double>(llm::peak_rss_bytes()) / (1 << 30));
  std::fputs(line.c_str(), stderr);
}

int run(const FlagTable& flags, GenerateSettings& settings) {
  complete(flags, settings);
  const llm::Weights weights = llm::Weights::open(settings.model);
  find_calibration(flags, settings);
  complete(flags, weights, settings);
  if (settings.context == 0) settings.context = weights.config().context;
  check(settings.session, weights.config());
  if (settings.logprobs > weights.config().vocab) {
    throw UsageError(fmt::format("--logprobs: expected at most {} (the vocabulary), got {}",
                                 weights.config().vocab, settings.logprobs));
  }
  const llm::Tokenizer tokenizer = llm::Tokenizer::open(settings.model);
  std::vector<std::int32_t> prompt = prompt_tokens(settings, tokenizer);
  choose_attention(settings, weights.config(), static_cast<std::int64_t>(prompt.size()));
  const std::int64_t answer = std::max<std::int64_t>(0, settings.predict);
  check_memory(settings.model, session_memory(weights, settings.arithmetic, settings.session),
               std::min(settings.context, static_cast<std::int64_t>(prompt.size()) + answer),
               llm::available_memory());
  try {
    const Generation result = generate(settings, weights, tokenizer, std::move(prompt));
    if (settings.json) {
      Json json = flags.json();
      json["requested"] = flags.requested();
      print_json(json, result);
    } else {
      print("\n");
      print_summary(settings, result);
    }
    return result.finish == llm::Finish::stopped ? kInterruptedCode : 0;
  } catch (const Interrupted&) {
    std::fputs("moba generate: interrupted during prefill\n", stderr);
    return kInterruptedCode;
  }
}

}  // namespace

CLI::App* add_generate(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command = parent.add_subcommand("generate", "Read a prompt or a long document and answer");
  const auto flags = std::make_shared<FlagTable>(*command);
  const auto settings = std::make_shared<GenerateSettings>();
  add_flags(*flags, *settings);
  command->footer(
      "Example: ask about a long document, reading it with MoBA\n"
      "  moba generate -m SmolLM2-135M-Instruct.Q4_1.gguf -f report.txt -p \"What did the audit find?\" "
      "--attn moba\n");
  command->callback([=, &action] { action = [=] { return run(*flags, *settings); }; });
  return command;
}

}  // namespace moba::app
