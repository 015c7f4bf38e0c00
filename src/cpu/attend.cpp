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

/// Brings the keys and values of the next chunk into the second-level cache, a few rows at a time, while this
/// one is worked on.
class Prefetch {
 public:
  void begin(const Problem& problem, const SequenceView& sequence, std::int64_t head, std::int64_t first,
             std::int64_t count) {
    problem_ = &problem;
    sequence_ = &sequence;
    head_ = head;
    next_ = first;
    end_ = first + count;
  }
  std::int64_t left() const { return end_ - next_; }
  void advance(std::int64_t rows) {
    for (rows = std::min(rows, left()); rows > 0;) {
      const Rows keys = problem_->keys(*sequence_, head_, next_),
                 values = problem_->values(*sequence_, head_, next_);
      const std::int64_t run = std::min({rows, keys.count, values.count});
      touch(keys, problem_->k.dtype, run);
      touch(values, problem_->v.dtype, run);
      next_ += run;
      rows -= run;
    }
  }

 private:
  void touch(const Rows& rows, DType dtype, std::int64_t count) const {
    const auto size = static_cast<std::int64_t>(size_of(dtype));
    for (std::int64_t row = 0; row < count; ++row) {
      const std::byte* from = rows.data + row * rows.stride * size;
      for (std::int64_t i = 0; i < problem_->head_dim * size; i += 64) __builtin_prefetch(from + i, 0, 2);
    }
  }

  const Problem* problem_ = nullptr;
  const SequenceView* sequence_ = nullptr;
  std::int64_t head_ = 0, next_ = 0, end_ = 0;
};

/// Where a tile's rows are found, looked up once, a tile ahead, so that the next ones are on their way while
/// this one is worked on.
struct TileRows {
  std::size_t count = 0;
  std::uint32_t ids[kTileRows];
  const std::byte* query[kTileRows];
};

struct Worker {
  const Problem& problem;
  const SequenceView& sequence;
  const Range& range;
  RangeState state;
  Chunk chunk;
  TileScratch& tile;
  Prefetch upcoming;

