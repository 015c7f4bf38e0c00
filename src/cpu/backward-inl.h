// Shared by both implementations of the backward pass (multiply-adds and AMX): a worker with its key tile and
// the list of rows that see it, and prefetching.
#if defined(MOBA_CPU_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_BACKWARD_INL_H_
#undef MOBA_CPU_BACKWARD_INL_H_
#else
#define MOBA_CPU_BACKWARD_INL_H_
#endif

#include <bitset>

#include "cpu/backward.h"
#include "cpu/prefetch.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

struct BackwardWorker {
  const BackwardState& g;
  const SequenceView& sequence;
  const BackwardTile& backward_tile;
  BackwardScratch& batch;
  float* keys;      // [panels(count)][D][kCols]
  float* values;    // [panels(count)][D][kCols]
  float* key_rows;  // [panels(D)][count][kCols]
  float *dk, *dv;   // [count, stride]
  std::size_t stride;
  std::bitset<kKeyTileSize> nonfinite_keys{};  // packed as zeros
  KeyTile key_tile{}, next_key_tile{};
  PrefetchBudget row_budget{}, key_budget{};

  std::size_t depth() const { return static_cast<std::size_t>(g.call.head_dim); }
  std::size_t count() const { return static_cast<std::size_t>(key_tile.count); }
  std::int64_t own() const { return key_tile.own_last - key_tile.own_first; }
  std::int64_t rows() const { return own() + static_cast<std::int64_t>(key_tile.selected.size()); }
  /// Rows whose own block this is come first, so the number of keys that a row sees never decreases along the
  /// list.
  std::uint32_t row(std::int64_t index) const {
    return index < own() ? static_cast<std::uint32_t>(key_tile.own_first + index)
                         : key_tile.selected[static_cast<std::size_t>(index - own())];
  }
  /// Keys of the key tile that row `index` of the list sees.
  std::size_t seen(std::int64_t index) const {
    if (index >= own()) return count();
    return static_cast<std::size_t>(
        std::min(sequence.position(query_of(row(index))) + 1 - key_tile.first, key_tile.count));
  }
  std::int64_t query_of(std::uint32_t row) const {
    return backward_tile.range->q0 + row / static_cast<std::uint32_t>(g.call.heads_per_kv);
  }
  std::int64_t head_of(std::uint32_t row) const {
    return backward_tile.range->head * g.call.heads_per_kv +
           row % static_cast<std::uint32_t>(g.call.heads_per_kv);
  }
  const std::byte* row_of(const Tensor& t, std::uint32_t row) const {
    return static_cast<const std::byte*>(t.data) + Call::offset(t, sequence, query_of(row), head_of(row)) *
                                                       static_cast<std::int64_t>(size_of(t.dtype));
  }
  float* dq_of(std::uint32_t row) const { return g.dq.row(sequence.q_begin + query_of(row), head_of(row)); }
};

/// Prefetches one third of a row that the next tile gathers: its query, its d_out or its dq.
HWY_INLINE void prefetch_row(const BackwardWorker& w, std::int64_t step_index) {
  const std::uint32_t row = w.row(step_index / 3);
  const std::size_t size = w.depth() * size_of(w.g.call.q.dtype);
  if (step_index % 3 == 0) prefetch_l2(w.row_of(w.g.call.q, row), size);
  if (step_index % 3 == 1) prefetch_l2(w.row_of(w.g.backward.d_out, row), size);
  if (step_index % 3 == 2) prefetch_l2(w.dq_of(row), w.depth() * sizeof(float));
}

/// Prefetches one row that the end of this key tile or the beginning of the next one touches.
HWY_INLINE void prefetch_key(const BackwardWorker& w, std::int64_t step_index) {
  const std::int64_t key = step_index / 4, head = w.backward_tile.range->head;
  const std::size_t size = w.depth() * size_of(w.g.call.k.dtype);
  const std::int64_t position = w.backward_tile.first_key + w.key_tile.first + key;
  if (step_index % 4 < 2 && key < w.key_tile.count)
    prefetch_l2((step_index % 4 == 0 ? w.g.dk : w.g.dv).row(position, head), w.depth() * sizeof(float));
  if (step_index % 4 >= 2 && key < w.next_key_tile.count) {
    const Rows rows = step_index % 4 == 2 ? w.g.call.keys(w.sequence, head, w.next_key_tile.first + key)
                                          : w.g.call.values(w.sequence, head, w.next_key_tile.first + key);
    prefetch_l2(rows.data, size);
  }
}

/// Rows and keys are prefetched a few at a time between products, so that the core's line-fill buffers are
/// never exhausted.
HWY_INLINE void prefetch_some_rows(BackwardWorker& w) {
  for (std::int64_t i = 0; i < w.row_budget.step && w.row_budget.next < w.row_budget.end; ++i)
    prefetch_row(w, w.row_budget.next++);
}

HWY_INLINE void prefetch_some_keys(BackwardWorker& w) {
  for (std::int64_t i = 0; i < w.key_budget.step && w.key_budget.next < w.key_budget.end; ++i)
    prefetch_key(w, w.key_budget.next++);
}

void gather(BackwardWorker& w, const Tensor& t, std::uint32_t row, float factor, float* to) {
  load_f32(w.row_of(t, row), t.dtype, w.depth(), factor, to);
  std::fill(to + w.depth(), to + w.stride, 0.0F);
}

/// to += factor * from
void add_scaled(const float* HWY_RESTRICT from, std::size_t size, float factor, float* HWY_RESTRICT to) {
  const F32 d;
  const Vec by = hn::Set(d, factor);
  std::size_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    hn::StoreU(hn::MulAdd(by, hn::LoadU(d, from + i), hn::LoadU(d, to + i)), d, to + i);
  for (; i < size; ++i) to[i] += factor * from[i];
}

/// Accumulates the key tile's gradients into dk (times `factor`) and dv.
void accumulate_dk_dv(const BackwardWorker& w, float factor) {
  for (std::size_t i = 0; i < w.count(); ++i) {
    const std::int64_t key = w.backward_tile.first_key + w.key_tile.first + static_cast<std::int64_t>(i);
    add_scaled(w.dk + i * w.stride, w.depth(), factor, w.g.dk.row(key, w.backward_tile.range->head));
    add_scaled(w.dv + i * w.stride, w.depth(), 1, w.g.dv.row(key, w.backward_tile.range->head));
  }
}

}  // namespace
}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
