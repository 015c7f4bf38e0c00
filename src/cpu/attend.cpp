// Attention, block by block: a worker owns a range of queries, walks the blocks, gathers the rows that chose
// each one, and keeps a running maximum, sum and output for every row (online softmax). No two workers touch
// the same row, so nothing is merged across threads and the order of every sum is fixed.
#include "cpu/sizes.h"
#include "cpu/stages.h"
#include "number.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attend.cpp"
#include <hwy/foreach_target.h>
// foreach_target first
#include <hwy/highway.h>

#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

/// Where the rows of one range stand: logits are in units of log2, so weights are powers of 2.
struct RangeState {
  float* out;  // [rows, stride], unnormalised
  float* max;
  float* sum;
  std::size_t stride;
};

/// A chunk of keys and values of one kv head, packed for the tiles.
struct Chunk {
  std::int64_t first = 0, count = 0;
  float* keys = nullptr;    // [panels(count)][D][kCols]
  float* values = nullptr;  // [panels(D)][count][kCols]
};

struct Worker {
  const Problem& problem;
  const SequenceView& sequence;
  const Range& range;
  RangeState state;
  Chunk chunk;
  TileScratch& tile;

  std::size_t depth() const { return static_cast<std::size_t>(problem.head_dim); }
  const std::byte* query(std::int64_t row) const {
    const std::int64_t head = range.head * problem.group + row % problem.group;
    const std::int64_t offset = Problem::offset(problem.q, sequence, range.q0 + row / problem.group, head);
    return static_cast<const std::byte*>(problem.q.data) +
           offset * static_cast<std::int64_t>(size_of(problem.q.dtype));
  }
  /// Brings what the next tile gathers into the second-level cache.
  void prefetch(std::uint32_t row) const {
    const std::byte* from = query(row);
    const std::size_t bytes = depth() * size_of(problem.q.dtype);
    for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
    const float* out = state.out + row * state.stride;
    for (std::size_t i = 0; i < state.stride; i += 16) __builtin_prefetch(out + i, 1, 2);
  }
  /// Keys of the chunk that a row may see when the chunk lies in its own block.
  std::int64_t visible(std::int64_t row) const {
    const std::int64_t p = sequence.position(range.q0 + row / problem.group);
    return std::clamp<std::int64_t>(p + 1 - chunk.first, 0, chunk.count);
  }
};

void pack_values(const Problem& problem, const Chunk& chunk, std::int64_t index, const float* row) {
  const std::size_t depth = static_cast<std::size_t>(problem.head_dim),
                    count = static_cast<std::size_t>(chunk.count);
  float* to = chunk.values + static_cast<std::size_t>(index) * kCols;
  for (std::size_t column = 0; column < depth; column += kCols, to += count * kCols) {
    const std::size_t width = std::min(kCols, depth - column);
    for (std::size_t i = 0; i < width; ++i) to[i] = row[column + i];
    for (std::size_t i = width; i < kCols; ++i) to[i] = 0;
  }
}

/// Packs keys [first, first + count) of the sequence, wherever their pages lie.
void pack_chunk(Worker& w, std::int64_t first, std::int64_t count) {
  const Problem& problem = w.problem;
  w.chunk.first = first;
  w.chunk.count = count;
  Rows rows;
  std::int64_t begin = 0;  // index in the chunk at which `rows` starts
  const auto key = [&](std::size_t i, float* scratch) HWY_ATTR {
    const auto index = static_cast<std::int64_t>(i);
    if (index >= begin + rows.count || index == 0) {
      begin = index;
      rows = problem.keys(w.sequence, w.range.head, first + index);
    }
    return row_as_f32(rows, problem.k.dtype, index - begin, w.depth(), scratch);
  };
  pack_transposed(static_cast<std::size_t>(count), w.depth(), key, w.tile.widened, w.chunk.keys);

  for (std::int64_t done = 0; done < count;) {
    const Rows values = problem.values(w.sequence, w.range.head, first + done);
    const std::int64_t run = std::min(values.count, count - done);
    for (std::int64_t i = 0; i < run; ++i) {
      pack_values(problem, w.chunk, done + i,
                  row_as_f32(values, problem.v.dtype, i, w.depth(), w.tile.widened));
    }
    done += run;
  }
}

