// Gradients of keys and values. A thread block holds a chunk of the keys of one block and their gradients,
// and the rows that see them stream past: those that chose the block, then those whose own block it is.
// Products are formed with keys as rows, so that weights leave one product as the left side of the next.
//
// A block that very many rows chose is cut into segments of rows. All but the first are summed on their own,
// before; the thread block of the first adds them up in order.
#include "cuda/attend_backward_chunks.h"
#include "cuda/ptx/atomic.h"
#include "cuda/ptx/barrier.h"
#include "cuda/tile/scan.h"

namespace moba::cuda {
namespace {

template <int head_dim>
struct TileShape {
  /// Warps that share 16 keys: at D 256 each sums half of the columns, for all would not fit the registers.
  static constexpr int kShares = head_dim > 128 ? 2 : 1;
  static constexpr int kThreads = kChunkThreads, kWarps = kThreads / ptx::kLanes;
  static constexpr int kKeys = kWarps / kShares * 16;
  static_assert(kKeys == keys_of_chunk(head_dim));
  static constexpr int kRows = head_dim > 64 ? 32 : 64;
  static constexpr int kColumns = head_dim / kShares;
};

constexpr int kPlanThreads = 256;

struct WalkParams {
  KeyWalk walk;
  Batch batch;
  const std::uint32_t* offsets;  // [heads, most_blocks + 1]
  std::int64_t block_size, chunk, most_blocks, segment;
};

/// Chunks before each sequence.
MOBA_KERNEL(kPlanThreads, 1) chunk_kernel(MOBA_GRID_CONSTANT WalkParams p) {
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
MOBA_KERNEL(kPlanThreads, 4) segment_kernel(MOBA_GRID_CONSTANT WalkParams p) {
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

template <typename T, int head_dim>
struct Shared {
  using C = TileShape<head_dim>;
  static constexpr int kKeyElements = C::kKeys * head_dim, kRowElements = C::kRows * head_dim;
  static constexpr std::size_t kBytes =
      (2 * kKeyElements + 4 * kRowElements) * sizeof(T) +
      2 * C::kRows * (sizeof(LseDelta) + sizeof(Source) + sizeof(std::int32_t)) + sizeof(Chunk);

  tile::SwizzledTile<T, head_dim> k, v;
  // Two buffers each.
  T* rows;  // queries, with the gradients of their answers behind each buffer
  LseDelta* row_sums;
  Source* row_sources;
  std::int32_t* row_seen;
  Chunk* chunk;  // for when all rows have passed: its numbers need not stay in registers until then

  MOBA_DEVICE explicit Shared(std::byte* memory) {
    k.data = reinterpret_cast<T*>(memory);
    v.data = k.data + kKeyElements;
    rows = v.data + kKeyElements;
    row_sums = reinterpret_cast<LseDelta*>(rows + 4 * kRowElements);
    row_sources = reinterpret_cast<Source*>(row_sums + 2 * C::kRows);
    row_seen = reinterpret_cast<std::int32_t*>(row_sources + 2 * C::kRows);
    chunk = reinterpret_cast<Chunk*>(row_seen + 2 * C::kRows);
  }
  MOBA_DEVICE tile::SwizzledTile<T, head_dim> q(int buffer) const {
    return {rows + 2 * buffer * kRowElements};
  }
  MOBA_DEVICE tile::SwizzledTile<T, head_dim> d_out(int buffer) const {
    return {rows + (2 * buffer + 1) * kRowElements};
  }
  MOBA_DEVICE LseDelta* sums(int buffer) const { return row_sums + buffer * C::kRows; }
  MOBA_DEVICE Source* sources(int buffer) const { return row_sources + buffer * C::kRows; }
  MOBA_DEVICE std::int32_t* seen(int buffer) const { return row_seen + buffer * C::kRows; }
};

/// The rows of a tile add to the gradients of this warp's keys.
template <typename T, int head_dim>
MOBA_DEVICE void add_tile(const KeysParams<T>& p, const Shared<T, head_dim>& shared, int buffer, bool whole,
                          int warp_key, int first_vec, float (&dk)[1][TileShape<head_dim>::kColumns / 8][4],
                          float (&dv)[1][TileShape<head_dim>::kColumns / 8][4]) {
  constexpr int kTiles = TileShape<head_dim>::kRows / 8;
  float weights[1][kTiles][4] = {}, d_logits[1][kTiles][4] = {};
  tile::gemm_nt(weights, shared.k, warp_key, shared.q(buffer));
  tile::gemm_nt(d_logits, shared.v, warp_key, shared.d_out(buffer));
  to_weights(weights[0], shared.sums(buffer), p.log2_scale);
  to_d_logits(d_logits[0], weights[0], shared.sums(buffer));
  if (!whole) {
    hide_unseen(weights[0], shared.seen(buffer), warp_key);
    hide_unseen(d_logits[0], shared.seen(buffer), warp_key);
  }
  tile::gemm_rs(dv, weights, shared.d_out(buffer), first_vec);
  tile::gemm_rs(dk, d_logits, shared.q(buffer), first_vec);
}

/// All rows of the chunk add to the gradients. Every tile is announced two steps ahead: its rows are looked
/// up while the tile before the last is worked on, and copied while the last is.
template <typename T, int head_dim>
MOBA_DEVICE void add_rows(const KeysParams<T>& p, const Shared<T, head_dim>& shared, const Chunk& chunk,
                          int warp_key, int first_vec, float (&dk)[1][TileShape<head_dim>::kColumns / 8][4],
                          float (&dv)[1][TileShape<head_dim>::kColumns / 8][4]) {
  using C = TileShape<head_dim>;
  const int mine = ptx::thread();
  const bool looks_up = mine < C::kRows;
  const auto gather = [&](int buffer) {
    const Source* sources = shared.sources(buffer);
    tile::gather_rows<C::kRows, C::kThreads>(shared.q(buffer), [&](int row) {
      return sources[row].row == kNoEntry ? nullptr : p.q.data + sources[row].q;
    });
    tile::gather_rows<C::kRows, C::kThreads>(shared.d_out(buffer), [&](int row) {
      return sources[row].row == kNoEntry ? nullptr : p.d_out.data + sources[row].d_out;
    });
    ptx::cp_async_commit();
  };

  if (looks_up) {
    for (int tile = 0; tile < 2; ++tile) {
      const auto index = static_cast<std::uint32_t>(tile * C::kRows + mine);
      shared.sources(tile)[mine] = source_of(p, chunk, index, entry_at(chunk, index));
    }
    shared.sums(0)[mine] = sums_of(p, chunk, shared.sources(0)[mine]);
    shared.seen(0)[mine] = shared.sources(0)[mine].seen;
  }
  ptx::syncthreads();
  gather(0);
  int buffer = 0;
  for (std::uint32_t first = 0; first < chunk.rows(); first += C::kRows, buffer ^= 1) {
    ptx::cp_async_wait<0>();
    ptx::syncthreads();  // this buffer is filled, and the other has been used
    if (first + C::kRows < chunk.rows()) gather(buffer ^ 1);
    const std::uint32_t ahead = first + 2 * C::kRows + static_cast<std::uint32_t>(mine);
    std::uint32_t entry = kNoEntry;
    LseDelta next;
    if (looks_up) {
      entry = entry_at(chunk, ahead);
      next = sums_of(p, chunk, shared.sources(buffer ^ 1)[mine]);
    }
    if (warp_key < chunk.count)
      add_tile(p, shared, buffer, is_whole<C::kRows>(p, chunk, first), warp_key, first_vec, dk, dv);
    if (looks_up) {
      shared.sums(buffer ^ 1)[mine] = next;
      shared.seen(buffer ^ 1)[mine] = shared.sources(buffer ^ 1)[mine].seen;
      shared.sources(buffer)[mine] = source_of(p, chunk, ahead, entry);
    }
  }
}

template <typename T, int head_dim>
MOBA_KERNEL(kChunkThreads, 1)
attend_backward_dkv_kernel(MOBA_GRID_CONSTANT KeysParams<T> p) {
  using C = TileShape<head_dim>;
  const Chunk chunk = p.segments
                          ? chunk_of_segment<head_dim>(p, ptx::block_x())
                          : chunk_at<head_dim>(p, ptx::block_y(), static_cast<std::int32_t>(ptx::block_x()));
  if (chunk.count == 0) return;
  const Shared<T, head_dim> shared(ptx::shared());
  if (ptx::thread() == 0) *shared.chunk = chunk;
  tile::load_rows<C::kKeys, C::kThreads>(shared.k, p.k.row(chunk.first_key, p.head0 + chunk.head),
                                         p.k.token_stride, chunk.count);
  tile::load_rows<C::kKeys, C::kThreads>(shared.v, p.v.row(chunk.first_key, p.head0 + chunk.head),
                                         p.v.token_stride, chunk.count);
  const int warp_key = ptx::warp() / C::kShares * 16;
  const int first_vec = ptx::warp() % C::kShares * (C::kColumns / tile::kVecElements);
  float dk[1][C::kColumns / 8][4] = {}, dv[1][C::kColumns / 8][4] = {};
  add_rows(p, shared, chunk, warp_key, first_vec, dk, dv);
  ptx::cp_async_wait<0>();
  ptx::syncthreads();  // keys and values have been used: their gradients will lie there
  const Chunk& done = *shared.chunk;
  if (warp_key >= done.count) return;
  if (p.segments) {
    leave_sums(p, done.sums, 0, ptx::thread(), dk[0]);
    leave_sums(p, done.sums, 1, ptx::thread(), dv[0]);
    return;
  }
  add_segments(p, done, 0, ptx::thread(), dk[0]);
  add_segments(p, done, 1, ptx::thread(), dv[0]);
  const std::int64_t kv_head = p.head0 + done.head;
  write_gradient(p.dk, shared.k, done, kv_head, warp_key, first_vec, p.scale, dk[0]);
  write_gradient(p.dv, shared.v, done, kv_head, warp_key, first_vec, 1, dv[0]);
}

}  // namespace

std::size_t attend_backward_dkv_shared_bytes(std::int64_t head_dim) {
  return head_dim > 128 ? Shared<float16, 256>::kBytes : Shared<float16, 128>::kBytes;
}

KeyWalk carve_key_walk(ArenaLayout& layout, const Task& task, const WorkSlice& part) {
  KeyWalk walk{.chunk_starts = layout.take<std::int32_t>(task.sequences + 1)};
  const std::int64_t segments = most_segments(task, part);
  if (segments == 0) return walk;
  walk.segments = layout.take<Segment>(segments);
  walk.first_segment = layout.take<std::uint32_t>(part.heads() * task.most_blocks());
  walk.count = layout.take<std::uint32_t>(1);
  walk.sums =
      layout.take<float>(segments * chunks_of_block(task) * 2 * keys_of_chunk(task.head_dim) * task.head_dim);
  return walk;
}

void plan_key_walk(Stream& stream, const Task& task, const WorkSlice& part, const Batch& batch,
                   const Plan& plan, const KeyWalk& walk) {
  const WalkParams params{.walk = walk,
                          .batch = batch,
                          .offsets = plan.offsets,
                          .block_size = task.routing.block_size,
                          .chunk = keys_of_chunk(task.head_dim),
                          .most_blocks = task.most_blocks(),
                          .segment = segment_of(task)};
  stream.launch("chunk", chunk_kernel, {}, kPlanThreads, kPlanThreads / ptx::kLanes * sizeof(std::int32_t),
                params);
  if (most_segments(task, part) == 0) return;
  stream.fill(walk.count, 0, sizeof(std::uint32_t));
  stream.launch("segment", segment_kernel, {divide_up(task.most_blocks(), kPlanThreads), part.heads()},
                kPlanThreads, 0, params);
}

void attend_backward_dkv(Stream& stream, const Task& task, const WorkSlice& part, const Batch& batch,
                         const Plan& plan, const LseDelta* sums, const Backward& backward,
                         const KeyWalk& walk) {
  with_type(task, [&]<typename T, int head_dim>() {
    KeysParams<T> params = keys_params<T>(task, part, batch, plan, sums, backward, walk);
    const auto launch = [&](bool segments, Grid grid) {
      params.segments = segments;
      stream.launch("attend_backward_dkv", attend_backward_dkv_kernel<T, head_dim>, grid, kChunkThreads,
                    Shared<T, head_dim>::kBytes, params);
    };
    launch(true, {most_segments(task, part) * params.chunks});
    launch(false, {most_chunks(task), part.heads()});
  });
}

}  // namespace moba::cuda
