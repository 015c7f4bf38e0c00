#include "app/generate_settings.h"

#include <random>

#include "llm/error.h"

namespace moba::app {

void add_flags(FlagTable& flags, GenerateSettings& settings) {
  add_model_flag(flags, settings);
  flags.value("-p,--prompt", settings.prompt, "TEXT", "Prompt; with -f, the question about the document");
  flags.value(
      "-f,--file", settings.file, "PATH",
      "File with the prompt; with -p, the document, which comes before the question; -: standard input");
  flags
      .number("-n,--predict,--n-predict", settings.predict, {-1, kMaxTokens},
              "Maximum tokens to generate; -1: until the model ends its answer")
      .json();
  flags
      .number("-c,--ctx-size", settings.context, {1, kMaxTokens},
              "Maximum tokens of prompt and answer together; a longer prompt is an error")
      .default_text("the model's context")
      .json();
  add_cache_dir_flags(
      flags, settings,
      "Folder that keeps the KV cache of prompts, so that a document is read once; as in moba serve",
      /*is_json=*/true);
  add_threads_flag(flags, settings.session.threads);
  add_dtype_flag(flags, settings);
  add_kv_dtype_flag(flags, settings);
  flags
      .toggle("--no-chat", settings.chat,
              "Do not apply the chat template; needed for a model whose template is not supported")
      .json();
  flags.toggle("--ignore-eos", settings.ignore_eos, "Continue after the end token").json();
  flags.toggle("--json", settings.json, "Print one JSON object instead of the text");
  flags
      .number("--logprobs", settings.logprobs, {1, kMaxTokens},
              "With --json, log-probabilities of the N likeliest tokens for each generated token")
      .default_text("none");

  flags.group("Sampling");
  llm::Sampling& sampling = settings.sampling;
  const auto is_random = [&sampling] { return sampling.temperature > 0; };
  flags.number("--temp", sampling.temperature, {0, 1e6}, "Temperature; 0: greedy decoding").json();
  flags.number("--top-k", sampling.top_k, {0, kMaxTokens}, "Sample from the K likeliest tokens; 0: from all")
      .json(is_random);
  flags
      .number("--top-p", sampling.top_p, {0, 1},
              "Sample from the likeliest tokens that together reach this probability; 1: from all")
      .json(is_random);
  flags
      .number("--min-p", sampling.min_p, {0, 1},
              "Sample from tokens with at least this probability relative to the likeliest; 0: from all")
      .json(is_random);
  flags.number("-s,--seed", sampling.seed, {0, kMaxSeed}, "Random seed")
      .default_text("random")
      .json(is_random);

  flags.group("Attention");
  const llm::SessionSettings& session = settings.session;
  flags.choice(
      "--attn", settings.prefill, kAttentionModes,
      "Attention for prefill; auto: moba for long prompts if the model was trained with MoBA or has a "
      "calibration beside it (x.moba.json beside x.gguf, model.moba.json in a folder), else full; moba-naive "
      "is MoBA on the reference backend, slow, for comparison");
  flags.report("attn", [&session] { return Json(name_of(session.prefill)); });
  flags.report("attn_reason", [&settings] { return Json(name_of(settings.reason)); });
  flags.choice(
      "--decode", settings.decode, kDecodeModes,
      "Attention for decode; auto: full; moba reads less of a long context, but can lose what an answer "
      "needs");
  flags.report("decode", [&session] { return Json(name_of(session.decode)); });
  add_moba_flags(flags, settings, /*has_tail=*/true);
}

void complete(const FlagTable& flags, GenerateSettings& settings) {
  if (!settings.prompt && !settings.file)
    throw llm::UsageError("expected -p/--prompt or -f/--file, got neither");
  if (settings.sampling.temperature == 0) {
    for (const char* flag : {"--top-k", "--top-p", "--min-p"}) flags.refuse(flag, "without --temp above 0");
  }
  if (!settings.json) flags.refuse("--logprobs", "without --json");
  if (!flags.given("--seed")) settings.sampling.seed = std::random_device()();
}

}  // namespace moba::app
