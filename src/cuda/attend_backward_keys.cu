// Gradients of keys and values. A thread block holds a chunk of the keys of one block and their gradients,
// and the rows that see them stream past: those that chose the block, then those whose own block it is.
// Products are formed with keys as rows, so that weights leave one product as the left side of the next.
//
// A block that very many rows chose is cut into segments of rows. All but the first are summed on their own,
// before; whoever works on the first adds them up in order.
#include <algorithm>

#include "cuda/attend_backward.h"
#include "cuda/ptx/atomic.h"
#include "cuda/ptx/barrier.h"
#include "cuda/tile/rows.h"
#include "cuda/tile/scan.h"

namespace moba::cuda {
namespace {

constexpr std::uint32_t kNoRow = 0xFFFFFFFFU;
constexpr float kLog2E = 1.44269504088896341F;

template <int head_dim>
struct Cut {
  /// Warps that share 16 keys: at D 256 each sums half of the columns, for all would not fit the registers.
  static constexpr int kShares = head_dim > 128 ? 2 : 1;
  static constexpr int kWarps = 8, kThreads = kWarps * ptx::kLanes;
  static constexpr int kKeys = kWarps / kShares * 16;
  static constexpr int kRows = head_dim > 64 ? 32 : 64;
  static constexpr int kColumns = head_dim / kShares;
};

constexpr std::int64_t keys_of_chunk(std::int64_t head_dim) {
  return head_dim > 128 ? Cut<256>::kKeys : Cut<128>::kKeys;
}
std::int64_t chunks_of_block(const Task& task) {
  return divide_up(task.routing.block_size, keys_of_chunk(task.head_dim));
}

/// Rows of a segment: many times what a block receives on average, so that segments are few.
std::int64_t segment_of(const Task& task) {
  constexpr std::int64_t kLeast = 4096, kTimesMean = 16;
  return std::max(kLeast, kTimesMean * task.tokens * task.group * task.width / task.most_blocks());
}
std::int64_t most_segments(const Task& task, const Group& part) {
  return part.heads() * (task.rows(part) * task.width / segment_of(task));
}

constexpr int kPlanThreads = 256;

struct WalkParams {
  KeyWalk walk;
  Batch batch;
  const std::uint32_t* offsets;  // [heads, most_blocks + 1]
  std::int64_t block_size, chunk, most_blocks, segment;
};

/// Chunks before each sequence.
MOBA_KERNEL(kPlanThreads, 1) chunk_kernel(MOBA_PARAMETER WalkParams p) {
  auto* sums = reinterpret_cast<std::int32_t*>(ptx::shared());
  std::int32_t before = 0;
  for (std::int32_t first = 0; first < p.batch.sequences; first += kPlanThreads) {
    const std::int32_t s = first + ptx::thread();
    std::int64_t chunks = 0;
    if (s < p.batch.sequences) {
      const std::int64_t keys = p.batch.k_starts[s + 1] - p.batch.k_starts[s];
      chunks =
          keys / p.block_size * divide_up(p.block_size, p.chunk) + divide_up(keys % p.block_size, p.chunk);
    }
    const auto scanned = tile::scan<kPlanThreads>(static_cast<std::int32_t>(chunks), sums);
    if (s < p.batch.sequences) p.walk.chunk_starts[s] = before + scanned.before;
    before += scanned.total;
  }
  if (ptx::thread() == 0) p.walk.chunk_starts[p.batch.sequences] = before;
}

/// Lists the segments of every block, in no particular order of blocks.
MOBA_KERNEL(kPlanThreads, 4) segment_kernel(MOBA_PARAMETER WalkParams p) {
  const std::int64_t head = ptx::block_y();
  const std::int64_t block = std::int64_t{ptx::block_x()} * kPlanThreads + ptx::thread();
  if (block >= p.batch.block_starts[p.batch.sequences]) return;
  const std::uint32_t* offsets = p.offsets + head * (p.most_blocks + 1) + block;
  const auto rows = static_cast<std::uint32_t>(p.segment);
  const std::uint32_t begin = offsets[0], end = offsets[1];
  if (end - begin <= rows) return;
  const std::uint32_t more = (end - begin - 1) / rows;
  const std::uint32_t first = ptx::atomic_add(p.walk.count, more);
  p.walk.first_segment[head * p.most_blocks + block] = first;
  for (std::uint32_t i = 0; i < more; ++i) {
    const std::uint32_t from = begin + (i + 1) * rows;
    p.walk.segments[first + i] = {static_cast<std::int32_t>(head), static_cast<std::int32_t>(block), from,
                                  end - from < rows ? end - from : rows};
  }
}

template <typename T>
struct KeysParams {
  View<const T> q, k, v, d_out;
  Batch batch;
  KeyWalk walk;
  const std::uint32_t* entries;  // [heads, rows * width]
  const std::uint32_t* offsets;  // [heads, most_blocks + 1]
  const RowSums* sums;           // [heads, rows]
  std::int64_t block_size, chunks, most_blocks, segment;
  std::int64_t head0, rows, width;
  std::uint32_t group, ranks;
  bool near, causal;
  /// The segments are summed, not the rest.
  bool segments;
  float scale, log2_scale;  // the latter for powers of 2
  View<T> dk, dv;
};

/// A row of the tile after next, as the thread knows it that looks after it.
struct Source {
  std::int64_t q = 0, d_out = 0;  // elements
  std::uint32_t row = kNoRow;
  std::int32_t seen = 0;  // keys of the chunk, the first so many
};

/// A chunk of keys and the rows that see it: `listed` entries, then `near` neighbouring rows.
struct Work {
  std::int64_t head = 0;       // of the part
  std::int64_t first_key = 0;  // packed
  std::int32_t count = 0;      // keys; 0 for no work
  std::int32_t shift = 0;      // a near row sees keys of the chunk up to its token + shift
  const std::uint32_t* entries = nullptr;
  std::uint32_t listed = 0, near = 0, near_row = 0;
  /// Segments that somebody else has summed, or where to leave the sums of one.
  std::uint32_t segments = 0;
  std::int64_t sums = 0;

