// One token a sequence: gate over the cached means, then the chosen blocks, bound by how fast memory can be
// read. The keys of a kv head are read once for all query heads that chose their block. Work is cut into
// pieces of fixed size, whatever the number of threads, and partial answers meet in ascending order of their
// keys.
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

constexpr std::int64_t kPieceKeys = 512, kPieceMeans = 256;

/// Keys [first, first + count) that some query heads of a unit attend to.
struct Piece {
  std::int64_t unit = 0, block = 0, first = 0, count = 0;
};

/// One query token at one kv head: what its query heads chose.
struct Unit {
  std::size_t sequence = 0;
  std::int64_t head = 0, candidates = 0;
  std::int64_t first_score = 0;  // into scores: [group][candidates]
  std::int64_t first_piece = 0, pieces = 0;
  float* queries = nullptr;        // [group][kMaxHeadDim], widened, unscaled, zero padded
  std::int32_t* chosen = nullptr;  // [group][width]

  bool sees(const Problem& problem, std::int64_t width, std::int64_t g, std::int64_t block) const {
    if (block == problem.own_block(problem.sequences[sequence], 0)) return true;
    const std::int32_t* from = chosen + g * width;
    return std::find(from, from + width, static_cast<std::int32_t>(block)) != from + width;
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

/// scores[i] = query . keys[i] for `count` rows, four at a time so that their sums overlap.
template <typename T>
void dot_rows(const T* keys, std::int64_t stride, std::int64_t count, std::size_t depth, const float* query,
              float* scores) {
  const F32 d;
  std::int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const T* k0 = keys + i * stride;
    const T* k1 = k0 + stride;
    const T* k2 = k1 + stride;
    const T* k3 = k2 + stride;
    Vec s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
    for (std::size_t c = 0; c < depth; c += kLanes) {
      const Vec q = hn::Load(d, query + c);
      s0 = hn::MulAdd(q, load_wide(k0 + c), s0);
      s1 = hn::MulAdd(q, load_wide(k1 + c), s1);
      s2 = hn::MulAdd(q, load_wide(k2 + c), s2);
      s3 = hn::MulAdd(q, load_wide(k3 + c), s3);
    }
    scores[i] = hn::GetLane(hn::SumOfLanes(d, s0));
    scores[i + 1] = hn::GetLane(hn::SumOfLanes(d, s1));
    scores[i + 2] = hn::GetLane(hn::SumOfLanes(d, s2));
    scores[i + 3] = hn::GetLane(hn::SumOfLanes(d, s3));
  }
  for (; i < count; ++i) {
    Vec s = hn::Zero(d);
    for (std::size_t c = 0; c < depth; c += kLanes)
      s = hn::MulAdd(hn::Load(d, query + c), load_wide(keys + i * stride + c), s);
    scores[i] = hn::GetLane(hn::SumOfLanes(d, s));
  }
}

/// out += weights . values, kWide vectors of columns at a time in registers.
template <typename T, std::size_t kWide>
HWY_INLINE void add_columns(const T* values, std::int64_t stride, std::int64_t count, const float* weights,
                            float* out) {
  const F32 d;
  Vec sum[kWide];
#pragma GCC unroll 8
  for (std::size_t j = 0; j < kWide; ++j) sum[j] = hn::Load(d, out + j * kLanes);
  for (std::int64_t i = 0; i < count; ++i) {
    const Vec weight = hn::Set(d, weights[i]);
#pragma GCC unroll 8
    for (std::size_t j = 0; j < kWide; ++j)
      sum[j] = hn::MulAdd(weight, load_wide(values + i * stride + j * kLanes), sum[j]);
  }
#pragma GCC unroll 8
  for (std::size_t j = 0; j < kWide; ++j) hn::Store(sum[j], d, out + j * kLanes);
}

template <typename T>
void add_rows(const T* values, std::int64_t stride, std::int64_t count, std::size_t depth,
              const float* weights, float* out) {
  std::size_t c = 0;
  for (; c + 8 * kLanes <= depth; c += 8 * kLanes)
    add_columns<T, 8>(values + c, stride, count, weights, out + c);
  for (; c < depth; c += kLanes) add_columns<T, 1>(values + c, stride, count, weights, out + c);
}

/// Calls body(rows, stride, count, depth) with the rows as they are stored, or widened into `scratch` a few
/// at a time where the head dimension is no whole number of vectors.
template <typename Body>
void walk(const Rows& rows, DType dtype, std::int64_t count, std::size_t head_dim, float* scratch,
          Body&& body) {
  if (head_dim % kLanes == 0 && (kConvertsF16 || dtype != DType::f16)) {
    switch (dtype) {
      case DType::f32:
        return body(reinterpret_cast<const float*>(rows.data), rows.stride, 0, count, head_dim);
      case DType::bf16:
        return body(reinterpret_cast<const hwy::bfloat16_t*>(rows.data), rows.stride, 0, count, head_dim);
      case DType::f16:
        return body(reinterpret_cast<const hwy::float16_t*>(rows.data), rows.stride, 0, count, head_dim);
      case DType::i8:
        return body(reinterpret_cast<const std::int8_t*>(rows.data), rows.stride, 0, count, head_dim);
      case DType::f64:
        return;  // refused at the door
    }
  }
  constexpr std::int64_t kBatch = 16;
  const std::size_t depth = round_up(head_dim, kLanes);
  const std::int64_t bytes = rows.stride * static_cast<std::int64_t>(size_of(dtype));
  for (std::int64_t first = 0; first < count; first += kBatch) {
    const std::int64_t batch = std::min(kBatch, count - first);
    for (std::int64_t i = 0; i < batch; ++i) {
      float* to = scratch + i * static_cast<std::int64_t>(depth);
      widen(rows.data + (first + i) * bytes, dtype, head_dim, 1.0F, to);
      std::fill(to + head_dim, to + depth, 0.0F);
    }
    body(static_cast<const float*>(scratch), static_cast<std::int64_t>(depth), first, batch, depth);
  }
}

}  // namespace

