// Decode: one query token per sequence. The gate scores the cached centroids, then the selected blocks are
// attended to; memory bandwidth is the limit. The keys of a kv head are read once for all query heads that
// selected their block. The keys are cut into splits (split-KV) whose size does not depend on the number of
// threads, and partial results are merged in a fixed order. A call is one parallel region, in which threads
// take split after split; work that depends on several splits is done by the thread that finishes the last of
// them.
#include <thread>
#include <tuple>

#include "constants.h"
#include "cpu/decode_schedule.h"
#include "cpu/sizes.h"
#include "cpu/stages.h"
#include "cpu/topk.h"
#include "number.h"
#include "selection.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/decode.cpp"
#include <hwy/foreach_target.h>
// foreach_target first
#include <hwy/highway.h>

#include "cpu/row_streams-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
void load_query_f32(const std::byte* from, DType dtype, std::size_t depth, float* to) {
  std::fill(to, to + kMaxHeadDim, 0.0F);
  load_f32(from, dtype, depth, 1.0F, to);
}

/// Scores a split of the means of the candidate blocks, and lists the top-k of every query head of the unit.
void score_means(const Call& call, const BlockMeans& means, const DecodeUnit& unit, std::int64_t split) {
  const F32 d;
  const std::int64_t begin = unit.candidates.first + split * kSplitMeans;
  const std::int64_t count = std::min(kSplitMeans, unit.candidates.last - begin);
  if (unit.listed == 0 || count <= 0) return;
  alignas(64) float scratch[16 * kMaxHeadDim];
  alignas(64) float scores[kMaxHeads * kSplitMeans];
  const auto rows_from = [&](std::int64_t block) {
    const float* base = means.of(unit.sequence, unit.head) + block * means.block_stride;
    return Rows{reinterpret_cast<const std::byte*>(base), means.block_stride, 0, nullptr};
  };
  // The split that this thread will most likely take next.
  const std::int64_t next = unit.next_means.load(std::memory_order_relaxed);
  const Rows after = next < unit.mean_splits ? rows_from(unit.candidates.first + next * kSplitMeans) : Rows{};

  for (std::int64_t g0 = 0; g0 < call.heads_per_kv; g0 += static_cast<std::int64_t>(kMaxHeads)) {
    HeadGroup heads;
    for (std::int64_t g = g0; g < call.heads_per_kv && heads.count < kMaxHeads; ++g)
      heads.queries[heads.count++] = unit.query(g);
    for_row_streams(rows_from(begin), DType::f32, count, static_cast<std::size_t>(call.head_dim), after,
                    scratch, [&](const auto& stream, std::int64_t at) HWY_ATTR {
                      dot_rows(stream, heads, scores + at, kSplitMeans);
                    });
    for (std::size_t h = 0; h < heads.count; ++h) {
      float* of_head = scores + h * kSplitMeans;
      std::fill(of_head + count, of_head + kSplitMeans, kNegInf);
      const std::int64_t list = (split * call.heads_per_kv + g0 + static_cast<std::int64_t>(h)) * unit.listed;
      TopK topk{unit.list_scores + list, unit.lists + list, 0, unit.listed};
      for (std::int64_t i = 0; i < count; i += static_cast<std::int64_t>(kLanes)) {
        if (topk.count == topk.k &&
            hn::AllTrue(d, hn::Lt(hn::Load(d, of_head + i), hn::Set(d, topk.scores[0]))))
          continue;
        for (std::int64_t j = i; j < std::min(i + static_cast<std::int64_t>(kLanes), count); ++j)
          topk.push(of_head[j], static_cast<std::int32_t>(begin + j));
      }
    }
  }
}

/// Weights of the keys of a split, for a few query heads.
struct SplitWeights {
  static constexpr std::size_t kStride = kMaxSplitKeys + kMaxLanes;
  alignas(64) float values[kMaxHeads * kStride];

  float* of(std::size_t head) { return values + head * kStride; }
};

/// Turns the logits of one head (log2 units) over `count` keys into weights; returns their maximum and sum.
std::pair<float, float> exp2_logits(float* logits, std::size_t count) {
  const F32 d;
  const std::size_t padded = round_up(count, kLanes);
  std::fill(logits + count, logits + padded, kNegInf);
  Vec largest = hn::Load(d, logits);
  for (std::size_t i = kLanes; i < padded; i += kLanes) largest = hn::Max(largest, hn::Load(d, logits + i));
  const float max = hn::GetLane(hn::MaxOfLanes(d, largest));
  const Vec top = hn::Set(d, max == kNegInf ? 0.0F : max);
  Vec total = hn::Zero(d);
  for (std::size_t i = 0; i < padded; i += kLanes) {
    const Vec weight = exp2(hn::Sub(hn::Load(d, logits + i), top));
    hn::Store(weight, d, logits + i);
    total = hn::Add(total, weight);
  }
  return {max, hn::GetLane(hn::SumOfLanes(d, total))};
}

