#include "llm/eval/loss.h"

#include <algorithm>
#include <cmath>

#include "llm/error.h"
#include "llm/eval/random.h"
#include "llm/formats/mapped_file.h"
#include "llm/formats/text_files.h"
#include "src/stopwatch.h"

namespace moba::llm::eval {
namespace {

using Tokens = std::vector<std::int32_t>;

/// Logits in memory at a time: 64 MiB of f32.
std::size_t tokens_at_a_time(std::size_t vocab) {
  return std::clamp<std::size_t>((std::size_t{1} << 24) / vocab, 16, 2048);
}

/// Returns log(sum(exp(logits))).
double log_sum(std::span<const float> logits) {
  const float max_logit = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += static_cast<double>(std::exp(logit - max_logit));
  return std::log(sum) + static_cast<double>(max_logit);
}

std::ptrdiff_t likeliest(std::span<const float> logits) {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

/// Cuts a stream of tokens into sequences.
class Cutter {
 public:
  explicit Cutter(const SequenceSettings& settings) : settings_(settings) {}

  bool is_enough() const { return settings_.max_tokens > 0 && total_ >= settings_.max_tokens; }

  void add_document(const Tokens& ids) {
    for (const std::int32_t id : ids) {
      if (is_enough()) return;
      open_.push_back(id);
      if (static_cast<std::int64_t>(open_.size()) == settings_.seq_len) finish_sequence();
    }
    if (!settings_.join) finish_sequence();
  }

  std::vector<Tokens> finish() {
    finish_sequence();
    return std::move(sequences_);
  }

 private:
  void finish_sequence() {
    if (open_.size() >= 2) {
      total_ += static_cast<std::int64_t>(open_.size());
      sequences_.push_back(std::move(open_));
    }
    open_ = {};
  }

  SequenceSettings settings_;
  std::vector<Tokens> sequences_;
  Tokens open_;
  std::int64_t total_ = 0;
};

}  // namespace

std::vector<Tokens> sequences_of(const std::vector<std::filesystem::path>& paths, const Tokenizer& tokenizer,
                                 const SequenceSettings& settings) {
  std::vector<TextFile> files = find_text_files(paths);
  Random{settings.seed}.shuffle(files);
  Cutter cutter(settings);
  for (const TextFile& file : files) {
    if (cutter.is_enough()) break;
    const MappedFile mapped(file.path);
    const std::string_view text = text_in(file, mapped);
    if (!text.empty()) cutter.add_document(tokenizer.encode(text, /*add_special=*/true, false));
  }
  std::vector<Tokens> sequences = cutter.finish();
  if (sequences.empty()) throw DataError("--data: expected a text of two tokens or more, got none");
  return sequences;
}

double loss_of(std::span<const float> logits, std::int32_t token) {
  return log_sum(logits) - static_cast<double>(logits[static_cast<std::size_t>(token)]);
}

double divergence(std::span<const float> reference, std::span<const float> logits) {
  const double of_reference = log_sum(reference), of_logits = log_sum(logits);
  double sum = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double log_p = static_cast<double>(reference[i]) - of_reference;
    sum += std::exp(log_p) * (log_p - (static_cast<double>(logits[i]) - of_logits));
  }
  return sum;
}

std::vector<TokenScores> token_scores(
    std::span<Session> sessions, std::optional<std::size_t> reference, std::span<const std::int32_t> tokens,
    std::int64_t first, const Parallel& parallel,
    const std::function<void(std::size_t session, double tokens)>& progress) {
  const auto vocab = static_cast<std::size_t>(sessions.front().vocab());
  const std::size_t unscored = static_cast<std::size_t>(first) - 1, scored = tokens.size() - 1 - unscored;
  std::vector<TokenScores> scores(sessions.size());
  for (std::size_t s = 0; s < sessions.size(); ++s) {
    scores[s].losses.resize(scored);
    if (reference) scores[s].divergences.resize(scored);
    sessions[s].rewind(0);
    const ScopedTimer timer(scores[s].seconds);
    if (unscored > 0)
      sessions[s].prefill(
          tokens.first(unscored), [&](double read) { progress(s, read); }, Logits::none);
  }
  // vector<bool> is not for several threads.
  std::vector<std::vector<char>> agreements(sessions.size(), std::vector<char>(reference ? scored : 0));
  std::vector<std::vector<float>> logits(sessions.size());
  for (std::size_t begin = 0; begin < scored;) {
    const std::size_t count = std::min(tokens_at_a_time(vocab), scored - begin);
    const std::span<const std::int32_t> read = tokens.subspan(unscored + begin, count);
    for (std::size_t s = 0; s < sessions.size(); ++s) {
      const ScopedTimer timer(scores[s].seconds);
      logits[s] = sessions[s].prefill(
          read, [&](double done) { progress(s, static_cast<double>(unscored + begin) + done); }, Logits::all);
    }
    for (std::size_t s = 0; s < sessions.size(); ++s) {
      parallel.run(static_cast<std::int64_t>(count), [&](std::int64_t index, int) {
        const auto row = static_cast<std::size_t>(index), at = begin + row;
        const auto row_of = [&](const std::vector<float>& all) {
          return std::span<const float>(all).subspan(row * vocab, vocab);
        };
        scores[s].losses[at] = loss_of(row_of(logits[s]), tokens[unscored + at + 1]);
        if (!reference) return;
        const std::span<const float> expected = row_of(logits[*reference]), found = row_of(logits[s]);
        scores[s].divergences[at] = divergence(expected, found);
        agreements[s][at] = likeliest(expected) == likeliest(found);
      });
    }
    begin += count;
  }
  for (std::size_t s = 0; s < sessions.size(); ++s)
    scores[s].agrees.assign(agreements[s].begin(), agreements[s].end());
  return scores;
}

void add(Losses& losses, const Positions& positions, const TokenScores& scores) {
  const std::vector<double>& of_tokens = scores.losses;
  losses.positions.resize(static_cast<std::size_t>(positions.buckets));
  Portion& all = losses.all.emplace_back();
  Portion trailing;
  for (auto& bucket : losses.positions) bucket.emplace_back();
  for (std::size_t i = 0; i < of_tokens.size(); ++i) {
    const auto position = static_cast<std::int64_t>(i) + 1;
    all.add(of_tokens[i]);
    losses.positions[static_cast<std::size_t>(positions.bucket_of(position))].back().add(of_tokens[i]);
    if (position >= positions.seq_len - positions.trailing) trailing.add(of_tokens[i]);
  }
  const bool is_full = static_cast<std::int64_t>(of_tokens.size()) + 1 == positions.seq_len;
  if (is_full) losses.trailing.push_back(trailing);
  if (scores.divergences.empty()) return;
  Portion& divergence = losses.divergence.emplace_back();
  Portion& agreement = losses.agreement.emplace_back();
  for (const double of_token : scores.divergences) divergence.add(of_token);
  for (const bool agrees : scores.agrees) agreement.add(agrees ? 1 : 0);
}

std::vector<Portion> difference(const std::vector<Portion>& a, const std::vector<Portion>& b) {
  std::vector<Portion> differences;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    differences.push_back({a[i].sum - b[i].sum, a[i].count});
  return differences;
}

}  // namespace moba::llm::eval
