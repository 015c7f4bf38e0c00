#pragma once

#include <algorithm>

#include "cuda/attend_backward.h"
#include "cuda/divisor.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/warp.h"
#include "cuda/tile/nonfinite.h"
#include "cuda/tile/swizzled_tile.h"

/// Key tiles of the dk/dv pass: their rows, and the epilogue that writes their gradients.
namespace moba::cuda {

/// Threads that hold dk and dv of a key tile, numbered from 0.
constexpr int kDkvThreads = 256;
constexpr std::uint32_t kNoEntry = 0xFFFFFFFFU;

constexpr int keys_per_tile(std::int64_t head_dim) {
  return head_dim > 128 ? 64 : 128;
}
inline std::int64_t key_tiles_per_block(const DeviceCall& call) {
  return divide_up(call.routing.block_size, keys_per_tile(call.head_dim));
}

/// Rows of a segment: many times what a block receives on average, so that segments are few.
inline std::int64_t segment_of(const DeviceCall& call) {
  constexpr std::int64_t kMin = 4096, kTimesMean = 16;
  return std::max(kMin, kTimesMean * call.tokens * call.heads_per_kv * call.width() / call.max_blocks());
}
inline std::int64_t max_segments(const DeviceCall& call, const WorkSlice& slice) {
  return slice.heads() * (call.rows(slice) * call.width() / segment_of(call));
}
/// Upper bound on the key tiles of a head.
inline std::int64_t max_key_tiles(const DeviceCall& call) {
  return call.keys / keys_per_tile(call.head_dim) + call.max_blocks();
}

template <typename T>
struct DkvParams {
  View<const T> q, k, v, d_out;
  Batch batch;
  DkvPlan plan;
  const std::uint32_t* entries;  // [heads, rows * width]
  const std::uint32_t* offsets;  // [heads, max_blocks + 1]
  const LseDelta* sums;          // [heads, rows]
  std::int64_t block_size, key_tiles, max_blocks, segment;
  std::int64_t head0, rows, width;
  Divisor heads_per_kv, ranks;
  bool diagonal, causal;
  /// True in the launch that sums segments.
  bool segments;
  float scale, log2_scale;  // the latter for powers of 2
  View<T> dk, dv;
};

/// Parameters of one launch.
template <typename T>
DkvParams<T> dkv_params(const DeviceCall& call, const WorkSlice& slice, const Batch& batch, const Plan& plan,
                        const LseDelta* sums, const Backward& backward, const DkvPlan& dkv_plan) {
  return {.q = view_of<const T>(call.q),
          .k = view_of<const T>(call.k),
          .v = view_of<const T>(call.v),
          .d_out = view_of<const T>(backward.d_out),
          .batch = batch,
          .plan = dkv_plan,
          .entries = plan.entries,
          .offsets = plan.offsets,
          .sums = sums,
          .block_size = call.routing.block_size,
          .key_tiles = key_tiles_per_block(call),
          .max_blocks = call.max_blocks(),
          .segment = segment_of(call),
          .head0 = slice.head0,
          .rows = call.rows(slice),
          .width = call.width(),
          .heads_per_kv = Divisor(call.heads_per_kv),
          .ranks = Divisor(std::max<std::int64_t>(call.ranks(), 1)),
          .diagonal = call.has_diagonal(),
          .causal = call.routing.causal,
          .segments = false,
          .scale = call.scale,
          .log2_scale = call.scale * kLog2E,
          .dk = view_of<T>(backward.gradients.dk),
          .dv = view_of<T>(backward.gradients.dv)};
}

/// Key tile and the rows that see it: `routed` entries, then `diagonal` consecutive rows.
struct KeyTile {
  std::int64_t head = 0;       // of the slice
  std::int64_t first_key = 0;  // packed
  std::int32_t count = 0;      // keys; 0 for no work
  std::int32_t shift = 0;      // a diagonal row sees the keys up to its token + shift
  const std::uint32_t* entries = nullptr;
  std::uint32_t routed = 0, diagonal = 0, diagonal_row = 0;
  /// Segments summed by other thread blocks; in a segment, `sums` is where its own sums go.
  std::uint32_t segments = 0;
  std::int64_t sums = 0;