void widen_query(const std::byte* from, DType dtype, std::size_t depth, float* to) {
  std::fill(to, to + kMaxHeadDim, 0.0F);
  widen(from, dtype, depth, 1.0F, to);
}

/// Scores of candidate blocks [first, first + count) for every query head of the unit.
void score_means(const Problem& problem, const Means& means, const Unit& unit, std::int64_t first,
                 std::int64_t count, float* scores) {
  alignas(64) float scratch[16 * kMaxHeadDim];
  const float* base = means.of(unit.sequence, unit.head) + first * means.block_stride;
  const Rows rows{reinterpret_cast<const std::byte*>(base), means.block_stride, count, nullptr};
  walk(rows, DType::f32, count, static_cast<std::size_t>(problem.head_dim), scratch,
       [&](const auto* data, std::int64_t stride, std::int64_t at, std::int64_t n, std::size_t depth)
           HWY_ATTR {
             for (std::int64_t g = 0; g < problem.group; ++g) {
               dot_rows(data, stride, n, depth, unit.queries + static_cast<std::size_t>(g) * kMaxHeadDim,
                        scores + unit.first_score + g * unit.candidates + first + at);
             }
           });
}

/// Attention of the unit's query heads that see this piece: partial [group][stride] holds the unnormalised
/// output, the maximum (log2 units) and the sum. Heads that do not see it keep a maximum of -inf.
void attend_piece(const Problem& problem, const Unit& unit, std::int64_t width, const Piece& piece,
                  float* partial, std::size_t stride) {
  const F32 d;
  const SequenceView& sequence = problem.sequences[unit.sequence];
  const auto head_dim = static_cast<std::size_t>(problem.head_dim);
  alignas(64) float scratch[16 * kMaxHeadDim];
  alignas(64) float weights[kPieceKeys + kMaxLanes];
  alignas(64) float scaled[kPieceKeys + kMaxLanes];
  const auto padded = static_cast<std::int64_t>(round_up(static_cast<std::size_t>(piece.count), kLanes));
  const float to_log2 = problem.scale * 1.44269504F;

  for (std::int64_t g = 0; g < problem.group; ++g) {
    float* out = partial + static_cast<std::size_t>(g) * stride;
    float &max = out[stride - 2], &sum = out[stride - 1];
    std::fill(out, out + stride, 0.0F);
    max = -std::numeric_limits<float>::infinity();
    if (!unit.sees(problem, width, g, piece.block)) continue;

    for (std::int64_t done = 0; done < piece.count;) {
      const Rows rows = problem.keys(sequence, unit.head, piece.first + done);
      const std::int64_t run = std::min(rows.count, piece.count - done);
      walk(rows, problem.k.dtype, run, head_dim, scratch,
           [&](const auto* data, std::int64_t row_stride, std::int64_t at, std::int64_t n, std::size_t depth)
               HWY_ATTR {
                 dot_rows(data, row_stride, n, depth,
                          unit.queries + static_cast<std::size_t>(g) * kMaxHeadDim, weights + done + at);
               });
      for (std::int64_t i = 0; i < run; ++i)
        weights[done + i] *= rows.scales == nullptr ? to_log2 : to_log2 * rows.scales[i];
      done += run;
    }
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

    for (std::int64_t done = 0; done < piece.count;) {
      const Rows rows = problem.values(sequence, unit.head, piece.first + done);
      const std::int64_t run = std::min(rows.count, piece.count - done);
      const float* by = weights + done;
      if (rows.scales != nullptr) {
        for (std::int64_t i = 0; i < run; ++i) scaled[i] = by[i] * rows.scales[i];
        by = scaled;
      }
      walk(rows, problem.v.dtype, run, head_dim, scratch,
           [&](const auto* data, std::int64_t row_stride, std::int64_t at, std::int64_t n, std::size_t depth)
               HWY_ATTR { add_rows(data, row_stride, n, depth, by + at, out); });
      done += run;
    }
  }
}