  MOBA_DEVICE std::uint32_t rows() const { return listed + near; }
};

template <typename T, int head_dim>
struct Shared {
  using C = Cut<head_dim>;
  static constexpr int kKeyElements = C::kKeys * head_dim, kRowElements = C::kRows * head_dim;
  static constexpr std::size_t kBytes =
      (2 * kKeyElements + 4 * kRowElements) * sizeof(T) +
      2 * C::kRows * (sizeof(RowSums) + sizeof(Source) + sizeof(std::int32_t)) + sizeof(Work);

  tile::Rows<T, head_dim> k, v;
  // Two buffers each.
  T* rows;  // queries, with the gradients of their answers behind each buffer
  RowSums* row_sums;
  Source* row_sources;
  std::int32_t* row_seen;
  Work* work;  // for when all rows have passed: its numbers need not stay in registers until then

  MOBA_DEVICE explicit Shared(std::byte* memory) {
    k.data = reinterpret_cast<T*>(memory);
    v.data = k.data + kKeyElements;
    rows = v.data + kKeyElements;
    row_sums = reinterpret_cast<RowSums*>(rows + 4 * kRowElements);
    row_sources = reinterpret_cast<Source*>(row_sums + 2 * C::kRows);
    row_seen = reinterpret_cast<std::int32_t*>(row_sources + 2 * C::kRows);
    work = reinterpret_cast<Work*>(row_seen + 2 * C::kRows);
  }
  MOBA_DEVICE tile::Rows<T, head_dim> q(int buffer) const { return {rows + 2 * buffer * kRowElements}; }
  MOBA_DEVICE tile::Rows<T, head_dim> d_out(int buffer) const {
    return {rows + (2 * buffer + 1) * kRowElements};
  }
  MOBA_DEVICE RowSums* sums(int buffer) const { return row_sums + buffer * C::kRows; }
  MOBA_DEVICE Source* sources(int buffer) const { return row_sources + buffer * C::kRows; }
  MOBA_DEVICE std::int32_t* seen(int buffer) const { return row_seen + buffer * C::kRows; }
};

/// Chunk `chunk` of a block, as far as the keys go.
template <int head_dim, typename T>
MOBA_DEVICE Work chunk_of(const KeysParams<T>& p, std::int64_t head, std::int32_t sequence,
                          std::int32_t block, std::int64_t chunk) {
  constexpr int kKeys = Cut<head_dim>::kKeys;
  const std::int32_t k_begin = p.batch.k_starts[sequence], keys = p.batch.k_starts[sequence + 1] - k_begin;
  const Stretch stretch = keys_of(block, p.block_size, keys);
  const std::int64_t begin = stretch.begin + chunk * kKeys, left = stretch.end - begin;
  Work work{.head = head,
            .first_key = k_begin + begin,
            .count = static_cast<std::int32_t>(left < 0       ? 0
                                               : left < kKeys ? left
                                                              : kKeys)};
  if (!p.near || p.segments) return work;
  const std::int32_t q_begin = p.batch.q_starts[sequence], queries = p.batch.q_starts[sequence + 1] - q_begin,
                     before = keys - queries;
  std::int64_t first = 0, last = queries;
  if (p.causal) {
    first = begin > before ? begin - before : 0;
    last = stretch.end - before;
    work.shift = static_cast<std::int32_t>(before - q_begin - begin);
  }
  if (last <= first) return work;
  work.near_row = static_cast<std::uint32_t>(q_begin + first) * p.group;
  work.near = static_cast<std::uint32_t>(last - first) * p.group;
  return work;
}

template <int head_dim, typename T>
MOBA_DEVICE Work segment_work(const KeysParams<T>& p) {
  const auto index = static_cast<std::uint32_t>(ptx::block_x() / p.chunks);
  if (index >= *p.walk.count) return {};
  const Segment segment = p.walk.segments[index];
  const std::int32_t sequence = sequence_of(p.batch.block_starts, p.batch.sequences, segment.block);
  Work work = chunk_of<head_dim>(p, segment.head, sequence, segment.block - p.batch.block_starts[sequence],
                                 ptx::block_x() % p.chunks);
  work.entries = p.entries + segment.head * p.rows * p.width + segment.first;
  work.listed = segment.count;
  work.sums = ptx::block_x();
  return work;
}

template <int head_dim, typename T>
MOBA_DEVICE Work first_work(const KeysParams<T>& p) {
  const auto index = static_cast<std::int32_t>(ptx::block_x());
  const std::int64_t head = ptx::block_y();
  const std::int32_t* starts = p.walk.chunk_starts;
  if (index >= starts[p.batch.sequences]) return {};
  const std::int32_t sequence = sequence_of(starts, p.batch.sequences, index);
  const auto block = static_cast<std::int32_t>((index - starts[sequence]) / p.chunks);
  const std::int64_t chunk = (index - starts[sequence]) % p.chunks;
  Work work = chunk_of<head_dim>(p, head, sequence, block, chunk);
  if (p.width == 0) return work;
  const std::int64_t packed = p.batch.block_starts[sequence] + block;
  const std::uint32_t* offsets = p.offsets + head * (p.most_blocks + 1) + packed;
  const std::uint32_t size = offsets[1] - offsets[0], most = static_cast<std::uint32_t>(p.segment);
  work.entries = p.entries + head * p.rows * p.width + offsets[0];
  work.listed = size < most ? size : most;
  if (size > most) {
    work.segments = (size - 1) / most;
    work.sums = p.walk.first_segment[head * p.most_blocks + packed] * p.chunks + chunk;
  }
  return work;
}

/// What is known of row `index` of the work before it is divided into token and head.
MOBA_DEVICE std::uint32_t entry_at(const Work& work, std::uint32_t index) {
  if (index < work.listed) return work.entries[index];
  return index < work.rows() ? work.near_row + (index - work.listed) : kNoRow;
}

template <typename T>
MOBA_DEVICE Source source_of(const KeysParams<T>& p, const Work& work, std::uint32_t index,
                             std::uint32_t entry) {
  if (entry == kNoRow) return {};
  const bool is_listed = index < work.listed;
  const std::uint32_t row = is_listed ? entry / p.ranks : entry;
  const std::int64_t token = row / p.group, head = (p.head0 + work.head) * p.group + row % p.group;
  Source source{.q = token * p.q.token_stride + head * p.q.head_stride,
                .d_out = token * p.d_out.token_stride + head * p.d_out.head_stride,
                .row = row,
                .seen = work.count};
  if (is_listed || !p.causal) return source;
  const std::int64_t sees = token + work.shift + 1;
  source.seen = sees < work.count ? static_cast<std::int32_t>(sees) : work.count;
  return source;
}

template <typename T>
MOBA_DEVICE RowSums sums_of(const KeysParams<T>& p, const Work& work, const Source& source) {
  if (source.row == kNoRow) return {ptx::infinity(), 0};
  return p.sums[work.head * p.rows + source.row];
}

/// Whether every row of the tile that begins at row `first` exists and sees the whole chunk.
template <int rows, typename T>
MOBA_DEVICE bool is_whole(const KeysParams<T>& p, const Work& work, std::uint32_t first) {
  if (first + rows > work.rows()) return false;
  if (!p.causal || first + rows <= work.listed) return true;
  const std::uint32_t near = first > work.listed ? first - work.listed : 0;
  return std::int64_t{(work.near_row + near) / p.group} + work.shift + 1 >= work.count;
}

/// The rows of a tile add to the gradients of this warp's keys.
template <typename T, int head_dim>
MOBA_DEVICE void add_tile(const KeysParams<T>& p, const Shared<T, head_dim>& shared, int buffer, bool whole,
                          int warp_key, int first_piece, float (&dk)[1][Cut<head_dim>::kColumns / 8][4],
                          float (&dv)[1][Cut<head_dim>::kColumns / 8][4]) {
  constexpr int kTiles = Cut<head_dim>::kRows / 8;
  float weights[1][kTiles][4] = {}, d_logits[1][kTiles][4] = {};
  tile::multiply_rows(weights, shared.k, warp_key, shared.q(buffer));
  tile::multiply_rows(d_logits, shared.v, warp_key, shared.d_out(buffer));
  MOBA_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    MOBA_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int row = 8 * j + ptx::lane() % 4 * 2 + e;
      const RowSums sums = shared.sums(buffer)[row];
      MOBA_UNROLL
      for (int half = 0; half < 2; ++half) {
        float& weight = weights[0][j][2 * half + e];
        float& d_logit = d_logits[0][j][2 * half + e];
        weight = ptx::exp2(ptx::multiply_add(weight, p.log2_scale, -sums.lse));
        d_logit = weight * (d_logit - sums.delta);
      }
    }
  }
  if (!whole) {
    MOBA_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      MOBA_UNROLL
      for (int e = 0; e < 2; ++e) {
        const std::int32_t seen = shared.seen(buffer)[8 * j + ptx::lane() % 4 * 2 + e];
        MOBA_UNROLL
        for (int half = 0; half < 2; ++half) {
          if (warp_key + ptx::lane() / 4 + 8 * half < seen) continue;
          weights[0][j][2 * half + e] = 0;
          d_logits[0][j][2 * half + e] = 0;
        }
      }
    }
  }
  tile::add_weighted(dv, weights, shared.d_out(buffer), first_piece);
  tile::add_weighted(dk, d_logits, shared.q(buffer), first_piece);
}

