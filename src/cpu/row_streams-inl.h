// Products of a few query heads with rows that are read once, as decode does, bound by memory bandwidth: dot
// products with keys and weighted sums of values, in the storage type of the rows, which are converted once
// for all heads, with the rows further on prefetched.
#if defined(MOBA_CPU_ROW_STREAMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_ROW_STREAMS_INL_H_
#undef MOBA_CPU_ROW_STREAMS_INL_H_
#else
#define MOBA_CPU_ROW_STREAMS_INL_H_
#endif

#include <type_traits>

#include "cpu/decode_schedule.h"
#include "cpu/prefetch.h"
#include "cpu/tile-inl.h"

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

/// Rows that are read in order: while one is used, the rows kAheadBytes further on are prefetched, past the
/// end those of `next`.
template <typename T>
struct RowStream {
  static constexpr std::int64_t kAheadBytes = 4096;

  const T* rows = nullptr;
  std::int64_t stride = 0, count = 0;
  std::size_t depth = 0;
  const std::byte* next = nullptr;
  std::int64_t next_stride = 0;  // in bytes

  const T* row(std::int64_t i) const { return rows + i * stride; }
  HWY_INLINE void prefetch_next(std::int64_t i) const {
    const auto bytes = static_cast<std::int64_t>(depth * sizeof(T));
    const std::int64_t at = i + (kAheadBytes + bytes - 1) / bytes;
    const std::byte* from = reinterpret_cast<const std::byte*>(row(at));
    if (at >= count) {
      if (next == nullptr) return;
      from = next + (at - count) * next_stride;
    }
    // Not into the first-level cache, whose line-fill buffers would limit the bandwidth.
    prefetch_l2(from, static_cast<std::size_t>(bytes));
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
/// Sums the 128-bit parts of a vector.
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

/// Query heads that are multiplied with a row while it is in registers, at most, and the accumulators that
/// the register file holds beside the row's vectors.
#if HWY_TARGET <= HWY_AVX3 || HWY_TARGET == HWY_NEON
constexpr std::size_t kMaxHeads = 4, kAccumulators = 24;
#else
constexpr std::size_t kMaxHeads = 2, kAccumulators = 8;
#endif

/// Query heads that share the rows of a stream: their queries, [head_dim] each and padded with zeros to whole
/// vectors, and their outputs.
struct HeadGroup {
  std::size_t count = 0;
  const float* queries[kMaxHeads];
  float* out[kMaxHeads];
};

/// Calls body with std::integral_constant of `count`, 1 to kMaxHeads.
template <std::size_t kHeads = kMaxHeads, typename Body>
HWY_INLINE void with_heads(std::size_t count, Body&& body) {
  if constexpr (kHeads > 1) {
    if (count < kHeads) return with_heads<kHeads - 1>(count, body);
  }
  body(std::integral_constant<std::size_t, kHeads>());
}

/// scores[h * stride + i] = query h . row i, four rows at a time so that their sums overlap; the last row
/// stands in for those past it, so that equal rows have equal scores wherever they are.
template <std::size_t kHeads, typename T>
void dot_rows_of(const RowStream<T>& keys, const HeadGroup& heads, float* scores, std::size_t stride) {
  const F32 d;
  for (std::int64_t i = 0; i < keys.count; i += 4) {
    const std::int64_t last = keys.count - 1;
    const T *k0 = keys.row(i), *k1 = keys.row(std::min(i + 1, last)), *k2 = keys.row(std::min(i + 2, last)),
            *k3 = keys.row(std::min(i + 3, last));
    for (std::int64_t j = 0; j < 4; ++j) keys.prefetch_next(i + j);
    Vec s0[kHeads], s1[kHeads], s2[kHeads], s3[kHeads];
#pragma GCC unroll 4
    for (std::size_t h = 0; h < kHeads; ++h) s0[h] = s1[h] = s2[h] = s3[h] = hn::Zero(d);
    for (std::size_t c = 0; c < keys.depth; c += kLanes) {
      const Vec r0 = load_wide(k0 + c), r1 = load_wide(k1 + c), r2 = load_wide(k2 + c),
                r3 = load_wide(k3 + c);
#pragma GCC unroll 4
      for (std::size_t h = 0; h < kHeads; ++h) {
        const Vec q = hn::Load(d, heads.queries[h] + c);
        s0[h] = hn::MulAdd(q, r0, s0[h]);
        s1[h] = hn::MulAdd(q, r1, s1[h]);
        s2[h] = hn::MulAdd(q, r2, s2[h]);
        s3[h] = hn::MulAdd(q, r3, s3[h]);
      }
    }
#pragma GCC unroll 4
    for (std::size_t h = 0; h < kHeads; ++h) {
      alignas(16) float sums[4];
      store_sums(s0[h], s1[h], s2[h], s3[h], sums);
      std::copy_n(sums, std::min<std::int64_t>(4, keys.count - i),
                  scores + h * stride + static_cast<std::size_t>(i));
    }
  }
}

template <typename T>
void dot_rows(const RowStream<T>& keys, const HeadGroup& heads, float* scores, std::size_t stride) {
  with_heads(heads.count, [&](auto count) HWY_ATTR { dot_rows_of<count>(keys, heads, scores, stride); });
}

/// out of each head += its weights . values, kWide vectors of columns from `column` on in registers.
template <std::size_t kHeads, std::size_t kWide, typename T>
HWY_INLINE void add_columns(const RowStream<T>& values, std::size_t column, const HeadGroup& heads,
                            const float* weights, std::size_t stride) {
  const F32 d;
  Vec sum[kHeads][kWide];
#pragma GCC unroll 4
  for (std::size_t h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (std::size_t j = 0; j < kWide; ++j) sum[h][j] = hn::Load(d, heads.out[h] + column + j * kLanes);
  }
  for (std::int64_t i = 0; i < values.count; ++i) {
    if (column == 0) values.prefetch_next(i);
    const T* from = values.row(i) + column;
    Vec row[kWide];
#pragma GCC unroll 8
    for (std::size_t j = 0; j < kWide; ++j) row[j] = load_wide(from + j * kLanes);
#pragma GCC unroll 4
    for (std::size_t h = 0; h < kHeads; ++h) {
      const Vec weight = hn::Set(d, weights[h * stride + static_cast<std::size_t>(i)]);
#pragma GCC unroll 8
      for (std::size_t j = 0; j < kWide; ++j) sum[h][j] = hn::MulAdd(weight, row[j], sum[h][j]);
    }
  }
#pragma GCC unroll 4
  for (std::size_t h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (std::size_t j = 0; j < kWide; ++j) hn::Store(sum[h][j], d, heads.out[h] + column + j * kLanes);
  }
}

template <std::size_t kHeads, std::size_t kWide, typename T>
HWY_INLINE void add_rows_of(const RowStream<T>& values, std::size_t column, const HeadGroup& heads,
                            const float* weights, std::size_t stride) {
  if constexpr (kHeads * kWide <= kAccumulators) {
    for (; column + kWide * kLanes <= values.depth; column += kWide * kLanes)
      add_columns<kHeads, kWide>(values, column, heads, weights, stride);
  }
  if constexpr (kWide > 1) add_rows_of<kHeads, kWide / 2>(values, column, heads, weights, stride);
}

template <typename T>
void add_rows(const RowStream<T>& values, const HeadGroup& heads, const float* weights, std::size_t stride) {
  with_heads(heads.count,
             [&](auto count) HWY_ATTR { add_rows_of<count, 8>(values, 0, heads, weights, stride); });
}

std::int64_t bytes_between(const Rows& rows, DType dtype) {
  return rows.stride * static_cast<std::int64_t>(size_of(dtype));
}

HWY_INLINE void prefetch_scales(const Rows& rows) {
  if (rows.scales == nullptr) return;
  prefetch_l1(rows.scales, static_cast<std::size_t>(rows.count) * sizeof(float));
}

/// Calls body(stream, at) with the first `count` rows as they are stored, or converted into `scratch` a few
/// at a time where the head dimension is not a whole number of vectors. `next` are the rows that are read
/// after them.
template <typename Body>
void for_row_streams(const Rows& rows, DType dtype, std::int64_t count, std::size_t head_dim,
                     const Rows& next, float* scratch, Body&& body) {
  if (head_dim % kLanes == 0 && (kConvertsF16 || dtype != DType::f16)) {
    const auto as = [&](auto type) HWY_ATTR {
      using T = decltype(type);
      body(RowStream<T>{reinterpret_cast<const T*>(rows.data), rows.stride, count, head_dim, next.data,
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
        return;  // rejected by the argument checks
    }
  }
  constexpr std::int64_t kBatch = 16;
  const std::size_t depth = round_up(head_dim, kLanes);
  const std::int64_t bytes = bytes_between(rows, dtype);
  for (std::int64_t first = 0; first < count; first += kBatch) {
    const std::int64_t batch = std::min(kBatch, count - first);
    for (std::int64_t i = 0; i < batch; ++i) {
      float* to = scratch + i * static_cast<std::int64_t>(depth);
      load_f32(rows.data + (first + i) * bytes, dtype, head_dim, 1.0F, to);
      std::fill(to + head_dim, to + depth, 0.0F);
    }
    body(RowStream<float>{scratch, static_cast<std::int64_t>(depth), batch, depth}, first);
  }
}

/// Visits the keys or values of a split page by page: body(rows, at, next) with contiguous rows and the rows
/// that are read after them: the split's next page or, at its end, `after`.
template <typename Of, typename Body>
void for_pages(const KvSplit& split, const Rows& after, const Of& of, Body&& body) {
  for (std::int64_t at = 0; at < split.count;) {
    Rows rows = of(split.first + at);
    rows.count = std::min(rows.count, split.count - at);
    const std::int64_t end = at + rows.count;
    body(rows, at, end < split.count ? of(split.first + end) : after);
    at = end;
  }
}

}  // namespace
}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
