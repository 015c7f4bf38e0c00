// The backward pass of a key tile on AMX, in bf16 or in f32 split into bf16 parts. Logits are computed key by
// row, so a vector holds sixteen rows of one key: its two halves pack into a row of the products that give dk
// and dv, and two keys' vectors pack into a panel of the product that gives dq. No transposition is needed.
#if defined(MOBA_CPU_BACKWARD_BF16X6_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_BACKWARD_BF16X6_INL_H_
#undef MOBA_CPU_BACKWARD_BF16X6_INL_H_
#else
#define MOBA_CPU_BACKWARD_BF16X6_INL_H_
#endif

#include "cpu/backward-inl.h"
#include "cpu/bf16x6-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3

/// A tile has 32 rows and a block 32 keys.
constexpr std::size_t kSide = kMatrixCols;

/// kParts is 1 where all inputs are bf16 (weights and the gradients of logits are then rounded to bf16), else
/// 3.
template <std::size_t kParts>
class AmxBackward {
 public:
  /// `memory` holds amx_backward_floats() floats.
  AmxBackward(BackwardWorker& w, float* memory)
      : w_(w), depth_(round_up(w.depth(), kSide)), scratch_(*reinterpret_cast<AmxBackwardScratch*>(memory)) {
    auto* words = reinterpret_cast<std::uint32_t*>(memory) + sizeof(AmxBackwardScratch) / sizeof(float);
    const auto take = [&](std::size_t count) { return std::exchange(words, words + count); };
    keys_ = take(kParts * key_part());
    values_ = take(kParts * key_part());
    key_columns_ = take(kParts * key_part());
    queries_ = take(kAmxRowTiles * tile_words());
    d_outs_ = take(kAmxRowTiles * tile_words());
    query_rows_ = take(depth_ / kSide * kParts * row_part());
    d_out_rows_ = take(depth_ / kSide * kParts * row_part());
    dq_ = reinterpret_cast<float*>(take(depth_ * kAmxRows));
    w.dk = reinterpret_cast<float*>(take(kKeyTileSize * w.stride));
    w.dv = reinterpret_cast<float*>(take(kKeyTileSize * w.stride));
  }

  void backward_key_tile() {
    pack();
    const std::size_t keys = round_up(w_.count(), kSide);
    std::fill(w_.dk, w_.dk + keys * w_.stride, 0.0F);
    std::fill(w_.dv, w_.dv + keys * w_.stride, 0.0F);
    constexpr auto kRows = static_cast<std::int64_t>(kAmxRows);
    const std::int64_t batches = (w_.rows() + kRows - 1) / kRows;
    w_.key_budget.reset(0, 4 * std::max(w_.key_tile.count, w_.next_key_tile.count), batches * products());
    for (std::int64_t i = 0; i < batches; ++i)
      backward_batch(i * kRows, std::min((i + 1) * kRows, w_.rows()));
    accumulate_dk_dv(w_, w_.g.call.scale);
  }

 private:
  std::size_t dim_words() const { return depth_ / 2; }
  std::size_t key_part() const { return kKeyTileSize * dim_words(); }
  std::size_t tile_part() const { return dim_words() * kSide; }
  std::size_t tile_words() const { return kParts * tile_part(); }
  static constexpr std::size_t row_part() { return kAmxRowWords * kSide; }
  static constexpr std::size_t kKeyWords = kKeyTileSize / 2, kWeightPart = kAmxKeys * kAmxRowWords,
                               kPanelPart = kAmxKeys / 2 * kSide;
  /// Products of a whole batch and a whole key tile: the number of prefetch steps.
  std::int64_t products() const {
    const std::size_t groups = round_up(w_.count(), kAmxKeys) / kAmxKeys, panels = depth_ / kSide;
    return static_cast<std::int64_t>(groups * (4 * kAmxRowTiles + 4 * panels + panels * kAmxRowTiles));
  }

