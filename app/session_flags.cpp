#include "app/session_flags.h"

#include <fmt/format.h>

#include <algorithm>
#include <thread>

#include "app/flags.h"
#include "llm/error.h"
#include "llm/formats/read_config.h"

namespace moba::app {
namespace {

using llm::AttentionMode;
using llm::UsageError;

const std::map<std::string, AttentionMode> kDecodeModes{{"full", AttentionMode::full},
                                                        {"moba", AttentionMode::moba}};
const std::map<std::string, DType> kDTypes{{"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}};

/// Returns the MoBA settings in config.json, if the model is a Hugging Face folder that was trained with
/// MoBA.
std::optional<llm::TrainedAttention> trained_attention(const std::filesystem::path& model) {
  const std::filesystem::path file = model / "config.json";
  if (!std::filesystem::is_regular_file(file)) return std::nullopt;
  const nlohmann::json document = llm::load_json(file);
  return llm::read_config(llm::JsonValue(document, file.string())).moba;
}

}  // namespace

void add_model_flags(CLI::App& command, SessionFlags& flags) {
  command.add_option("-m,--model", flags.model, "Weights: a GGUF file or a Hugging Face folder")->required();
  add_number(command, "-t,--threads", flags.threads, "Threads [as many as there are cores]");
}

void add_dtype_flag(CLI::App& command, SessionFlags& flags) {
  add_choice(command, "--dtype", flags.dtype, kDTypes, "Working precision of weights and cache [f32]");
}

void add_block_flags(CLI::App& command, SessionFlags& flags) {
  const std::string group = "Attention";
  add_number(command, "--moba-chunk-size", flags.block_size,
             "Tokens in a block [what the model was trained with, else 256]")
      ->group(group);
  add_number(command, "--moba-topk", flags.top_blocks,
             "Blocks a token attends to, its own included [the same, else 4]")
      ->group(group);
  add_number(command, "--moba-sink", flags.sink,
             "First blocks that are always selected, counted in top-k [the same, else 1]")
      ->group(group);
  command
      .add_option("--moba-full-layers", flags.full_layers,
                  "Layers that stay full, such as 0,27-29 [the same]")
      ->group(group);
}

void add_answer_flags(CLI::App& command, SessionFlags& flags) {
  const std::string group = "Attention";
  add_choice(command, "--decode", flags.decode, kDecodeModes, "Attention for the decode [full]");
  command.get_option("--decode")->group(group);
  add_number(command, "--moba-full-tail", flags.full_tail,
             "Last prompt tokens that are read fully [the same, else 128]")
      ->group(group);
}

std::vector<llm::SessionSettings> sessions_from(const SessionFlags& flags,
                                                const std::vector<AttentionMode>& prefills) {
  llm::SessionSettings session;
  session.decode = flags.decode;
  Routing& moba = session.moba;
  if (const auto trained = trained_attention(flags.model)) {
    moba.block_size = trained->block_size;
    moba.top_k = trained->top_k;
    moba.sink_blocks = trained->sink_blocks;
    session.full_tail = trained->full_tail;
    session.full_layers = trained->full_layers;
  }
  moba.block_size =
      in_range("--moba-chunk-size", flags.block_size, std::int64_t{1}, kMostTokens, moba.block_size);
  moba.top_k = in_range("--moba-topk", flags.top_blocks, std::int64_t{1}, kMostTokens, moba.top_k);
  const std::int64_t most_sinks = moba.top_k - 1;
  if (flags.sink && (*flags.sink < 0 || *flags.sink > most_sinks)) {
    throw UsageError(fmt::format("--moba-sink: expected 0 to {}, one less than --moba-topk {}, got {}",
                                 most_sinks, moba.top_k, *flags.sink));
  }
  moba.sink_blocks = flags.sink.value_or(std::min(moba.sink_blocks, most_sinks));
  session.full_tail =
      in_range("--moba-full-tail", flags.full_tail, std::int64_t{0}, kMostTokens, session.full_tail);
  if (flags.full_layers) session.full_layers = layer_ranges("--moba-full-layers", *flags.full_layers);

  const auto cores = static_cast<std::int64_t>(std::max(1U, std::thread::hardware_concurrency()));
  session.threads =
      static_cast<int>(in_range("-t/--threads", flags.threads, std::int64_t{1}, std::int64_t{1024}, cores));

  std::vector<llm::SessionSettings> sessions(prefills.size(), session);
  for (std::size_t i = 0; i < prefills.size(); ++i) sessions[i].prefill = prefills[i];
  return sessions;
}

void add_attention(nlohmann::ordered_json& json, const llm::SessionSettings& session) {
  const bool prefills_sparsely = session.prefill != AttentionMode::full;
  json["decode"] = name_of(session.decode);
  if (!prefills_sparsely && session.decode == AttentionMode::full) return;
  json["moba_chunk_size"] = session.moba.block_size;
  json["moba_topk"] = session.moba.top_k;
  json["moba_sink"] = session.moba.sink_blocks;
  if (prefills_sparsely) json["moba_full_tail"] = session.full_tail;
  json["moba_full_layers"] = layers_in(session.full_layers);
}

}  // namespace moba::app
