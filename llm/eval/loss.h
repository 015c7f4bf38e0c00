#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "llm/eval/interval.h"
#include "llm/session/session.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::llm::eval {

/// Settings for cutting texts into sequences.
struct SequenceSettings {
  /// Maximum of tokens in a sequence; longer documents become several sequences.
  std::int64_t seq_len = 2048;
  /// Joins the documents to one stream, so that every sequence but the last is full.
  bool join = false;
  /// Limit of the tokens of all sequences.
  std::int64_t max_tokens = 0;
  /// Seed of the order of the files.
  std::int64_t seed = 0;
};

/// Reads sequences of at least two tokens from text files, each file a document that begins with the special
/// tokens that the tokenizer puts before a text. Throws DataError.
std::vector<std::vector<std::int32_t>> sequences_of(const std::vector<std::filesystem::path>& paths,
                                                    const Tokenizer& tokenizer,
                                                    const SequenceSettings& settings);

/// How well one attention variant predicts each token of a sequence but those before the first scored one.
struct TokenScores {
  /// -log p of the token, in nats.
  std::vector<double> losses;
  /// Kullback-Leibler divergence of the distribution from that of the reference, in nats, and whether both
  /// have the same likeliest token. Empty without a reference.
  std::vector<double> divergences;
  std::vector<bool> agrees;
  /// Time to read the sequence.
  double seconds = 0;
};

/// Scores tokens [first, tokens.size()) of a sequence, first >= 1, under every session, in their prefill
/// modes; clears the sessions first. `reference` is the session that the others are compared with, or none.
/// Progress is in tokens of all sessions.
std::vector<TokenScores> token_scores(
    std::span<Session> sessions, std::optional<std::size_t> reference, std::span<const std::int32_t> tokens,
    std::int64_t first, const Parallel& parallel,
    const std::function<void(std::size_t session, double tokens)>& progress);

/// Compares the distributions of two rows of logits: the divergence of `logits` from `reference`.
double divergence(std::span<const float> reference, std::span<const float> logits);

/// Returns -log softmax(logits)[token].
double loss_of(std::span<const float> logits, std::int32_t token);

/// The losses under one attention variant, by sequence.
struct Losses {
  /// One portion per sequence, of all its tokens.
  std::vector<Portion> all;
  /// One portion per full sequence, of its last tokens.
  std::vector<Portion> trailing;
  /// [buckets][sequences]: by position in the sequence.
  std::vector<std::vector<Portion>> positions;
  /// One portion per sequence: divergences, and agreements as 0 and 1. Empty without a reference.
  std::vector<Portion> divergence{}, agreement{};
};

/// The positions at which losses are reported.
struct Positions {
  std::int64_t seq_len, trailing, buckets;

  /// Returns the bucket of a position; bucket b begins at position begin_of(b).
  std::int64_t bucket_of(std::int64_t position) const { return position * buckets / seq_len; }
  std::int64_t begin_of(std::int64_t bucket) const { return (bucket * seq_len + buckets - 1) / buckets; }
};

/// Adds the scores of a sequence from the token at position 1 on.
void add(Losses& losses, const Positions& positions, const TokenScores& of_tokens);

/// The differences, token by token, of two attention variants on the same sequences.
std::vector<Portion> difference(const std::vector<Portion>& a, const std::vector<Portion>& b);

}  // namespace moba::llm::eval
