// Score and top-k in one: a worker takes a few hundred rows, walks the block means a panel at a time, and
// keeps each row's best blocks in a short sorted list. Most scores are dismissed by one comparison against
// the worst of the list; no matrix of scores exists.
#include <bit>

#include "cpu/choice.h"
#include "cpu/sizes.h"
#include "cpu/stages.h"
#include "number.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/gate.cpp"
#include <hwy/foreach_target.h>
// foreach_target first
#include <hwy/highway.h>

#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

/// Offers the scores of blocks [first, last) to a row's list, the most of them by a glance at their vector.
void offer_all(const float* scores, std::int64_t first, std::int64_t last, std::int64_t own, Best& best) {
  const F32 d;
  const std::int64_t count = last - first;
  for (std::int64_t i = 0; i < count; i += static_cast<std::int64_t>(kLanes)) {
    std::uint32_t hits = (1U << std::min<std::int64_t>(static_cast<std::int64_t>(kLanes), count - i)) - 1;
    if (best.count == best.places) {
      std::uint32_t below = 0;
      hn::StoreMaskBits(d, hn::Lt(hn::LoadU(d, scores + i), hn::Set(d, best.scores[0])),
                        reinterpret_cast<std::uint8_t*>(&below));
      hits &= ~below;
    }
    for (; hits != 0; hits &= hits - 1) {
      const std::int64_t j = i + std::countr_zero(hits);
      if (first + j != own) best.offer(scores[j], static_cast<std::int32_t>(first + j));
    }
  }
}

}  // namespace

