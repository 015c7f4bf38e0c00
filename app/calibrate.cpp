#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "app/commands.h"
#include "app/plot/charts.h"
#include "app/program.h"
#include "app/progress.h"
#include "app/session_flags.h"
#include "llm/calibrate/attention_work.h"
#include "llm/calibrate/calibration.h"
#include "llm/calibrate/frontier.h"
#include "llm/calibrate/measurements.h"
#include "llm/calibrate/sensitivity.h"
#include "llm/engine/model_fingerprint.h"
#include "llm/engine/sha256.h"
#include "llm/error.h"
#include "llm/eval/loss.h"
#include "llm/formats/weights.h"
#include "llm/session/session_memory.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::app {
namespace {

using llm::FrontierPoint;
using llm::Measurements;
using llm::Score;
using llm::UsageError;
using Tokens = std::vector<std::int32_t>;

struct CalibrateFlags : SessionFlags {
  std::vector<std::filesystem::path> data;
  std::optional<std::string> output, png;
  std::string budget = "1%";
  std::optional<std::string> speed_up;
  std::int64_t seq_len = 8192, sequences = 4, held_out = 4, tail = 1024, seed = 0;
  std::vector<std::int64_t> blocks{16, 32, 64, 128}, keys{512, 1024, 2048};
};

/// An attention of the whole model, by layer.
struct Attention {
  std::string name;
  std::vector<Routing> layers;
};

/// "32/16/1" for 16 blocks of 32, the first one always.
std::string text_of(const Routing& routing) {
  return llm::is_full(routing)
             ? "full"
             : fmt::format("{}/{}/{}", routing.block_size, routing.top_k, routing.sink_blocks);
}

/// A name for the measurements, which says all that they depend on.
std::string key_of(const std::vector<Routing>& layers) {
  std::string key;
  for (const Routing& routing : layers) key += (key.empty() ? "" : " ") + text_of(routing);
  return key;
}

/// Reads "1%" or "5x" as a number. Throws UsageError.
double number_before(const char* flag, const std::string& text, char unit, double low, double high) {
  double value = 0;
  const char* end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, value);
  const bool is_whole = parsed.ec == std::errc() && parsed.ptr + 1 == end && *parsed.ptr == unit;
  if (!is_whole || !(value >= low && value <= high))
    throw UsageError(fmt::format("{}: expected {}{} to {}{}, got '{}'", flag, low, unit, high, unit, text));
  return value;
}

/// Every block size with every number of keys, with and without a sink.
std::vector<Routing> candidates_of(const CalibrateFlags& flags) {
  std::vector<Routing> candidates;
  for (const std::int64_t block : flags.blocks) {
    for (const std::int64_t keys : flags.keys) {
      const std::int64_t top_k = keys / block;
      if (top_k < 2) continue;
      for (const std::int64_t sink : {0, 1})
        candidates.push_back({.block_size = block, .top_k = top_k, .sink_blocks = sink});
    }
  }
  if (candidates.empty())
    throw UsageError("--blocks: expected a block that goes twice into one of --keys, got none");
  return candidates;
}

/// Sequences of full length, taken from the paths in turn: those that are measured, then those that confirm.
/// Throws DataError.
std::vector<Tokens> sequences_of(const CalibrateFlags& flags, const llm::Tokenizer& tokenizer) {
  const auto paths = static_cast<std::int64_t>(flags.data.size()), count = flags.sequences + flags.held_out;
  const std::int64_t per_path = (count + paths - 1) / paths;
  std::vector<std::vector<Tokens>> by_path;
  for (const std::filesystem::path& path : flags.data) {
    by_path.push_back(llm::eval::sequences_of({path}, tokenizer,
                                              {.seq_len = flags.seq_len,
                                               .join = true,
                                               .max_tokens = per_path * flags.seq_len,
                                               .seed = flags.seed}));
    std::int64_t tokens = 0;
    for (const Tokens& sequence : by_path.back()) tokens += static_cast<std::int64_t>(sequence.size());
    if (tokens < per_path * flags.seq_len) {
      throw llm::DataError(
          fmt::format("--data {}: expected at least {} tokens of text ({} sequences of {}), got {}",
                      path.string(), per_path * flags.seq_len, per_path, flags.seq_len, tokens));
    }
  }
  std::vector<Tokens> sequences;
  for (std::int64_t i = 0; i < count; ++i)
    sequences.push_back(
        std::move(by_path[static_cast<std::size_t>(i % paths)][static_cast<std::size_t>(i / paths)]));
  return sequences;
}