  MOBA_DEVICE std::uint32_t rows() const { return routed + diagonal; }
};

/// Returns key tile `index_in_block` of a block; its count is 0 past the last key.
template <int head_dim, typename T>
MOBA_DEVICE KeyTile key_tile_of(const DkvParams<T>& p, std::int64_t head, std::int32_t sequence,
                                std::int32_t block, std::int64_t index_in_block) {
  constexpr int kKeys = keys_per_tile(head_dim);
  const std::int32_t k_begin = p.batch.k_starts[sequence], keys = p.batch.k_starts[sequence + 1] - k_begin;
  const KeyRange range = keys_of(block, p.block_size, keys);
  const std::int64_t begin = range.begin + index_in_block * kKeys, left = range.end - begin;
  if (left <= 0) return {};
  KeyTile key_tile{.head = head,
                   .first_key = k_begin + begin,
                   .count = static_cast<std::int32_t>(left < kKeys ? left : kKeys)};
  if (!p.diagonal || p.segments) return key_tile;
  const std::int32_t q_begin = p.batch.q_starts[sequence], queries = p.batch.q_starts[sequence + 1] - q_begin,
                     before = keys - queries;
  std::int64_t first = 0, last = queries;
  if (p.causal) {
    first = begin > before ? begin - before : 0;
    last = range.end - before;
    key_tile.shift = static_cast<std::int32_t>(before - q_begin - begin);
  }
  if (last <= first) return key_tile;
  key_tile.diagonal_row = static_cast<std::uint32_t>(q_begin + first) * p.heads_per_kv.divisor;
  key_tile.diagonal = static_cast<std::uint32_t>(last - first) * p.heads_per_kv.divisor;
  return key_tile;
}

/// Returns key tile `index` among those of all segments, with the rows of its segment.
template <int head_dim, typename T>
MOBA_DEVICE KeyTile key_tile_of_segment(const DkvParams<T>& p, std::int64_t index) {
  if (index / p.key_tiles >= *p.plan.count) return {};
  const Segment segment = p.plan.segments[index / p.key_tiles];
  const std::int32_t sequence = sequence_of(p.batch.block_starts, p.batch.sequences, segment.block);
  KeyTile key_tile = key_tile_of<head_dim>(
      p, segment.head, sequence, segment.block - p.batch.block_starts[sequence], index % p.key_tiles);
  if (key_tile.count == 0) return key_tile;
  key_tile.entries = p.entries + segment.head * p.rows * p.width + segment.first;
  key_tile.routed = segment.count;
  key_tile.sums = index;
  return key_tile;
}

/// Returns key tile `index` of a head, with all rows except those of segments.
template <int head_dim, typename T>
MOBA_DEVICE KeyTile key_tile_at(const DkvParams<T>& p, std::int64_t head, std::int32_t index) {
  const std::int32_t* starts = p.plan.key_tile_starts;
  if (index >= starts[p.batch.sequences]) return {};
  const std::int32_t sequence = sequence_of(starts, p.batch.sequences, index);
  const auto block = static_cast<std::int32_t>((index - starts[sequence]) / p.key_tiles);
  const std::int64_t index_in_block = (index - starts[sequence]) % p.key_tiles;
  KeyTile key_tile = key_tile_of<head_dim>(p, head, sequence, block, index_in_block);
  if (p.width == 0) return key_tile;
  const std::int64_t packed = p.batch.block_starts[sequence] + block;
  const std::uint32_t* offsets = p.offsets + head * (p.max_blocks + 1) + packed;
  const std::uint32_t size = offsets[1] - offsets[0], max_routed = static_cast<std::uint32_t>(p.segment);
  key_tile.entries = p.entries + head * p.rows * p.width + offsets[0];
  key_tile.routed = size < max_routed ? size : max_routed;
  if (size > max_routed) {
    key_tile.segments = (size - 1) / max_routed;
    key_tile.sums = p.plan.first_segment[head * p.max_blocks + packed] * p.key_tiles + index_in_block;
  }
  return key_tile;
}

/// Returns the entry of row `index` of a key tile, from which row_info_of computes token and head.
MOBA_DEVICE std::uint32_t entry_at(const KeyTile& key_tile, std::uint32_t index) {
  if (index < key_tile.routed) return key_tile.entries[index];
  return index < key_tile.rows() ? key_tile.diagonal_row + (index - key_tile.routed) : kNoEntry;
}

/// Row of a key tile.
struct RowInfo {
  std::int64_t q = 0, d_out = 0;  // elements
  std::uint32_t row = kNoEntry;
  std::int32_t visible_keys = 0;  // leading keys of the key tile that the row sees
};

template <typename T>
MOBA_DEVICE RowInfo row_info_of(const DkvParams<T>& p, const KeyTile& key_tile, std::uint32_t index,
                                std::uint32_t entry) {
  if (entry == kNoEntry) return {};
  const bool is_routed = index < key_tile.routed;
  const std::uint32_t heads_per_kv = p.heads_per_kv.divisor,
                      row = is_routed ? p.ranks.quotient(entry) : entry, token = p.heads_per_kv.quotient(row);
  const std::int64_t head = (p.head0 + key_tile.head) * heads_per_kv + (row - token * heads_per_kv);
  RowInfo row_info{.q = token * p.q.token_stride + head * p.q.head_stride,
                   .d_out = token * p.d_out.token_stride + head * p.d_out.head_stride,
                   .row = row,
                   .visible_keys = key_tile.count};
  if (is_routed || !p.causal) return row_info;
  const std::int64_t visible = std::int64_t{token} + key_tile.shift + 1;
  row_info.visible_keys = visible < key_tile.count ? static_cast<std::int32_t>(visible) : key_tile.count;
  return row_info;
}

template <typename T>
MOBA_DEVICE LseDelta lse_delta_of(const DkvParams<T>& p, const KeyTile& key_tile, const RowInfo& row_info) {
  if (row_info.row == kNoEntry) return {ptx::infinity(), 0};
  return p.sums[key_tile.head * p.rows + row_info.row];
}

/// Tests that every row of the tile from row `first` on exists and sees the whole key tile.
template <int rows, typename T>
MOBA_DEVICE bool is_unmasked(const DkvParams<T>& p, const KeyTile& key_tile, std::uint32_t first) {
  if (first + rows > key_tile.rows()) return false;
  if (!p.causal || first + rows <= key_tile.routed) return true;
  const std::uint32_t diagonal = first > key_tile.routed ? first - key_tile.routed : 0;
  return std::int64_t{p.heads_per_kv.quotient(key_tile.diagonal_row + diagonal)} + key_tile.shift + 1 >=
         key_tile.count;
}

/// Tests that rows of a tile that is not unmasked see different keys: diagonal ones, under a causal mask.
template <int rows, typename T>
MOBA_DEVICE bool is_mixed(const DkvParams<T>& p, const KeyTile& key_tile, std::uint32_t first) {
  return p.causal && key_tile.diagonal > 0 && first + rows > key_tile.routed;
}

/// Recomputes P = exp2(log2_scale * S - lse) in place, at most 1 whatever the rounding of lse; columns are
/// rows of q.
template <int tiles>
MOBA_DEVICE void recompute_p(float (&products)[tiles][4], const LseDelta* sums, float log2_scale) {
  MOBA_UNROLL
  for (int j = 0; j < tiles; ++j) {
    MOBA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const float lse = sums[8 * j + ptx::lane() % 4 * 2 + e % 2].lse;
      products[j][e] = ptx::exp2(ptx::at_most_zero(ptx::fma(products[j][e], log2_scale, -lse)));
    }
  }
}

