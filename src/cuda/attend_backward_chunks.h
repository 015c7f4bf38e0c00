#pragma once

#include <algorithm>

#include "cuda/attend_backward.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/warp.h"
#include "cuda/tile/swizzled_tile.h"

/// What the kernels of the walk by key have in common: which chunks of keys there are, what rows see each,
/// and where its gradients go.
namespace moba::cuda {

/// Threads that hold the gradients of a chunk between them, numbered from 0.
constexpr int kChunkThreads = 256;
constexpr std::uint32_t kNoEntry = 0xFFFFFFFFU;

constexpr int keys_of_chunk(std::int64_t head_dim) {
  return head_dim > 128 ? 64 : 128;
}
inline std::int64_t chunks_of_block(const Task& task) {
  return divide_up(task.routing.block_size, keys_of_chunk(task.head_dim));
}

/// Rows of a segment: many times what a block receives on average, so that segments are few.
inline std::int64_t segment_of(const Task& task) {
  constexpr std::int64_t kLeast = 4096, kTimesMean = 16;
  return std::max(kLeast, kTimesMean * task.tokens * task.group * task.width / task.most_blocks());
}
inline std::int64_t most_segments(const Task& task, const WorkSlice& part) {
  return part.heads() * (task.rows(part) * task.width / segment_of(task));
}
/// No fewer than a head has.
inline std::int64_t most_chunks(const Task& task) {
  return task.keys / keys_of_chunk(task.head_dim) + task.most_blocks();
}

template <typename T>
struct KeysParams {
  View<const T> q, k, v, d_out;
  Batch batch;
  KeyWalk walk;
  const std::uint32_t* entries;  // [heads, rows * width]
  const std::uint32_t* offsets;  // [heads, most_blocks + 1]
  const LseDelta* sums;          // [heads, rows]
  std::int64_t block_size, chunks, most_blocks, segment;
  std::int64_t head0, rows, width;
  std::uint32_t group, ranks;
  bool near, causal;
  /// The segments are summed, not the rest.
  bool segments;
  float scale, log2_scale;  // the latter for powers of 2
  View<T> dk, dv;
};

/// What the host tells them.
template <typename T>
KeysParams<T> keys_params(const Task& task, const WorkSlice& part, const Batch& batch, const Plan& plan,
                          const LseDelta* sums, const Backward& backward, const KeyWalk& walk) {
  return {.q = view_of<const T>(task.q),
          .k = view_of<const T>(task.k),
          .v = view_of<const T>(task.v),
          .d_out = view_of<const T>(backward.d_out),
          .batch = batch,
          .walk = walk,
          .entries = plan.entries,
          .offsets = plan.offsets,
          .sums = sums,
          .block_size = task.routing.block_size,
          .chunks = chunks_of_block(task),
          .most_blocks = task.most_blocks(),
          .segment = segment_of(task),
          .head0 = part.head0,
          .rows = task.rows(part),
          .width = task.width,
          .group = static_cast<std::uint32_t>(task.group),
          .ranks = static_cast<std::uint32_t>(task.ranks()),
          .near = task.has_near_keys(),
          .causal = task.routing.causal,
          .segments = false,
          .scale = task.scale,
          .log2_scale = task.scale * ptx::kLog2E,
          .dk = view_of<T>(backward.gradients.dk),
          .dv = view_of<T>(backward.gradients.dv)};
}

/// A chunk of keys and the rows that see it: `listed` entries, then `near` neighbouring rows.
struct Chunk {
  std::int64_t head = 0;       // of the part
  std::int64_t first_key = 0;  // packed
  std::int32_t count = 0;      // keys; 0 for no work
  std::int32_t shift = 0;      // a near row sees keys of the chunk up to its token + shift
  const std::uint32_t* entries = nullptr;
  std::uint32_t listed = 0, near = 0, near_row = 0;
  /// Segments that another thread block has summed, or where to leave the sums of one.
  std::uint32_t segments = 0;
  std::int64_t sums = 0;