/// All rows of the work add to the gradients. Every tile is announced two steps ahead: its rows are looked up
/// while the tile before the last is worked on, and copied while the last is.
template <typename T, int head_dim>
MOBA_DEVICE void add_rows(const KeysParams<T>& p, const Shared<T, head_dim>& shared, const Work& work,
                          int warp_key, int first_piece, float (&dk)[1][Cut<head_dim>::kColumns / 8][4],
                          float (&dv)[1][Cut<head_dim>::kColumns / 8][4]) {
  using C = Cut<head_dim>;
  const int mine = ptx::thread();
  const bool looks_up = mine < C::kRows;
  const auto gather = [&](int buffer) {
    const Source* sources = shared.sources(buffer);
    tile::gather_rows<C::kRows, C::kThreads>(shared.q(buffer), [&](int row) {
      return sources[row].row == kNoRow ? nullptr : p.q.data + sources[row].q;
    });
    tile::gather_rows<C::kRows, C::kThreads>(shared.d_out(buffer), [&](int row) {
      return sources[row].row == kNoRow ? nullptr : p.d_out.data + sources[row].d_out;
    });
    ptx::copy_commit();
  };

  if (looks_up) {
    for (int tile = 0; tile < 2; ++tile) {
      const auto index = static_cast<std::uint32_t>(tile * C::kRows + mine);
      shared.sources(tile)[mine] = source_of(p, work, index, entry_at(work, index));
    }
    shared.sums(0)[mine] = sums_of(p, work, shared.sources(0)[mine]);
    shared.seen(0)[mine] = shared.sources(0)[mine].seen;
  }
  ptx::barrier();
  gather(0);
  int buffer = 0;
  for (std::uint32_t first = 0; first < work.rows(); first += C::kRows, buffer ^= 1) {
    ptx::copy_wait<0>();
    ptx::barrier();  // this buffer is filled, and the other has been used
    if (first + C::kRows < work.rows()) gather(buffer ^ 1);
    const std::uint32_t ahead = first + 2 * C::kRows + static_cast<std::uint32_t>(mine);
    std::uint32_t entry = kNoRow;
    RowSums next;
    if (looks_up) {
      entry = entry_at(work, ahead);
      next = sums_of(p, work, shared.sources(buffer ^ 1)[mine]);
    }
    if (warp_key < work.count)
      add_tile(p, shared, buffer, is_whole<C::kRows>(p, work, first), warp_key, first_piece, dk, dv);
    if (looks_up) {
      shared.sums(buffer ^ 1)[mine] = next;
      shared.seen(buffer ^ 1)[mine] = shared.sources(buffer ^ 1)[mine].seen;
      shared.sources(buffer)[mine] = source_of(p, work, ahead, entry);
    }
  }
}