float sum_of(const float* values, std::int64_t count) {
  const F32 d;
  const auto lanes = static_cast<std::int64_t>(kLanes);
  Vec total = hn::Zero(d);
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) total = hn::Add(total, hn::LoadU(d, values + i));
  float sum = hn::GetLane(hn::SumOfLanes(d, total));
  for (; i < count; ++i) sum += values[i];
  return sum;
}

/// Sums the weights of a split's keys, those of one head, over the ranges of the unit.
void sum_ranges(const DecodeUnit& unit, const KvSplit& split, const float* weights, float* sums) {
  const DecodeUnit::Counted keys = unit.counted(split);
  const std::int64_t size = unit.weights->range;
  for (std::int64_t first = keys.begin, range = keys.range; first < keys.end; ++range) {
    const std::int64_t end = std::min((range + 1) * size, keys.end);
    *sums++ = sum_of(weights + (first - split.first), end - first);
    first = end;
  }
}

/// Computes attention of the unit's query heads that see a split into its partials [group][stride]: the
/// unnormalised output, the maximum (log2 units) and the sum. Heads that do not see the split keep a maximum
/// of -inf.
void attend_split(const Call& call, const DecodeUnit& unit, std::int64_t width, std::int64_t index,
                  std::size_t stride) {
  const F32 d;
  const SequenceView& sequence = call.sequences[unit.sequence];
  const auto head_dim = static_cast<std::size_t>(call.head_dim);
  alignas(64) float scratch[16 * kMaxHeadDim];
  SplitWeights weights, scaled;
  const KvSplit split = unit.split(index);
  const Vec to_log2 = hn::Set(d, call.scale * kLog2E);
  const auto keys = [&](std::int64_t first) { return call.keys(sequence, unit.head, first); };
  const auto values = [&](std::int64_t first) { return call.values(sequence, unit.head, first); };
  float* partials = unit.partials + static_cast<std::size_t>(index * call.heads_per_kv) * stride;

  const auto attend = [&](const HeadGroup& heads) HWY_ATTR {
    for_pages(split, values(split.first), keys, [&](const Rows& rows, std::int64_t done, const Rows& next) {
      prefetch_scales(rows);
      for_row_streams(rows, call.k.dtype, rows.count, head_dim, next, scratch,
                      [&](const auto& stream, std::int64_t at) HWY_ATTR {
                        dot_rows(stream, heads, weights.values + done + at, SplitWeights::kStride);
                      });
      if (rows.scales == nullptr) return;
      for (std::size_t h = 0; h < heads.count; ++h) {
        float* logits = weights.of(h) + done;
        for (std::int64_t i = 0; i < rows.count; ++i) logits[i] *= rows.scales[i];
      }
    });
    for (std::size_t h = 0; h < heads.count; ++h) {
      for (std::size_t i = 0; i < static_cast<std::size_t>(split.count); i += kLanes)
        hn::Store(hn::Mul(to_log2, hn::Load(d, weights.of(h) + i)), d, weights.of(h) + i);
      std::tie(heads.out[h][stride - 2], heads.out[h][stride - 1]) =
          exp2_logits(weights.of(h), static_cast<std::size_t>(split.count));
      if (unit.weights == nullptr) continue;
      const std::int64_t row = (heads.out[h] - unit.partials) / static_cast<std::int64_t>(stride);
      sum_ranges(unit, split, weights.of(h), unit.range_sums + row * unit.ranges_per_split);
    }

    // The split that this thread will most likely take next.
    const std::int64_t soon = unit.next_split.load(std::memory_order_relaxed);
    const Rows after = soon < unit.own_splits || (unit.gate_done && soon < unit.splits)
                           ? keys(unit.split(soon).first)
                           : Rows{};
    for_pages(split, after, values, [&](const Rows& rows, std::int64_t done, const Rows& next) {
      const float* by = weights.values + done;
      if (rows.scales != nullptr) {
        for (std::size_t h = 0; h < heads.count; ++h) {
          const float* from = weights.of(h) + done;
          for (std::int64_t i = 0; i < rows.count; ++i) scaled.of(h)[i] = from[i] * rows.scales[i];
        }
        by = scaled.values;
      }
      for_row_streams(rows, call.v.dtype, rows.count, head_dim, next, scratch,
                      [&](const auto& stream, std::int64_t at)
                          HWY_ATTR { add_rows(stream, heads, by + at, SplitWeights::kStride); });
    });
  };

  HeadGroup heads;
  for (std::int64_t g = 0; g < call.heads_per_kv; ++g) {
    float* out = partials + static_cast<std::size_t>(g) * stride;
    std::fill(out, out + stride, 0.0F);
    out[stride - 2] = kNegInf;
    if (!unit.sees(width, g, split.block)) continue;
    heads.queries[heads.count] = unit.query(g);
    heads.out[heads.count++] = out;
    if (heads.count < kMaxHeads) continue;
    attend(heads);
    heads.count = 0;
  }
  if (heads.count > 0) attend(heads);
}