  std::size_t depth() const { return static_cast<std::size_t>(problem.head_dim); }
  std::int64_t token_of(std::uint32_t row) const {
    return range.q0 + row / static_cast<std::uint32_t>(problem.group);
  }
  const std::byte* query(std::uint32_t row) const {
    const std::int64_t head = range.head * problem.group + row % static_cast<std::uint32_t>(problem.group);
    const std::int64_t offset = Problem::offset(problem.q, sequence, token_of(row), head);
    return static_cast<const std::byte*>(problem.q.data) +
           offset * static_cast<std::int64_t>(size_of(problem.q.dtype));
  }
  /// Keys of the chunk that a row may see when the chunk lies in its own block.
  std::int64_t visible(std::uint32_t row) const {
    return std::clamp<std::int64_t>(sequence.position(token_of(row)) + 1 - chunk.first, 0, chunk.count);
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

/// Turns the scores of `rows` rows over `columns` (whole panels) into weights, and moves each row's maximum
/// and sum on. Leaves in tile.decay what earlier outputs are to be multiplied by.
void soften(const Worker& w, const std::uint32_t* row_ids, std::size_t rows, std::size_t columns) {
  const F32 d;
  TileScratch& tile = w.tile;
  for (std::size_t r = 0; r < rows; ++r) {
    tile.decay[r] = w.state.max[row_ids[r]];
    tile.row_max[r] = max_of(tile.scores + r * kScoreStride, columns);
  }
  for (std::size_t r = 0; r < rows; r += kLanes) {
    const Vec never = hn::Set(d, -std::numeric_limits<float>::infinity()),
              before = hn::Load(d, tile.decay + r);
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

/// One tile: rows of the range against the first columns of the chunk that any of them may see.
void attend_tile(Worker& w, const TileRows& rows, bool own_block) {
  const float scale = w.problem.scale * 1.44269504F;  // log2(e)
  const std::size_t last = rows.count - 1;
  const auto columns = static_cast<std::size_t>(own_block ? w.visible(rows.ids[last]) : w.chunk.count);
  for (std::size_t r = 0; r < rows.count; ++r) {
    widen(rows.query[r], w.problem.q.dtype, w.depth(), scale, w.tile.rows + r * kRowStride);
    w.tile.out[r] = w.state.out + rows.ids[r] * w.state.stride;
  }
  for (std::size_t panel = 0; panel < panels(columns); ++panel) {
    kScoreTiles[last](w.tile.rows, w.chunk.keys + panel * w.depth() * kCols, w.depth(),
                      w.tile.scores + panel * kCols);
  }
  const std::size_t padded = panels(columns) * kCols;
  for (std::size_t r = 0; r < rows.count; ++r) {
    const std::size_t seen = own_block ? static_cast<std::size_t>(w.visible(rows.ids[r])) : columns;
    float* scores = w.tile.scores + r * kScoreStride;
    std::fill(scores + seen, scores + padded, -std::numeric_limits<float>::infinity());
  }
  soften(w, rows.ids, rows.count, padded);
  const auto count = static_cast<std::size_t>(w.chunk.count);
  for (std::size_t panel = 0; panel < panels(w.depth()); ++panel) {
    kValueTiles[last](w.tile.scores, w.chunk.values + panel * count * kCols, columns, w.tile.decay,
                      w.tile.out, panel * kCols);
  }
}

/// Rows [first, last) of a list as a tile, on their way into the second-level cache.
template <typename Id>
TileRows locate(const Worker& w, std::int64_t first, std::int64_t last, Id&& id) {
  TileRows rows;
  const std::size_t bytes = w.depth() * size_of(w.problem.q.dtype);
  for (std::int64_t i = first; i < last; ++i, ++rows.count) {
    const std::uint32_t row = id(i);
    const std::byte* query = w.query(row);
    const float* out = w.state.out + row * w.state.stride;
    rows.ids[rows.count] = row;
    rows.query[rows.count] = query;
    for (std::size_t at = 0; at < bytes; at += 64) __builtin_prefetch(query + at, 0, 2);
    for (std::size_t at = 0; at < w.state.stride; at += 16) __builtin_prefetch(out + at, 1, 2);
  }
  return rows;
}

constexpr auto kHeight = static_cast<std::int64_t>(kTileRows);

/// Cuts a list of rows into tiles of nearly equal height.
template <typename Id>
void attend_rows(Worker& w, std::int64_t rows, bool own_block, std::int64_t prefetch, Id&& id) {
  const std::int64_t tiles = (rows + kHeight - 1) / kHeight;
  if (tiles == 0) return;
  TileRows next = locate(w, 0, rows / tiles, id);
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const TileRows now = next;
    if (tile + 1 < tiles) next = locate(w, rows * (tile + 1) / tiles, rows * (tile + 2) / tiles, id);
    w.upcoming.advance(prefetch);
    attend_tile(w, now, own_block);
  }
}

/// One chunk of one block, and who sees it: the rows that chose the block, all of it; the rows [own_first,
/// own_last) whose own block it is, up to their position.
struct Job {
  std::int64_t block = -1, first = 0, count = 0;
  std::span<const std::uint32_t> chosen;
  std::int64_t own_first = 0, own_last = 0;
};

/// Walks the chunks of a range in ascending order of their keys.
class Walk {
 public:
  Walk(const Problem& problem, const SequenceView& sequence, const Plan& plan, const Range& range)
      : problem_(problem), sequence_(sequence), plan_(plan), range_(range) {
    const std::int64_t last = problem.own_block(sequence, range.q1 - 1);
    blocks_ = problem.routing.causal ? last + 1 : problem.blocks(sequence);
  }

  /// The next chunk that anybody sees; false at the end.
  bool next(Job& job) {
    while (at_ >= end_) {
      if (++block_ >= blocks_) return false;
      enter_block();
    }
    job = {block_, at_, std::min(step_, end_ - at_), chosen_, own_first_, own_last_};
    job.own_first = std::max(own_first_, (at_ - sequence_.position(range_.q0)) * problem_.group);
    at_ += step_;
    return true;
  }

 private:
  void enter_block() {
    const std::int64_t size = problem_.routing.block_size;
    chosen_ = plan_.rows.size() > 0 ? plan_.rows_of(range_, block_) : std::span<const std::uint32_t>();
    at_ = block_ * size;
    // Whoever chose the block sees all of it; its own rows see it up to the last of them.
    end_ = std::min(at_ + std::min(size, sequence_.keys), sequence_.keys);
    own_first_ = own_last_ = 0;
    if (problem_.routing.causal) {
      const std::int64_t zero = sequence_.position(range_.q0), tokens = range_.q1 - range_.q0;
      own_first_ = std::clamp<std::int64_t>(at_ - zero, 0, tokens) * problem_.group;
      own_last_ = std::clamp<std::int64_t>(end_ - zero, 0, tokens) * problem_.group;
    }
    if (chosen_.empty()) {
      end_ = own_first_ == own_last_ ? at_
                                     : sequence_.position(range_.q0 + (own_last_ - 1) / problem_.group) + 1;
    }
    constexpr auto kMost = static_cast<std::int64_t>(kChunk);
    const std::int64_t chunks = std::max<std::int64_t>((end_ - at_ + kMost - 1) / kMost, 1);
    step_ = static_cast<std::int64_t>(
        round_up(static_cast<std::size_t>((end_ - at_ + chunks - 1) / chunks), kMaxCols));
  }

  const Problem& problem_;
  const SequenceView& sequence_;
  const Plan& plan_;
  const Range& range_;
  std::int64_t blocks_ = 0, block_ = -1, at_ = 0, end_ = 0, step_ = 1, own_first_ = 0, own_last_ = 0;
  std::span<const std::uint32_t> chosen_;
};

void attend_chunk(Worker& w, const Job& job) {
  pack_chunk(w, job.first, job.count);
  const auto chosen = static_cast<std::int64_t>(job.chosen.size()),
             own = std::max<std::int64_t>(job.own_last - job.own_first, 0);
  const std::int64_t tiles = (chosen + kHeight - 1) / kHeight + (own + kHeight - 1) / kHeight;
  const std::int64_t prefetch = w.upcoming.left() / std::max<std::int64_t>(tiles, 1) + 1;
  attend_rows(w, chosen, false, prefetch,
              [&](std::int64_t i) { return job.chosen[static_cast<std::size_t>(i)]; });
  attend_rows(w, own, true, prefetch,
              [&](std::int64_t i) { return static_cast<std::uint32_t>(job.own_first + i); });
}

void finish_rows(const Worker& w, std::int64_t rows, const Outputs& outputs) {
  const Problem& problem = w.problem;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t query = w.range.q0 + row / problem.group,
                       head = w.range.head * problem.group + row % problem.group;
    const float sum = w.state.sum[row], inverse = sum == 0 ? 0.0F : 1 / sum;
    const float* from = w.state.out + static_cast<std::size_t>(row) * w.state.stride;
    const std::int64_t offset = Problem::offset(outputs.out, w.sequence, query, head);
    narrow(from, static_cast<std::size_t>(problem.head_dim), inverse, outputs.out.dtype,
           static_cast<std::byte*>(outputs.out.data) +
               offset * static_cast<std::int64_t>(size_of(outputs.out.dtype)));
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
           tile,
           {}};

  std::fill(std::begin(tile.widened), std::end(tile.widened), 0.0F);
  std::fill(out, max, 0.0F);
  std::fill(max, max + rows, -std::numeric_limits<float>::infinity());
  std::fill(max + rows, max + 2 * rows, 0.0F);

  Walk walk(problem, sequence, plan, range);
  Job now, next;
  for (bool more = walk.next(next); more;) {
    now = next;
    more = walk.next(next);
    if (more) w.upcoming.begin(problem, sequence, range.head, next.first, next.count);
    attend_chunk(w, now);
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
