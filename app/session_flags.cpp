#include "app/session_flags.h"

#include "app/routing_flags.h"
#include "llm/formats/read_config.h"

namespace moba::app {
namespace {

using llm::AttentionMode;

/// Returns the MoBA settings in config.json, if the model is a Hugging Face folder that was trained with
/// MoBA.
std::optional<llm::TrainedAttention> trained_attention(const std::filesystem::path& model) {
  const std::filesystem::path file = model / "config.json";
  if (!std::filesystem::is_regular_file(file)) return std::nullopt;
  const nlohmann::json document = llm::load_json(file);
  return llm::read_config(llm::JsonValue(document, file.string())).moba;
}

}  // namespace

const Words<AttentionMode> kAttentionModes{
    {"full", AttentionMode::full}, {"moba", AttentionMode::moba}, {"moba-naive", AttentionMode::moba_naive}};

void add_model_flag(FlagTable& flags, SessionFlags& settings) {
  flags.value("-m,--model", settings.model, "PATH", "Model: a GGUF file or a Hugging Face folder")
      .required()
      .json();
}

void add_dtype_flag(FlagTable& flags, SessionFlags& settings) {
  const Words<DType> dtypes{{"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}};
  flags.choice("--dtype", settings.dtype, dtypes, "Data type of weights, activations and KV cache").json();
}

void add_attention_flags(FlagTable& flags, SessionFlags& settings, bool decodes) {
  llm::SessionSettings& session = settings.session;
  const auto prefill_is_sparse = [&session] { return session.prefill != AttentionMode::full; };
  const auto is_sparse = [&session] {
    return session.prefill != AttentionMode::full || session.decode != AttentionMode::full;
  };
  constexpr const char* kDefault = "the model's, else {}";
  const Words<AttentionMode> decode_modes{{"full", AttentionMode::full}, {"moba", AttentionMode::moba}};
  if (decodes) {
    flags.choice("--decode", session.decode, decode_modes, "Attention for decode").json();
  } else {
    flags.report("decode", [&session] { return Json(name_of(session.decode)); });
  }
  add_routing_flags(flags, session.moba, kDefault, is_sparse);
  if (decodes) {
    flags
        .number("--moba-full-tail", session.full_tail, {0, kMaxTokens},
                "Last tokens of the prompt whose queries use full attention")
        .default_text(kDefault)
        .json(prefill_is_sparse);
  } else {
    flags.report(
        "moba_full_tail", [&session] { return Json(session.full_tail); }, prefill_is_sparse);
  }
  add_full_layers_flag(flags, session.full_layers, kDefault, is_sparse);
}

void complete(const FlagTable& flags, SessionFlags& settings) {
  llm::SessionSettings& session = settings.session;
  if (const auto trained = trained_attention(settings.model)) {
    const auto use = [&](const char* flag, auto& variable, const auto& value) {
      if (!flags.given(flag)) variable = value;
    };
    use("--moba-chunk-size", session.moba.block_size, trained->block_size);
    use("--moba-topk", session.moba.top_k, trained->top_k);
    use("--moba-sink", session.moba.sink_blocks, trained->sink_blocks);
    use("--moba-full-tail", session.full_tail, trained->full_tail);
    use("--moba-full-layers", session.full_layers, trained->full_layers);
  }
  limit_sink(flags, session.moba);
}

}  // namespace moba::app