/// One run of `moba calibrate`.
class Run {
 public:
  Run(const CalibrateFlags& flags, const llm::Weights& weights, std::vector<Tokens> sequences)
      : flags_(flags),
        candidates_(candidates_of(flags)),
        sequences_(std::move(sequences)),
        model_(llm::Model::load(weights, flags.arithmetic)),
        parallel_(openmp(flags.session.threads)),
        measurements_(*flags.output + ".part", key(weights)) {}

  const std::vector<Routing>& candidates() const { return candidates_; }
  const llm::ModelConfig& config() const { return model_.config(); }
  const Measurements& measurements() const { return measurements_; }

  /// Measures the layers one at a time; returns the frontier of their combinations.
  std::vector<FrontierPoint> measure_layers() {
    llm::SensitivitySettings settings{.candidates = candidates_,
                                      .probe = candidates_.size() / 2,
                                      .tail = flags_.tail,
                                      .threads = flags_.session.threads};
    const auto count = static_cast<std::size_t>(flags_.sequences);
    ProgressLine progress("", static_cast<double>(count));
    std::vector<std::vector<llm::LayerOption>> options(static_cast<std::size_t>(config().layers));
    for (std::size_t s = 0; s < count; ++s) {
      progress.name(fmt::format("layers, text {} of {}:", s + 1, count));
      if (measurements_.sensitivities(s) == nullptr) {
        measurements_.put(s, llm::sensitivities(model_, sequences_[s], settings, [&](double share) {
                            progress(static_cast<double>(s) + share);
                          }));
        measurements_.save();
      }
    }
    for (std::size_t layer = 0; layer < options.size(); ++layer) {
      options[layer].push_back({work_of(Routing::full()), 0});
      for (std::size_t c = 0; c < candidates_.size(); ++c) {
        double sum = 0;
        for (std::size_t s = 0; s < count; ++s) sum += (*measurements_.sensitivities(s))[layer][c];
        options[layer].push_back({work_of(candidates_[c]), sum / static_cast<double>(count)});
      }
    }
    return llm::frontier(options);
  }

  /// Returns the routings of a point of the frontier.
  std::vector<Routing> layers_of(const FrontierPoint& point) const {
    std::vector<Routing> layers;
    for (const std::size_t option : point.choice)
      layers.push_back(option == 0 ? Routing::full() : candidates_[option - 1]);
    return layers;
  }

  /// Measures attentions on sequences [first, last), with full attention as the reference.
  void measure(const std::vector<Attention>& attentions, std::size_t first, std::size_t last) {
    ProgressLine progress("", static_cast<double>(last - first));
    for (std::size_t s = first; s < last; ++s) {
      std::vector<Attention> missing;
      for (const Attention& attention : attentions)
        if (measurements_.score(s, key_of(attention.layers)) == nullptr) missing.push_back(attention);
      if (missing.empty()) continue;
      missing.insert(missing.begin(), full());
      progress.name(fmt::format("predictions, text {} of {}:", s - first + 1, last - first));
      measure(missing, s, [&](double share) { progress(static_cast<double>(s - first) + share); });
      measurements_.save();
    }
  }

  /// Returns the measured sums of an attention over sequences [first, last).
  Score score(const Attention& attention, std::size_t first, std::size_t last) const {
    Score sum;
    for (std::size_t s = first; s < last; ++s) sum += *measurements_.score(s, key_of(attention.layers));
    return sum;
  }

  Attention full() const { return uniform("full", Routing::full()); }
  Attention uniform(const std::string& name, const Routing& routing) const {
    return {name, std::vector<Routing>(static_cast<std::size_t>(config().layers), routing)};
  }
  double speed_up(const Attention& attention) const {
    return llm::speed_up(attention.layers, flags_.seq_len);
  }

 private:
  double work_of(const Routing& routing) const { return llm::attention_work(routing, flags_.seq_len); }

  /// What the measurements depend on.
  std::string key(const llm::Weights& weights) const {
    llm::Sha256 hash;
    hash.add(llm::model_fingerprint(weights, flags_.arithmetic));
    for (const Routing& candidate : candidates_) hash.add(text_of(candidate));
    hash.add(fmt::format("\n{} {}", flags_.sequences, flags_.tail));
    for (const Tokens& tokens : sequences_) hash.add(std::as_bytes(std::span(tokens)));
    return llm::hex(hash.finish());
  }

