#include "app/session_flags.h"

#include "app/routing_flags.h"
#include "llm/calibrate/calibration.h"

namespace moba::app {

using llm::AttentionMode;

const Words<AttentionMode> kAttentionModes{
    {"full", AttentionMode::full}, {"moba", AttentionMode::moba}, {"moba-naive", AttentionMode::moba_naive}};
const Words<AttentionMode> kDecodeModes{{"full", AttentionMode::full}, {"moba", AttentionMode::moba}};

void add_model_flag(FlagTable& flags, SessionFlags& settings) {
  flags.value("-m,--model", settings.model, "PATH", "Model: a GGUF file or a Hugging Face folder")
      .required()
      .json();
}

void add_dtype_flag(FlagTable& flags, SessionFlags& settings) {
  const Words<DType> dtypes{{"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}};
  flags.choice(
      "--dtype", settings.dtype, dtypes,
      "Data type of the activations and of matrix products; auto: the fastest at bf16's accuracy or "
      "better, in which single tokens may be multiplied in int8 with the blocks of quantised weights");
  flags.report("dtype", [&settings] { return Json(name_of(settings.arithmetic.dtype)); });
  flags.report("int8_decode", [&settings] { return Json(settings.arithmetic.int8_decode); });
}

void add_kv_dtype_flag(FlagTable& flags, SessionFlags& settings) {
  const Words<DType> dtypes{
      {"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}, {"i8", DType::i8}};
  flags.choice("--kv-dtype", settings.kv_dtype, dtypes,
               "Data type of the KV cache; auto: that of --dtype, f16 where --dtype auto is f32");
  flags.report("kv_dtype", [&settings] { return Json(name_of(settings.session.kv_dtype.value())); });
}

void add_calibration_flag(FlagTable& flags, SessionFlags& settings) {
  flags
      .value("--calibration", settings.calibration, "PATH",
             "Routing of each layer, a .moba.json file of moba calibrate, in place of the --moba flags")
      .default_text("none")
      .json([&settings] { return settings.calibration.has_value(); });
}

void add_moba_flags(FlagTable& flags, SessionFlags& settings, bool has_tail) {
  llm::SessionSettings& session = settings.session;
  add_calibration_flag(flags, settings);
  const auto prefill_is_sparse = [&session] { return session.prefill != AttentionMode::full; };
  const auto is_sparse = [&settings, &session] {
    return !settings.calibration &&
           (session.prefill != AttentionMode::full || session.decode != AttentionMode::full);
  };
  constexpr const char* kDefault = "the model's, else {}";
  add_routing_flags(flags, session.moba, kDefault, is_sparse);
  if (has_tail) {
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

namespace {

void use_calibration(const FlagTable& flags, const llm::Weights& weights, SessionFlags& settings) {
  for (const char* flag : {"--moba-chunk-size", "--moba-topk", "--moba-sink", "--moba-full-layers"})
    flags.refuse(flag, "with --calibration");
  const llm::Calibration calibration = llm::read_calibration(*settings.calibration, settings.model, weights);
  settings.session.layers = calibration.layers;
  settings.session.full_layers.clear();
  if (!flags.given("--moba-full-tail")) settings.session.full_tail = calibration.full_tail;
}

}  // namespace

void complete(const FlagTable& flags, const llm::Weights& weights, SessionFlags& settings) {
  const llm::ModelConfig& config = weights.config();
  llm::SessionSettings& session = settings.session;
  settings.arithmetic = settings.dtype ? llm::Arithmetic{.dtype = *settings.dtype} : llm::best_arithmetic();
  const bool halves = !settings.dtype && settings.arithmetic.dtype == DType::f32;
  session.kv_dtype = settings.kv_dtype.value_or(halves ? DType::f16 : settings.arithmetic.dtype);
  if (const auto& trained = config.moba) {
    const auto use = [&](const char* flag, auto& variable, const auto& value) {
      if (!flags.given(flag)) variable = value;
    };
    use("--moba-chunk-size", session.moba.block_size, trained->block_size);
    use("--moba-topk", session.moba.top_k, trained->top_k);
    use("--moba-sink", session.moba.sink_blocks, trained->sink_blocks);
    use("--moba-full-tail", session.full_tail, trained->full_tail);
    use("--moba-full-layers", session.full_layers, trained->full_layers);
    const bool is_changed =
        flags.given("--moba-chunk-size") || flags.given("--moba-topk") || flags.given("--moba-sink");
    if (!is_changed) session.layers = trained->layers;
  }
  limit_sink(flags, session.moba);
  if (settings.calibration) use_calibration(flags, weights, settings);
}

}  // namespace moba::app