HWY_INLINE float max_of(const float* HWY_RESTRICT scores, std::size_t columns) {
  const F32 d;
  Vec left = hn::Load(d, scores), right = hn::Load(d, scores + kLanes);
  for (std::size_t i = kCols; i < columns; i += kCols) {
    left = hn::Max(left, hn::Load(d, scores + i));
    right = hn::Max(right, hn::Load(d, scores + i + kLanes));
  }
  return hn::GetLane(hn::MaxOfLanes(d, hn::Max(left, right)));
}

/// scores = 2^(scores - top); returns their sum.
HWY_INLINE float weigh(float* HWY_RESTRICT scores, std::size_t columns, float top) {
  const F32 d;
  const Vec by = hn::Set(d, top);
  Vec left = hn::Zero(d), right = left;
  for (std::size_t i = 0; i < columns; i += kCols) {
    const Vec a = exp2(hn::Sub(hn::Load(d, scores + i), by));
    const Vec b = exp2(hn::Sub(hn::Load(d, scores + i + kLanes), by));
    hn::Store(a, d, scores + i);
    hn::Store(b, d, scores + i + kLanes);
    left = hn::Add(left, a);
    right = hn::Add(right, b);
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(left, right)));
}

/// Turns the scores of `rows` rows over `columns` (whole panels) into weights, and moves each row's maximum and sum on. Leaves in
/// tile.decay what earlier outputs are to be multiplied by.
void soften(const Worker& w, const std::uint32_t* row_ids, std::size_t rows, std::size_t columns) {
  const F32 d;
  TileScratch& tile = w.tile;
  for (std::size_t r = 0; r < rows; ++r) {
    tile.decay[r] = w.state.max[row_ids[r]];
    tile.row_max[r] = max_of(tile.scores + r * kScoreStride, columns);
  }
  for (std::size_t r = 0; r < rows; r += kLanes) {
    const Vec never = hn::Set(d, -std::numeric_limits<float>::infinity()), before = hn::Load(d, tile.decay + r);
    const Vec now = hn::Max(hn::Load(d, tile.row_max + r), before);
    // A row that has seen nothing but -inf keeps weights of 0, not NaN.
    const Vec safe = hn::IfThenZeroElse(hn::Eq(now, never), now);
    hn::Store(now, d, tile.row_max + r);
    hn::Store(safe, d, tile.top + r);
    hn::Store(exp2(hn::Sub(before, safe)), d, tile.decay + r);
  }
  for (std::size_t r = 0; r < rows; ++r) {
    float& sum = w.state.sum[row_ids[r]];
    sum = sum * tile.decay[r] + weigh(tile.scores + r * kScoreStride, columns, tile.top[r]);
    w.state.max[row_ids[r]] = tile.row_max[r];
  }
}