  void measure(const std::vector<Attention>& attentions, std::size_t sequence,
               const std::function<void(double)>& progress) {
    std::vector<llm::Session> sessions;
    for (const Attention& attention : attentions) {
      llm::SessionSettings settings = flags_.session;
      settings.prefill = llm::AttentionMode::moba;
      settings.full_tail = 0;
      settings.layers = llm::with_blocks_of_full(attention.layers);
      sessions.emplace_back(model_, settings);
    }
    const Tokens& tokens = sequences_[sequence];
    std::vector<double> read(sessions.size());
    const auto all = static_cast<double>(tokens.size() * sessions.size());
    const std::vector<llm::eval::TokenScores> scores =
        llm::eval::token_scores(sessions, 0, tokens, static_cast<std::int64_t>(tokens.size()) / 2, parallel_,
                                [&](std::size_t s, double count) {
                                  read[s] = count;
                                  progress(std::accumulate(read.begin(), read.end(), 0.0) / all);
                                });
    for (std::size_t a = 0; a < attentions.size(); ++a) {
      const llm::eval::TokenScores& of = scores[a];
      measurements_.put(
          sequence, key_of(attentions[a].layers),
          {.loss = std::accumulate(of.losses.begin(), of.losses.end(), 0.0),
           .divergence = std::accumulate(of.divergences.begin(), of.divergences.end(), 0.0),
           .agreement = static_cast<double>(std::count(of.agrees.begin(), of.agrees.end(), true)),
           .tokens = static_cast<std::int64_t>(of.losses.size())});
    }
  }

  const CalibrateFlags& flags_;
  std::vector<Routing> candidates_;
  std::vector<Tokens> sequences_;
  llm::Model model_;
  Parallel parallel_;
  Measurements measurements_;
};

/// The first point of the frontier with at least this much less work, or the last one.
std::size_t point_at(const std::vector<FrontierPoint>& frontier, double speed_up) {
  const double full = frontier.front().work;
  const auto is_slower = [&](const FrontierPoint& point) { return point.work * speed_up > full; };
  const auto found = std::find_if_not(frontier.begin(), frontier.end(), is_slower);
  return static_cast<std::size_t>(std::min(found, frontier.end() - 1) - frontier.begin());
}

/// A measured point of the frontier.
struct Measured {
  std::size_t point;
  Attention attention;
  double increase;  // of the loss, relative
};

/// Follows the frontier: measures some of its points, then between the last that keeps the budget and the
/// next. Returns them from little to much saved work.
std::vector<Measured> follow(Run& run, const std::vector<FrontierPoint>& frontier, std::size_t sequences,
                             double budget, std::optional<double> speed_up) {
  constexpr int kRefinements = 3;
  std::vector<Measured> measured;
  const auto measure = [&](std::vector<std::size_t> points) {
    std::sort(points.begin(), points.end());
    points.erase(std::unique(points.begin(), points.end()), points.end());
    std::vector<Attention> attentions;
    for (const std::size_t point : points) {
      const bool is_known =
          std::any_of(measured.begin(), measured.end(), [&](const Measured& m) { return m.point == point; });
      if (is_known) continue;
      attentions.push_back({"", run.layers_of(frontier[point])});
      measured.push_back({point, attentions.back(), 0});
    }
    run.measure(attentions, 0, sequences);
    const double full = run.score(run.full(), 0, sequences).mean_loss();
    for (Measured& m : measured) m.increase = run.score(m.attention, 0, sequences).mean_loss() / full - 1;
    std::sort(measured.begin(), measured.end(),
              [](const Measured& a, const Measured& b) { return a.point < b.point; });
  };
  std::vector<std::size_t> points{frontier.size() - 1};
  for (const double share : {2.0, 3.0, 4.0, 5.0, 6.5, 8.0}) points.push_back(point_at(frontier, share));
  if (speed_up) points.push_back(point_at(frontier, *speed_up));
  measure(points);
  for (int i = 0; i < kRefinements && !speed_up; ++i) {
    std::size_t kept = 0, next = frontier.size();
    for (const Measured& m : measured) {
      if (m.increase <= budget) kept = m.point;
    }
    for (const Measured& m : measured) {
      if (m.point > kept) next = std::min(next, m.point);
    }
    if (next == frontier.size() || next <= kept + 1) break;
    measure({(kept + next) / 2});
  }
  return measured;
}

