#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "app/routing_flags.h"
#include "llm/train/run.h"

namespace moba::app {

/// The unchecked command line of `moba train`.
struct TrainFlags {
  std::optional<std::string> config, model, tokenizer;
  std::vector<std::string> data;
  std::string out;
  bool resume = false;
  std::int64_t steps = 0;
  std::optional<std::int64_t> seq_len, batch_tokens, accumulate, seed, save_every, keep, threads;
  bool completion_only = false, recompute = false;
  DType dtype = DType::f32;

  llm::train::LearningRate::Kind schedule = llm::train::LearningRate::Kind::cosine;
  double lr = 3e-4, min_lr = 0.1, beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.1, clip = 1;
  std::optional<std::int64_t> warmup, decay;

  llm::train::AttentionMode attention = llm::train::AttentionMode::moba;
  std::optional<std::string> attention_schedule, rope_scaling;
  RoutingFlags routing;

  std::optional<std::int64_t> lora_rank;
  std::optional<double> lora_alpha;
  std::optional<std::string> lora_targets;
};

void add_flags(CLI::App& command, TrainFlags& flags);

/// Throws UsageError, naming the flag, for values out of range and for flags that contradict each other.
llm::train::RunSettings settings_from(const TrainFlags& flags);

}  // namespace moba::app