  /// out[kSide][kSide] = or += rows . panel, in units of words.
  void multiply(const std::uint32_t* rows, std::size_t stride, std::size_t part, const std::uint32_t* panel,
                std::size_t panel_part, std::size_t words, bool more, float* out, std::size_t out_stride) {
    RowPrefetcher no_prefetch;
    const auto run = kParts == 1 ? tiles_.multiply_bf16 : tiles_.multiply;
    run(reinterpret_cast<const bfloat16*>(rows), 2 * stride, 2 * part, kSide,
        reinterpret_cast<const bfloat16*>(panel), 2 * panel_part, 2 * words, more, out, out_stride,
        no_prefetch);
    prefetch_some_rows(w_);
    prefetch_some_keys(w_);
  }

  /// Returns up to 32 rows from `first` on as f32, zeros after the last; `scratch` holds the rows that are
  /// converted.
  std::array<const float*, kSide> rows_as_f32(const Rows& rows, DType dtype, std::size_t first,
                                              float* scratch) const {
    std::array<const float*, kSide> from;
    for (std::size_t r = 0; r < kSide; ++r) {
      from[r] = first + r < w_.count() ? row_as_f32(rows, dtype, static_cast<std::int64_t>(first + r),
                                                    w_.depth(), scratch + r * kRowStride)
                                       : w_.batch.f32_rows + kMaxLanes * kMaxHeadDim;
    }
    return from;
  }

  void pack() {
    const Call& call = w_.g.call;
    const std::int64_t head = w_.backward_tile.range->head;
    const Rows keys = call.keys(w_.sequence, head, w_.key_tile.first),
               values = call.values(w_.sequence, head, w_.key_tile.first);
    for (std::size_t first = 0; first < w_.count(); first += kSide) {
      const auto key = rows_as_f32(keys, call.k.dtype, first, w_.batch.queries),
                 value = rows_as_f32(values, call.v.dtype, first, w_.batch.d_outs);
      for (std::size_t r = 0; r < kSide; ++r) {
        split_row_bf16x3<kParts>(key[r], w_.depth(), keys_ + (first + r) * dim_words(), key_part());
        split_row_bf16x3<kParts>(value[r], w_.depth(), values_ + (first + r) * dim_words(), key_part());
      }
      float* columns = w_.batch.weights;  // [D][32]
      transpose_rows(key.data(), w_.depth(), columns);
      transpose_rows(key.data() + kLanes, w_.depth(), columns + kLanes);
      for (std::size_t d = 0; d < w_.depth(); ++d) {
        store_bf16x3<kParts>(hn::Load(F32(), columns + d * kSide),
                             hn::Load(F32(), columns + d * kSide + kLanes),
                             key_columns_ + d * kKeyWords + first / 2, key_part());
      }
    }
  }

  /// Gathers rows [first, last) of the key tile's list, in the four layouts in which they are multiplied.
  void gather_batch(std::int64_t first, std::int64_t last) {
    const Call& call = w_.g.call;
    const std::size_t row_panel = kParts * row_part();
    std::array<const float*, kSide> query, d_out;
    for (std::size_t tile = 0; tile < tiles_in(first, last); ++tile) {
      for (std::size_t r = 0; r < kSide; ++r) {
        float *q = w_.batch.queries + r * kRowStride, *d = w_.batch.d_outs + r * kRowStride;
        query[r] = q;
        d_out[r] = d;
        const std::size_t at = tile * kSide + r;
        const std::int64_t index = first + static_cast<std::int64_t>(at);
        if (index >= last) {
          std::fill_n(q, w_.stride, 0.0F);
          std::fill_n(d, w_.stride, 0.0F);
          scratch_.lse[at] = -kNegInf;
          scratch_.delta[at] = 0;
          scratch_.seen[at] = 0;
          continue;
        }
        const std::uint32_t row = w_.row(index);
        gather(w_, call.q, row, 1, q);
        gather(w_, w_.g.backward.d_out, row, 1, d);
        const RowStats& stats = w_.g.stats_of(w_.head_of(row), w_.sequence.q_begin + w_.query_of(row));
        scratch_.lse[at] = stats.lse;
        scratch_.delta[at] = stats.delta;
        scratch_.seen[at] = static_cast<std::int32_t>(w_.seen(index));
      }
      transpose_tile(query, queries_ + tile * tile_words());
      transpose_tile(d_out, d_outs_ + tile * tile_words());
      zip_rows<kParts>(query.data(), w_.depth(), query_rows_ + tile * kPairWords * kSide, row_panel,
                       row_part());
      zip_rows<kParts>(d_out.data(), w_.depth(), d_out_rows_ + tile * kPairWords * kSide, row_panel,
                       row_part());
    }
  }

