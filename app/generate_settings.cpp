#include "app/generate_settings.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <map>
#include <random>
#include <thread>

#include "app/flags.h"
#include "llm/error.h"

namespace moba::app {
namespace {

using llm::AttentionMode;
using llm::UsageError;

const std::map<std::string, AttentionMode> kAttentionModes{
    {"full", AttentionMode::full}, {"moba", AttentionMode::moba}, {"moba-naive", AttentionMode::moba_naive}};
const std::map<std::string, AttentionMode> kDecodeModes{{"full", AttentionMode::full},
                                                        {"moba", AttentionMode::moba}};
const std::map<std::string, DType> kDTypes{{"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}};

bool prefills_sparsely(const llm::SessionSettings& session) {
  return session.prefill != AttentionMode::full;
}

bool uses_moba(const llm::SessionSettings& session) {
  return prefills_sparsely(session) || session.decode != AttentionMode::full;
}

llm::Sampling sampling_from(const GenerateFlags& flags) {
  llm::Sampling sampling;
  sampling.temperature = in_range("--temp", flags.temperature, 0.0, 1e6);
  if (sampling.temperature == 0) {
    constexpr const char* kWhy = "without --temp above 0";
    refuse(flags.top_k.has_value(), "--top-k", kWhy);
    refuse(flags.top_p.has_value(), "--top-p", kWhy);
    refuse(flags.min_p.has_value(), "--min-p", kWhy);
  }
  sampling.top_k = in_range("--top-k", flags.top_k, std::int64_t{0}, kMostTokens, sampling.top_k);
  sampling.top_p = in_range("--top-p", flags.top_p, 0.0, 1.0, sampling.top_p);
  sampling.min_p = in_range("--min-p", flags.min_p, 0.0, 1.0, sampling.min_p);
  constexpr std::int64_t kMostSeed = std::numeric_limits<std::int64_t>::max();
  const std::int64_t seed = in_range("--seed", flags.seed, std::int64_t{0}, kMostSeed,
                                     static_cast<std::int64_t>(std::random_device()()));
  sampling.seed = static_cast<std::uint64_t>(seed);
  return sampling;
}

llm::SessionSettings session_from(const GenerateFlags& flags) {
  llm::SessionSettings session;
  session.prefill = flags.attention;
  session.decode = flags.decode;
  if (!uses_moba(session)) {
    constexpr const char* kWhy = "with --attn full and --decode full";
    refuse(flags.block_size.has_value(), "--moba-chunk-size", kWhy);
    refuse(flags.top_blocks.has_value(), "--moba-topk", kWhy);
    refuse(flags.sink.has_value(), "--moba-sink", kWhy);
    refuse(flags.full_layers.has_value(), "--moba-full-layers", kWhy);
  }
  refuse(!prefills_sparsely(session) && flags.full_tail.has_value(), "--moba-full-tail", "with --attn full");

  Routing& moba = session.moba;
  moba.block_size =
      in_range("--moba-chunk-size", flags.block_size, std::int64_t{1}, kMostTokens, moba.block_size);
  moba.top_k = in_range("--moba-topk", flags.top_blocks, std::int64_t{1}, kMostTokens, moba.top_k);
  const std::int64_t most_sinks = moba.top_k - 1;
  if (flags.sink && (*flags.sink < 0 || *flags.sink > most_sinks)) {
    throw UsageError(fmt::format("--moba-sink: expected 0 to {}, one less than --moba-topk {}; found {}",
                                 most_sinks, moba.top_k, *flags.sink));
  }
  moba.sink_blocks = flags.sink.value_or(std::min(moba.sink_blocks, most_sinks));
  session.full_tail =
      in_range("--moba-full-tail", flags.full_tail, std::int64_t{0}, kMostTokens, session.full_tail);
  if (flags.full_layers) session.full_layers = layer_ranges("--moba-full-layers", *flags.full_layers);

  const auto cores = static_cast<std::int64_t>(std::max(1U, std::thread::hardware_concurrency()));
  session.threads =
      static_cast<int>(in_range("-t/--threads", flags.threads, std::int64_t{1}, std::int64_t{1024}, cores));
  return session;
}

}  // namespace

void add_flags(CLI::App& command, GenerateFlags& flags) {
  command.add_option("-m,--model", flags.model, "Weights: a GGUF file or a Hugging Face folder")->required();
  command.add_option("-p,--prompt", flags.prompt, "What to say to the model");
  command.add_option(
      "-f,--file", flags.file,
      "A file with the prompt, or with -p the document that the prompt is about; -: standard input");
  add_number(command, "-n,--predict,--n-predict", flags.predict, "Tokens to write; -1: until the end")
      ->capture_default_str();
  add_number(command, "-c,--ctx-size", flags.context,
             "Most tokens of prompt and answer [the model's context]");
  add_number(command, "-t,--threads", flags.threads, "Threads [as many as there are cores]");
  add_choice(command, "--dtype", flags.dtype, kDTypes, "Working precision of weights and cache [f32]");
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

  add_choice(command, "--attn", flags.attention, kAttentionModes, "How the prompt is read [full]");
  add_choice(command, "--decode", flags.decode, kDecodeModes, "How the answer is written [full]");
  add_number(command, "--moba-chunk-size", flags.block_size, "Tokens in a block [256]");
  add_number(command, "--moba-topk", flags.top_blocks, "Blocks a token attends to, its own included [4]");
  add_number(command, "--moba-sink", flags.sink,
             "First blocks that are always selected, counted in top-k [1]");
  add_number(command, "--moba-full-tail", flags.full_tail, "Last prompt tokens that are read fully [128]");
  command.add_option("--moba-full-layers", flags.full_layers, "Layers that stay full, such as 0,27-29");
  for (const char* flag : {"--attn", "--decode", "--moba-chunk-size", "--moba-topk", "--moba-sink",
                           "--moba-full-tail", "--moba-full-layers"}) {
    command.get_option(flag)->group("Attention");
  }
}

GenerateSettings settings_from(const GenerateFlags& flags) {
  if (!flags.prompt && !flags.file) throw UsageError("expected -p/--prompt or -f/--file; found neither");
  GenerateSettings settings;
  settings.model = flags.model;
  settings.prompt = flags.prompt;
  settings.file = flags.file;
  settings.predict = in_range("-n/--predict", flags.predict, std::int64_t{-1}, kMostTokens);
  settings.context = in_range("-c/--ctx-size", flags.context, std::int64_t{1}, kMostTokens, std::int64_t{0});
  settings.chat = !flags.no_chat;
  settings.ignore_eos = flags.ignore_eos;
  settings.json = flags.json;
  settings.dtype = flags.dtype;
  settings.sampling = sampling_from(flags);
  settings.session = session_from(flags);
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
  json["decode"] = name_of(session.decode);
  if (uses_moba(session)) {
    json["moba_chunk_size"] = session.moba.block_size;
    json["moba_topk"] = session.moba.top_k;
    json["moba_sink"] = session.moba.sink_blocks;
    if (prefills_sparsely(session)) json["moba_full_tail"] = session.full_tail;
    json["moba_full_layers"] = nlohmann::json::array();
    for (const llm::LayerRange& range : session.full_layers) {
      for (std::int64_t layer = range.first; layer <= range.last; ++layer)
        json["moba_full_layers"].push_back(layer);
    }
  }
  return json;
}

}  // namespace moba::app
