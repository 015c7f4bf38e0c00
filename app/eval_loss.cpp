#include "llm/eval/loss.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "app/eval.h"
#include "app/flags.h"
#include "app/plot/charts.h"
#include "app/program.h"
#include "app/progress.h"
#include "llm/error.h"

namespace moba::app {
namespace {

using llm::eval::Losses;
using llm::eval::Portion;
using llm::eval::Positions;
using Sequences = std::vector<std::vector<std::int32_t>>;

struct LossFlags : EvalFlags {
  llm::eval::SequenceSettings sequences;
  std::optional<std::string> trailing;
  std::int64_t trailing_tokens = 0, buckets = 16;
};

/// The losses under one attention variant.
struct Prediction {
  Losses losses;
  double seconds = 0;
};

/// A mean with its interval, where there are portions enough for one.
struct Estimate {
  double value;
  std::optional<llm::eval::Interval> interval;
  std::int64_t tokens = 0;
};

Estimate estimate(const std::vector<Portion>& portions) {
  Estimate result{llm::eval::mean(portions), std::nullopt, 0};
  for (const Portion& portion : portions) result.tokens += portion.count;
  if (portions.size() >= 2 && std::isfinite(result.value)) result.interval = bootstrap(portions);
  return result;
}

/// "2k" tokens, or a share of the sequence such as 0.1.
std::int64_t trailing_from(const std::optional<std::string>& text, std::int64_t seq_len) {
  if (!text) return std::max<std::int64_t>(1, seq_len / 16);  // the paper's 2K of 32K
  if (text->find('.') == std::string::npos) return size_from("--trailing", *text, {1, seq_len - 1});
  double share = 0;
  const char* end = text->data() + text->size();
  const auto parsed = std::from_chars(text->data(), end, share);
  if (parsed.ec != std::errc() || parsed.ptr != end || !(share > 0 && share < 1)) {
    throw llm::UsageError(
        fmt::format("--trailing: expected tokens or a share between 0 and 1, got '{}'", *text));
  }
  const auto tokens = std::llround(share * static_cast<double>(seq_len));
  return std::clamp<std::int64_t>(tokens, 1, seq_len - 1);
}

/// The variant with full attention, which the others are compared with.
std::optional<std::size_t> reference_of(const Subject& subject) {
  for (std::size_t w = 0; w < subject.variants.size() && subject.variants.size() > 1; ++w)
    if (subject.variants[w].session.prefill == llm::AttentionMode::full) return w;
  return std::nullopt;
}

/// Fills `predictions`, one for each variant, sequence by sequence. Throws Interrupted; what is in them then
/// is the same sequences for every variant.
void predict(const Subject& subject, const llm::Model& model, const Sequences& sequences,
             const Positions& positions, std::vector<Prediction>& predictions) {
  double total = 0, done = 0;
  for (const auto& sequence : sequences) total += static_cast<double>(sequence.size());
  total *= static_cast<double>(subject.variants.size());
  ProgressLine progress("", total);
  const std::optional<std::size_t> reference = reference_of(subject);
  const Parallel parallel = openmp(subject.variants.front().session.threads);
  std::vector<llm::Session> sessions;
  for (const Variant& variant : subject.variants) sessions.emplace_back(model, variant.session);

  for (const auto& sequence : sequences) {
    std::vector<double> read(sessions.size());
    const std::vector<llm::eval::TokenScores> scores = llm::eval::token_scores(
        sessions, reference, sequence, 1, parallel, [&](std::size_t w, double tokens) {
          progress.name(subject.variants[w].name + ":");
          read[w] = tokens;
          progress(done + std::accumulate(read.begin(), read.end(), 0.0));
        });
    done += static_cast<double>(sequence.size() * sessions.size());
    for (std::size_t w = 0; w < sessions.size(); ++w) {
      add(predictions[w].losses, positions, scores[w]);
      predictions[w].seconds += scores[w].seconds;
    }
  }
}

std::string text_of(const Estimate& estimate) {
  if (!estimate.interval) return fmt::format("{:.4f}", estimate.value);
  return fmt::format("{:.4f} ({:.4f} to {:.4f})", estimate.value, estimate.interval->low,
                     estimate.interval->high);
}

std::string difference_line(const char* what, const Estimate& difference, double base) {
  return fmt::format("{} {:+.4f}{}, {:+.3f}%", what, difference.value,
                     difference.interval ? fmt::format(" ({:+.4f} to {:+.4f})", difference.interval->low,
                                                       difference.interval->high)
                                         : "",
                     100 * difference.value / base);
}

std::string text_table(const Subject& subject, const Positions& positions,
                       const std::vector<Prediction>& predictions) {
  const Losses& first = predictions.front().losses;
  const Estimate base = estimate(first.all), base_trailing = estimate(first.trailing);
  std::string text =
      fmt::format("{} sequences of up to {} tokens, {} full; {} tokens predicted\n\n{:<12}{:<28}{:<12}{}\n",
                  first.all.size(), positions.seq_len, first.trailing.size(), base.tokens, "", "loss (95%)",
                  "perplexity", fmt::format("last {} (95%)", positions.trailing));
  for (std::size_t w = 0; w < predictions.size(); ++w) {
    const Losses& losses = predictions[w].losses;
    const Estimate all = estimate(losses.all), trailing = estimate(losses.trailing);
    text += fmt::format("{:<12}{:<28}{:<12.4f}{}\n", subject.variants[w].name, text_of(all),
                        std::exp(all.value), trailing.tokens > 0 ? text_of(trailing) : "no full sequence");
  }
  for (std::size_t w = 1; w < predictions.size(); ++w) {
    const Losses& losses = predictions[w].losses;
    text += fmt::format("{} against {}: {}", subject.variants[w].name, subject.variants[0].name,
                        difference_line("loss", estimate(difference(losses.all, first.all)), base.value));
    if (base_trailing.tokens > 0) {
      text += "; " + difference_line("trailing", estimate(difference(losses.trailing, first.trailing)),
                                     base_trailing.value);
    }
    text += "\n";
  }
  const std::optional<std::size_t> reference = reference_of(subject);
  for (std::size_t w = 0; reference && w < predictions.size(); ++w) {
    if (w == *reference) continue;
    const Losses& losses = predictions[w].losses;
    text += fmt::format("{} against {}: KL divergence {}, same likeliest token {}\n",
                        subject.variants[w].name, subject.variants[*reference].name,
                        text_of(estimate(losses.divergence)), text_of(estimate(losses.agreement)));
  }
  text += fmt::format("\n{:>15} {:>10}", "position", "tokens");
  for (const Variant& variant : subject.variants) text += fmt::format(" {:>10}", variant.name);
  for (std::int64_t b = 0; b < positions.buckets; ++b) {
    const auto bucket = static_cast<std::size_t>(b);
    text += fmt::format("\n{:>15} {:>10}",
                        fmt::format("{}-{}", positions.begin_of(b), positions.begin_of(b + 1) - 1),
                        estimate(first.positions[bucket]).tokens);
    for (const Prediction& prediction : predictions)
      text += fmt::format(" {:>10.4f}", llm::eval::mean(prediction.losses.positions[bucket]));
  }
  return text + "\n";
}

Json value_json(const Estimate& estimate, const char* name) {
  Json json{{name, estimate.value}, {"low", nullptr}, {"high", nullptr}, {"tokens", estimate.tokens}};
  if (estimate.interval) {
    json["low"] = estimate.interval->low;
    json["high"] = estimate.interval->high;
  }
  return json;
}

Json to_json(const Estimate& estimate) {
  return value_json(estimate, "loss");
}

/// So that models can be compared sequence by sequence, as attention variants are here.
Json by_sequence(const std::vector<Portion>& portions) {
  Json json = Json::array();
  for (const Portion& portion : portions)
    json.push_back({{"loss", portion.sum / static_cast<double>(portion.count)}, {"tokens", portion.count}});
  return json;
}

Json to_json(const Losses& losses, const Positions& positions) {
  const Estimate all = estimate(losses.all);
  Json json = to_json(all);
  json["perplexity"] = std::exp(all.value);
  json["by_sequence"] = by_sequence(losses.all);
  json["trailing"] = losses.trailing.empty() ? Json() : to_json(estimate(losses.trailing));
  if (!losses.trailing.empty()) json["trailing"]["by_sequence"] = by_sequence(losses.trailing);
  json["positions"] = Json::array();
  for (std::int64_t b = 0; b < positions.buckets; ++b) {
    Json bucket{{"from", positions.begin_of(b)}, {"to", positions.begin_of(b + 1)}};
    bucket.update(to_json(estimate(losses.positions[static_cast<std::size_t>(b)])));
    json["positions"].push_back(bucket);
  }
  return json;
}

Json difference_json(const std::vector<Portion>& portions, const std::vector<Portion>& base) {
  if (base.empty()) return {};
  const Estimate all = estimate(difference(portions, base));
  Json json = to_json(all);
  json["relative"] = all.value / llm::eval::mean(base);
  return json;
}

Json to_json(Json json, const Subject& subject, const Positions& positions,
             const std::vector<Prediction>& predictions, bool complete) {
  const Losses& first = predictions.front().losses;
  json["sequences"] = first.all.size();
  json["full_sequences"] = first.trailing.size();
  json["complete"] = complete;
  json["by_attn"] = Json::array();
  json["differences"] = Json::array();
  for (std::size_t w = 0; w < predictions.size(); ++w) {
    const Losses& losses = predictions[w].losses;
    Json variant{{"attn", subject.variants[w].name}};
    variant.update(to_json(losses, positions));
    variant["seconds"] = predictions[w].seconds;
    json["by_attn"].push_back(variant);
    if (!losses.divergence.empty()) {
      json["by_attn"].back()["kl"] = value_json(estimate(losses.divergence), "kl");
      json["by_attn"].back()["top1_agreement"] = value_json(estimate(losses.agreement), "agreement");
    }
    if (w == 0) continue;
    Json compared{{"attn", subject.variants[w].name}, {"against", subject.variants[0].name}};
    compared.update(difference_json(losses.all, first.all));
    compared["trailing"] = difference_json(losses.trailing, first.trailing);
    json["differences"].push_back(compared);
  }
  return json;
}

/// The standard error of a mean over sequences, by the spread of their means.
double standard_error(const std::vector<Portion>& portions) {
  const double all = llm::eval::mean(portions);
  const auto n = static_cast<double>(portions.size());
  double sum = 0;
  for (const Portion& portion : portions) {
    const double deviation = portion.sum / static_cast<double>(portion.count) - all;
    sum += deviation * deviation;
  }
  return n > 1 ? std::sqrt(sum / (n - 1) / n) : std::numeric_limits<double>::quiet_NaN();
}

void print_lm_eval(const Json& config, const Subject& subject, const std::vector<Prediction>& predictions) {
  std::vector<std::pair<std::string, std::vector<Metric>>> by_variant;
  for (std::size_t w = 0; w < predictions.size(); ++w) {
    const Losses& losses = predictions[w].losses;
    std::vector<Metric>& metrics =
        by_variant.emplace_back(subject.variants[w].name, std::vector<Metric>()).second;
    const auto add = [&](const char* name, const std::vector<Portion>& portions, bool higher_is_better) {
      if (!portions.empty())
        metrics.push_back({name, llm::eval::mean(portions), standard_error(portions), higher_is_better});
    };
    add("loss", losses.all, false);
    add("trailing_loss", losses.trailing, false);
    add("kl", losses.divergence, false);
    add("top1_agreement", losses.agreement, true);
    const double perplexity = std::exp(metrics.front().value);
    metrics.push_back({"token_perplexity", perplexity, perplexity * metrics.front().error, false});
  }
  print_lm_eval("loss", config, static_cast<std::int64_t>(predictions.front().losses.all.size()), by_variant);
}

void draw(const std::string& png, const Subject& subject, const Positions& positions,
          const std::vector<Prediction>& predictions) {
  std::vector<Curve> curves;
  for (std::size_t w = 0; w < predictions.size(); ++w) {
    Curve curve{
        fmt::format("{}: {:.4f}", subject.variants[w].name, llm::eval::mean(predictions[w].losses.all)), {}};
    for (std::int64_t b = 0; b < positions.buckets; ++b) {
      const double loss = llm::eval::mean(predictions[w].losses.positions[static_cast<std::size_t>(b)]);
      const auto middle = static_cast<double>(positions.begin_of(b) + positions.begin_of(b + 1)) / 2;
      if (std::isfinite(loss)) curve.points.push_back({middle, loss});
    }
    curves.push_back(std::move(curve));
  }
  draw_curves(png, "Loss by position, nats a token", curves, "position in the sequence, tokens");
}

int loss(const FlagTable& table, LossFlags& flags) {
  const std::int64_t seq_len = flags.sequences.seq_len;
  if (flags.buckets > seq_len)
    throw llm::UsageError(fmt::format("--buckets: expected 1 to {}, got {}", seq_len, flags.buckets));
  flags.trailing_tokens = trailing_from(flags.trailing, seq_len);
  flags.sequences.seed = flags.seed;
  const Positions positions{seq_len, flags.trailing_tokens, flags.buckets};

  Subject subject = open_subject(table, flags);
  for (Variant& variant : subject.variants)
    variant.session.full_tail = 0;  // no full tail: every token uses the variant
  const Sequences sequences = sequences_of(flags.data, subject.tokenizer, flags.sequences);
  std::size_t longest = 0;
  for (const auto& sequence : sequences) longest = std::max(longest, sequence.size());
  const llm::Model model =
      load_model(subject, flags, static_cast<std::int64_t>(longest * subject.variants.size()));
  std::vector<Prediction> predictions(subject.variants.size());
  note_interrupts();
  bool complete = true;
  try {
    predict(subject, model, sequences, positions, predictions);
  } catch (const Interrupted&) {
    complete = false;
  }
  if (predictions.front().losses.all.empty()) return kInterruptedCode;
  Json head = json_head("loss", table, flags, subject);
  head.update(table.json("Sequences"));
  if (flags.format == ReportFormat::json) {
    print_json(to_json(std::move(head), subject, positions, predictions, complete));
  } else if (flags.format == ReportFormat::lm_eval) {
    print_lm_eval(head, subject, predictions);
  } else {
    print(text_table(subject, positions, predictions));
  }
  if (flags.png) draw(*flags.png, subject, positions, predictions);
  return complete ? 0 : kInterruptedCode;
}

}  // namespace

CLI::App* add_eval_loss(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command = parent.add_subcommand("loss", "Loss and perplexity of texts, by position, at the end");
  const auto table = std::make_shared<FlagTable>(*command);
  const auto flags = std::make_shared<LossFlags>();
  add_flags(*table, *flags);

  table->group("Sequences");
  llm::eval::SequenceSettings& sequences = flags->sequences;
  table->value("--data", flags->data, "PATH", "Text files and folders; each file is a document")
      .required()
      .json();
  table
      ->size("--seq-len", sequences.seq_len, {2, kMaxTokens}, "Maximum sequence length in tokens, such as 8k")
      .json();
  table
      ->value(
          "--trailing", flags->trailing, "SIZE",
          "Tokens at the end of full sequences whose loss is also reported on its own, or their share such "
          "as 0.1")
      .default_text("a sixteenth of --seq-len");
  table->report("trailing_tokens", [flags = flags.get()] { return Json(flags->trailing_tokens); });
  table->toggle("--join", sequences.join, "Concatenate the documents, so that all sequences are full").json();
  table
      ->size("--max-tokens", sequences.max_tokens, {1, std::numeric_limits<std::int64_t>::max() / 2},
             "Stop after this many tokens, such as 1m")
      .default_text("all");
  table->number("--buckets", flags->buckets, {1, kMaxTokens},
                "Buckets of positions for the loss by position");
  add_attention_flags(*table, *flags, /*decodes=*/false);
  command->footer(
      "Example: what MoBA costs at 8192 tokens\n"
      "  moba eval loss -m model --data books/ --seq-len 8k --attn full,moba --png loss.png\n");
  command->callback([=, &action] { action = [=] { return loss(*table, *flags); }; });
  return command;
}

}  // namespace moba::app
