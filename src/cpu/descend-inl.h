// What both ways of the backward pass share: a worker with its chunk of keys and the list of rows that see
// it, and what is fetched ahead.
#if defined(MOBA_CPU_DESCEND_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_DESCEND_INL_H_
#undef MOBA_CPU_DESCEND_INL_H_
#else
#define MOBA_CPU_DESCEND_INL_H_
#endif

#include "cpu/gradient.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

/// Something to be done a little at a time, `step` pieces at each occasion.
struct Errands {
  std::int64_t next = 0, end = 0, step = 0;

  void spread(std::int64_t first, std::int64_t last, std::int64_t occasions) {
    next = first;
    end = last;
    step = (last - first + occasions - 1) / occasions;
  }
};

struct Worker {
  const Gradient& g;
  const SequenceView& sequence;
  const Cell& cell;
  BackwardScratch& batch;
  float* keys;      // [panels(count)][D][kCols]
  float* values;    // [panels(count)][D][kCols]
  float* key_rows;  // [panels(D)][count][kCols]
  float *dk, *dv;   // [count, stride]
  std::size_t stride;
  Chunk chunk{}, next_chunk{};
  Errands rows_ahead{}, keys_ahead{};

  std::size_t depth() const { return static_cast<std::size_t>(g.problem.head_dim); }
  std::size_t count() const { return static_cast<std::size_t>(chunk.count); }
  std::int64_t own() const { return chunk.own_last - chunk.own_first; }
  std::int64_t rows() const { return own() + static_cast<std::int64_t>(chunk.chosen.size()); }
  /// Rows whose own block this is come first, so that what a row sees of the chunk never shrinks.
  std::uint32_t row(std::int64_t index) const {
    return index < own() ? static_cast<std::uint32_t>(chunk.own_first + index)
                         : chunk.chosen[static_cast<std::size_t>(index - own())];
  }
  /// Keys of the chunk that row `index` of the list sees.
  std::size_t seen(std::int64_t index) const {
    if (index >= own()) return count();
    return static_cast<std::size_t>(
        std::min(sequence.position(query_of(row(index))) + 1 - chunk.first, chunk.count));
  }
  std::int64_t query_of(std::uint32_t row) const {
    return cell.range->q0 + row / static_cast<std::uint32_t>(g.problem.group);
  }
  std::int64_t head_of(std::uint32_t row) const {
    return cell.range->head * g.problem.group + row % static_cast<std::uint32_t>(g.problem.group);
  }
  const std::byte* row_of(const Tensor& t, std::uint32_t row) const {
    return static_cast<const std::byte*>(t.data) + Problem::offset(t, sequence, query_of(row), head_of(row)) *
                                                       static_cast<std::int64_t>(size_of(t.dtype));
  }
  float* dq_of(std::uint32_t row) const { return g.dq.row(sequence.q_begin + query_of(row), head_of(row)); }
};

/// Brings `size` bytes into the second-level cache. Always inlined, as what calls it must be: GCC takes a
/// function of prefetches alone for one without effect, and drops its calls.
HWY_INLINE void prefetch(const void* from, std::size_t size) {
  const auto* bytes = static_cast<const std::byte*>(from);
  for (std::size_t at = 0; at < size; at += 64) __builtin_prefetch(bytes + at, 0, 2);
}

/// What the next tile will gather, a third of a row at a time: its query, its d_out, its dq.
HWY_INLINE void prefetch_row(const Worker& w, std::int64_t piece) {
  const std::uint32_t row = w.row(piece / 3);
  const std::size_t size = w.depth() * size_of(w.g.problem.q.dtype);
  if (piece % 3 == 0) prefetch(w.row_of(w.g.problem.q, row), size);
  if (piece % 3 == 1) prefetch(w.row_of(w.g.backward.d_out, row), size);
  if (piece % 3 == 2) prefetch(w.dq_of(row), w.depth() * sizeof(float));
}

/// What the end of this chunk and the beginning of the next will touch, a row at a time.
HWY_INLINE void prefetch_key(const Worker& w, std::int64_t piece) {
  const std::int64_t key = piece / 4, head = w.cell.range->head;
  const std::size_t size = w.depth() * size_of(w.g.problem.k.dtype);
  const std::int64_t position = w.cell.first_key + w.chunk.first + key;
  if (piece % 4 < 2 && key < w.chunk.count)
    prefetch((piece % 4 == 0 ? w.g.dk : w.g.dv).row(position, head), w.depth() * sizeof(float));
  if (piece % 4 >= 2 && key < w.next_chunk.count) {
    const Rows rows = piece % 4 == 2 ? w.g.problem.keys(w.sequence, head, w.next_chunk.first + key)
                                     : w.g.problem.values(w.sequence, head, w.next_chunk.first + key);
    prefetch(rows.data, size);
  }
}

/// Both are done a little at a time, between products, so that memory is never asked for too much at once.
HWY_INLINE void look_for_rows(Worker& w) {
  for (std::int64_t i = 0; i < w.rows_ahead.step && w.rows_ahead.next < w.rows_ahead.end; ++i)
    prefetch_row(w, w.rows_ahead.next++);
}

HWY_INLINE void look_for_keys(Worker& w) {
  for (std::int64_t i = 0; i < w.keys_ahead.step && w.keys_ahead.next < w.keys_ahead.end; ++i)
    prefetch_key(w, w.keys_ahead.next++);
}

void gather(Worker& w, const Tensor& t, std::uint32_t row, float factor, float* to) {
  widen(w.row_of(t, row), t.dtype, w.depth(), factor, to);
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

/// Adds a chunk's gradients to everybody's, those of keys times `factor`.
void hand_over(const Worker& w, float factor) {
  for (std::size_t i = 0; i < w.count(); ++i) {
    const std::int64_t key = w.cell.first_key + w.chunk.first + static_cast<std::int64_t>(i);
    add_scaled(w.dk + i * w.stride, w.depth(), factor, w.g.dk.row(key, w.cell.range->head));
    add_scaled(w.dv + i * w.stride, w.depth(), 1, w.g.dv.row(key, w.cell.range->head));
  }
}

}  // namespace
}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
