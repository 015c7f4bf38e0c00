#include "app/generate_settings.h"

#include <fmt/format.h>

#include <limits>
#include <random>

#include "app/flags.h"
#include "llm/error.h"

namespace moba::app {
namespace {

using llm::UsageError;

llm::Sampling sampling_from(const GenerateFlags& flags) {
  llm::Sampling sampling;
  sampling.temperature = in_range("--temp", flags.temperature, 0.0, 1e6);
  if (sampling.temperature == 0) {
    constexpr const char* kWhy = "without --temp above 0";
    refuse(flags.top_k.has_value(), "--top-k", kWhy);
    refuse(flags.top_p.has_value(), "--top-p", kWhy);
    refuse(flags.min_p.has_value(), "--min-p", kWhy);
  }
  sampling.top_k = in_range("--top-k", flags.top_k, 0, kMaxTokens, sampling.top_k);
  sampling.top_p = in_range("--top-p", flags.top_p, 0.0, 1.0, sampling.top_p);
  sampling.min_p = in_range("--min-p", flags.min_p, 0.0, 1.0, sampling.min_p);
  constexpr std::int64_t kMaxSeed = std::numeric_limits<std::int64_t>::max();
  const std::int64_t seed =
      in_range("--seed", flags.seed, 0, kMaxSeed, static_cast<std::int64_t>(std::random_device()()));
  sampling.seed = static_cast<std::uint64_t>(seed);
  return sampling;
}

}  // namespace

void add_flags(CLI::App& command, GenerateFlags& flags) {
  add_model_flags(command, flags.session);
  add_dtype_flag(command, flags.session);
  command.add_option("-p,--prompt", flags.prompt, "Prompt for the model");
  command.add_option(
      "-f,--file", flags.file,
      "A file with the prompt, or with -p the document that the prompt is about; -: standard input");
  add_number(command, "-n,--predict,--n-predict", flags.predict, "Tokens to write; -1: until the end")
      ->capture_default_str();
  add_number(command, "-c,--ctx-size", flags.context,
             "Most tokens of prompt and answer [the model's context]");
  command.add_flag("--no-chat", flags.no_chat, "Give the model the bare text, without chat turns");
  command.add_flag("--ignore-eos", flags.ignore_eos, "Write on after the model has ended its answer");
  command.add_flag("--json", flags.json, "Print one JSON object instead of the text");

  const std::string sampling = "Sampling";
  command.add_option("--temp", flags.temperature, "Temperature; 0: always the likeliest token")
      ->capture_default_str()
      ->group(sampling);
  add_number(command, "--top-k", flags.top_k, "Draw from this many of the likeliest tokens; 0: all [40]")
      ->group(sampling);
  command.add_option("--top-p", flags.top_p, "Draw from the likeliest that reach this probability [0.95]")
      ->group(sampling);
  command
      .add_option("--min-p", flags.min_p, "Draw from those this probable relative to the likeliest [0.05]")
      ->group(sampling);
  add_number(command, "-s,--seed", flags.seed, "Makes draws repeatable [random]")->group(sampling);

  add_choice(command, "--attn", flags.attention, kAttentionModes, "Attention for the prefill [full]");
  command.get_option("--attn")->group("Attention");
  add_answer_flags(command, flags.session);
  add_block_flags(command, flags.session);
}

GenerateSettings settings_from(const GenerateFlags& flags) {
  if (!flags.prompt && !flags.file) throw UsageError("expected -p/--prompt or -f/--file, got neither");
  GenerateSettings settings;
  settings.model = flags.session.model;
  settings.prompt = flags.prompt;
  settings.file = flags.file;
  settings.predict = in_range("-n/--predict", flags.predict, -1, kMaxTokens);
  settings.context = in_range("-c/--ctx-size", flags.context, 1, kMaxTokens, 0);
  settings.chat = !flags.no_chat;
  settings.ignore_eos = flags.ignore_eos;
  settings.json = flags.json;
  settings.dtype = flags.session.dtype;
  settings.sampling = sampling_from(flags);
  settings.session = sessions_from(flags.session, {flags.attention}).front();
  return settings;
}

nlohmann::ordered_json to_json(const GenerateSettings& settings) {
  const llm::SessionSettings& session = settings.session;
  nlohmann::ordered_json json{{"model", settings.model},           {"predict", settings.predict},
                              {"ctx_size", settings.context},      {"threads", session.threads},
                              {"dtype", name_of(settings.dtype)},  {"chat", settings.chat},
                              {"ignore_eos", settings.ignore_eos}, {"temp", settings.sampling.temperature}};
  if (settings.sampling.temperature > 0) {
    json["top_k"] = settings.sampling.top_k;
    json["top_p"] = settings.sampling.top_p;
    json["min_p"] = settings.sampling.min_p;
    json["seed"] = settings.sampling.seed;
  }
  json["attn"] = name_of(session.prefill);
  add_attention(json, session);
  return json;
}

}  // namespace moba::app
