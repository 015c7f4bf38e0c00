#include "llm/train/run.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <system_error>
#include <utility>

#include "llm/error.h"
#include "llm/formats/json.h"
#include "llm/formats/output_file.h"
#include "llm/formats/read_config.h"
#include "llm/formats/weights.h"
#include "llm/formats/write_config.h"
#include "llm/formats/write_safetensors.h"
#include "llm/memory.h"
#include "llm/train/checkpoint.h"
#include "llm/train/corpus.h"
#include "llm/train/packing.h"
#include "src/stopwatch.h"

namespace moba::llm::train {
namespace {

namespace fs = std::filesystem;

constexpr const char* kStateFile = "train_state.json";
constexpr const char* kOptimiserFile = "optimizer.safetensors";
constexpr const char* kLogFile = "log.jsonl";

/// The model that training starts from.
struct SourceModel {
  ModelConfig config;
  nlohmann::ordered_json document = nlohmann::ordered_json::object();  // config.json; empty for GGUF
  std::optional<Weights> weights;
  double deviation = 0.02;  // of new weights; transformers' default
  std::string name;
};

SourceModel open_source(const RunSettings& settings) {
  SourceModel source;
  const bool is_new = settings.model.empty();
  const fs::path& path = is_new ? settings.config : settings.model;
  source.name = path.string();
  if (!is_new) {
    source.weights = Weights::open(path);
    source.config = source.weights->config();
  }
  const fs::path file = is_new ? path : path / "config.json";
  if (is_new || fs::is_directory(path)) {
    const nlohmann::json document = load_json(file);
    if (is_new) {
      const std::string name = file.string();
      const JsonValue root(document, name);
      source.config = read_config(root);
      check_heads(source.config, name);
      if (const auto range = root.find("initializer_range")) source.deviation = range->number();
    }
    source.document = nlohmann::ordered_json::parse(document.dump());
  }
  return source;
}

/// Divides positions (linear RoPE scaling) so that `seq_len` of them fit the model's context.
void grow_context(ModelConfig& config, const RunSettings& settings, const Run::Log& log) {
  RopeScaling& rope = config.rope;
  const bool grows = settings.seq_len > config.context;
  const double needed = static_cast<double>(settings.seq_len) / static_cast<double>(config.context);
  const double factor = settings.rope_factor.value_or(grows ? needed : 1);
  if (factor != 1) {
    if (rope.kind != RopeScaling::Kind::none && rope.kind != RopeScaling::Kind::linear) {
      throw UsageError(fmt::format(
          "--seq-len: expected at most {} (the model's context; its RoPE scaling is not linear), got {}",
          config.context, settings.seq_len));
    }
    rope.factor *= factor;
    rope.kind = RopeScaling::Kind::linear;
    log(fmt::format("positions are divided by {:.6g}", rope.factor));
  }
  config.context = std::max(config.context, settings.seq_len);
}

std::string gibibytes(double bytes) {
  return fmt::format("{:.3g} GiB", bytes / (1 << 30));
}

/// Throws DataError for a model that does not fit into memory, before anything is allocated.
void check_memory(const ModelConfig& config, const ModelSettings& computing, const std::string& name) {
  const double needed = bytes_needed(config, computing);
  const double machine =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  if (needed <= machine) return;
  throw DataError(fmt::format(
      "{}: expected a model and --batch-tokens that fit this machine's {} of memory, got a need of {}", name,
      gibibytes(machine), gibibytes(needed)));
}

/// Creates the folder of a run if it is missing, and locks it against other runs.
class DirectoryLock {
 public:
  explicit DirectoryLock(const fs::path& folder) {
    std::error_code error;
    fs::create_directories(folder, error);
    if (error || !fs::is_directory(folder)) {
      throw DataError(fmt::format("--out: expected a folder that can be created, got {}: {}", folder.string(),
                                  error.message()));
    }
    file_ = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (file_ < 0 || flock(file_, LOCK_EX | LOCK_NB) == 0) return;
    close(file_);
    throw DataError(
        fmt::format("--out: expected a folder that no other run writes to, got {}, locked by another run",
                    folder.string()));
  }
  ~DirectoryLock() { close(file_); }  // releases the lock, as the end of the process does
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;

