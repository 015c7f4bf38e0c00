#include "llm/train/packing.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <utility>

#include "llm/error.h"

namespace moba::llm::train {
namespace {

/// Open batches of first fit; a segment that fits none of them begins another.
constexpr std::size_t kOpen = 64;

/// std::shuffle, identical on every standard library.
template <typename T>
void shuffle(std::vector<T>& values, std::mt19937_64& random) {
  for (std::size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[random() % i]);
}

}  // namespace

Packing::Packing(const Corpus& corpus, const PackingSettings& settings)
    : corpus_(corpus), settings_(settings) {
  const auto& documents = corpus.documents();
  for (std::size_t d = 0; d < documents.size(); ++d) {
    const std::int64_t predicted = documents[d].count - 1;
    for (std::int64_t first = 0; first < predicted; first += settings.seq_len) {
      const std::int64_t count = std::min(settings.seq_len, predicted - first);
      const bool counts = !settings.completion_only || has_completion(documents[d], first + 1, count);
      if (counts) segments_.push_back({d, first, count});
    }
  }
  if (segments_.empty()) throw DataError("--data: expected a text of at least two tokens, got none");
}

/// Returns whether a completion has one of the tokens [first, first + count) of a document.
bool Packing::has_completion(const Corpus::Document& document, std::int64_t first, std::int64_t count) const {
  const auto ranges = corpus_.completions(document);
  return std::any_of(ranges.begin(), ranges.end(), [&](const TokenRange& range) {
    return std::max(range.begin, first) < std::min(range.end, first + count);
  });
}

/// Packs the segments by first fit, in random order.
void Packing::plan(std::int64_t epoch) {
  std::seed_seq seed{settings_.seed, settings_.seed >> 32, static_cast<std::uint64_t>(epoch)};
  std::mt19937_64 random(seed);
  std::vector<std::size_t> order(segments_.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  shuffle(order, random);

  struct Open {
    std::int64_t left;
    std::vector<std::size_t> segments;
  };
  std::vector<Open> open;
  batches_.clear();
  const auto close = [&](std::vector<Open>::iterator batch) {
    batches_.push_back(std::move(batch->segments));
    open.erase(batch);
  };
  for (const std::size_t index : order) {
    const std::int64_t count = segments_[index].count;
    auto place =
        std::find_if(open.begin(), open.end(), [&](const Open& batch) { return batch.left >= count; });
    if (place == open.end()) {
      const auto fuller = [](const Open& a, const Open& b) { return a.left < b.left; };
      if (open.size() == kOpen) close(std::min_element(open.begin(), open.end(), fuller));
      place = open.insert(open.end(), {settings_.batch_tokens, {}});
    }
    place->segments.push_back(index);
    place->left -= count;
    if (place->left == 0) close(place);
  }
  while (!open.empty()) close(open.begin());
  shuffle(batches_, random);
  planned_ = epoch;
}

void Packing::add_segment(const Segment& segment, Batch& batch) const {
  const Corpus::Document& document = corpus_.documents()[segment.document];
  const std::size_t begin = batch.tokens.size(), count = static_cast<std::size_t>(segment.count);
  batch.tokens.resize(begin + count);
  batch.targets.resize(begin + count);
  corpus_.read(document, segment.first, segment.count, batch.tokens.data() + begin);
  corpus_.read(document, segment.first + 1, segment.count, batch.targets.data() + begin);
  if (settings_.completion_only) {
    const auto targets = batch.targets.begin() + static_cast<std::ptrdiff_t>(begin);
    std::int64_t last = 0;  // of the targets before it, those of completions are kept
    for (const TokenRange& range : corpus_.completions(document)) {
      const auto target_of = [&](std::int64_t token) {
        return std::clamp<std::int64_t>(token - 1 - segment.first, 0, segment.count);
      };
      std::fill(targets + last, targets + target_of(range.begin), -1);
      last = target_of(range.end);
    }
    std::fill(targets + last, targets + segment.count, -1);
  }
  batch.cu_seqlens.push_back(static_cast<std::int32_t>(batch.tokens.size()));
}

Batch Packing::next(DataPosition& position) {
  if (planned_ != position.epoch) plan(position.epoch);
  Batch batch;
  for (const std::size_t segment : batches_[static_cast<std::size_t>(position.batch)])
    add_segment(segments_[segment], batch);
  if (++position.batch == static_cast<std::int64_t>(batches_.size())) position = {position.epoch + 1, 0};
  return batch;
}

}  // namespace moba::llm::train
