#include "app/train_settings.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <string_view>

#include "app/flags.h"

namespace moba::app {
namespace {

using llm::UsageError;
using llm::train::AttentionMode;
using llm::train::LearningRate;
using llm::train::RunSettings;

constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();

const std::map<std::string, DType> kDTypes{{"f32", DType::f32}, {"bf16", DType::bf16}};
const std::map<std::string, AttentionMode> kAttentionModes{{"full", AttentionMode::full},
                                                           {"moba", AttentionMode::moba}};
const std::map<std::string, bool> kLosses{{"all", false}, {"completion", true}};
const std::map<std::string, LearningRate::Kind> kSchedules{{"cosine", LearningRate::Kind::cosine},
                                                           {"wsd", LearningRate::Kind::wsd},
                                                           {"constant", LearningRate::Kind::constant}};

LearningRate rate_from(const TrainFlags& flags) {
  LearningRate rate;
  rate.kind = flags.schedule;
  rate.peak = in_range("--lr", flags.lr, 0.0, 1e30);
  rate.floor = in_range("--min-lr", flags.min_lr, 0.0, 1.0);
  rate.steps = flags.steps;
  rate.warmup = in_range("--warmup", flags.warmup, 0, flags.steps, flags.steps / 50);
  refuse(flags.decay.has_value() && rate.kind != LearningRate::Kind::wsd, "--decay",
         "without --lr-schedule wsd");
  rate.decay = in_range("--decay", flags.decay, 0, flags.steps - rate.warmup,
                        std::min(flags.steps / 5, flags.steps - rate.warmup));
  return rate;
}

void read_attention(const TrainFlags& flags, RunSettings& settings) {
  const std::string always = flags.attention == AttentionMode::full ? "full:1" : "moba:1";
  settings.schedule =
      llm::train::AttentionSchedule::parse("--attn-schedule", flags.attention_schedule.value_or(always));
  read_routing(flags.routing, settings.moba, settings.full_layers);
}

/// "linear:4" or "none".
double rope_factor(const std::string& text) {
  constexpr std::string_view kLinear = "linear:";
  if (text == "none") return 1;
  double factor = 0;
  if (text.starts_with(kLinear)) {
    const char *first = text.data() + kLinear.size(), *end = text.data() + text.size();
    const auto parsed = std::from_chars(first, end, factor);
    if (parsed.ec == std::errc() && parsed.ptr == end && factor >= 1 && factor <= 1e6) return factor;
  }
  throw UsageError(
      fmt::format("--rope-scaling: expected linear:FACTOR, at least 1, or none, got '{}'", text));
}

std::optional<llm::train::LoraSettings> lora_from(const TrainFlags& flags) {
  if (!flags.lora_rank) {
    refuse(flags.lora_alpha.has_value(), "--lora-alpha", "without --lora-rank");
    refuse(flags.lora_targets.has_value(), "--lora-targets", "without --lora-rank");
    return std::nullopt;
  }
  llm::train::LoraSettings lora;
  lora.rank = in_range("--lora-rank", *flags.lora_rank, 1, 65536);
  lora.alpha = in_range("--lora-alpha", flags.lora_alpha, 1e-6, 1e6, 2.0 * static_cast<double>(lora.rank));
  if (flags.lora_targets) {
    const std::vector<std::string> known = lora.targets;
    lora.targets.clear();
    const std::string& text = *flags.lora_targets;
    for (std::size_t begin = 0; begin <= text.size();) {
      const std::size_t end = std::min(text.find(',', begin), text.size());
      const std::string name = text.substr(begin, end - begin);
      if (std::find(known.begin(), known.end(), name) == known.end()) {
        throw UsageError(
            fmt::format("--lora-targets: expected some of {}, got '{}'", fmt::join(known, ","), name));
      }
      lora.targets.push_back(name);
      begin = end + 1;
    }
  }
  return lora;
}

}  // namespace

void add_flags(CLI::App& command, TrainFlags& flags) {
  command.add_option("--config", flags.config, "Train a new model of the shape in this config.json");
  command.add_option("-m,--model", flags.model,
                     "Go on training this model: a Hugging Face folder or GGUF file");
  command.add_option("--tokenizer", flags.tokenizer,
                     "Folder with a tokenizer [the model's; for a new model: tokens are bytes]");
  command.add_option("--data", flags.data, "Text files and folders; .jsonl files hold a document a line")
      ->required();
  command.add_option("--out", flags.out, "Folder for checkpoints and log")->required();
  command.add_flag("--resume", flags.resume, "Go on from the newest checkpoint in --out, if there is one");
  add_choice(command, "--loss", flags.completion_only, kLosses,
             "What counts: all tokens, or only completions of {\"prompt\", \"completion\"} lines [all]");

  const std::string training = "Training";
  add_number(command, "--steps", flags.steps, "Steps of the whole run")->required()->group(training);
  add_number(command, "--seq-len", flags.seq_len,
             "Most tokens of a sequence; longer documents are cut [1024]")
      ->group(training);
  add_number(command, "--batch-tokens", flags.batch_tokens, "Most tokens of a step [8 sequences' worth]")
      ->group(training);
  add_number(command, "--accumulate", flags.accumulate, "Parts that a step is computed in [1]")
      ->group(training);
  add_number(command, "--seed", flags.seed, "Of the first weights and the order of the data [0]")
      ->group(training);
  command.add_option("--lr", flags.lr, "Highest learning rate")->capture_default_str()->group(training);
  add_choice(command, "--lr-schedule", flags.schedule, kSchedules, "How the learning rate falls [cosine]");
  add_number(command, "--warmup", flags.warmup, "Steps over which it rises [2% of all]")->group(training);
  add_number(command, "--decay", flags.decay, "Last steps over which wsd falls [20% of all]")
      ->group(training);
  command.add_option("--min-lr", flags.min_lr, "Where it ends, as a share of --lr")
      ->capture_default_str()
      ->group(training);
  command.add_option("--beta1", flags.beta1, "AdamW")->capture_default_str()->group(training);
  command.add_option("--beta2", flags.beta2, "AdamW")->capture_default_str()->group(training);
  command.add_option("--eps", flags.epsilon, "AdamW")->capture_default_str()->group(training);
  command.add_option("--weight-decay", flags.weight_decay, "AdamW, on matrices")
      ->capture_default_str()
      ->group(training);
  command.add_option("--clip", flags.clip, "Largest norm of the gradient; 0: any")
      ->capture_default_str()
      ->group(training);
  command.get_option("--lr-schedule")->group(training);

  const std::string attention = "Attention";
  add_choice(command, "--attn", flags.attention, kAttentionModes, "Attention mode [moba]");
  command
      .add_option("--attn-schedule", flags.attention_schedule,
                  "By shares of the steps, such as moba:0.9,full:0.1")
      ->excludes("--attn");
  add_routing_flags(command, flags.routing,
                    {.block_size = "512", .top_blocks = "3", .sink = "0", .full_layers = "none"});
  command.add_option("--rope-scaling", flags.rope_scaling,
                     "linear:FACTOR or none [linear, as far as --seq-len exceeds the model's context]");
  for (const char* flag : {"--attn", "--attn-schedule", "--rope-scaling"}) {
    command.get_option(flag)->group(attention);
  }

  const std::string lora = "LoRA";
  add_number(command, "--lora-rank", flags.lora_rank, "Train adapters of this rank instead of the weights")
      ->group(lora);
  command.add_option("--lora-alpha", flags.lora_alpha, "Their weight, times the rank [twice the rank]")
      ->group(lora);
  command
      .add_option("--lora-targets", flags.lora_targets, "Where, such as q_proj,v_proj [every linear layer]")
      ->group(lora);

  const std::string machine = "Machine";
  add_choice(command, "--dtype", flags.dtype, kDTypes,
             "What products are computed in; weights are f32 [f32]");
  command.get_option("--dtype")->group(machine);
  command
      .add_flag("--activation-checkpointing", flags.recompute,
                "Compute activations again for the backward pass instead of keeping them")
      ->group(machine);
  add_number(command, "-t,--threads", flags.threads, "Threads [as many as there are cores]")->group(machine);
  add_number(command, "--save-every", flags.save_every, "Steps between checkpoints [100]")->group(machine);
  add_number(command, "--keep", flags.keep, "Checkpoints that are kept [2]")->group(machine);
}

RunSettings settings_from(const TrainFlags& flags) {
  if (flags.config.has_value() == flags.model.has_value()) {
    throw UsageError(
        fmt::format("expected either --config or -m/--model, got {}", flags.config ? "both" : "neither"));
  }
  RunSettings settings;
  settings.config = flags.config.value_or("");
  settings.model = flags.model.value_or("");
  settings.tokenizer = flags.tokenizer.value_or("");
  settings.data.assign(flags.data.begin(), flags.data.end());
  settings.out = flags.out;
  settings.resume = flags.resume;
  settings.completion_only = flags.completion_only;

  settings.steps = in_range("--steps", flags.steps, 1, kMaxTokens);
  settings.seq_len = in_range("--seq-len", flags.seq_len, 1, kMaxTokens, 1024);
  settings.accumulate = in_range("--accumulate", flags.accumulate, 1, kMaxTokens, 1);
  settings.batch_tokens = flags.batch_tokens.value_or(8 * settings.seq_len * settings.accumulate);
  if (settings.batch_tokens / settings.accumulate < settings.seq_len ||
      settings.batch_tokens / settings.accumulate > kMaxTokens) {
    throw UsageError(fmt::format("--batch-tokens: expected at least {}, --seq-len times --accumulate, got {}",
                                 settings.seq_len * settings.accumulate, settings.batch_tokens));
  }
  settings.seed = in_range("--seed", flags.seed, 0, kMax, 0);
  settings.save_every = in_range("--save-every", flags.save_every, 1, kMaxTokens, 100);
  settings.keep = in_range("--keep", flags.keep, 1, kMaxTokens, 2);

  settings.rate = rate_from(flags);
  settings.adamw = {
      in_range("--beta1", flags.beta1, 0.0, 0.999999), in_range("--beta2", flags.beta2, 0.0, 0.999999),
      in_range("--eps", flags.epsilon, 0.0, 1.0), in_range("--weight-decay", flags.weight_decay, 0.0, 1e3)};
  settings.clip = in_range("--clip", flags.clip, 0.0, 1e30);
  read_attention(flags, settings);
  if (flags.rope_scaling) settings.rope_factor = rope_factor(*flags.rope_scaling);

  settings.computing = {.dtype = flags.dtype,
                        .recompute = flags.recompute,
                        .threads = threads_from(flags.threads),
                        .lora = lora_from(flags)};
  return settings;
}

}  // namespace moba::app
