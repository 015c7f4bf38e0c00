// One token a sequence: gate over the cached means, then the chosen blocks, bound by how fast memory can be
// read. The keys of a kv head are read once for all query heads that chose their block. Work is cut into
// pieces whose size does not depend on the number of threads, and partial answers meet in a fixed order. All
// of it is one parallel region, in which threads take piece after piece: what depends on other pieces is done
// by the thread that finishes the last of them.
#include <atomic>
#include <thread>

#include "cpu/choice.h"
#include "cpu/sizes.h"
#include "cpu/stages.h"
#include "number.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/decode.cpp"
#include <hwy/foreach_target.h>
// foreach_target first
#include <hwy/highway.h>

#include "cpu/tile-inl.h"

#ifndef MOBA_CPU_DECODE_TYPES_
#define MOBA_CPU_DECODE_TYPES_
namespace moba::cpu {

constexpr std::int64_t kMinPieceKeys = 64, kMaxPieceKeys = 512, kPieceMeans = 256;

/// Keys [first, first + count) of a block.
struct Piece {
  std::int64_t block = 0, first = 0, count = 0;
};

/// One query token at one kv head: what its query heads read, and how far the threads have come. Pieces are
/// those of the token's own block, which need not wait for the gate, then those of the chosen blocks.
struct alignas(64) Unit {
  std::size_t sequence = 0;
  std::int64_t head = 0, own = -1, keys = 0, block_size = 0;
  std::int64_t mean_pieces =
      1;  // one at least, if an empty one: whoever ends the last one settles the choice
  std::int64_t piece_keys = 0, own_pieces = 0, block_pieces = 0;
  std::int64_t pieces = 0;  // known when settled
  Choice choice;
  std::int64_t listed = 0;         // the longest list of the best of a piece of means
  float* list_scores = nullptr;    // [mean_pieces][group][listed]
  std::int32_t* lists = nullptr;   // the blocks of these scores
  float* best = nullptr;           // [group][width], scores of the blocks chosen
  float* queries = nullptr;        // [group][kMaxHeadDim], widened, unscaled, zero padded
  std::int32_t* chosen = nullptr;  // [group][width]
  std::int32_t* blocks = nullptr;  // all that were chosen, without the own block, ascending
  float* partials = nullptr;       // [pieces][group][stride]

  alignas(64) std::atomic<std::int64_t> next_means = 0, means_left = 0;
  std::atomic<std::int64_t> next_piece = 0, pieces_left = 0;
  std::atomic<bool> settled = false;

  bool sees(std::int64_t width, std::int64_t g, std::int64_t block) const {
    const std::int32_t* from = chosen + g * width;
    return block == own || std::find(from, from + width, static_cast<std::int32_t>(block)) != from + width;
  }
  Piece piece(std::int64_t index) const {
    const std::int64_t other = index - own_pieces;
    const std::int64_t block = other < 0 ? own : blocks[other / block_pieces];
    const std::int64_t first = block * block_size + (other < 0 ? index : other % block_pieces) * piece_keys;
    return {block, first, std::min({piece_keys, (block + 1) * block_size - first, keys - first})};
  }
};

}  // namespace moba::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

template <typename T>
HWY_INLINE Vec load_wide(const T* from) {
  const F32 d;
  if constexpr (std::is_same_v<T, float>) {
    return hn::LoadU(d, from);
  } else if constexpr (std::is_same_v<T, std::int8_t>) {
    return hn::ConvertTo(
        d, hn::PromoteTo(hn::RebindToSigned<F32>(), hn::LoadU(hn::Rebind<std::int8_t, F32>(), from)));
  } else {
    return hn::PromoteTo(d, hn::LoadU(hn::Rebind<T, F32>(), from));
  }
}

/// Rows as they are read: while one is used, those kAheadBytes further on are on their way, past the end
/// those of `next`.
template <typename T>
struct Stream {
  static constexpr std::int64_t kAheadBytes = 2048;

  const T* rows = nullptr;
  std::int64_t stride = 0, count = 0;
  std::size_t depth = 0;
  const std::byte* next = nullptr;
  std::int64_t next_stride = 0;  // in bytes

