// Block means: one pass over the keys, summed in token order as the KV cache sums them, so that both give the
// same bits.
#include "cpu/sizes.h"
#include "cpu/stages.h"
#include "number.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/centroids.cpp"
#include <hwy/foreach_target.h>
// foreach_target first
#include <hwy/highway.h>

#include "cpu/features-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
void block_features(const Call& call, const SequenceView& sequence, std::int64_t head, std::int64_t block,
                    const FeatureRows& to) {
  const auto depth = static_cast<std::size_t>(call.head_dim);
  const std::int64_t begin = block * call.routing.block_size;
  const std::int64_t end = std::min(begin + call.routing.block_size, sequence.keys);
  alignas(64) float f32_rows[kMaxHeadDim];
  float* mean = to.mean;
  std::fill(mean, mean + depth, 0.0F);
  begin_extremes(to, depth);
  for (std::int64_t first = begin; first < end;) {
    const Rows rows = call.keys(sequence, head, first);
    const std::int64_t run = std::min(rows.count, end - first);
    for (std::int64_t i = 0; i < run; ++i) {
      const float* row = row_as_f32(rows, call.k.dtype, i, depth, f32_rows);
      add_row(row, depth, mean);
      add_to_extremes(row, depth, to);
    }
    first += run;
  }
  const auto count = static_cast<float>(end - begin);
  for (std::size_t i = 0; i < depth; ++i) mean[i] = rounded_to(call.k.dtype, mean[i] / count);
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {

HWY_EXPORT(block_features);

void features(const Call& call, const SequenceView& s, std::int64_t head, std::int64_t block,
              const FeatureRows& to) {
  HWY_DYNAMIC_DISPATCH(block_features)(call, s, head, block, to);
}

BlockMeans centroids(const Call& call, std::int64_t head0, std::int64_t head1, Context& context) {
  std::vector<std::int64_t> first_block{0};  // of each sequence, among those of all
  for (const SequenceView& s : call.sequences)
    first_block.push_back(first_block.back() + call.candidate_blocks(s));
  const std::int64_t total = first_block.back();

  BlockMeans means;
  means.head0 = head0;
  means.block_stride = call.head_dim;
  means.head_stride = total * call.head_dim;
  means.storage = Buffer<float>(context.scratch, (head1 - head0) * means.head_stride);
  for (std::size_t s = 0; s + 1 < first_block.size(); ++s) {
    means.base.push_back(means.storage.data() + first_block[s] * means.block_stride);
  }

  // Enough keys per task to amortise its scheduling.
  const std::int64_t step = std::max<std::int64_t>(1, 4096 / call.routing.block_size);
  const std::int64_t tasks = (total + step - 1) / step;
  const auto features_of = &HWY_DYNAMIC_DISPATCH(block_features);
  context.parallel.run(tasks * (head1 - head0), [&](std::int64_t task, int) {
    const std::int64_t head = head0 + task / tasks, begin = task % tasks * step,
                       end = std::min(begin + step, total);
    auto s = static_cast<std::size_t>(std::upper_bound(first_block.begin(), first_block.end(), begin) -
                                      first_block.begin() - 1);
    for (std::int64_t block = begin; block < end; ++block) {
      while (block >= first_block[s + 1]) ++s;
      const std::int64_t local = block - first_block[s];
      float* mean = const_cast<float*>(means.of(s, head)) + local * means.block_stride;
      features_of(call, call.sequences[s], head, local, {.mean = mean});
    }
  });
  return means;
}

}  // namespace moba::cpu
#endif
