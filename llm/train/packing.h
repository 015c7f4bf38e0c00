#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "llm/train/batch.h"
#include "llm/train/corpus.h"

namespace moba::llm::train {

struct PackingSettings {
  /// Most tokens of a sequence: longer documents are cut, and their pieces are sequences of their own.
  std::int64_t seq_len = 1024;
  /// Most tokens of a batch, at least seq_len.
  std::int64_t batch_tokens = 1024;
  /// Only what follows a prompt counts for the loss.
  bool completion_only = false;
  std::uint64_t seed = 0;
};

/// The position of a run in its data.
struct DataPosition {
  std::int64_t epoch = 0, batch = 0;
};

/// Packs the documents of a corpus into batches. Every epoch has each token to predict once, in an order that
/// follows from the seed and the number of the epoch alone, so that a position is two numbers.
class Packing {
 public:
  /// Throws DataError for a corpus in which there is nothing to predict.
  Packing(const Corpus& corpus, const PackingSettings& settings);

  /// The batch at `position`, which moves on.
  Batch next(DataPosition& position);

 private:
  struct Piece {
    std::size_t document;
    std::int64_t first, count;
  };
  void plan(std::int64_t epoch);
  void add_piece(const Piece& piece, Batch& batch) const;

  const Corpus& corpus_;
  PackingSettings settings_;
  std::vector<Piece> pieces_;
  std::int64_t planned_ = -1;                      // the epoch that `batches_` is of
  std::vector<std::vector<std::size_t>> batches_;  // pieces in each
};

}  // namespace moba::llm::train