float power_of_two(float x) {
  return hn::GetLane(exp2(hn::Set(F32(), x)));
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {
namespace {

HWY_EXPORT(widen_query);
HWY_EXPORT(score_means);
HWY_EXPORT(attend_piece);
HWY_EXPORT(power_of_two);

constexpr float kNothing = -std::numeric_limits<float>::infinity();

/// The best of a unit's scores, for each of its query heads.
void choose(const Problem& problem, const Unit& unit, std::int64_t width, const float* scores,
            float* best_scores) {
  const Choice choice = choice_of(problem, problem.sequences[unit.sequence], 0, width);
  for (std::int64_t g = 0; g < problem.group; ++g) {
    Best best{best_scores + g * width, unit.chosen + g * width, 0, choice.places};
    const bool all = choice.last - choice.first <= choice.places;
    for (std::int64_t block = choice.first; block < choice.last && choice.places > 0; ++block) {
      best.offer(all ? 0.0F : scores[unit.first_score + g * unit.candidates + block],
                 static_cast<std::int32_t>(block));
    }
    finish_row(problem, choice, best.count, width, best.blocks);
  }
}

/// Cuts what any query head of the unit chose, and its own block, into pieces.
void cut(const Problem& problem, Unit& unit, std::int64_t index, std::int64_t width,
         std::vector<Piece>& pieces) {
  const SequenceView& s = problem.sequences[unit.sequence];
  unit.first_piece = static_cast<std::int64_t>(pieces.size());
  const std::int64_t own = problem.own_block(s, 0);
  if (own >= 0) {
    std::vector<std::int64_t> blocks{own};
    for (std::int64_t i = 0; i < problem.group * width; ++i) {
      if (unit.chosen[i] >= 0) blocks.push_back(unit.chosen[i]);
    }
    std::sort(blocks.begin(), blocks.end());
    blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
    for (const std::int64_t block : blocks) {
      const std::int64_t begin = block * problem.routing.block_size;
      const std::int64_t end = block == own ? s.keys : begin + problem.routing.block_size;
      for (std::int64_t first = begin; first < end; first += kPieceKeys) {
        pieces.push_back({index, block, first, std::min(kPieceKeys, end - first)});
      }
    }
  }
  unit.pieces = static_cast<std::int64_t>(pieces.size()) - unit.first_piece;
}

/// Merges the pieces of one query head in the order of their keys.
void combine(const Problem& problem, const Unit& unit, std::int64_t g, const float* partials,
             std::size_t stride, const Outputs& outputs) {
  const auto row_of = [&](std::int64_t piece) {
    return partials +
           (static_cast<std::size_t>(unit.first_piece + piece) * static_cast<std::size_t>(problem.group) +
            static_cast<std::size_t>(g)) *
               stride;
  };
  float max = kNothing, sum = 0;
  for (std::int64_t p = 0; p < unit.pieces; ++p) max = std::max(max, row_of(p)[stride - 2]);
  float out[kMaxHeadDim] = {};
  const auto power = &HWY_DYNAMIC_DISPATCH(power_of_two);
  for (std::int64_t p = 0; p < unit.pieces; ++p) {
    const float* from = row_of(p);
    if (from[stride - 2] == kNothing) continue;
    const float weight = power(from[stride - 2] - max);
    sum += weight * from[stride - 1];
    for (std::int64_t i = 0; i < problem.head_dim; ++i) out[i] += weight * from[i];
  }
  const SequenceView& s = problem.sequences[unit.sequence];
  const std::int64_t head = unit.head * problem.group + g, offset = Problem::offset(outputs.out, s, 0, head);
  const float inverse = sum == 0 ? 0.0F : 1 / sum;
  for (std::int64_t i = 0; i < problem.head_dim; ++i)
    store(outputs.out.data, outputs.out.dtype, offset + i, out[i] * inverse);
  if (outputs.lse != nullptr) {
    outputs.lse[head * problem.tokens + s.q_begin] =
        sum == 0 ? kNothing : (max + std::log2(sum)) * 0.69314718F;
  }
}

}  // namespace

void decode(const Problem& problem, const Means& means, const Outputs& outputs, Resources& resources) {
  const std::int64_t width = problem.width(), group = problem.group;
  const auto count = static_cast<std::int64_t>(problem.sequences.size()) * problem.kv_heads;
  const Buffer<float> queries(resources.scratch, count * group * static_cast<std::int64_t>(kMaxHeadDim));
  const Buffer<std::int32_t> chosen(resources.scratch, count * group * width);
  const Buffer<float> best(resources.scratch, count * group * width);

  std::vector<Unit> units(static_cast<std::size_t>(count));
  std::vector<Piece> mean_pieces, pieces;
  std::int64_t score_count = 0;
  for (std::int64_t u = 0; u < count; ++u) {
    Unit& unit = units[static_cast<std::size_t>(u)];
    unit.sequence = static_cast<std::size_t>(u / problem.kv_heads);
    unit.head = u % problem.kv_heads;
    unit.queries = queries.data() + u * group * static_cast<std::int64_t>(kMaxHeadDim);
    unit.chosen = chosen.data() + u * group * width;
    const SequenceView& s = problem.sequences[unit.sequence];
    for (std::int64_t g = 0; g < group; ++g) {
      const std::int64_t offset = Problem::offset(problem.q, s, 0, unit.head * group + g);
      HWY_DYNAMIC_DISPATCH(widen_query)
      (static_cast<const std::byte*>(problem.q.data) +
           offset * static_cast<std::int64_t>(size_of(problem.q.dtype)),
       problem.q.dtype, static_cast<std::size_t>(problem.head_dim),
       unit.queries + g * static_cast<std::int64_t>(kMaxHeadDim));
    }
    const Choice choice = choice_of(problem, s, 0, width);
    if (choice.last - choice.first <= choice.places || choice.places == 0) continue;
    unit.candidates = choice.last;
    unit.first_score = score_count;
    score_count += group * unit.candidates;
    for (std::int64_t first = 0; first < unit.candidates; first += kPieceMeans) {
      mean_pieces.push_back({u, 0, first, std::min(kPieceMeans, unit.candidates - first)});
    }
  }

  const Buffer<float> scores(resources.scratch, score_count);
  const auto score = &HWY_DYNAMIC_DISPATCH(score_means);
  resources.parallel.run(static_cast<std::int64_t>(mean_pieces.size()), [&](std::int64_t task, int) {
    const Piece& piece = mean_pieces[static_cast<std::size_t>(task)];
    score(problem, means, units[static_cast<std::size_t>(piece.unit)], piece.first, piece.count,
          scores.data());
  });
  if (width > 0) {
    resources.parallel.run(count, [&](std::int64_t u, int) {
      choose(problem, units[static_cast<std::size_t>(u)], width, scores.data(),
             best.data() + u * group * width);
    });
  }
  for (std::int64_t u = 0; u < count; ++u) cut(problem, units[static_cast<std::size_t>(u)], u, width, pieces);

  const std::size_t stride = round_up(static_cast<std::size_t>(problem.head_dim), kMaxLanes) + kMaxLanes;
  const auto piece_count = static_cast<std::int64_t>(pieces.size());
  const Buffer<float> partials(resources.scratch, piece_count * group * static_cast<std::int64_t>(stride));
  const auto attend_one = &HWY_DYNAMIC_DISPATCH(attend_piece);
  resources.parallel.run(piece_count, [&](std::int64_t task, int) {
    const Piece& piece = pieces[static_cast<std::size_t>(task)];
    attend_one(problem, units[static_cast<std::size_t>(piece.unit)], width, piece,
               partials.data() + task * group * static_cast<std::int64_t>(stride), stride);
  });
  resources.parallel.run(count, [&](std::int64_t u, int) {
    for (std::int64_t g = 0; g < group; ++g)
      combine(problem, units[static_cast<std::size_t>(u)], g, partials.data(), stride, outputs);
  });
}

}  // namespace moba::cpu
#endif