struct alignas(16) Quad {
  float v[4];
};

/// Where this thread's sums of one gradient lie among a chunk's, kThreads apart.
template <int head_dim, typename T>
MOBA_DEVICE Quad* quads(const KeysParams<T>& p, std::int64_t sums, int gradient) {
  using C = Cut<head_dim>;
  return reinterpret_cast<Quad*>(p.walk.sums) + (2 * sums + gradient) * (C::kColumns / 8) * C::kThreads +
         ptx::thread();
}

template <typename T, int head_dim>
MOBA_DEVICE void leave_sums(const KeysParams<T>& p, std::int64_t sums, int gradient,
                            const float (&from)[1][Cut<head_dim>::kColumns / 8][4]) {
  Quad* to = quads<head_dim>(p, sums, gradient);
  MOBA_UNROLL
  for (int j = 0; j < Cut<head_dim>::kColumns / 8; ++j)
    to[j * Cut<head_dim>::kThreads] = {from[0][j][0], from[0][j][1], from[0][j][2], from[0][j][3]};
}

template <typename T, int head_dim>
MOBA_DEVICE void add_segments(const KeysParams<T>& p, const Work& work, int gradient,
                              float (&to)[1][Cut<head_dim>::kColumns / 8][4]) {
  for (std::uint32_t i = 0; i < work.segments; ++i) {
    const Quad* from = quads<head_dim>(p, work.sums + i * p.chunks, gradient);
    MOBA_UNROLL
    for (int j = 0; j < Cut<head_dim>::kColumns / 8; ++j) {
      const Quad quad = from[j * Cut<head_dim>::kThreads];
      MOBA_UNROLL
      for (int e = 0; e < 4; ++e) to[0][j][e] += quad.v[e];
    }
  }
}