  MOBA_DEVICE std::uint32_t rows() const { return listed + near; }
};

/// Chunk `number` of a block, as far as the keys go.
template <int head_dim, typename T>
MOBA_DEVICE Chunk chunk_of(const KeysParams<T>& p, std::int64_t head, std::int32_t sequence,
                           std::int32_t block, std::int64_t number) {
  constexpr int kKeys = keys_of_chunk(head_dim);
  const std::int32_t k_begin = p.batch.k_starts[sequence], keys = p.batch.k_starts[sequence + 1] - k_begin;
  const KeyRange stretch = keys_of(block, p.block_size, keys);
  const std::int64_t begin = stretch.begin + number * kKeys, left = stretch.end - begin;
  if (left <= 0) return {};
  Chunk chunk{.head = head,
              .first_key = k_begin + begin,
              .count = static_cast<std::int32_t>(left < kKeys ? left : kKeys)};
  if (!p.near || p.segments) return chunk;
  const std::int32_t q_begin = p.batch.q_starts[sequence], queries = p.batch.q_starts[sequence + 1] - q_begin,
                     before = keys - queries;
  std::int64_t first = 0, last = queries;
  if (p.causal) {
    first = begin > before ? begin - before : 0;
    last = stretch.end - before;
    chunk.shift = static_cast<std::int32_t>(before - q_begin - begin);
  }
  if (last <= first) return chunk;
  chunk.near_row = static_cast<std::uint32_t>(q_begin + first) * p.group;
  chunk.near = static_cast<std::uint32_t>(last - first) * p.group;
  return chunk;
}

/// Chunk `index` of all blocks that have segments, with the rows of one of these.
template <int head_dim, typename T>
MOBA_DEVICE Chunk chunk_of_segment(const KeysParams<T>& p, std::int64_t index) {
  if (index / p.chunks >= *p.walk.count) return {};
  const Segment segment = p.walk.segments[index / p.chunks];
  const std::int32_t sequence = sequence_of(p.batch.block_starts, p.batch.sequences, segment.block);
  Chunk chunk = chunk_of<head_dim>(p, segment.head, sequence, segment.block - p.batch.block_starts[sequence],
                                   index % p.chunks);
  if (chunk.count == 0) return chunk;
  chunk.entries = p.entries + segment.head * p.rows * p.width + segment.first;
  chunk.listed = segment.count;
  chunk.sums = index;
  return chunk;
}

/// Chunk `index` of all sequences, with all rows but those of segments.
template <int head_dim, typename T>
MOBA_DEVICE Chunk chunk_at(const KeysParams<T>& p, std::int64_t head, std::int32_t index) {
  const std::int32_t* starts = p.walk.chunk_starts;
  if (index >= starts[p.batch.sequences]) return {};
  const std::int32_t sequence = sequence_of(starts, p.batch.sequences, index);
  const auto block = static_cast<std::int32_t>((index - starts[sequence]) / p.chunks);
  const std::int64_t number = (index - starts[sequence]) % p.chunks;
  Chunk chunk = chunk_of<head_dim>(p, head, sequence, block, number);
  if (p.width == 0) return chunk;
  const std::int64_t packed = p.batch.block_starts[sequence] + block;
  const std::uint32_t* offsets = p.offsets + head * (p.most_blocks + 1) + packed;
  const std::uint32_t size = offsets[1] - offsets[0], most = static_cast<std::uint32_t>(p.segment);
  chunk.entries = p.entries + head * p.rows * p.width + offsets[0];
  chunk.listed = size < most ? size : most;
  if (size > most) {
    chunk.segments = (size - 1) / most;
    chunk.sums = p.walk.first_segment[head * p.most_blocks + packed] * p.chunks + number;
  }
  return chunk;
}

/// What is known of row `index` of a chunk before it is divided into token and head.
MOBA_DEVICE std::uint32_t entry_at(const Chunk& chunk, std::uint32_t index) {
  if (index < chunk.listed) return chunk.entries[index];
  return index < chunk.rows() ? chunk.near_row + (index - chunk.listed) : kNoEntry;
}

/// A row of a chunk.
struct Source {
  std::int64_t q = 0, d_out = 0;  // elements
  std::uint32_t row = kNoEntry;
  std::int32_t seen = 0;  // keys of the chunk, the first so many
};

template <typename T>
MOBA_DEVICE Source source_of(const KeysParams<T>& p, const Chunk& chunk, std::uint32_t index,
                             std::uint32_t entry) {
  if (entry == kNoEntry) return {};
  const bool is_listed = index < chunk.listed;
  const std::uint32_t row = is_listed ? entry / p.ranks : entry;
  const std::int64_t token = row / p.group, head = (p.head0 + chunk.head) * p.group + row % p.group;
  Source source{.q = token * p.q.token_stride + head * p.q.head_stride,
                .d_out = token * p.d_out.token_stride + head * p.d_out.head_stride,
                .row = row,
                .seen = chunk.count};
  if (is_listed || !p.causal) return source;
  const std::int64_t sees = token + chunk.shift + 1;
  source.seen = sees < chunk.count ? static_cast<std::int32_t>(sees) : chunk.count;
  return source;
}

template <typename T>
MOBA_DEVICE LseDelta sums_of(const KeysParams<T>& p, const Chunk& chunk, const Source& source) {
  if (source.row == kNoEntry) return {ptx::infinity(), 0};
  return p.sums[chunk.head * p.rows + source.row];
}

/// Whether every row of the tile that begins at row `first` exists and sees the whole chunk.
template <int rows, typename T>
MOBA_DEVICE bool is_whole(const KeysParams<T>& p, const Chunk& chunk, std::uint32_t first) {
  if (first + rows > chunk.rows()) return false;
  if (!p.causal || first + rows <= chunk.listed) return true;
  const std::uint32_t near = first > chunk.listed ? first - chunk.listed : 0;
  return std::int64_t{(chunk.near_row + near) / p.group} + chunk.shift + 1 >= chunk.count;
}

/// Products of keys and queries, one column a row of the tile, become weights.
template <int tiles>
MOBA_DEVICE void to_weights(float (&products)[tiles][4], const LseDelta* sums, float log2_scale) {
  MOBA_UNROLL
  for (int j = 0; j < tiles; ++j) {
    MOBA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const float lse = sums[8 * j + ptx::lane() % 4 * 2 + e % 2].lse;
      products[j][e] = ptx::exp2(ptx::fma(products[j][e], log2_scale, -lse));
    }
  }
}