Json to_json(const Run& run, const Attention& attention, std::size_t first, std::size_t last) {
  const Score score = run.score(attention, first, last);
  return {{"speed_up", run.speed_up(attention)},
          {"loss", score.mean_loss()},
          {"loss_increase", score.mean_loss() / run.score(run.full(), first, last).mean_loss() - 1},
          {"kl", score.mean_divergence()},
          {"top1_agreement", score.mean_agreement()},
          {"tokens", score.tokens}};
}

std::string row_text(const std::string& name, const Json& row) {
  return fmt::format("{:<28}{:>9.2f}x{:>10.4f}{:>+10.2f}%{:>10.4f}{:>9.1f}%\n", name,
                     row["speed_up"].get<double>(), row["loss"].get<double>(),
                     100 * row["loss_increase"].get<double>(), row["kl"].get<double>(),
                     100 * row["top1_agreement"].get<double>());
}

std::string heading(const std::string& what) {
  return fmt::format("{:<28}{:>10}{:>10}{:>11}{:>10}{:>10}\n", what, "work", "loss", "increase", "KL",
                     "top-1");
}

/// "0-4,7: full" for each routing.
std::string layers_text(const std::vector<Routing>& layers) {
  std::vector<std::string> order;
  for (const Routing& routing : layers) {
    if (std::find(order.begin(), order.end(), text_of(routing)) == order.end())
      order.push_back(text_of(routing));
  }
  std::string text;
  for (const std::string& name : order) {
    std::string numbers;
    const Routing* routing = nullptr;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      if (text_of(layers[l]) != name) continue;
      routing = &layers[l];
      numbers += fmt::format("{}{}", numbers.empty() ? "" : ",", l);
    }
    text += llm::is_full(*routing)
                ? fmt::format("full attention: layers {}\n", numbers)
                : fmt::format("{} blocks of {}{}: layers {}\n", routing->top_k, routing->block_size,
                              routing->sink_blocks > 0 ? ", the first one always" : "", numbers);
  }
  return text;
}

void draw(const std::string& png, const Json& frontier, const Json& plain) {
  Curve found{"calibrated layers", {}}, uniform{"the same routing in every layer", {}};
  for (const Json& row : frontier)
    found.points.push_back({row["speed_up"].get<double>(), 100 * row["loss_increase"].get<double>()});
  for (const Json& row : plain)
    uniform.points.push_back({row["speed_up"].get<double>(), 100 * row["loss_increase"].get<double>()});
  const auto by_x = [](const Point& a, const Point& b) { return a.x < b.x; };
  std::sort(uniform.points.begin(), uniform.points.end(), by_x);
  draw_curves(png, "Increase of the loss, %", {found, uniform}, "full attention's work / work");
}

