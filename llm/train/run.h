#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "llm/config.h"
#include "llm/train/adamw.h"
#include "llm/train/model.h"
#include "llm/train/schedule.h"
#include "moba/attention.h"

namespace moba::llm::train {

struct RunSettings {
  /// The model to train: a new one with the shape of `config` (config.json), or `model` (Hugging Face folder
  /// or GGUF file).
  std::filesystem::path config, model;
  /// Empty: the model's tokenizer, or bytes if it has none.
  std::filesystem::path tokenizer;
  std::vector<std::filesystem::path> data;
  std::filesystem::path out;
  bool resume = false;

  std::int64_t steps = 0;
  std::int64_t seq_len = 1024;
  /// Maximum of tokens in a step, in `accumulate` batches one after the other.
  std::int64_t batch_tokens = 0;
  std::int64_t accumulate = 1;
  std::int64_t seed = 0;
  bool completion_only = false;
  std::int64_t save_every = 100, keep = 2;

  LearningRate rate;
  AdamW::Settings adamw;
  double clip = 1;
  AttentionSchedule schedule{{}};
  Routing moba;
  std::vector<LayerRange> full_layers;
  /// Divisor of positions; unset: seq_len over the model's context if that is above 1.
  std::optional<double> rope_factor;
  ModelSettings computing;
};

/// The record of a step, in the order of its fields in the log.
struct StepRecord {
  std::int64_t step = 0;
  double loss = 0, grad_norm = 0, learning_rate = 0;
  std::string_view attention;
  std::int64_t tokens = 0;  // of this step
  double seconds = 0, tokens_per_second = 0;
  /// Seconds in the forward and backward pass and the optimiser.
  double compute_seconds = 0;
  /// Share of `seconds` in attention.
  double attention_share = 0;
  double memory_gib = 0;
  std::int64_t epoch = 0;

  /// Returns the line of log.jsonl.
  std::string json() const;
};

/// A training run.
class Run {
 public:
  using Log = std::function<void(const std::string&)>;

  /// Prepares everything that the first step needs. Throws UsageError or DataError for every failure that can
  /// be detected beforehand. `log` receives notes to the user.
  Run(const RunSettings& settings, const Log& log);
  ~Run();

  /// Returns the number of completed steps, above 0 at the start of a resumed run.
  std::int64_t step() const;
  std::int64_t steps() const;
  std::int64_t data_tokens() const;
  std::int64_t parameters() const;
  std::int64_t trained_parameters() const;

  /// Trains until all steps are done or `should_stop()`, and saves. Throws DataError for a loss or gradient
  /// that is not finite, and for a file that cannot be written.
  void train(const std::function<void(const StepRecord&)>& on_step, const std::function<bool()>& should_stop);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moba::llm::train
