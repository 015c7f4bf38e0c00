#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "llm/train/batch.h"
#include "llm/train/corpus.h"

namespace moba::llm::train {

struct PackingSettings {
  /// Maximum of tokens in a sequence; longer documents are split into several sequences.
  std::int64_t seq_len = 1024;
  /// Maximum of tokens in a batch, at least seq_len.
  std::int64_t batch_tokens = 1024;
  /// Counts only the tokens of completions for the loss.
  bool completion_only = false;
  std::uint64_t seed = 0;
};

/// The position of a run in its data.
struct DataPosition {
  std::int64_t epoch = 0, batch = 0;
};

/// Packs the documents of a corpus into batches. Every epoch predicts each token once, in an order that
/// follows from the seed and the number of the epoch alone, so that a position is two numbers.
class Packing {
 public:
  /// Throws DataError for a corpus without a token to predict.
  Packing(const Corpus& corpus, const PackingSettings& settings);

  /// Returns the batch at `position`, and advances it.
  Batch next(DataPosition& position);

 private:
  struct Segment {
    std::size_t document;
    std::int64_t first, count;
  };
  bool has_completion(const Corpus::Document& document, std::int64_t first, std::int64_t count) const;
  void plan(std::int64_t epoch);
  void add_segment(const Segment& segment, Batch& batch) const;

  const Corpus& corpus_;
  PackingSettings settings_;
  std::vector<Segment> segments_;
  std::int64_t planned_ = -1;                      // the epoch of `batches_`
  std::vector<std::vector<std::size_t>> batches_;  // the segments of each
};

}  // namespace moba::llm::train
