// The rows of a task of the gate, and their division into tiles.
#if defined(MOBA_CPU_GATE_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_GATE_ROWS_INL_H_
#undef MOBA_CPU_GATE_ROWS_INL_H_
#else
#define MOBA_CPU_GATE_ROWS_INL_H_
#endif

#include "cpu/gate_task.h"
#include "cpu/prefetch.h"
#include "cpu/topk-inl.h"
#include "cpu/topk.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

constexpr auto kTileBlocks = static_cast<std::int64_t>(kKeyTileSize);

/// The rows of a task, their candidates and their lists.
struct GateRows {
  const Call& call;
  const BlockMeans& means;
  const GateTask& task;
  const SequenceView& sequence;
  std::int64_t width, count;
  const SliceSelection& selection;  // a row holds the row's list until it is finished
  float* scores;                    // [count, width]
  Candidates* candidates;
  std::int64_t first_scored = 0;

  std::size_t depth() const { return static_cast<std::size_t>(call.head_dim); }
  std::int64_t query_of(std::int64_t row) const { return task.q0 + row / call.heads_per_kv; }
  std::int64_t q_head_of(std::int64_t row) const {
    return task.head * call.heads_per_kv + row % call.heads_per_kv;
  }
  std::int32_t* blocks(std::int64_t row) const {
    return selection.of(q_head_of(row), sequence.q_begin + query_of(row));
  }
  const std::byte* query(std::int64_t row) const {
    const std::int64_t offset = Call::offset(call.q, sequence, query_of(row), q_head_of(row));
    return static_cast<const std::byte*>(call.q.data) +
           offset * static_cast<std::int64_t>(size_of(call.q.dtype));
  }
  /// Prefetches a query that is read soon.
  HWY_INLINE void prefetch_query(std::int64_t row) const {
    if (row >= count) return;
    prefetch_l1(query(row), depth() * size_of(call.q.dtype));
  }
  const float* mean(std::int64_t block) const {
    return means.of(task.sequence, task.head) + block * means.block_stride;
  }
  TopK topk(std::int64_t row) const {
    return {scores + row * width, blocks(row), candidates[row].count, candidates[row].k};
  }
  /// Returns the end of the blocks that any row may select: candidates grow with the query.
  std::int64_t last_block() const { return first_scored < count ? candidates[count - 1].last : 0; }

  /// Selects all candidates of the rows that have no more of them than k, without scores; these rows come
  /// first.
  void take_all() {
    bool selecting = false;
    for (std::int64_t row = 0; row < count; ++row) {
      Candidates& c = candidates[row] = candidates_of(call, sequence, query_of(row), width);
      selecting = selecting || c.last - c.first - (c.own >= 0 ? 1 : 0) > c.k;
      if (selecting) continue;
      first_scored = row + 1;
      std::int32_t* const row_blocks = blocks(row);
      for (std::int64_t block = c.first; block < c.last; ++block) {
        if (block != c.own) row_blocks[c.count++] = static_cast<std::int32_t>(block);
      }
    }
  }
  void finish() {
    for (std::int64_t row = 0; row < count; ++row) {
      std::int32_t* const row_blocks = blocks(row);
      sort_blocks(row_blocks, candidates[row].count);
      std::int64_t found = finish_row(call, candidates[row], candidates[row].count, width, row_blocks);
      const std::int64_t own = call.routing.causal ? call.own_block(sequence, query_of(row)) : -1;
      if (own >= 0) row_blocks[found++] = static_cast<std::int32_t>(own);
      std::fill(row_blocks + found, row_blocks + selection.rows.stride, -1);
    }
  }
};

/// Calls visit(from, to) for tiles of nearly equal height over the rows that need scores.
template <typename Visit>
void for_tiles(const GateRows& rows, std::int64_t height, Visit&& visit) {
  const std::int64_t scored = rows.count - rows.first_scored, tiles = (scored + height - 1) / height;
  for (std::int64_t t = 0; t < tiles; ++t)
    visit(rows.first_scored + scored * t / tiles, rows.first_scored + scored * (t + 1) / tiles);
}

}  // namespace
}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