  void transpose_tile(const std::array<const float*, kSide>& rows, std::uint32_t* panel) {
    constexpr std::size_t kStride = kMaxHeadDim / 2;
    for (std::size_t first = 0; first < kSide; first += kLanes) {
      for (std::size_t r = 0; r < kLanes; ++r)
        split_row_bf16x3<kParts>(rows[first + r], w_.depth(), scratch_.words + r * kStride, kLanes * kStride);
      transpose_bf16x3<kParts>(scratch_.words, kStride, depth_, panel + first, tile_part());
    }
  }

  static std::size_t tiles_in(std::int64_t first, std::int64_t last) {
    return (static_cast<std::size_t>(last - first) + kSide - 1) / kSide;
  }

  void backward_batch(std::int64_t first, std::int64_t last) {
    constexpr auto kRows = static_cast<std::int64_t>(kAmxRows);
    w_.row_budget.reset(3 * last, 3 * std::min(last + kRows, w_.rows()), products());
    gather_batch(first, last);
    std::fill(dq_, dq_ + depth_ * kAmxRows, 0.0F);
    const std::size_t tiles = tiles_in(first, last);
    std::size_t from = 0;  // the first tile with a row that sees the keys: what rows see never shrinks
    for (std::size_t key = 0; key < w_.count(); key += kAmxKeys) {
      const auto blind = [&](std::size_t tile) {
        const std::int64_t last_row =
            std::min(first + static_cast<std::int64_t>((tile + 1) * kSide), last) - 1;
        return w_.seen(last_row) <= key;
      };
      while (from < tiles && blind(from)) ++from;
      if (from < tiles) backward_keys(key, from, tiles);
    }
    accumulate_dq(first, last, tiles);
  }

  /// Keys [key, key + kAmxKeys) against tiles [from, tiles) of the batch.
  void backward_keys(std::size_t key, std::size_t from, std::size_t tiles) {
    const std::size_t keys = std::min(round_up(w_.count() - key, kSide), kAmxKeys);
    // One operand of each product stays in the first-level cache while the other passes by.
    for (std::size_t tile = from; tile < tiles; ++tile) {
      const auto by_block = [&](const std::uint32_t* rows, const std::uint32_t* panels, float* out) {
        for (std::size_t block = 0; block < keys; block += kSide) {
          multiply(rows + (key + block) * dim_words(), dim_words(), key_part(), panels + tile * tile_words(),
                   tile_part(), dim_words(), false, out + block * kSide, kSide);
        }
      };
      by_block(keys_, queries_, scratch_.logits);
      by_block(values_, d_outs_, scratch_.d_weights);
      for (std::size_t block = 0; block < keys; block += kSide) exp2_and_d_logits_block(key, block, tile);
    }
    const std::size_t words = (tiles - from) * kPairWords, skipped = from * kPairWords;
    for (std::size_t block = 0; block < keys; block += kSide) {
      const auto by_column = [&](const std::uint32_t* rows, const std::uint32_t* panels, float* out) {
        for (std::size_t column = 0; column < depth_; column += kSide) {
          multiply(rows + block * kAmxRowWords + skipped, kAmxRowWords, kWeightPart,
                   panels + (column / kSide * kParts * kAmxRowWords + skipped) * kSide, row_part(), words,
                   true, out + (key + block) * w_.stride + column, w_.stride);
        }
      };
      by_column(scratch_.weights, d_out_rows_, w_.dv);
      by_column(scratch_.d_logits, query_rows_, w_.dk);
    }
    for (std::size_t tile = from; tile < tiles; ++tile) {
      for (std::size_t d = 0; d < depth_; d += kSide) {
        multiply(key_columns_ + d * kKeyWords + key / 2, kKeyWords, key_part(),
                 scratch_.d_logit_panels + tile * kParts * kPanelPart, kPanelPart, keys / 2, true,
                 dq_ + d * kAmxRows + tile * kSide, kAmxRows);
      }
    }
  }