/// Computes dS = P * (dP - delta); `ds` holds dP on entry.
template <int tiles>
MOBA_DEVICE void compute_ds(float (&ds)[tiles][4], const float (&probs)[tiles][4], const LseDelta* sums) {
  MOBA_UNROLL
  for (int j = 0; j < tiles; ++j) {
    MOBA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const float delta = sums[8 * j + ptx::lane() % 4 * 2 + e % 2].delta;
      ds[j][e] = probs[j][e] * (ds[j][e] - delta);
    }
  }
}

/// Zeroes entries of keys that a row does not see. The keys of the warp begin at `warp_key`.
template <int tiles>
MOBA_DEVICE void apply_mask(float (&probs)[tiles][4], const std::int32_t* visible_keys, int warp_key) {
  MOBA_UNROLL
  for (int j = 0; j < tiles; ++j) {
    MOBA_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (warp_key + ptx::lane() / 4 + e / 2 * 8 >= visible_keys[8 * j + ptx::lane() % 4 * 2 + e % 2])
        probs[j][e] = 0;
    }
  }
}

/// Isolates NaN and infinity in mixed tiles of q and d_out: their rows get an LSE of NaN, which makes P and
/// dS NaN for the keys that they see. Called by `threads` threads.
template <int threads, int rows, typename Rows>
MOBA_DEVICE void isolate_nonfinite_rows(const Rows& q, const Rows& d_out, int thread, LseDelta* sums) {
  const auto report = [&](int row, bool found) {
    if (found) sums[row] = {ptx::nan(), ptx::nan()};
  };
  tile::isolate_nonfinite<threads, rows>(q, thread, report);
  tile::isolate_nonfinite<threads, rows>(d_out, thread, report);
}