/// Writes this warp's columns of the gradients of its keys, through `rows` of shared memory so that whole
/// pieces go out.
template <typename T, int head_dim>
MOBA_DEVICE void write(const View<T>& to, const tile::Rows<T, head_dim>& rows, const Work& work,
                       std::int64_t kv_head, int warp_key, int first_piece, float scale,
                       const float (&from)[1][Cut<head_dim>::kColumns / 8][4]) {
  constexpr int kPieces = Cut<head_dim>::kColumns / tile::kPiece;
  const int lane = ptx::lane();
  MOBA_UNROLL
  for (int j = 0; j < kPieces; ++j) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      auto* at =
          reinterpret_cast<std::uint32_t*>(rows.piece(warp_key + 8 * half + lane / 4, first_piece + j));
      at[lane % 4] = ptx::pack<T>(from[0][j][2 * half] * scale, from[0][j][2 * half + 1] * scale);
    }
  }
  ptx::warp_barrier();
  for (int i = lane; i < 16 * kPieces; i += ptx::kLanes) {
    const int key = warp_key + i / kPieces, piece = first_piece + i % kPieces;
    if (key >= work.count) break;
    *reinterpret_cast<ptx::Vector*>(to.row(work.first_key + key, kv_head) + piece * tile::kPiece) =
        *reinterpret_cast<const ptx::Vector*>(rows.piece(key, piece));
  }
}