int calibrate(const FlagTable& table, CalibrateFlags& flags) {
  const double budget = number_before("--budget", flags.budget, '%', 0, 1000) / 100;
  std::optional<double> speed_up;
  if (flags.speed_up) speed_up = number_before("--speed-up", *flags.speed_up, 'x', 1, 1e6);
  if (flags.tail > flags.seq_len / 2) {
    throw UsageError(
        fmt::format("--tail: expected 1 to {}, half of --seq-len, got {}", flags.seq_len / 2, flags.tail));
  }
  const llm::Weights weights = llm::Weights::open(flags.model);
  complete(table, weights, flags);
  if (!flags.output) flags.output = llm::calibration_beside(flags.model).string();
  const llm::Tokenizer tokenizer = llm::Tokenizer::open(flags.model);
  constexpr std::int64_t kSessions = 9;
  check_memory(flags.model, session_memory(weights, flags.arithmetic, flags.session),
               kSessions * flags.seq_len, llm::available_memory());
  llm::use_threads(flags.session.threads);
  Run run(flags, weights, sequences_of(flags, tokenizer));
  const auto measured_on = static_cast<std::size_t>(flags.sequences),
             all = measured_on + static_cast<std::size_t>(flags.held_out);

  note_interrupts();
  try {
    const std::vector<FrontierPoint> frontier = run.measure_layers();
    const std::vector<Measured> followed = follow(run, frontier, measured_on, budget, speed_up);
    const Measured* chosen = nullptr;
    for (const Measured& m : followed) {
      const bool is_chosen = speed_up ? m.point == point_at(frontier, *speed_up) : m.increase <= budget;
      if (is_chosen) chosen = &m;
    }
    Attention result = chosen != nullptr ? chosen->attention : run.full();
    result.name = "calibrated";
    std::vector<Attention> compared{run.full(), result};
    for (const std::int64_t block : flags.blocks) {
      const Routing plain{.block_size = block, .top_k = 1024 / block, .sink_blocks = 1};
      if (plain.top_k > 1)
        compared.push_back(run.uniform(fmt::format("{} blocks of {}", plain.top_k, block), plain));
    }
    run.measure(compared, measured_on, all);

    Json rows = Json::array(), held_out = Json::array(), plain = Json::array();
    for (const Measured& m : followed) rows.push_back(to_json(run, m.attention, 0, measured_on));
    std::string text = heading("frontier, measured texts");
    for (std::size_t i = 0; i < followed.size(); ++i)
      text += row_text(&followed[i] == chosen ? "  chosen" : "", rows[i]);
    text += "\n" + heading("held-out texts");
    for (const Attention& attention : compared) {
      Json row{{"attention", attention.name}};
      row.update(to_json(run, attention, measured_on, all));
      text += row_text(attention.name, row);
      if (&attention > &compared[1]) plain.push_back(row);
      held_out.push_back(row);
    }
    text += "\n" + layers_text(result.layers);
    const double increase = held_out[1]["loss_increase"].get<double>();
    if (increase > budget) {
      text += fmt::format("note: the loss of held-out texts rises by {:.2f}%, more than --budget {}\n",
                          100 * increase, flags.budget);
    }
    llm::write_calibration(*flags.output, {.model = std::filesystem::path(flags.model).filename().string(),
                                           .fingerprint = llm::weights_fingerprint(weights),
                                           .layers = result.layers,
                                           .full_tail = flags.session.full_tail,
                                           .measured = {{"seq_len", flags.seq_len},
                                                        {"positions", "the last half"},
                                                        {"budget", budget},
                                                        {"held_out", held_out},
                                                        {"frontier", rows}}});
    run.measurements().discard();
    print(text + fmt::format("{}: written\n", *flags.output));
    if (flags.png) draw(*flags.png, rows, plain);
  } catch (const Interrupted&) {
    std::fprintf(stderr, "moba calibrate: interrupted; the same command goes on from %s.part\n",
                 flags.output->c_str());
    return kInterruptedCode;
  }
  return 0;
}

}  // namespace

CLI::App* add_calibrate(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command = parent.add_subcommand(
      "calibrate", "Find how a model that was not trained with MoBA may use it, layer by layer");
  const auto table = std::make_shared<FlagTable>(*command);
  const auto flags = std::make_shared<CalibrateFlags>();
  add_model_flag(*table, *flags);
  table
      ->value("--data", flags->data, "PATH",
              "Text files and folders, of the kinds that the model will read, in equal shares")
      .required();
  table
      ->value("-o,--output", flags->output, "PATH",
              "Calibration to write; PATH.part keeps the measurements of a run that is interrupted")
      .default_text("x.moba.json beside x.gguf, model.moba.json in a folder");
  table->value("--budget", flags->budget, "PERCENT",
               "Greatest increase of the loss; the least work within it is chosen");
  table
      ->value("--speed-up", flags->speed_up, "FACTOR",
              "Choose this much less attention work, such as 5x, whatever the loss")
      .default_text("none");
  table->size("--seq-len", flags->seq_len, {64, kMaxTokens}, "Tokens of each text, such as 8k");
  table->number("--sequences", flags->sequences, {1, 1000}, "Texts that are measured");
  table->number("--held-out", flags->held_out, {1, 1000}, "Further texts that confirm the choice");
  table->number("--blocks", flags->blocks, {1, kMaxTokens}, "Block sizes to choose from");
  table->number("--keys", flags->keys, {1, kMaxTokens},
                "Keys that a query attends to, to choose from: blocks times top-k");
  table->size("--tail", flags->tail, {1, kMaxTokens},
              "Last tokens of each text on which layers are measured one at a time");
  table->number("--moba-full-tail", flags->session.full_tail, {0, kMaxTokens},
                "Last tokens of a prompt whose queries will use full attention");
  table->number("--seed", flags->seed, {0, kMaxSeed}, "Random seed of the choice of texts");
  table->value("--png", flags->png, "PATH", "Also draw the frontier into this PNG file");
  add_threads_flag(*table, flags->session.threads);
  add_dtype_flag(*table, *flags);
  command->footer(
      "Example: the least attention work that costs 1% of the loss; moba generate then uses it\n"
      "  moba calibrate -m model.gguf --data books/ --budget 1%\n");
  command->callback([=, &action] { action = [=] { return calibrate(*table, *flags); }; });
  return command;
}

}  // namespace moba::app
