#include "llm/eval/loss.h"

#include <algorithm>
#include <cmath>

#include "llm/error.h"
#include "llm/eval/random.h"
#include "llm/formats/mapped_file.h"
#include "llm/formats/text_files.h"

namespace moba::llm::eval {
namespace {

using Tokens = std::vector<std::int32_t>;

/// Logits in memory at a time: 64 MiB of f32.
std::size_t tokens_at_a_time(std::size_t vocab) {
  return std::clamp<std::size_t>((std::size_t{1} << 24) / vocab, 16, 2048);
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
  const float max_logit = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += static_cast<double>(std::exp(logit - max_logit));
  return std::log(sum) + static_cast<double>(max_logit) -
         static_cast<double>(logits[static_cast<std::size_t>(token)]);
}

std::vector<double> token_losses(Session& session, std::span<const std::int32_t> tokens,
                                 const Parallel& parallel, const Session::Progress& progress) {
  const std::size_t vocab = static_cast<std::size_t>(session.vocab());
  session.rewind(0);
  std::vector<double> losses(tokens.size() - 1);
  for (std::size_t first = 0; first < losses.size();) {
    const std::size_t count = std::min(tokens_at_a_time(vocab), losses.size() - first);
    const std::vector<float> logits = session.prefill(
        tokens.subspan(first, count), [&](double read) { progress(static_cast<double>(first) + read); },
        Logits::all);
    parallel.run(static_cast<std::int64_t>(count), [&](std::int64_t row, int) {
      const auto r = static_cast<std::size_t>(row);
      losses[first + r] = loss_of(std::span(logits).subspan(r * vocab, vocab), tokens[first + r + 1]);
    });
    first += count;
  }
  return losses;
}

void add(Losses& losses, const Positions& positions, const std::vector<double>& of_tokens) {
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
}

std::vector<Portion> difference(const std::vector<Portion>& a, const std::vector<Portion>& b) {
  std::vector<Portion> differences;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    differences.push_back({a[i].sum - b[i].sum, a[i].count});
  return differences;
}

}  // namespace moba::llm::eval