/// One tile: `rows` rows of the range against the first columns of the chunk that any of them may see.
void attend_tile(Worker& w, const std::uint32_t* row_ids, std::size_t rows, bool own_block) {
  const float scale = w.problem.scale * 1.44269504F;  // log2(e)
  std::size_t columns = static_cast<std::size_t>(own_block ? w.visible(row_ids[rows - 1]) : w.chunk.count);
  for (std::size_t r = 0; r < rows; ++r) {
    widen(w.query(row_ids[r]), w.problem.q.dtype, w.depth(), scale, w.tile.rows + r * kRowStride);
    w.tile.out[r] = w.state.out + row_ids[r] * w.state.stride;
  }
  for (std::size_t panel = 0; panel < panels(columns); ++panel) {
    kScoreTiles[rows - 1](w.tile.rows, w.chunk.keys + panel * w.depth() * kCols, w.depth(),
                          w.tile.scores + panel * kCols);
  }
  const std::size_t padded = panels(columns) * kCols;
  for (std::size_t r = 0; r < rows; ++r) {
    const std::size_t seen = own_block ? static_cast<std::size_t>(w.visible(row_ids[r])) : columns;
    for (std::size_t i = seen; i < padded; ++i)
      w.tile.scores[r * kScoreStride + i] = -std::numeric_limits<float>::infinity();
  }
  soften(w, row_ids, rows, padded);
  const auto count = static_cast<std::size_t>(w.chunk.count);
  for (std::size_t panel = 0; panel < panels(w.depth()); ++panel) {
    kValueTiles[rows - 1](w.tile.scores, w.chunk.values + panel * count * kCols, columns, w.tile.decay,
                          w.tile.out, panel * kCols);
  }
}

/// Cuts a list of rows into tiles of nearly equal height.
template <typename Id>
void attend_rows(Worker& w, std::int64_t rows, bool own_block, Id&& id) {
  const std::int64_t tiles =
      (rows + static_cast<std::int64_t>(kTileRows) - 1) / static_cast<std::int64_t>(kTileRows);
  std::uint32_t ids[kTileRows];
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t first = rows * tile / tiles, last = rows * (tile + 1) / tiles;
    for (std::int64_t row = first; row < last; ++row) ids[row - first] = id(row);
    for (std::int64_t row = last; row < std::min(last + (last - first), rows); ++row) w.prefetch(id(row));
    attend_tile(w, ids, static_cast<std::size_t>(last - first), own_block);
  }
}

/// The rows of the range whose own block is `block`, as [first, last).
std::pair<std::int64_t, std::int64_t> own_rows(const Worker& w, std::int64_t block) {
  const std::int64_t zero = w.sequence.position(w.range.q0), length = w.range.q1 - w.range.q0,
                     size = w.problem.routing.block_size;
  const auto token = [&](std::int64_t position) {
    return std::clamp<std::int64_t>(position - zero, 0, length);
  };
  const std::int64_t end = block >= (w.sequence.keys - 1) / size ? w.sequence.keys : (block + 1) * size;
  return {token(block * size) * w.problem.group, token(end) * w.problem.group};
}

void attend_block(Worker& w, std::int64_t block, std::span<const std::uint32_t> chosen) {
  const std::int64_t begin = block * w.problem.routing.block_size;
  const auto [own_first, own_last] =
      w.problem.routing.causal ? own_rows(w, block) : std::pair<std::int64_t, std::int64_t>{0, 0};
  // Whoever chose the block sees all of it; its own rows see it up to the last of them.
  std::int64_t end =
      std::min(begin + std::min(w.problem.routing.block_size, w.sequence.keys), w.sequence.keys);
  if (chosen.empty()) {
    if (own_first == own_last) return;
    end = w.sequence.position(w.range.q0 + (own_last - 1) / w.problem.group) + 1;
  }
  constexpr auto kMost = static_cast<std::int64_t>(kChunk);
  const std::int64_t chunks = (end - begin + kMost - 1) / kMost;
  const auto step = static_cast<std::int64_t>(
      round_up(static_cast<std::size_t>((end - begin + chunks - 1) / chunks), kMaxCols));
  for (std::int64_t first = begin; first < end; first += step) {
    pack_chunk(w, first, std::min(step, end - first));
    attend_rows(w, static_cast<std::int64_t>(chosen.size()), false,
                [&](std::int64_t i) { return chosen[static_cast<std::size_t>(i)]; });
    const std::int64_t from =
        std::max(own_first, (first - w.sequence.position(w.range.q0)) * w.problem.group);
    attend_rows(w, std::max<std::int64_t>(own_last - from, 0), true,
                [&](std::int64_t i) { return static_cast<std::uint32_t>(from + i); });
  }
}