template <typename T, int head_dim>
MOBA_KERNEL(Cut<head_dim>::kThreads, 1)
attend_backward_keys_kernel(MOBA_PARAMETER KeysParams<T> p) {
  using C = Cut<head_dim>;
  const Work work = p.segments ? segment_work<head_dim>(p) : first_work<head_dim>(p);
  if (work.count == 0) return;
  const Shared<T, head_dim> shared(ptx::shared());
  if (ptx::thread() == 0) *shared.work = work;
  tile::load_rows<C::kKeys, C::kThreads>(shared.k, p.k.row(work.first_key, p.head0 + work.head),
                                         p.k.token_stride, work.count);
  tile::load_rows<C::kKeys, C::kThreads>(shared.v, p.v.row(work.first_key, p.head0 + work.head),
                                         p.v.token_stride, work.count);
  const int warp_key = ptx::warp() / C::kShares * 16;
  const int first_piece = ptx::warp() % C::kShares * (C::kColumns / tile::kPiece);
  float dk[1][C::kColumns / 8][4] = {}, dv[1][C::kColumns / 8][4] = {};
  add_rows(p, shared, work, warp_key, first_piece, dk, dv);
  ptx::copy_wait<0>();
  ptx::barrier();  // keys and values have been used: their gradients will lie there
  const Work& done = *shared.work;
  if (warp_key >= done.count) return;
  if (p.segments) {
    leave_sums<T, head_dim>(p, done.sums, 0, dk);
    leave_sums<T, head_dim>(p, done.sums, 1, dv);
    return;
  }
  add_segments<T, head_dim>(p, done, 0, dk);
  add_segments<T, head_dim>(p, done, 1, dv);
  const std::int64_t kv_head = p.head0 + done.head;
  write(p.dk, shared.k, done, kv_head, warp_key, first_piece, p.scale, dk);
  write(p.dv, shared.v, done, kv_head, warp_key, first_piece, 1, dv);
}

}  // namespace

std::size_t attend_backward_keys_shared_bytes(std::int64_t head_dim) {
  return head_dim > 128 ? Shared<float16, 256>::kBytes : Shared<float16, 128>::kBytes;
}

KeyWalk carve_key_walk(Carver& carver, const Task& task, const Group& part) {
  KeyWalk walk{.chunk_starts = carver.take<std::int32_t>(task.sequences + 1)};
  const std::int64_t segments = most_segments(task, part);
  if (segments == 0) return walk;
  walk.segments = carver.take<Segment>(segments);
  walk.first_segment = carver.take<std::uint32_t>(part.heads() * task.most_blocks());
  walk.count = carver.take<std::uint32_t>(1);
  walk.sums =
      carver.take<float>(segments * chunks_of_block(task) * 2 * keys_of_chunk(task.head_dim) * task.head_dim);
  return walk;
}

void attend_backward_keys(Queue& queue, const Task& task, const Group& part, const Batch& batch,
                          const Plan& plan, const RowSums* sums, const Backward& backward,
                          const KeyWalk& walk) {
  const std::int64_t chunk = keys_of_chunk(task.head_dim);
  const WalkParams params{.walk = walk,
                          .batch = batch,
                          .offsets = plan.offsets,
                          .block_size = task.routing.block_size,
                          .chunk = chunk,
                          .most_blocks = task.most_blocks(),
                          .segment = segment_of(task)};
  queue.launch("chunk", chunk_kernel, {}, kPlanThreads, kPlanThreads / ptx::kLanes * sizeof(std::int32_t),
               params);
  const std::int64_t segments = most_segments(task, part);
  if (segments > 0) {
    queue.fill(walk.count, 0, sizeof(std::uint32_t));
    queue.launch("segment", segment_kernel, {divide_up(task.most_blocks(), kPlanThreads), part.heads()},
                 kPlanThreads, 0, params);
  }
  with_type(task, [&]<typename T, int head_dim>() {
    KeysParams<T> keys{.q = view_of<const T>(task.q),
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
                       .segment = params.segment,
                       .head0 = part.head0,
                       .rows = task.rows(part),
                       .width = task.width,
                       .group = static_cast<std::uint32_t>(task.group),
                       .ranks = static_cast<std::uint32_t>(task.ranks()),
                       .near = task.has_near_keys(),
                       .causal = task.routing.causal,
                       .segments = true,
                       .scale = task.scale,
                       .log2_scale = task.scale * kLog2E,
                       .dk = view_of<T>(backward.gradients.dk),
                       .dv = view_of<T>(backward.gradients.dv)};
    const auto launch = [&](Grid grid) {
      queue.launch("attend_backward_keys", attend_backward_keys_kernel<T, head_dim>, grid,
                   Cut<head_dim>::kThreads, Shared<T, head_dim>::kBytes, keys);
    };
    launch({segments * keys.chunks});
    keys.segments = false;
    launch({task.keys / chunk + task.most_blocks(), part.heads()});
  });
}

}  // namespace moba::cuda