/// Gradients of weights become gradients of logits.
template <int tiles>
MOBA_DEVICE void to_d_logits(float (&d_weights)[tiles][4], const float (&weights)[tiles][4],
                             const LseDelta* sums) {
  MOBA_UNROLL
  for (int j = 0; j < tiles; ++j) {
    MOBA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const float delta = sums[8 * j + ptx::lane() % 4 * 2 + e % 2].delta;
      d_weights[j][e] = weights[j][e] * (d_weights[j][e] - delta);
    }
  }
}

/// 0 where a row does not see a key. The warp's keys begin with `warp_key`.
template <int tiles>
MOBA_DEVICE void hide_unseen(float (&weights)[tiles][4], const std::int32_t* seen, int warp_key) {
  MOBA_UNROLL
  for (int j = 0; j < tiles; ++j) {
    MOBA_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (warp_key + ptx::lane() / 4 + e / 2 * 8 >= seen[8 * j + ptx::lane() % 4 * 2 + e % 2])
        weights[j][e] = 0;
    }
  }
}

struct alignas(16) Quad {
  float v[4];
};

/// Where a thread's sums of one gradient lie among a chunk's, kChunkThreads apart.
template <int tiles, typename T>
MOBA_DEVICE Quad* quads(const KeysParams<T>& p, std::int64_t sums, int gradient, int thread) {
  return reinterpret_cast<Quad*>(p.walk.sums) + (2 * sums + gradient) * tiles * kChunkThreads + thread;
}

/// Leaves what a segment adds to a gradient, 0 being dk and 1 dv.
template <typename T, int tiles>
MOBA_DEVICE void leave_sums(const KeysParams<T>& p, std::int64_t sums, int gradient, int thread,
                            const float (&from)[tiles][4]) {
  Quad* to = quads<tiles>(p, sums, gradient, thread);
  MOBA_UNROLL
  for (int j = 0; j < tiles; ++j) to[j * kChunkThreads] = {from[j][0], from[j][1], from[j][2], from[j][3]};
}

/// Adds what the chunk's segments have left, in their order.
template <typename T, int tiles>
MOBA_DEVICE void add_segments(const KeysParams<T>& p, const Chunk& chunk, int gradient, int thread,
                              float (&to)[tiles][4]) {
  for (std::uint32_t i = 0; i < chunk.segments; ++i) {
    const Quad* from = quads<tiles>(p, chunk.sums + i * p.chunks, gradient, thread);
    MOBA_UNROLL
    for (int j = 0; j < tiles; ++j) {
      const Quad quad = from[j * kChunkThreads];
      MOBA_UNROLL
      for (int e = 0; e < 4; ++e) to[j][e] += quad.v[e];
    }
  }
}

/// Writes this warp's columns of the gradients of its keys, through `rows` of shared memory so that whole
/// vecs go out.
template <typename T, typename Rows, int tiles>
MOBA_DEVICE void write_gradient(const View<T>& to, const Rows& rows, const Chunk& chunk, std::int64_t kv_head,
                                int warp_key, int first_vec, float scale, const float (&from)[tiles][4]) {
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
    if (key >= chunk.count) break;
    *reinterpret_cast<ptx::Vec16*>(to.row(chunk.first_key + key, kv_head) + vec * tile::kVecElements) =
        *reinterpret_cast<const ptx::Vec16*>(rows.vec(key, vec));
  }
}

}  // namespace moba::cuda