  struct Pair {
    Vec left, right;  // sixteen rows each
  };

  /// weights = 2^min(scale logits - lse, 0), d_logits = weights (d_weights - delta), of one key; 0 where it
  /// is not seen.
  HWY_INLINE Pair exp2_and_d_logits(std::size_t key, std::size_t block, std::size_t in_block,
                                    std::size_t tile) {
    const __m512i number = _mm512_set1_epi32(static_cast<int>(key + block + in_block));
    const Vec scale = hn::Set(F32(), w_.g.call.scale * kLog2E);
    Vec p[2], d[2];
    for (std::size_t half = 0; half < 2; ++half) {
      const std::size_t at = tile * kSide + half * kLanes, from = (block + in_block) * kSide + half * kLanes;
      const __mmask16 seen = _mm512_cmpgt_epi32_mask(_mm512_load_si512(scratch_.seen + at), number);
      p[half] = exp2(at_most_zero(
          hn::MulSub(hn::Load(F32(), scratch_.logits + from), scale, hn::Load(F32(), scratch_.lse + at))));
      p[half] = Vec{_mm512_maskz_mov_ps(seen, p[half].raw)};
      const Vec slope =
          hn::Sub(hn::Load(F32(), scratch_.d_weights + from), hn::Load(F32(), scratch_.delta + at));
      d[half] = Vec{_mm512_maskz_mul_ps(seen, p[half].raw, slope.raw)};
    }
    const std::size_t to = (block + in_block) * kAmxRowWords + tile * kPairWords;
    store_bf16x3<kParts>(p[0], p[1], scratch_.weights + to, kWeightPart);
    store_bf16x3<kParts>(d[0], d[1], scratch_.d_logits + to, kWeightPart);
    return {d[0], d[1]};
  }

  void exp2_and_d_logits_block(std::size_t key, std::size_t block, std::size_t tile) {
    std::uint32_t* panel = scratch_.d_logit_panels + tile * kParts * kPanelPart + block / 2 * kSide;
    for (std::size_t pair = 0; pair < kPairWords; ++pair, panel += kSide) {
      const Pair low = exp2_and_d_logits(key, block, pair, tile),
                 high = exp2_and_d_logits(key, block, pair + kPairWords, tile);
      store_bf16x3<kParts>(low.left, high.left, panel, kPanelPart);
      store_bf16x3<kParts>(low.right, high.right, panel + kLanes, kPanelPart);
    }
  }

  void accumulate_dq(std::int64_t first, std::int64_t last, std::size_t tiles) {
    float* rows = w_.batch.weights;  // [kAmxRows][32]
    for (std::size_t column = 0; column < w_.depth(); column += kSide) {
      for (std::size_t half = 0; half < kSide; half += kLanes) {
        std::array<const float*, kLanes> from;
        for (std::size_t i = 0; i < kLanes; ++i) from[i] = dq_ + (column + half + i) * kAmxRows;
        transpose_rows(from.data(), tiles * kSide, rows + half);
      }
      const std::size_t size = std::min(kSide, w_.depth() - column);
      for (std::int64_t i = first; i < last; ++i) {
        add_scaled(rows + static_cast<std::size_t>(i - first) * kSide, size, w_.g.call.scale,
                   w_.dq_of(w_.row(i)) + column);
      }
    }
  }

  BackwardWorker& w_;
  std::size_t depth_;  // whole words
  AmxBackwardScratch& scratch_;
  const Bf16x6Tiles& tiles_ = *amx_bf16x6_tiles();
  std::uint32_t *keys_, *values_;            // [part][key][D / 2]
  std::uint32_t* key_columns_;               // [part][D][keys / 2]
  std::uint32_t *queries_, *d_outs_;         // [tile][part][D / 2][32]
  std::uint32_t *query_rows_, *d_out_rows_;  // [D / 32][part][rows / 2][32]
  float* dq_;                                // [D][rows]
};

#endif

}  // namespace
}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
