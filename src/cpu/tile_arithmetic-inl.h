// The interface of the tile arithmetics, which compute a tile of attention: Float32 (f32 multiply-adds,
// whatever the storage type), BFloat16 (bf16 matrix instructions) and F32AsBf16x6 (f32 on bf16 matrix
// instructions). Beside it, what they share: the location of a key tile, and non-finite values.
#if defined(MOBA_CPU_TILE_ARITHMETIC_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_TILE_ARITHMETIC_INL_H_
#undef MOBA_CPU_TILE_ARITHMETIC_INL_H_
#else
#define MOBA_CPU_TILE_ARITHMETIC_INL_H_
#endif

#include <bitset>
#include <concepts>

#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

/// Calls visit(index, rows, i) for rows [first, first + count) of a sequence, page by page; `fetch(position)`
/// returns the contiguous rows that start there.
template <typename Fetch, typename Visit>
HWY_INLINE void for_rows(std::int64_t first, std::int64_t count, Fetch&& fetch, Visit&& visit) {
  for (std::int64_t done = 0; done < count;) {
    const Rows rows = fetch(first + done);
    const std::int64_t run = std::min(rows.count, count - done);
    for (std::int64_t i = 0; i < run; ++i) visit(static_cast<std::size_t>(done + i), rows, i);
    done += run;
  }
}

/// Location of a key tile's keys and values in the call's tensors or pages.
struct KvSource {
  const Call* call = nullptr;
  const SequenceView* sequence = nullptr;
  std::int64_t head = 0, first = 0, count = 0;

  template <typename Visit>
  HWY_INLINE void for_keys(Visit&& visit) const {
    for_rows(
        first, count, [&](std::int64_t at) { return call->keys(*sequence, head, at); }, visit);
  }
  template <typename Visit>
  HWY_INLINE void for_values(Visit&& visit) const {
    for_rows(
        first, count, [&](std::int64_t at) { return call->values(*sequence, head, at); }, visit);
  }
};

/// A set of keys, by their index in the key tile.
using KeySet = std::bitset<kKeyTileSize>;

/// Adds weight(r, i) * value i to out[r] for the non-finite values, only in the rows that see them. In a
/// product of tiles a non-finite value would reach every row, because 0 * inf is NaN.
template <typename Weight>
void add_nonfinite_values(const KvSource& source, const KeySet& nonfinite, TileScratch& tile,
                          std::size_t rows, std::size_t head_dim, Weight&& weight) {
  source.for_values([&](std::size_t index, const Rows& from, std::int64_t i) HWY_ATTR {
    if (!nonfinite.test(index)) return;
    const float* value = row_as_f32(from, source.call->v.dtype, i, head_dim, tile.f32_rows);
    for (std::size_t r = 0; r < rows; ++r) {
      const float by = index < tile.visible[r] ? weight(r, index) : 0.0F;
      for (std::size_t c = 0; c < head_dim && index < tile.visible[r]; ++c) tile.out[r][c] += by * value[c];
    }
  });
}

/// Interface of a tile arithmetic, which attend.cpp is written against. A tile arithmetic packs a key tile
/// (`pack`), holds a tile of up to kHeight query rows (`gather`), computes their scores into
/// TileScratch::scores (`score`), takes the weights that the online softmax makes of them (`store_weights`,
/// two vectors of columns), and adds the weighted values to the rows' outputs, which are multiplied by
/// TileScratch::rescale first (`add_values`). Both products call `between` now and then, which prefetches.
template <typename A>
concept TileArithmetic = requires(A a, const A& constant, const Call& call, const SequenceView& sequence,
                                  std::int64_t at, std::size_t index, const std::byte* query, DType dtype,
                                  float sign, Vec weights, void (*between)()) {
  { A::kHeight } -> std::convertible_to<std::size_t>;   // rows of a tile, at most
  { A::kMaxKeys } -> std::convertible_to<std::size_t>;  // keys of a key tile, at most
  { A::kEqualTiles } -> std::convertible_to<bool>;      // whether tiles of equal height are the fastest
  { A::kPrefetchesRows } -> std::convertible_to<bool>;  // whether it prefetches the next rows: begin_prefetch
  { a.pack(call, sequence, at, at, at) } -> std::same_as<void>;               // head, first key, keys
  { a.gather(index, query, dtype, sign) } -> std::same_as<void>;              // row of the tile
  { a.score(index, index, between) } -> std::same_as<void>;                   // rows, columns
  { a.store_weights(index, index, weights, weights) } -> std::same_as<void>;  // row, column
  { a.add_values(index, index, between) } -> std::same_as<void>;              // rows, columns
  { constant.weight(index, index) } -> std::same_as<float>;                   // row, column
  requires std::same_as<decltype(a.source), KvSource>;                        // the key tile that is packed
  requires std::same_as<decltype(a.nonfinite_values), KeySet>;  // values that are packed as zeros
};

}  // namespace
}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