struct alignas(16) Vec4F32 {
  float v[4];
};

/// Address of the partial sums of one gradient and thread; consecutive vectors are kDkvThreads apart.
template <int tiles, typename T>
MOBA_DEVICE Vec4F32* partial_sums_of(const DkvParams<T>& p, std::int64_t sums, int gradient, int thread) {
  return reinterpret_cast<Vec4F32*>(p.plan.sums) + (2 * sums + gradient) * tiles * kDkvThreads + thread;
}

/// Stores the partial sums of a segment; gradient 0 is dk and 1 dv.
template <typename T, int tiles>
MOBA_DEVICE void store_partial_sums(const DkvParams<T>& p, std::int64_t sums, int gradient, int thread,
                                    const float (&from)[tiles][4]) {
  Vec4F32* to = partial_sums_of<tiles>(p, sums, gradient, thread);
  MOBA_UNROLL
  for (int j = 0; j < tiles; ++j) to[j * kDkvThreads] = {from[j][0], from[j][1], from[j][2], from[j][3]};
}

/// Adds the partial sums of the segments in order.
template <typename T, int tiles>
MOBA_DEVICE void add_partial_sums(const DkvParams<T>& p, const KeyTile& key_tile, int gradient, int thread,
                                  float (&to)[tiles][4]) {
  for (std::uint32_t i = 0; i < key_tile.segments; ++i) {
    const Vec4F32* from = partial_sums_of<tiles>(p, key_tile.sums + i * p.key_tiles, gradient, thread);
    MOBA_UNROLL
    for (int j = 0; j < tiles; ++j) {
      const Vec4F32 quad = from[j * kDkvThreads];
      MOBA_UNROLL
      for (int e = 0; e < 4; ++e) to[j][e] += quad.v[e];
    }
  }
}

/// Stores this warp's columns of a gradient through shared memory, in 16-byte vectors.
template <typename T, typename Rows, int tiles>
MOBA_DEVICE void store_gradient(const View<T>& to, const Rows& rows, const KeyTile& key_tile,
                                std::int64_t kv_head, int warp_key, int first_vec, float scale,
                                const float (&from)[tiles][4]) {
  const int lane = ptx::opaque(ptx::lane());
  MOBA_UNROLL
  for (int j = 0; j < tiles; ++j) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      auto* at = reinterpret_cast<std::uint32_t*>(rows.vec(warp_key + 8 * half + lane / 4, first_vec + j));
      at[lane % 4] = ptx::pack<T>(from[j][2 * half] * scale, from[j][2 * half + 1] * scale);
    }
  }
  ptx::syncwarp();
  for (int i = lane; i < 16 * tiles; i += ptx::kLanes) {
    const int key = warp_key + i / tiles, vec = first_vec + i % tiles;
    if (key >= key_tile.count) break;
    *reinterpret_cast<ptx::Vec16*>(to.row(key_tile.first_key + key, kv_head) + vec * tile::kVecElements) =
        *reinterpret_cast<const ptx::Vec16*>(rows.vec(key, vec));
  }
}

}  // namespace moba::cuda