  const T* row(std::int64_t i) const { return rows + i * stride; }
  HWY_INLINE void fetch_ahead(std::int64_t i) const {
    const auto bytes = static_cast<std::int64_t>(depth * sizeof(T));
    const std::int64_t at = i + (kAheadBytes + bytes - 1) / bytes;
    const std::byte* from = reinterpret_cast<const std::byte*>(row(at));
    if (at >= count) {
      if (next == nullptr) return;
      from = next + (at - count) * next_stride;
    }
    for (std::int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte);
  }
};

#if HWY_TARGET == HWY_SCALAR
/// to[0, 4) = the sums of four vectors' lanes.
HWY_INLINE void store_sums(Vec s0, Vec s1, Vec s2, Vec s3, float* to) {
  to[0] = hn::GetLane(s0);
  to[1] = hn::GetLane(s1);
  to[2] = hn::GetLane(s2);
  to[3] = hn::GetLane(s3);
}
#else
/// Adds up the 128-bit parts of a vector.
template <class D>
HWY_INLINE void fold(D d, hn::Vec<D> sums, float* to) {
  if constexpr (hn::MaxLanes(D()) == 4) {
    hn::Store(sums, d, to);
  } else {
    const hn::Half<D> half;
    fold(half, hn::Add(hn::LowerHalf(half, sums), hn::UpperHalf(half, sums)), to);
  }
}

/// to[0, 4) = the sums of four vectors' lanes.
HWY_INLINE void store_sums(Vec s0, Vec s1, Vec s2, Vec s3, float* to) {
  const F32 d;
  const hn::RepartitionToWide<F32> pairs;
  const auto s01 =
      hn::BitCast(pairs, hn::Add(hn::InterleaveLower(d, s0, s1), hn::InterleaveUpper(d, s0, s1)));
  const auto s23 =
      hn::BitCast(pairs, hn::Add(hn::InterleaveLower(d, s2, s3), hn::InterleaveUpper(d, s2, s3)));
  fold(d,
       hn::Add(hn::BitCast(d, hn::InterleaveLower(pairs, s01, s23)),
               hn::BitCast(d, hn::InterleaveUpper(pairs, s01, s23))),
       to);
}
#endif

/// scores[i] = query . row i, four at a time so that their sums overlap; the last row stands in for those
/// past it, so that equal rows have equal scores wherever they are.
template <typename T>
void dot_rows(const Stream<T>& keys, const float* query, float* scores) {
  const F32 d;
  for (std::int64_t i = 0; i < keys.count; i += 4) {
    const std::int64_t last = keys.count - 1;
    const T *k0 = keys.row(i), *k1 = keys.row(std::min(i + 1, last)), *k2 = keys.row(std::min(i + 2, last)),
            *k3 = keys.row(std::min(i + 3, last));
    for (std::int64_t j = 0; j < 4; ++j) keys.fetch_ahead(i + j);
    Vec s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
    for (std::size_t c = 0; c < keys.depth; c += kLanes) {
      const Vec q = hn::Load(d, query + c);
      s0 = hn::MulAdd(q, load_wide(k0 + c), s0);
      s1 = hn::MulAdd(q, load_wide(k1 + c), s1);
      s2 = hn::MulAdd(q, load_wide(k2 + c), s2);
      s3 = hn::MulAdd(q, load_wide(k3 + c), s3);
    }
    alignas(16) float sums[4];
    store_sums(s0, s1, s2, s3, sums);
    std::copy_n(sums, std::min<std::int64_t>(4, keys.count - i), scores + i);
  }
}

