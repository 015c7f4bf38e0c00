#pragma once

#include <cstdint>
#include <filesystem>
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

/// Returns -log p of every token of a sequence but the first, given those before it: [tokens - 1], in nats.
/// Every token is read in the session's prefill mode; clears the session first.
std::vector<double> token_losses(Session& session, std::span<const std::int32_t> tokens,
                                 const Parallel& parallel, const Session::Progress& progress);

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
};

/// The positions at which losses are reported.
struct Positions {
  std::int64_t seq_len, trailing, buckets;

  /// Returns the bucket of a position; bucket b begins at position begin_of(b).
  std::int64_t bucket_of(std::int64_t position) const { return position * buckets / seq_len; }
  std::int64_t begin_of(std::int64_t bucket) const { return (bucket * seq_len + buckets - 1) / buckets; }
};

/// Adds the losses of a sequence, losses[i] that of the token at position i + 1.
void add(Losses& losses, const Positions& positions, const std::vector<double>& of_tokens);

/// The differences, token by token, of two attention variants on the same sequences.
std::vector<Portion> difference(const std::vector<Portion>& a, const std::vector<Portion>& b);

}  // namespace moba::llm::eval