 private:
  int file_;
};

TextTokens open_tokens(const RunSettings& settings) {
  if (!settings.tokenizer.empty()) return TextTokens::open(settings.tokenizer);
  return settings.model.empty() ? TextTokens::bytes() : TextTokens::open(settings.model);
}

}  // namespace

std::string StepRecord::json() const {
  const nlohmann::ordered_json json{{"step", step},
                                    {"loss", loss},
                                    {"grad_norm", grad_norm},
                                    {"lr", learning_rate},
                                    {"attention", attention},
                                    {"tokens", tokens},
                                    {"seconds", seconds},
                                    {"compute_seconds", compute_seconds},
                                    {"tokens_per_second", tokens_per_second},
                                    {"attention_share", attention_share},
                                    {"memory_gib", memory_gib},
                                    {"epoch", epoch}};
  return json.dump();
}

struct Run::Impl {
  RunSettings settings;
  SourceModel source;
  TextTokens tokens;
  DirectoryLock lock;
  Corpus corpus;
  Packing packing;
  Model model;
  AdamW optimiser;
  Checkpoints checkpoints;
  std::vector<bool> is_full;  // by layer
  std::ofstream log_file;

  std::int64_t step = 0;
  DataPosition position;

  Impl(const RunSettings& with, const Log& log);

