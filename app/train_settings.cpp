#include "app/train_settings.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <string_view>

#include "app/routing_flags.h"

namespace moba::app {
namespace {

using llm::UsageError;
using llm::train::LearningRate;

/// Replaces "linear:4" by "4" and "none" by "1".
std::string check_rope_scaling(std::string& text) {
  constexpr std::string_view kLinear = "linear:";
  std::string factor = text == "none" ? "1" : text.starts_with(kLinear) ? text.substr(kLinear.size()) : "";
  if (!in_range(Range<double>{1, 1e6})(factor).empty())
    return fmt::format("expected linear:FACTOR, at least 1, or none, got '{}'", text);
  text = factor;
  return {};
}

void add_optimizer_flags(FlagTable& flags, TrainSettings& settings) {
  flags.group("Optimizer");
  const Words<LearningRate::Kind> schedules{{"cosine", LearningRate::Kind::cosine},
                                            {"wsd", LearningRate::Kind::wsd},
                                            {"constant", LearningRate::Kind::constant}};
  LearningRate& rate = settings.rate;
  flags.number("--lr", rate.peak, {0, 1e30}, "Peak learning rate");
  flags.choice("--lr-schedule", rate.kind, schedules,
               "Learning rate after warmup; wsd (warmup, stable, decay) falls in the last --decay steps");
  flags.number("--warmup", rate.warmup, {0, kMaxTokens}, "Steps of linear warmup of the learning rate")
      .default_text("2% of --steps");
  flags.number("--decay", rate.decay, {0, kMaxTokens}, "Steps of decay at the end, for --lr-schedule wsd")
      .default_text("20% of --steps");
  flags.number("--min-lr", rate.floor, {0, 1}, "Final learning rate as a share of --lr");
  flags.number("--beta1", settings.adamw.beta1, {0, 0.999999}, "AdamW: decay rate of the first moment");
  flags.number("--beta2", settings.adamw.beta2, {0, 0.999999}, "AdamW: decay rate of the second moment");
  flags.number("--eps", settings.adamw.epsilon, {0, 1}, "AdamW: term added to the denominator");
  flags.number("--weight-decay", settings.adamw.weight_decay, {0, 1e3},
               "AdamW: decoupled weight decay, of matrices only");
  flags.number("--clip", settings.clip, {0, 1e30}, "Maximum norm of the gradient; 0: no clipping");
}

void complete(const FlagTable& flags, LearningRate& rate, std::int64_t steps) {
  rate.steps = steps;
  const auto limit = [&](const char* flag, std::int64_t& value, std::int64_t max, std::int64_t otherwise) {
    if (!flags.given(flag)) value = std::min(otherwise, max);
    if (value > max) throw UsageError(fmt::format("{}: expected 0 to {}, got {}", flag, max, value));
  };
  limit("--warmup", rate.warmup, steps, steps / 50);
  if (rate.kind != LearningRate::Kind::wsd) flags.refuse("--decay", "without --lr-schedule wsd");
  limit("--decay", rate.decay, steps - rate.warmup, steps / 5);
}

}  // namespace

void add_flags(FlagTable& flags, TrainSettings& settings) {
  const Words<bool> losses{{"all", false}, {"completion", true}};
  flags.value("--config", settings.config, "PATH", "Train a new model of the shape in this config.json");
  flags.value("-m,--model", settings.model, "PATH",
              "Train this model further: a Hugging Face folder or a GGUF file");
  flags.value("--tokenizer", settings.tokenizer, "PATH", "Tokenizer: a Hugging Face folder or a GGUF file")
      .default_text("the model's; for a new model, bytes");
  flags
      .value("--data", settings.data, "PATH",
             "Text files, .jsonl files with a document in each line ({\"text\"}, {\"messages\"} or "
             "{\"prompt\", \"completion\"}), and folders of them")
      .required();
  flags.value("--out", settings.out, "PATH", "Folder for checkpoints and log").required();
  flags.toggle("--resume", settings.resume, "Resume from the newest checkpoint in --out, if there is one");
  flags.choice("--loss", settings.completion_only, losses,
               "Tokens that count in the loss: all, or those of the completions of "
               "{\"prompt\", \"completion\"} lines and of the assistant's turns of {\"messages\"} lines");

  flags.group("Steps");
  flags.number("--steps", settings.steps, {1, kMaxTokens}, "Optimizer steps of the whole run").required();
  flags.number("--seq-len", settings.seq_len, {1, kMaxTokens},
               "Maximum sequence length in tokens; longer documents are split");
  flags
      .number("--batch-tokens", settings.batch_tokens, {1, std::numeric_limits<std::int64_t>::max()},
              "Maximum tokens of a step")
      .default_text("8 x --seq-len x --accumulate");
  flags.number("--accumulate", settings.accumulate, {1, kMaxTokens},
               "Micro-batches that a step is split into (gradient accumulation)");
  flags.number("--seed", settings.seed, {0, kMaxSeed},
               "Random seed of the initial weights and the data order");
  add_optimizer_flags(flags, settings);

  flags.group("Attention");
  const Words<std::string> modes{{"full", "full:1"}, {"moba", "moba:1"}};
  flags.choice("--attn", settings.attention, modes, "Attention of the whole run");
  flags
      .value("--attn-schedule", settings.attention, "SCHEDULE",
             "Attention by share of the steps, such as moba:0.9,full:0.1")
      .excludes("--attn")
      .default_text("");
  add_routing_flags(flags, settings.moba);
  add_full_layers_flag(flags, settings.full_layers);
  flags
      .value("--rope-scaling", settings.rope_factor, "linear:FACTOR|none",
             "RoPE scaling: divides positions by FACTOR")
      .check(CLI::Validator(check_rope_scaling, ""))
      .default_text("linear, by as much as --seq-len exceeds the model's context");

  flags.group("LoRA");
  flags
      .number("--lora-rank", settings.lora.rank, {1, 65536},
              "Rank of the low-rank adapters, which are trained instead of the weights")
      .default_text("no adapters");
  flags
      .number("--lora-alpha", settings.lora.alpha, {1e-6, 1e6},
              "Scale of the adapters, multiplied by alpha / rank")
      .default_text("2 x --lora-rank");
  flags
      .choice("--lora-targets", settings.lora.targets, words_of(settings.lora.targets),
              "Linear layers with adapters")
      .default_text("all");

  flags.group("Machine");
  const Words<DType> dtypes{{"f32", DType::f32}, {"bf16", DType::bf16}};
  flags.choice("--dtype", settings.computing.dtype, dtypes,
               "Data type of matrix products and attention; weights and gradients are f32");
  flags.toggle("--activation-checkpointing", settings.computing.recompute,
               "Recompute activations in the backward pass instead of storing them: less memory, more time");
  add_threads_flag(flags, settings.computing.threads);
  flags.number("--save-every", settings.save_every, {1, kMaxTokens}, "Steps between checkpoints");
  flags.number("--keep", settings.keep, {1, kMaxTokens}, "Newest checkpoints to keep");
}

void complete(const FlagTable& flags, TrainSettings& settings) {
  if (flags.given("--config") == flags.given("--model")) {
    throw UsageError(fmt::format("expected either --config or -m/--model, got {}",
                                 flags.given("--config") ? "both" : "neither"));
  }
  if (!flags.given("--batch-tokens")) settings.batch_tokens = 8 * settings.seq_len * settings.accumulate;
  if (settings.batch_tokens / settings.accumulate < settings.seq_len ||
      settings.batch_tokens / settings.accumulate > kMaxTokens) {
    throw UsageError(fmt::format("--batch-tokens: expected at least {}, --seq-len times --accumulate, got {}",
                                 settings.seq_len * settings.accumulate, settings.batch_tokens));
  }
  complete(flags, settings.rate, settings.steps);
  settings.schedule = llm::train::AttentionSchedule::parse("--attn-schedule", settings.attention);
  limit_sink(flags, settings.moba);
  if (!flags.given("--lora-rank")) {
    for (const char* flag : {"--lora-alpha", "--lora-targets"}) flags.refuse(flag, "without --lora-rank");
    return;
  }
  if (!flags.given("--lora-alpha")) settings.lora.alpha = 2.0 * static_cast<double>(settings.lora.rank);
  settings.computing.lora = settings.lora;
}

}  // namespace moba::app