void finish_rows(const Worker& w, std::int64_t rows, const Outputs& outputs) {
  const Problem& problem = w.problem;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t query = w.range.q0 + row / problem.group,
                       head = w.range.head * problem.group + row % problem.group;
    const float sum = w.state.sum[row], inverse = sum == 0 ? 0.0F : 1 / sum;
    const float* from = w.state.out + static_cast<std::size_t>(row) * w.state.stride;
    const std::int64_t offset = Problem::offset(outputs.out, w.sequence, query, head);
    for (std::int64_t i = 0; i < problem.head_dim; ++i) {
      store(outputs.out.data, outputs.out.dtype, offset + i, from[i] * inverse);
    }
    if (outputs.lse == nullptr) continue;
    outputs.lse[head * problem.tokens + w.sequence.q_begin + query] =
        sum == 0 ? -std::numeric_limits<float>::infinity()
                 : (w.state.max[row] + std::log2(sum)) * 0.69314718F;
  }
}

}  // namespace

void attend_range(const Problem& problem, const Plan& plan, const Range& range, float* memory,
                  const Outputs& outputs) {
  const SequenceView& sequence = problem.sequences[static_cast<std::size_t>(range.sequence)];
  const std::int64_t rows = (range.q1 - range.q0) * problem.group;
  const std::size_t stride = padded_dim(problem.head_dim);
  auto& tile = *reinterpret_cast<TileScratch*>(memory);
  memory += sizeof(TileScratch) / sizeof(float);
  float* packed_keys = memory;
  float* packed_values = packed_keys + kChunk * stride;
  float* out = packed_values + kChunk * stride;
  float* max = out + static_cast<std::size_t>(rows) * stride;
  Worker w{problem, sequence, range, {out, max, max + rows, stride}, {0, 0, packed_keys, packed_values},
           tile};

  std::fill(std::begin(tile.widened), std::end(tile.widened), 0.0F);
  std::fill(out, max, 0.0F);
  std::fill(max, max + rows, -std::numeric_limits<float>::infinity());
  std::fill(max + rows, max + 2 * rows, 0.0F);

  const std::int64_t last_own = problem.own_block(sequence, range.q1 - 1);
  const std::int64_t blocks = problem.routing.causal ? last_own + 1 : problem.blocks(sequence);
  const bool listed = plan.rows.size() > 0;
  for (std::int64_t block = 0; block < blocks; ++block) {
    attend_block(w, block, listed ? plan.rows_of(range, block) : std::span<const std::uint32_t>());
  }
  finish_rows(w, rows, outputs);
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {

HWY_EXPORT(attend_range);

std::size_t attend_bytes(const Problem& problem, std::int64_t rows) {
  const std::size_t stride = padded_dim(problem.head_dim);
  const std::size_t floats = 2 * kChunk * stride + static_cast<std::size_t>(rows) * (stride + 2);
  return sizeof(TileScratch) + round_up(floats * sizeof(float), Scratch::kAlignment);
}

void attend(const Problem& problem, const Selection& /*selection*/, const Plan& plan, const Outputs& outputs,
            Resources& resources) {
  if (plan.ranges.empty()) return;
  std::int64_t rows = 0;
  for (const Range& range : plan.ranges) rows = std::max(rows, (range.q1 - range.q0) * problem.group);
  const std::size_t floats = attend_bytes(problem, rows) / sizeof(float);
  const Buffer<float> memory(resources.scratch,
                             resources.parallel.threads * static_cast<std::int64_t>(floats));
  const auto run = &HWY_DYNAMIC_DISPATCH(attend_range);
  resources.parallel.run(static_cast<std::int64_t>(plan.ranges.size()), [&](std::int64_t task, int worker) {
    run(problem, plan, plan.ranges[static_cast<std::size_t>(task)],
        memory.data() + static_cast<std::size_t>(worker) * floats, outputs);
  });
}

}  // namespace moba::cpu
#endif
