#include "app/session_flags.h"

#include <fmt/format.h>

#include "app/flags.h"
#include "llm/error.h"
#include "llm/formats/read_config.h"

namespace moba::app {
namespace {

using llm::AttentionMode;

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
  add_routing_flags(command, flags.routing,
                    {.block_size = "what the model was trained with, else 256",
                     .top_blocks = "the same, else 4",
                     .sink = "the same, else 1",
                     .full_layers = "the same"});
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
  read_routing(flags.routing, moba, session.full_layers);
  session.full_tail = in_range("--moba-full-tail", flags.full_tail, 0, kMaxTokens, session.full_tail);
  session.threads = threads_from(flags.threads);

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