/// out += weights . values, kWide vectors of columns from `column` on in registers.
template <typename T, std::size_t kWide>
HWY_INLINE void add_columns(const Stream<T>& values, std::size_t column, const float* weights, float* out) {
  const F32 d;
  Vec sum[kWide];
#pragma GCC unroll 8
  for (std::size_t j = 0; j < kWide; ++j) sum[j] = hn::Load(d, out + column + j * kLanes);
  for (std::int64_t i = 0; i < values.count; ++i) {
    if (column == 0) values.fetch_ahead(i);
    const Vec weight = hn::Set(d, weights[i]);
    const T* row = values.row(i) + column;
#pragma GCC unroll 8
    for (std::size_t j = 0; j < kWide; ++j) sum[j] = hn::MulAdd(weight, load_wide(row + j * kLanes), sum[j]);
  }
#pragma GCC unroll 8
  for (std::size_t j = 0; j < kWide; ++j) hn::Store(sum[j], d, out + column + j * kLanes);
}

template <typename T>
void add_rows(const Stream<T>& values, const float* weights, float* out) {
  std::size_t c = 0;
  for (; c + 8 * kLanes <= values.depth; c += 8 * kLanes) add_columns<T, 8>(values, c, weights, out);
  for (; c < values.depth; c += kLanes) add_columns<T, 1>(values, c, weights, out);
}

std::int64_t bytes_between(const Rows& rows, DType dtype) {
  return rows.stride * static_cast<std::int64_t>(size_of(dtype));
}

HWY_INLINE void fetch_scales(const Rows& rows) {
  if (rows.scales == nullptr) return;
  for (std::int64_t i = 0; i < rows.count; i += 16) __builtin_prefetch(rows.scales + i);
}

/// Calls body(stream, at) with the first `count` rows as they are stored, or widened into `scratch` a few at
/// a time where the head dimension is no whole number of vectors. `next` is what will be read after them.
template <typename Body>
void walk(const Rows& rows, DType dtype, std::int64_t count, std::size_t head_dim, const Rows& next,
          float* scratch, Body&& body) {
  if (head_dim % kLanes == 0 && (kConvertsF16 || dtype != DType::f16)) {
    const auto as = [&](auto type) HWY_ATTR {
      using T = decltype(type);
      body(Stream<T>{reinterpret_cast<const T*>(rows.data), rows.stride, count, head_dim, next.data,
                     bytes_between(next, dtype)},
           0);
    };
    switch (dtype) {
      case DType::f32:
        return as(float());
      case DType::bf16:
        return as(hwy::bfloat16_t());
      case DType::f16:
        return as(hwy::float16_t());
      case DType::i8:
        return as(std::int8_t());
      case DType::f64:
        return;  // refused at the door
    }
  }
  constexpr std::int64_t kBatch = 16;
  const std::size_t depth = round_up(head_dim, kLanes);
  const std::int64_t bytes = bytes_between(rows, dtype);
  for (std::int64_t first = 0; first < count; first += kBatch) {
    const std::int64_t batch = std::min(kBatch, count - first);
    for (std::int64_t i = 0; i < batch; ++i) {
      float* to = scratch + i * static_cast<std::int64_t>(depth);
      widen(rows.data + (first + i) * bytes, dtype, head_dim, 1.0F, to);
      std::fill(to + head_dim, to + depth, 0.0F);
    }
    body(Stream<float>{scratch, static_cast<std::int64_t>(depth), batch, depth}, first);
  }
}

/// The keys or values of a piece, page by page: body(rows, at) with the rows that follow each other in
/// memory, and what will be read after them: the piece's next page or, at its end, `after`.
template <typename Of, typename Body>
void walk_pages(const Piece& piece, const Rows& after, const Of& of, Body&& body) {
  for (std::int64_t at = 0; at < piece.count;) {
    Rows rows = of(piece.first + at);
    rows.count = std::min(rows.count, piece.count - at);
    const std::int64_t end = at + rows.count;
    body(rows, at, end < piece.count ? of(piece.first + end) : after);
    at = end;
  }
}

}  // namespace

void widen_query(const std::byte* from, DType dtype, std::size_t depth, float* to) {
  std::fill(to, to + kMaxHeadDim, 0.0F);
  widen(from, dtype, depth, 1.0F, to);
}

