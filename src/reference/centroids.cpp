#include <vector>

#include "reference/rows.h"
#include "reference/stages.h"

namespace moba::reference {
namespace {

std::int64_t candidate_blocks(const Call& call) {
  std::int64_t total = 0;
  for (const SequenceView& s : call.sequences) total += call.candidate_blocks(s);
  return total;
}

}  // namespace

/// The mean is over the keys that the block actually has, rounded to the dtype of k.
void features(const Call& call, const SequenceView& s, std::int64_t head, std::int64_t block,
              const FeatureRows& to) {
  begin_extremes(to, call.head_dim);
  const std::int64_t begin = block * call.routing.block_size;
  const std::int64_t end = std::min(begin + call.routing.block_size, s.keys);
  const DType rounded_to = call.k.dtype == DType::i8 ? DType::f32 : call.k.dtype;
  for (std::int64_t d = 0; d < call.head_dim; ++d) {
    double sum = 0;
    for (std::int64_t token = begin; token < end; ++token) {
      const Rows key = call.keys(s, head, token);
      const double value = load(key.data, call.k.dtype, d) * (key.scales == nullptr ? 1 : *key.scales);
      sum += value;
      add_to_extremes(to, d, static_cast<float>(value));
    }
    double rounded = 0;
    store(&rounded, rounded_to, 0, sum / static_cast<double>(end - begin));
    to.mean[d] = static_cast<float>(load(&rounded, rounded_to, 0));
  }
}

std::size_t centroids_bytes(const Call& call, std::int64_t heads) {
  if (!call.needs_scores()) return 0;
  return static_cast<std::size_t>(heads * candidate_blocks(call) * call.head_dim) * sizeof(float);
}

BlockMeans centroids(const Call& call, std::int64_t head0, std::int64_t head1, Context& context) {
  const std::int64_t heads = head1 - head0, total = candidate_blocks(call);
  BlockMeans means{.head0 = head0,
                   .head_stride = call.head_dim,
                   .block_stride = heads * call.head_dim,
                   .storage = Buffer<float>(context.scratch, total * heads * call.head_dim)};
  float* base = means.storage.data();
  for (const SequenceView& s : call.sequences) {
    means.base.push_back(base);
    const std::int64_t blocks = call.candidate_blocks(s);
    context.parallel.run(blocks * heads, [&](std::int64_t task, int) {
      const std::int64_t block = task / heads, head = task % heads;
      float* mean = base + block * means.block_stride + head * means.head_stride;
      features(call, s, head0 + head, block, {.mean = mean});
    });
    base += blocks * means.block_stride;
  }
  return means;
}

}  // namespace moba::reference