/// Merges the splits of one query head: `out` [stride], unnormalised; returns its maximum and sum.
std::pair<float, float> combine_splits(const DecodeUnit& unit, std::int64_t group, std::int64_t g,
                                       std::size_t stride, float* out) {
  const F32 d;
  const auto partial = [&](std::int64_t split) {
    return unit.partials + static_cast<std::size_t>(split * group + g) * stride;
  };
  float max = kNegInf, sum = 0;
  for (std::int64_t p = 0; p < unit.splits; ++p) max = std::max(max, partial(p)[stride - 2]);
  std::fill(out, out + stride, 0.0F);
  for (std::int64_t p = 0; p < unit.splits; ++p) {
    const float* from = partial(p);
    if (from[stride - 2] == kNegInf) continue;
    const Vec weight = exp2(hn::Set(d, from[stride - 2] - max));
    sum += hn::GetLane(weight) * from[stride - 1];
    for (std::size_t c = 0; c < stride - kMaxLanes; c += kLanes)
      hn::Store(hn::MulAdd(weight, hn::Load(d, from + c), hn::Load(d, out + c)), d, out + c);
  }
  return {max, sum};
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {
namespace {

HWY_EXPORT(load_query_f32);
HWY_EXPORT(score_means);
HWY_EXPORT(attend_split);
HWY_EXPORT(combine_splits);

std::int64_t divided_up(std::int64_t value, std::int64_t by) {
  return (value + by - 1) / by;
}

/// One call: its units, and the work of the threads on them.
class Decoding {
 public:
  Decoding(const Call& call, const BlockMeans& means, const Outputs& outputs, Scratch& scratch)
      : call_(call),
        means_(means),
        outputs_(outputs),
        width_(call.listed_width()),
        stride_(round_up(static_cast<std::size_t>(call.head_dim), kMaxLanes) + kMaxLanes),
        units_(call.sequences.size() * static_cast<std::size_t>(call.kv_heads)) {
    if (call.is_selected()) rows_ = selected_rows(call);
    std::int64_t listed = 0, splits = 0, mean_splits = 0, range_sums = 0;
    for (std::size_t u = 0; u < units_.size(); ++u) {
      plan(units_[u], u);
      listed += list_size(units_[u]);
      range_sums += max_range_sums(units_[u]);
      splits += max_splits(units_[u]);
      mean_splits += units_[u].mean_splits;
    }
    tasks_ = std::max(mean_splits, splits);
    const std::int64_t heads = static_cast<std::int64_t>(units_.size()) * call.heads_per_kv;
    queries_ = {scratch, heads * static_cast<std::int64_t>(kMaxHeadDim)};
    topk_scores_ = {scratch, heads * width_};
    selected_ = {scratch, heads * width_};
    blocks_ = {scratch, heads * width_};
    list_scores_ = {scratch, listed};
    lists_ = {scratch, listed};
    partials_ = {scratch, splits * call.heads_per_kv * static_cast<std::int64_t>(stride_)};
    range_sums_ = {scratch, range_sums};
    listed = splits = range_sums = 0;
    for (std::size_t u = 0; u < units_.size(); ++u) {
      DecodeUnit& unit = units_[u];
      const auto head = static_cast<std::int64_t>(u) * call.heads_per_kv;
      unit.queries = queries_.data() + head * static_cast<std::int64_t>(kMaxHeadDim);
      unit.topk_scores = topk_scores_.data() + head * width_;
      unit.selected = selected_.data() + head * width_;
      unit.blocks = blocks_.data() + head * width_;
      unit.list_scores = list_scores_.data() + listed;
      unit.lists = lists_.data() + listed;
      unit.partials = partials_.data() + splits * call.heads_per_kv * static_cast<std::int64_t>(stride_);
      unit.range_sums = range_sums_.data() + range_sums;
      listed += list_size(unit);
      splits += max_splits(unit);
      range_sums += max_range_sums(unit);
      load_queries_f32(unit);
    }
  }

  /// Threads that start late, or one after the other, find less to do or nothing.
  void run(const Parallel& parallel) {
    parallel.run(std::min<std::int64_t>(parallel.threads, tasks_), [&](std::int64_t, int) { work(); });
  }

 private:
  void plan(DecodeUnit& unit, std::size_t index) const {
    unit.sequence = index / static_cast<std::size_t>(call_.kv_heads);
    unit.head = static_cast<std::int64_t>(index) % call_.kv_heads;
    const SequenceView& s = call_.sequences[unit.sequence];
    unit.keys = s.keys;
    unit.block_size = std::min(call_.routing.block_size, call_.max_seqlen_k);
    unit.own = call_.own_block(s, 0);
    if (!call_.is_selected()) unit.candidates = candidates_of(call_, s, 0, width_);
    const std::int64_t candidates = unit.candidates.last - unit.candidates.first;
    if (unit.candidates.k > 0 && candidates > unit.candidates.k) {
      unit.listed = std::min(unit.candidates.k, kSplitMeans);
      unit.mean_splits = divided_up(candidates, kSplitMeans);
    }
    if (unit.own >= 0) {
      const std::int64_t max_keys = std::min(unit.keys, (width_ + 1) * unit.block_size);
      unit.split_keys = std::clamp(divided_up(max_keys, kMinSplitKeys * kMinSplitKeys) * kMinSplitKeys,
                                   kMinSplitKeys, kMaxSplitKeys);
      unit.block_splits = divided_up(unit.block_size, unit.split_keys);
      unit.own_splits = divided_up(unit.keys - unit.own * unit.block_size, unit.split_keys);
    }
    if (!outputs_.weights.empty() && outputs_.weights[unit.sequence].data != nullptr) {
      unit.weights = &outputs_.weights[unit.sequence];
      unit.ranges_per_split = divided_up(unit.split_keys, unit.weights->range) + 1;
    }
    unit.means_left = unit.mean_splits;
    unit.splits_left = unit.own_splits + 1;  // and the selection
  }

  std::int64_t list_size(const DecodeUnit& unit) const {
    return unit.mean_splits * call_.heads_per_kv * unit.listed;
  }
  std::int64_t max_splits(const DecodeUnit& unit) const {
    return unit.own_splits +
           std::min(call_.heads_per_kv * width_, std::max<std::int64_t>(unit.own, 0)) * unit.block_splits;
  }

  std::int64_t max_range_sums(const DecodeUnit& unit) const {
    return max_splits(unit) * call_.heads_per_kv * unit.ranges_per_split;
  }

  void load_queries_f32(DecodeUnit& unit) const {
    const SequenceView& s = call_.sequences[unit.sequence];
    for (std::int64_t g = 0; g < call_.heads_per_kv; ++g) {
      const std::int64_t offset = Call::offset(call_.q, s, 0, unit.head * call_.heads_per_kv + g);
      HWY_DYNAMIC_DISPATCH(load_query_f32)
      (static_cast<const std::byte*>(call_.q.data) +
           offset * static_cast<std::int64_t>(size_of(call_.q.dtype)),
       call_.q.dtype, static_cast<std::size_t>(call_.head_dim),
       unit.queries + g * static_cast<std::int64_t>(kMaxHeadDim));
    }
  }

  /// The loop of a thread: splits of the gate, then splits of the keys. A waiting thread only waits for
  /// splits that other threads have begun.
  void work() {
    const auto score = &HWY_DYNAMIC_DISPATCH(score_means);
    for (DecodeUnit& unit : units_) {
      for (std::int64_t i = unit.next_means++; i < unit.mean_splits; i = unit.next_means++) {
        score(call_, means_, unit, i);
        if (--unit.means_left == 0) finish_gate(unit);
      }
    }
    const auto attend = &HWY_DYNAMIC_DISPATCH(attend_split);
    for (DecodeUnit& unit : units_) {
      for (std::int64_t i = unit.next_split++;; i = unit.next_split++) {
        if (i >= unit.own_splits) {
          while (!unit.gate_done) std::this_thread::yield();
          if (i >= unit.splits) break;
        }
        attend(call_, unit, width_, i, stride_);
        if (--unit.splits_left == 0) combine(unit);
      }
    }
  }

  /// Runs when every mean is scored: computes the selection of each head and the splits that follow from it.
  void finish_gate(DecodeUnit& unit) const {
    for (std::int64_t g = 0; g < call_.heads_per_kv; ++g) select(unit, g);
    std::int32_t* end = std::copy_if(unit.selected, unit.selected + call_.heads_per_kv * width_, unit.blocks,
                                     [&](std::int32_t block) { return block >= 0 && block != unit.own; });
    std::sort(unit.blocks, end);
    const std::int64_t selected = std::unique(unit.blocks, end) - unit.blocks;
    unit.splits = unit.own_splits + selected * unit.block_splits;
    unit.splits_left += selected * unit.block_splits;
    unit.gate_done = true;
    if (--unit.splits_left == 0) combine(unit);
  }

  void select(DecodeUnit& unit, std::int64_t g) const {
    std::int32_t* selected = unit.selected + g * width_;
    if (call_.is_selected()) {
      const SequenceView& s = call_.sequences[unit.sequence];
      std::copy_n(rows_.of(unit.head * call_.heads_per_kv + g, s.q_begin), width_, selected);
      return;
    }
    TopK topk{unit.topk_scores + g * width_, selected, 0, unit.candidates.k};
    if (unit.listed == 0) {
      for (std::int64_t block = unit.candidates.first; block < unit.candidates.last && topk.k > 0; ++block)
        topk.push(0, static_cast<std::int32_t>(block));
    }
    for (std::int64_t split = 0; split < unit.mean_splits && unit.listed > 0; ++split) {
      const std::int64_t list = (split * call_.heads_per_kv + g) * unit.listed;
      const std::int64_t means =
          std::min(kSplitMeans, unit.candidates.last - unit.candidates.first - split * kSplitMeans);
      for (std::int64_t i = list; i < list + std::min(unit.listed, means); ++i)
        topk.push(unit.list_scores[i], unit.lists[i]);
    }
    finish_row(call_, unit.candidates, topk.count, width_, selected);
  }

  void combine(const DecodeUnit& unit) const {
    const SequenceView& s = call_.sequences[unit.sequence];
    alignas(64) float merged[kMaxHeadDim + kMaxLanes];
    for (std::int64_t g = 0; g < call_.heads_per_kv; ++g) {
      const auto [max, sum] =
          HWY_DYNAMIC_DISPATCH(combine_splits)(unit, call_.heads_per_kv, g, stride_, merged);
      const std::int64_t head = unit.head * call_.heads_per_kv + g,
                         offset = Call::offset(outputs_.out, s, 0, head);
      const float inverse = sum == 0 ? 0.0F : 1 / sum;
      for (std::int64_t i = 0; i < call_.head_dim; ++i)
        store(outputs_.out.data, outputs_.out.dtype, offset + i, merged[i] * inverse);
      if (outputs_.lse != nullptr) {
        outputs_.lse[head * call_.tokens + s.q_begin] = sum == 0 ? kNegInf : (max + std::log2(sum)) * kLn2;
      }
      if (unit.weights != nullptr) combine_weights(unit, g, max, inverse);
    }
  }

  /// Writes the weights of one query head, whose splits have the maximum `max` and the sum 1 / `inverse`.
  void combine_weights(const DecodeUnit& unit, std::int64_t g, float max, float inverse) const {
    const std::int64_t size = unit.weights->range, ranges = divided_up(unit.weights->keys, size);
    float* weights = unit.weights->data + (unit.head * call_.heads_per_kv + g) * ranges;
    std::fill_n(weights, ranges, 0.0F);
    for (std::int64_t p = 0; p < unit.splits; ++p) {
      const std::int64_t row = p * call_.heads_per_kv + g;
      const float split_max = unit.partials[static_cast<std::size_t>(row) * stride_ + stride_ - 2];
      const DecodeUnit::Counted keys = unit.counted(unit.split(p));
      if (split_max == kNegInf || keys.begin >= keys.end) continue;
      const float scale = std::exp2(split_max - max) * inverse;
      const float* sums = unit.range_sums + row * unit.ranges_per_split;
      for (std::int64_t range = keys.range; range * size < keys.end; ++range)
        weights[range] += scale * *sums++;
    }
  }

  const Call& call_;
  const BlockMeans& means_;
  const Outputs& outputs_;
  SelectionRows rows_{};  // the caller's
  std::int64_t width_ = 0, tasks_ = 0;
  std::size_t stride_ = 0;
  std::vector<DecodeUnit> units_;
  Buffer<float> queries_, topk_scores_, list_scores_, partials_, range_sums_;
  Buffer<std::int32_t> selected_, blocks_, lists_;
};

}  // namespace

void decode(const Call& call, const BlockMeans& means, const Outputs& outputs, Context& context) {
  Decoding(call, means, outputs, context.scratch).run(context.parallel);
}

}  // namespace moba::cpu
#endif