/// Scores a piece of the means of the candidate blocks, and lists the best for every query head of the unit.
void score_means(const Problem& problem, const Means& means, const Unit& unit, std::int64_t piece) {
  const F32 d;
  const std::int64_t begin = unit.choice.first + piece * kPieceMeans;
  const std::int64_t count = std::min(kPieceMeans, unit.choice.last - begin);
  if (unit.listed == 0 || count <= 0) return;
  alignas(64) float scratch[16 * kMaxHeadDim];
  alignas(64) float scores[kPieceMeans];
  const auto rows_from = [&](std::int64_t block) {
    const float* base = means.of(unit.sequence, unit.head) + block * means.block_stride;
    return Rows{reinterpret_cast<const std::byte*>(base), means.block_stride, 0, nullptr};
  };
  // The piece that this thread will most likely take next.
  const std::int64_t next = unit.next_means.load(std::memory_order_relaxed);
  const Rows after = next < unit.mean_pieces ? rows_from(unit.choice.first + next * kPieceMeans) : Rows{};

  for (std::int64_t g = 0; g < problem.group; ++g) {
    walk(rows_from(begin), DType::f32, count, static_cast<std::size_t>(problem.head_dim), after, scratch,
         [&](const auto& stream, std::int64_t at) HWY_ATTR {
           dot_rows(stream, unit.queries + static_cast<std::size_t>(g) * kMaxHeadDim, scores + at);
         });
    std::fill(scores + count, scores + kPieceMeans, -std::numeric_limits<float>::infinity());
    const std::int64_t list = (piece * problem.group + g) * unit.listed;
    Best best{unit.list_scores + list, unit.lists + list, 0, unit.listed};
    for (std::int64_t i = 0; i < count; i += static_cast<std::int64_t>(kLanes)) {
      if (best.count == best.places &&
          hn::AllTrue(d, hn::Lt(hn::Load(d, scores + i), hn::Set(d, best.scores[0]))))
        continue;
      for (std::int64_t j = i; j < std::min(i + static_cast<std::int64_t>(kLanes), count); ++j)
        best.offer(scores[j], static_cast<std::int32_t>(begin + j));
    }
  }
}

/// Attention of the unit's query heads that see a piece, as its partials [group][stride]: the unnormalised
/// output, the maximum (log2 units) and the sum. Heads that do not see it keep a maximum of -inf.
void attend_piece(const Problem& problem, const Unit& unit, std::int64_t width, std::int64_t index,
                  std::size_t stride) {
  const F32 d;
  const SequenceView& sequence = problem.sequences[unit.sequence];
  const auto head_dim = static_cast<std::size_t>(problem.head_dim);
  alignas(64) float scratch[16 * kMaxHeadDim];
  alignas(64) float weights[kMaxPieceKeys + kMaxLanes];
  alignas(64) float scaled[kMaxPieceKeys + kMaxLanes];
  const Piece piece = unit.piece(index);
  const auto padded = static_cast<std::int64_t>(round_up(static_cast<std::size_t>(piece.count), kLanes));
  const float to_log2 = problem.scale * 1.44269504F;
  const auto keys = [&](std::int64_t first) { return problem.keys(sequence, unit.head, first); };
  const auto values = [&](std::int64_t first) { return problem.values(sequence, unit.head, first); };
  float* partial = unit.partials + static_cast<std::size_t>(index * problem.group) * stride;

  for (std::int64_t g = 0; g < problem.group; ++g) {
    float* out = partial + static_cast<std::size_t>(g) * stride;
    float &max = out[stride - 2], &sum = out[stride - 1];
    std::fill(out, out + stride, 0.0F);
    max = -std::numeric_limits<float>::infinity();
    if (!unit.sees(width, g, piece.block)) continue;

    walk_pages(piece, values(piece.first), keys, [&](const Rows& rows, std::int64_t done, const Rows& next) {
      fetch_scales(rows);
      walk(rows, problem.k.dtype, rows.count, head_dim, next, scratch,
           [&](const auto& stream, std::int64_t at) HWY_ATTR {
             dot_rows(stream, unit.queries + static_cast<std::size_t>(g) * kMaxHeadDim, weights + done + at);
           });
      for (std::int64_t i = 0; i < rows.count; ++i)
        weights[done + i] *= rows.scales == nullptr ? to_log2 : to_log2 * rows.scales[i];
    });
    std::fill(weights + piece.count, weights + padded, -std::numeric_limits<float>::infinity());
    Vec most = hn::Load(d, weights);
    for (std::int64_t i = 0; i < padded; i += static_cast<std::int64_t>(kLanes))
      most = hn::Max(most, hn::Load(d, weights + i));
    max = hn::GetLane(hn::MaxOfLanes(d, most));
    const Vec top = hn::Set(d, max == -std::numeric_limits<float>::infinity() ? 0.0F : max);
    Vec total = hn::Zero(d);
    for (std::int64_t i = 0; i < padded; i += static_cast<std::int64_t>(kLanes)) {
      const Vec weight = exp2(hn::Sub(hn::Load(d, weights + i), top));
      hn::Store(weight, d, weights + i);
      total = hn::Add(total, weight);
    }
    sum = hn::GetLane(hn::SumOfLanes(d, total));

    // The piece that this thread will most likely take next.
    const std::int64_t soon = unit.next_piece.load(std::memory_order_relaxed);
    const Rows after = soon < unit.own_pieces || (unit.settled && soon < unit.pieces)
                           ? keys(unit.piece(soon).first)
                           : Rows{};
    walk_pages(piece, after, values, [&](const Rows& rows, std::int64_t done, const Rows& next) {
      const float* by = weights + done;
      if (rows.scales != nullptr) {
        for (std::int64_t i = 0; i < rows.count; ++i) scaled[i] = by[i] * rows.scales[i];
        by = scaled;
      }
      walk(rows, problem.v.dtype, rows.count, head_dim, next, scratch,
           [&](const auto& stream, std::int64_t at) HWY_ATTR { add_rows(stream, by + at, out); });
    });
  }
}