/// Queries [q0, q1) of one sequence at one kv head. `memory`: TileScratch, packed means, then the lists'
/// scores.
void gate_rows(const Problem& problem, const Means& means, std::size_t sequence_index, std::int64_t head,
               std::int64_t q0, std::int64_t q1, const Selection& selection, float* memory) {
  const SequenceView& sequence = problem.sequences[sequence_index];
  const auto depth = static_cast<std::size_t>(problem.head_dim);
  const std::int64_t rows = (q1 - q0) * problem.group, width = selection.width;
  auto& tile = *reinterpret_cast<TileScratch*>(memory);
  float* packed = memory + sizeof(TileScratch) / sizeof(float);
  float* scores = packed + kChunk * depth;
  auto* counts = reinterpret_cast<std::int32_t*>(scores + rows * width);
  std::int32_t* blocks = selection.of(head, sequence.q_begin + q0);
  std::fill(std::begin(tile.widened), std::end(tile.widened), 0.0F);
  std::fill(counts, counts + rows, 0);

  const auto choice = [&](std::int64_t row) {
    return choice_of(problem, sequence, q0 + row / problem.group, width);
  };
  // Rows that have no more candidates than places take all of them unseen. Candidates grow with the query.
  std::int64_t first_row = 0;
  for (; first_row < rows; ++first_row) {
    const Choice c = choice(first_row);
    const std::int64_t free = c.last - c.first - (c.own >= 0 ? 1 : 0);
    if (free > c.places) break;
    for (std::int64_t block = c.first; block < c.last; ++block) {
      if (block != c.own) blocks[first_row * width + counts[first_row]++] = static_cast<std::int32_t>(block);
    }
  }
  const std::int64_t last_block = first_row < rows ? choice(rows - 1).last : 0;
  const std::int64_t scored = rows - first_row, height = static_cast<std::int64_t>(kTileRows);
  const std::int64_t tiles = (scored + height - 1) / height;

  for (std::int64_t begin = 0; begin < last_block; begin += static_cast<std::int64_t>(kChunk)) {
    const std::int64_t count = std::min(static_cast<std::int64_t>(kChunk), last_block - begin);
    const float* base = means.of(sequence_index, head) + begin * means.block_stride;
    const auto mean = [&](std::size_t i, float*) {
      return base + static_cast<std::int64_t>(i) * means.block_stride;
    };
    pack_transposed(static_cast<std::size_t>(count), depth, mean, tile.widened, packed);

    for (std::int64_t t = 0; t < tiles; ++t) {
      const std::int64_t from = first_row + scored * t / tiles, to = first_row + scored * (t + 1) / tiles;
      const std::int64_t columns = std::min(choice(to - 1).last - begin, count);
      if (columns <= 0) continue;
      for (std::int64_t row = from; row < to; ++row) {
        const std::int64_t offset = Problem::offset(problem.q, sequence, q0 + row / problem.group,
                                                    head * problem.group + row % problem.group);
        const auto* query = static_cast<const std::byte*>(problem.q.data) +
                            offset * static_cast<std::int64_t>(size_of(problem.q.dtype));
        widen(query, problem.q.dtype, depth, 1.0F,
              tile.rows + static_cast<std::size_t>(row - from) * kRowStride);
      }
      for (std::size_t panel = 0; panel < panels(static_cast<std::size_t>(columns)); ++panel) {
        kScoreTiles[static_cast<std::size_t>(to - from - 1)](tile.rows, packed + panel * depth * kCols, depth,
                                                             tile.scores + panel * kCols);
      }
      for (std::int64_t row = from; row < to; ++row) {
        const Choice c = choice(row);
        const std::int64_t first = std::max(c.first, begin), last = std::min(c.last, begin + count);
        if (first >= last || c.places == 0) continue;
        Best best{scores + row * width, blocks + row * width, counts[row], c.places};
        offer_all(tile.scores + static_cast<std::size_t>(row - from) * kScoreStride + (first - begin), first,
                  last, c.own, best);
        counts[row] = static_cast<std::int32_t>(best.count);
      }
    }
  }
  for (std::int64_t row = 0; row < rows; ++row)
    finish_row(problem, choice(row), counts[row], width, blocks + row * width);
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {

HWY_EXPORT(gate_rows);

std::size_t gate_bytes(const Problem& problem) {
  if (problem.width() == 0) return 0;
  const std::int64_t rows = std::max(kGateRows, problem.group);
  return sizeof(TileScratch) + round_up((kChunk * static_cast<std::size_t>(problem.head_dim) +
                                         static_cast<std::size_t>(rows * (problem.width() + 1))) *
                                            sizeof(float),
                                        Scratch::kAlignment);
}

Selection gate(const Problem& problem, const Means& means, const Group& group, Resources& resources) {
  Selection selection{group, problem.group, problem.width(), {}};
  if (selection.width == 0) return selection;
  selection.blocks = Buffer<std::int32_t>(resources.scratch,
                                          group.heads() * group.tokens() * problem.group * selection.width);

  struct Task {
    std::size_t sequence;
    std::int64_t q0, q1;
  };
  std::vector<Task> tasks;
  const std::int64_t step = std::max<std::int64_t>(kGateRows / problem.group, 1);
  for (std::size_t s = 0; s < problem.sequences.size(); ++s) {
    const auto [first, last] = group.queries_of(problem.sequences[s]);
    for (std::int64_t q = first; q < last; q += step) tasks.push_back({s, q, std::min(q + step, last)});
  }
  const std::size_t floats = gate_bytes(problem) / sizeof(float);
  const Buffer<float> memory(resources.scratch,
                             resources.parallel.threads * static_cast<std::int64_t>(floats));
  const auto run = &HWY_DYNAMIC_DISPATCH(gate_rows);
  const auto count = static_cast<std::int64_t>(tasks.size());
  resources.parallel.run(count * group.heads(), [&](std::int64_t index, int worker) {
    // Later queries have more candidates: begin with them.
    const Task& task = tasks[static_cast<std::size_t>(count - 1 - index % count)];
    run(problem, means, task.sequence, group.head0 + index / count, task.q0, task.q1, selection,
        memory.data() + static_cast<std::size_t>(worker) * floats);
  });
  return selection;
}

}  // namespace moba::cpu
#endif
