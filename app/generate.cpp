#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "app/commands.h"
#include "app/document.h"
#include "app/generate_settings.h"
#include "app/program.h"
#include "app/progress.h"
#include "llm/error.h"
#include "llm/formats/weights.h"
#include "llm/memory.h"
#include "llm/session/text_stream.h"
#include "llm/tokenizer/tokenizer.h"
#include "src/stopwatch.h"

namespace moba::app {
namespace {

using llm::UsageError;

enum class Finish : std::uint8_t { end_token, length, context, interrupted };

const char* name_of(Finish finish) {
  switch (finish) {
    case Finish::end_token:
      return "end_token";
    case Finish::length:
      return "length";
    case Finish::context:
      return "context";
    case Finish::interrupted:
      return "interrupted";
  }
  return "?";
}

struct Generation {
  std::vector<std::int32_t> prompt, generated;
  std::string text;
  double load_seconds = 0, prefill_seconds = 0, decode_seconds = 0;
  llm::AttentionSeconds attention;
  Finish finish = Finish::length;
};

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

/// Writes tokens, `logits` giving the first, until one of them, the user or a limit ends it.
Finish write_answer(const GenerateSettings& settings, const llm::Tokenizer& tokenizer, llm::Session& session,
                    std::vector<float> logits, Generation& result) {
  const std::vector<std::int32_t>& ends = tokenizer.end_tokens();
  const auto full = [&] { return static_cast<std::int64_t>(result.generated.size()) == settings.predict; };
  llm::Sampler sampler(settings.sampling);
  llm::TextStream stream;
  const auto emit = [&](const std::string& text) {
    result.text += text;
    if (!settings.json) print(text);
  };
  const auto write = [&] {
    while (!full()) {
      if (interrupt_requested()) return Finish::interrupted;
      const std::int32_t token = sampler(logits);
      if (!settings.ignore_eos && std::find(ends.begin(), ends.end(), token) != ends.end())
        return Finish::end_token;
      result.generated.push_back(token);
      emit(stream.push(tokenizer.piece(token)));
      if (session.length() == settings.context) return Finish::context;
      if (!full()) logits = session.decode(token);
    }
    return Finish::length;
  };
  const Finish finish = write();
  emit(stream.finish());
  return finish;
}

Generation generate(const GenerateSettings& settings, const llm::Weights& weights,
                    const llm::Tokenizer& tokenizer) {
  Generation result;
  result.prompt = prompt_tokens(settings, tokenizer);

  llm::use_threads(settings.session.threads);
  const Stopwatch load;
  llm::Session session(llm::Model::load(weights, {.dtype = settings.dtype}), settings.session);
  result.load_seconds = load.seconds();

  note_interrupts();
  std::vector<float> logits;
  {
    ProgressLine progress("reading", static_cast<double>(result.prompt.size()));
    const Stopwatch prefill;
    logits = session.prefill(result.prompt, std::ref(progress));
    result.prefill_seconds = prefill.seconds();
  }
  const Stopwatch decode;
  result.finish = write_answer(settings, tokenizer, session, std::move(logits), result);
  result.decode_seconds = decode.seconds();
  result.attention = session.attention_seconds();
  return result;
}

void print_json(const Json& settings, const Generation& result) {
  const Json json{{"text", result.text},
                  {"finish", name_of(result.finish)},
                  {"prompt_ids", result.prompt},
                  {"generated_ids", result.generated},
                  {"load_seconds", result.load_seconds},
                  {"prefill_seconds", result.prefill_seconds},
                  {"decode_seconds", result.decode_seconds},
                  {"attention_seconds", result.attention.prefill},
                  {"decode_attention_seconds", result.attention.decode},
                  {"peak_rss_bytes", llm::peak_rss_bytes()},
                  {"settings", settings}};
  print(json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

void print_summary(const Generation& result) {
  const auto prompt = static_cast<double>(result.prompt.size());
  const auto generated = static_cast<double>(result.generated.size());
  const auto rate = [](double tokens, double seconds) { return seconds > 0 ? tokens / seconds : 0.0; };
  const std::string line = fmt::format(
      "prompt {} tokens in {:.2f} s ({:.0f}/s, attention {:.2f} s); answer {} tokens in {:.2f} s ({:.1f}/s); "
      "peak memory {:.2f} GiB\n",
      result.prompt.size(), result.prefill_seconds, rate(prompt, result.prefill_seconds),
      result.attention.prefill, result.generated.size(), result.decode_seconds,
      rate(generated, result.decode_seconds), static_cast<double>(llm::peak_rss_bytes()) / (1 << 30));
  std::fputs(line.c_str(), stderr);
}

int run(const FlagTable& flags, GenerateSettings& settings) {
  complete(flags, settings);
  const llm::Weights weights = llm::Weights::open(settings.model);
  if (settings.context == 0) settings.context = weights.config().context;
  check(settings.session, weights.config());
  const llm::Tokenizer tokenizer = llm::Tokenizer::open(settings.model);
  try {
    const Generation result = generate(settings, weights, tokenizer);
    if (settings.json) {
      print_json(flags.json(), result);
    } else {
      print("\n");
      print_summary(result);
    }
    return result.finish == Finish::interrupted ? kInterruptedCode : 0;
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