  ModelConfig config_of_run(const Log& log) const;
  ModelSettings model_settings() const;
  PackingSettings packing_settings() const;
  void check_layers() const;
  nlohmann::ordered_json identity() const;
  std::vector<Section> sections();
  void begin();
  void resume(const fs::path& checkpoint);
  void open_log();
  void check_space();
  void save();
  std::vector<Routing> routings(AttentionMode attend) const;
  StepRecord do_step();
  [[noreturn]] void fail_at_step(double loss, const std::vector<Batch>& batches,
                                 const std::vector<Routing>& routings);
};

Run::Impl::Impl(const RunSettings& with, const Log& log)
    : settings(with),
      source(open_source(settings)),
      tokens(open_tokens(settings)),
      lock(settings.out),
      corpus(Corpus::open(settings.data, tokens, settings.out / "data", settings.completion_only, log)),
      packing(corpus, packing_settings()),
      model(config_of_run(log), model_settings()),
      optimiser(model.trained(), settings.adamw),
      checkpoints(settings.out) {
  check_layers();
  is_full.resize(static_cast<std::size_t>(source.config.layers));
  for (const LayerRange& range : settings.full_layers)
    std::fill(is_full.begin() + range.first, is_full.begin() + range.last + 1, true);

  checkpoints.tidy();
  const auto newest = checkpoints.newest();
  if (newest && !settings.resume) {
    throw UsageError(fmt::format("--out {}: expected a folder without checkpoints, or --resume, got {}",
                                 settings.out.string(), newest->filename().string()));
  }
  if (settings.resume && !newest) log("no checkpoint yet: beginning at step 0");
  begin();
  if (newest) {
    resume(*newest);
    log(fmt::format("resuming from {}", newest->string()));
  }
  check_space();
  open_log();
}

ModelConfig Run::Impl::config_of_run(const Log& log) const {
  ModelConfig config = source.config;
  grow_context(config, settings, log);
  if (tokens.vocab_size() > config.vocab) {
    throw DataError(
        fmt::format("{}: expected a vocabulary of at least {}, as many as the tokenizer has, got {}",
                    source.name, tokens.vocab_size(), config.vocab));
  }
  check_memory(config, model_settings(), source.name);
  if (settings.schedule.uses(AttentionMode::moba)) {
    config.moba = {.block_size = settings.moba.block_size,
                   .top_k = settings.moba.top_k,
                   .sink_blocks = settings.moba.sink_blocks,
                   .full_layers = settings.full_layers};
  }
  return config;
}

ModelSettings Run::Impl::model_settings() const {
  ModelSettings computing = settings.computing;
  computing.max_tokens = packing_settings().batch_tokens;
  return computing;
}

PackingSettings Run::Impl::packing_settings() const {
  return {settings.seq_len, settings.batch_tokens / settings.accumulate, settings.completion_only,
          static_cast<std::uint64_t>(settings.seed)};
}

void Run::Impl::check_layers() const {
  for (const LayerRange& range : settings.full_layers) {
    if (range.first < 0 || range.last < range.first || range.last >= source.config.layers) {
      throw UsageError(fmt::format("--moba-full-layers: expected layers from 0 to {}, got {}-{}",
                                   source.config.layers - 1, range.first, range.last));
    }
  }
}

/// The settings that a checkpoint shares with the run that resumes from it.
nlohmann::ordered_json Run::Impl::identity() const {
  nlohmann::ordered_json json{{"--seed", settings.seed},
                              {"--seq-len", settings.seq_len},
                              {"--batch-tokens", settings.batch_tokens},
                              {"--accumulate", settings.accumulate},
                              {"--loss", settings.completion_only ? "completion" : "all"},
                              {"--data", corpus.fingerprint()},
                              {"--lora-rank", nullptr}};
  if (settings.computing.lora) {
    json["--lora-rank"] = settings.computing.lora->rank;
    json["--lora-alpha"] = settings.computing.lora->alpha;
    json["--lora-targets"] = settings.computing.lora->targets;
  }
  return json;
}

std::vector<Section> Run::Impl::sections() {
  const Parameters trained = model.trained();
  std::vector<Section> all{{"mean", trained.layout, optimiser.means()},
                           {"square", trained.layout, optimiser.squares()}};
  if (settings.computing.lora) all.push_back({"value", trained.layout, trained.values});
  return all;
}

void Run::Impl::begin() {
  if (source.weights) {
    model.load(*source.weights);
  } else {
    model.initialise(source.deviation, static_cast<std::uint64_t>(settings.seed));
  }
  if (settings.computing.lora) model.initialise_adapters(static_cast<std::uint64_t>(settings.seed));
}

void Run::Impl::resume(const fs::path& checkpoint) {
  const fs::path path = checkpoint / kStateFile;
  const nlohmann::json document = load_json(path);
  const std::string name = path.string();
  const JsonValue state(document, name);
  const JsonValue theirs = state.at("run");
  const nlohmann::ordered_json ours = identity();
  for (const auto& [key, value] : ours.items()) {
    const auto found = theirs.value().find(key);
    if (found != theirs.value().end() && *found == nlohmann::json(value)) continue;
    throw UsageError(fmt::format("{}: expected {} (that of {}), got {}", key,
                                 found == theirs.value().end() ? "nothing" : found->dump(),
                                 checkpoint.string(), value.dump()));
  }
  if (!settings.computing.lora) {
    const Weights weights = Weights::open(checkpoint);
    for (const Layout::Entry& entry : model.layout().entries()) {
      const StoredTensor* stored = weights.find(entry.name);
      if (stored == nullptr || stored->shape != entry.shape) {
        throw DataError(fmt::format("{}: expected a model of the shape of {}, got another {}",
                                    checkpoint.string(), source.name, entry.name));
      }
    }
    model.load(weights);
  }
  read_sections(checkpoint / kOptimiserFile, sections());
  model.values_changed();
  step = state.at("step").integer();
  position = {state.at("epoch").integer(), state.at("batch").integer()};
}

/// Opens the log, with the lines up to the checkpoint's step.
void Run::Impl::open_log() {
  const fs::path path = settings.out / kLogFile;
  std::string kept;
  std::ifstream old(path);
  for (std::string line; std::getline(old, line);) {
    const nlohmann::json record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (record.is_object() && record.value("step", step + 1) <= step) kept += line + "\n";
  }
  replace_file(path, kept);
  log_file.open(path, std::ios::app);
}

void Run::Impl::check_space() {
  const auto& lora = settings.computing.lora;
  const auto all = static_cast<double>(model.layout().size());
  const auto trained = static_cast<double>(model.trained().values.size());
  const double bytes = sizeof(float) * (all + (lora ? 3 : 2) * trained) + (1 << 20);
  const auto copies = static_cast<double>(std::max<std::int64_t>(1, settings.keep + 1 - checkpoints.count()));
  const auto free = static_cast<double>(fs::space(settings.out).available);
  if (free < copies * bytes) {
    throw DataError(fmt::format("--out {}: expected {} of free space for {:.0f} checkpoints, got {}",
                                settings.out.string(), gibibytes(copies * bytes), copies, gibibytes(free)));
  }
}

void Run::Impl::save() {
  checkpoints.save(step, settings.keep, [&](const fs::path& folder) {
    nlohmann::ordered_json config = source.document;
    for (const char* gone : {"rope_parameters", "rope_scaling", "torch_dtype"}) config.erase(gone);
    config.update(config_json(model.config()));
    if (tokens.end() >= 0 && config.value("eos_token_id", nlohmann::json()).is_null())
      config["eos_token_id"] = tokens.end();
    write_file(folder / "config.json", config.dump(2) + "\n");
    tokens.save(folder);

    const std::vector<float> weights = model.merged();
    std::vector<NamedTensor> tensors;
    for (const Layout::Entry& entry : model.layout().entries()) {
      tensors.push_back({entry.name, entry.shape,
                         std::span(weights).subspan(static_cast<std::size_t>(entry.offset),
                                                    static_cast<std::size_t>(entry.count))});
    }
    write_safetensors(folder / "model.safetensors", tensors);
    write_sections(folder / kOptimiserFile, sections());
    const nlohmann::ordered_json state{
        {"step", step}, {"epoch", position.epoch}, {"batch", position.batch}, {"run", identity()}};
    write_file(folder / kStateFile, state.dump(2) + "\n");
  });
}

std::vector<Routing> Run::Impl::routings(AttentionMode attend) const {
  std::vector<Routing> all;
  for (const bool full : is_full)
    all.push_back(full || attend == AttentionMode::full ? Routing::full() : settings.moba);
  return all;
}

/// Throws DataError that names the first tensor that is not finite.
void Run::Impl::fail_at_step(double loss, const std::vector<Batch>& batches,
                             const std::vector<Routing>& routings) {
  std::string where;
  for (const Batch& batch : batches) {
    if (where.empty()) where = model.first_non_finite(batch, routings);
  }
  if (where.empty() && !std::isfinite(loss)) where = "the logits";
  if (where.empty()) {
    // The backward pass goes from the last layer to the first.
    const Parameters trained = model.trained();
    const auto& entries = trained.layout->entries();
    const auto wrong = std::find_if(entries.rbegin(), entries.rend(), [&](const Layout::Entry& entry) {
      const float* first = trained.gradients.data() + entry.offset;
      return std::any_of(first, first + entry.count, [](float value) { return !std::isfinite(value); });
    });
    where = "the gradient" + (wrong == entries.rend() ? "'s norm" : " of " + wrong->name);
  }
  const auto newest = checkpoints.newest();
  throw DataError(
      fmt::format("step {}: expected a finite loss and gradient, got a loss of {}, and {} is the first "
                  "that is not finite; {}",
                  step + 1, loss, where,
                  newest ? "the last checkpoint is " + newest->string() : "no checkpoint was saved"));
}

StepRecord Run::Impl::do_step() {
  const Stopwatch whole;
  const double attention_before = model.attention_seconds();
  StepRecord record;
  record.epoch = position.epoch;
  std::vector<Batch> batches;
  std::int64_t counted = 0;
  for (std::int64_t i = 0; i < settings.accumulate; ++i) {
    const Batch& batch = batches.emplace_back(packing.next(position));
    record.tokens += batch.size();
    counted += batch.size() - std::count(batch.targets.begin(), batch.targets.end(), -1);
  }
  const AttentionMode attend = settings.schedule.at(step, settings.steps);
  const std::vector<Routing> routes = routings(attend);
  const Stopwatch computing;
  const Parameters trained = model.trained();
  clear_gradients(trained);
  double loss = 0;
  for (const Batch& batch : batches) {
    const std::vector<float> losses =
        model.forward_backward(batch, routes, 1.0f / static_cast<float>(counted));
    loss = std::accumulate(losses.begin(), losses.end(), loss);
  }
  record.loss = loss / static_cast<double>(counted);
  record.grad_norm = clip(trained, settings.clip);
  if (!std::isfinite(record.loss) || !std::isfinite(record.grad_norm))
    fail_at_step(record.loss, batches, routes);
  record.learning_rate = settings.rate.at(step);
  ++step;
  optimiser.update(step, record.learning_rate);
  model.values_changed();
  record.compute_seconds = computing.seconds();

  record.step = step;
  record.attention = attend == AttentionMode::full ? "full" : "moba";
  record.seconds = whole.seconds();
  record.tokens_per_second = static_cast<double>(record.tokens) / record.seconds;
  record.attention_share = (model.attention_seconds() - attention_before) / record.seconds;
  record.memory_gib = static_cast<double>(peak_rss_bytes()) / (1 << 30);
  return record;
}

Run::Run(const RunSettings& settings, const Log& log) : impl_(std::make_unique<Impl>(settings, log)) {}
Run::~Run() = default;

std::int64_t Run::step() const {
  return impl_->step;
}
std::int64_t Run::steps() const {
  return impl_->settings.steps;
}
std::int64_t Run::data_tokens() const {
  return impl_->corpus.tokens();
}
std::int64_t Run::parameters() const {
  return impl_->model.layout().size();
}
std::int64_t Run::trained_parameters() const {
  return static_cast<std::int64_t>(impl_->model.trained().values.size());
}

void Run::train(const std::function<void(const StepRecord&)>& on_step,
                const std::function<bool()>& should_stop) {
  Impl& run = *impl_;
  while (run.step < run.settings.steps) {
    const StepRecord record = run.do_step();
    run.log_file << record.json() << '\n' << std::flush;
    if (!run.log_file) fail_to_write(run.settings.out / kLogFile);
    on_step(record);
    const bool stops = should_stop();
    if (stops || run.step == run.settings.steps || run.step % run.settings.save_every == 0) run.save();
    if (stops) return;
  }
}

}  // namespace moba::llm::train