/// The answer of one query head out of its pieces: `out` [stride], unnormalised; its maximum and sum.
std::pair<float, float> merge_pieces(const Unit& unit, std::int64_t group, std::int64_t g, std::size_t stride,
                                     float* out) {
  const F32 d;
  const auto partial = [&](std::int64_t piece) {
    return unit.partials + static_cast<std::size_t>(piece * group + g) * stride;
  };
  float max = -std::numeric_limits<float>::infinity(), sum = 0;
  for (std::int64_t p = 0; p < unit.pieces; ++p) max = std::max(max, partial(p)[stride - 2]);
  std::fill(out, out + stride, 0.0F);
  for (std::int64_t p = 0; p < unit.pieces; ++p) {
    const float* from = partial(p);
    if (from[stride - 2] == -std::numeric_limits<float>::infinity()) continue;
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

HWY_EXPORT(widen_query);
HWY_EXPORT(score_means);
HWY_EXPORT(attend_piece);
HWY_EXPORT(merge_pieces);

constexpr float kNothing = -std::numeric_limits<float>::infinity();

std::int64_t divided_up(std::int64_t value, std::int64_t by) {
  return (value + by - 1) / by;
}

/// One call: its units, and what the threads do with them.
class Decoding {
 public:
  Decoding(const Problem& problem, const Means& means, const Outputs& outputs, Scratch& scratch)
      : problem_(problem),
        means_(means),
        outputs_(outputs),
        width_(problem.width()),
        stride_(round_up(static_cast<std::size_t>(problem.head_dim), kMaxLanes) + kMaxLanes),
        units_(problem.sequences.size() * static_cast<std::size_t>(problem.kv_heads)) {
    std::int64_t listed = 0, pieces = 0, mean_pieces = 0;
    for (std::size_t u = 0; u < units_.size(); ++u) {
      plan(units_[u], u);
      listed += list_size(units_[u]);
      pieces += most_pieces(units_[u]);
      mean_pieces += units_[u].mean_pieces;
    }
    tasks_ = std::max(mean_pieces, pieces);
    const std::int64_t heads = static_cast<std::int64_t>(units_.size()) * problem.group;
    queries_ = {scratch, heads * static_cast<std::int64_t>(kMaxHeadDim)};
    best_ = {scratch, heads * width_};
    chosen_ = {scratch, heads * width_};
    blocks_ = {scratch, heads * width_};
    list_scores_ = {scratch, listed};
    lists_ = {scratch, listed};
    partials_ = {scratch, pieces * problem.group * static_cast<std::int64_t>(stride_)};
    listed = pieces = 0;
    for (std::size_t u = 0; u < units_.size(); ++u) {
      Unit& unit = units_[u];
      const auto head = static_cast<std::int64_t>(u) * problem.group;
      unit.queries = queries_.data() + head * static_cast<std::int64_t>(kMaxHeadDim);
      unit.best = best_.data() + head * width_;
      unit.chosen = chosen_.data() + head * width_;
      unit.blocks = blocks_.data() + head * width_;
      unit.list_scores = list_scores_.data() + listed;
      unit.lists = lists_.data() + listed;
      unit.partials = partials_.data() + pieces * problem.group * static_cast<std::int64_t>(stride_);
      listed += list_size(unit);
      pieces += most_pieces(unit);
      widen_queries(unit);
    }
  }

  /// Threads that start late, or one after the other, find less to do or nothing.
  void run(const Parallel& parallel) {
    parallel.run(std::min<std::int64_t>(parallel.threads, tasks_), [&](std::int64_t, int) { work(); });
  }

 private:
  void plan(Unit& unit, std::size_t index) const {
    unit.sequence = index / static_cast<std::size_t>(problem_.kv_heads);
    unit.head = static_cast<std::int64_t>(index) % problem_.kv_heads;
    const SequenceView& s = problem_.sequences[unit.sequence];
    unit.keys = s.keys;
    unit.block_size = std::min(problem_.routing.block_size, problem_.longest);
    unit.own = problem_.own_block(s, 0);
    unit.choice = choice_of(problem_, s, 0, width_);
    const std::int64_t candidates = unit.choice.last - unit.choice.first;
    if (unit.choice.places > 0 && candidates > unit.choice.places) {
      unit.listed = std::min(unit.choice.places, kPieceMeans);
      unit.mean_pieces = divided_up(candidates, kPieceMeans);
    }
    if (unit.own >= 0) {
      const std::int64_t most = std::min(unit.keys, (width_ + 1) * unit.block_size);
      unit.piece_keys = std::clamp(divided_up(most, kMinPieceKeys * kMinPieceKeys) * kMinPieceKeys,
                                   kMinPieceKeys, kMaxPieceKeys);
      unit.block_pieces = divided_up(unit.block_size, unit.piece_keys);
      unit.own_pieces = divided_up(unit.keys - unit.own * unit.block_size, unit.piece_keys);
    }
    unit.means_left = unit.mean_pieces;
    unit.pieces_left = unit.own_pieces + 1;  // and the choice
  }

  std::int64_t list_size(const Unit& unit) const { return unit.mean_pieces * problem_.group * unit.listed; }
  std::int64_t most_pieces(const Unit& unit) const {
    return unit.own_pieces +
           std::min(problem_.group * width_, std::max<std::int64_t>(unit.own, 0)) * unit.block_pieces;
  }

  void widen_queries(Unit& unit) const {
    const SequenceView& s = problem_.sequences[unit.sequence];
    for (std::int64_t g = 0; g < problem_.group; ++g) {
      const std::int64_t offset = Problem::offset(problem_.q, s, 0, unit.head * problem_.group + g);
      HWY_DYNAMIC_DISPATCH(widen_query)
      (static_cast<const std::byte*>(problem_.q.data) +
           offset * static_cast<std::int64_t>(size_of(problem_.q.dtype)),
       problem_.q.dtype, static_cast<std::size_t>(problem_.head_dim),
       unit.queries + g * static_cast<std::int64_t>(kMaxHeadDim));
    }
  }

  /// What each thread does: a piece of the gate after the other, then of the keys. Whoever waits, waits for
  /// pieces that other threads have begun.
  void work() {
    const auto score = &HWY_DYNAMIC_DISPATCH(score_means);
    for (Unit& unit : units_) {
      for (std::int64_t i = unit.next_means++; i < unit.mean_pieces; i = unit.next_means++) {
        score(problem_, means_, unit, i);
        if (--unit.means_left == 0) settle(unit);
      }
    }
    const auto attend = &HWY_DYNAMIC_DISPATCH(attend_piece);
    for (Unit& unit : units_) {
      for (std::int64_t i = unit.next_piece++;; i = unit.next_piece++) {
        if (i >= unit.own_pieces) {
          while (!unit.settled) std::this_thread::yield();
          if (i >= unit.pieces) break;
        }
        attend(problem_, unit, width_, i, stride_);
        if (--unit.pieces_left == 0) combine(unit);
      }
    }
  }

  /// Every mean is scored: what the heads choose, and the pieces that it makes.
  void settle(Unit& unit) const {
    for (std::int64_t g = 0; g < problem_.group; ++g) choose(unit, g);
    std::int32_t* end = std::copy_if(unit.chosen, unit.chosen + problem_.group * width_, unit.blocks,
                                     [&](std::int32_t block) { return block >= 0 && block != unit.own; });
    std::sort(unit.blocks, end);
    const std::int64_t chosen = std::unique(unit.blocks, end) - unit.blocks;
    unit.pieces = unit.own_pieces + chosen * unit.block_pieces;
    unit.pieces_left += chosen * unit.block_pieces;
    unit.settled = true;
    if (--unit.pieces_left == 0) combine(unit);
  }

  void choose(Unit& unit, std::int64_t g) const {
    std::int32_t* chosen = unit.chosen + g * width_;
    Best best{unit.best + g * width_, chosen, 0, unit.choice.places};
    if (unit.listed == 0) {
      for (std::int64_t block = unit.choice.first; block < unit.choice.last && best.places > 0; ++block)
        best.offer(0, static_cast<std::int32_t>(block));
    }
    for (std::int64_t piece = 0; piece < unit.mean_pieces && unit.listed > 0; ++piece) {
      const std::int64_t list = (piece * problem_.group + g) * unit.listed;
      const std::int64_t means =
          std::min(kPieceMeans, unit.choice.last - unit.choice.first - piece * kPieceMeans);
      for (std::int64_t i = list; i < list + std::min(unit.listed, means); ++i)
        best.offer(unit.list_scores[i], unit.lists[i]);
    }
    finish_row(problem_, unit.choice, best.count, width_, chosen);
  }

  void combine(const Unit& unit) const {
    const SequenceView& s = problem_.sequences[unit.sequence];
    alignas(64) float merged[kMaxHeadDim + kMaxLanes];
    for (std::int64_t g = 0; g < problem_.group; ++g) {
      const auto [max, sum] = HWY_DYNAMIC_DISPATCH(merge_pieces)(unit, problem_.group, g, stride_, merged);
      const std::int64_t head = unit.head * problem_.group + g,
                         offset = Problem::offset(outputs_.out, s, 0, head);
      const float inverse = sum == 0 ? 0.0F : 1 / sum;
      for (std::int64_t i = 0; i < problem_.head_dim; ++i)
        store(outputs_.out.data, outputs_.out.dtype, offset + i, merged[i] * inverse);
      if (outputs_.lse != nullptr) {
        outputs_.lse[head * problem_.tokens + s.q_begin] =
            sum == 0 ? kNothing : (max + std::log2(sum)) * 0.69314718F;
      }
    }
  }

  const Problem& problem_;
  const Means& means_;
  const Outputs& outputs_;
  std::int64_t width_ = 0, tasks_ = 0;
  std::size_t stride_ = 0;
  std::vector<Unit> units_;
  Buffer<float> queries_, best_, list_scores_, partials_;
  Buffer<std::int32_t> chosen_, blocks_, lists_;
};

}  // namespace

void decode(const Problem& problem, const Means& means, const Outputs& outputs, Resources& resources) {
  Decoding(problem, means, outputs, resources.scratch).run(resources.parallel);
}

}  // namespace moba::cpu
#endif
