// Gradients of queries. As in `attend`, a thread block takes one tile, rows that chose the same block of keys
// or neighbouring rows with the keys of their own, and leaves their gradients through these keys in slots,
// which are added up in the order of their ranks. Rows with diagonal keys alone are done.
//
// Slots hold 16 bits: a row's slots are most of the memory traffic of small blocks, and each is a sum of
// products that were rounded to 16 bits before; rounding it once more costs what rounding dq does.
#include <algorithm>

#include "cuda/attend_backward.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/warp.h"
#include "cuda/tile/swizzled_tile.h"

namespace moba::cuda {
namespace {

/// As attend's. At D 256 a thread block takes half of a work tile, and two warps share their rows, each with
/// half of the columns to sum: more would fit neither shared memory nor the registers.
template <int head_dim>
struct TileShape {
  static constexpr int kShares = head_dim > 128 ? 2 : 1;
  static constexpr int kWarps = 4 * kShares, kThreads = kWarps * ptx::kLanes;
  static constexpr int kRows = kTileRows / kShares;
  static constexpr int kRowTiles = kRows * kShares / (16 * kWarps);
  static constexpr int kColumns = head_dim / kShares;
  static constexpr int kKeys = 32;
  static constexpr int kBlocksPerMultiprocessor = head_dim > 128 ? 1 : 2;
};

constexpr int kSumThreads = 128;
constexpr int kElements = 8;

template <typename T>
struct DeltaParams {
  View<const T> out, d_out;
  const float* lse;  // [Hq, Tq]
  LseDelta* sums;    // [heads, rows]
  std::int64_t rows, group, head0, tokens;
};

template <typename T>
MOBA_DEVICE float dot(const ptx::Vec16& a, const ptx::Vec16& b) {
  const std::uint32_t left[] = {a.x, a.y, a.z, a.w}, right[] = {b.x, b.y, b.z, b.w};
  float sum = 0;
  MOBA_UNROLL
  for (int i = 0; i < 4; ++i) {
    sum = ptx::fma(ptx::unpack_low<T>(left[i]), ptx::unpack_low<T>(right[i]), sum);
    sum = ptx::fma(ptx::unpack_high<T>(left[i]), ptx::unpack_high<T>(right[i]), sum);
  }
  return sum;
}

/// delta = <d_out, out>, which is the sum over keys of weight x <d_out, v>. head_dim / kElements threads
/// share a row.
template <typename T, int head_dim>
MOBA_KERNEL(kSumThreads, 8)
compute_delta_kernel(MOBA_GRID_CONSTANT DeltaParams<T> p) {
  constexpr int kColumns = head_dim / kElements, kRows = kSumThreads / kColumns;
  auto* products = reinterpret_cast<float*>(ptx::shared());  // [kRows, kColumns]
  const int in_block = ptx::thread() / kColumns, column = ptx::thread() % kColumns;
  const std::int64_t head = ptx::block_y(), row = std::int64_t{ptx::block_x()} * kRows + in_block;
  const bool exists = in_block < kRows && row < p.rows;
  const std::int64_t token = row / p.group, q_head = (p.head0 + head) * p.group + row % p.group;
  if (exists) {
    products[ptx::thread()] = dot<T>(ptx::load_streaming(p.out.row(token, q_head) + column * kElements),
                                     ptx::load_streaming(p.d_out.row(token, q_head) + column * kElements));
  }
  ptx::syncthreads();
  if (!exists || column != 0) return;
  const float lse = p.lse[q_head * p.tokens + token];
  float delta = 0;
  MOBA_UNROLL
  for (int i = 0; i < kColumns; ++i) delta += products[in_block * kColumns + i];
  p.sums[head * p.rows + row] = {lse == -ptx::infinity() ? ptx::infinity() : lse * ptx::kLog2E, delta};
}

template <typename T>
struct RowsParams {
  View<const T> q, k, v, d_out;
  Batch batch;
  Plan plan;
  const LseDelta* sums;  // [heads, sums_rows], of rows from the part's first on
  std::int64_t sums_rows;
  std::int64_t block_size, group, head0, heads;
  std::int64_t rows, width, ranks;  // of a head
  std::int32_t token0, token1;
  bool diagonal, causal;
  float scale, log2_scale;  // the latter for powers of 2
  View<T> dq;               // written where width is 0
  T* slots;                 // elsewhere: [heads, rows * ranks, D]
};

/// What a thread block works on: rows whose places are in shared memory, and keys [begin, end) of a sequence.
/// All rows see keys in [all_begin, all_end).
struct WorkTile {
  std::int64_t head = 0;  // of the part
  std::int32_t count = 0;
  std::int64_t first_key = 0;  // of the sequence, packed
  std::int32_t begin = 0, end = 0, all_begin = 0, all_end = 0;
};

/// Shared memory of one thread block.
template <typename T, int head_dim>
struct Shared {
  using C = TileShape<head_dim>;
  static constexpr int kRowElements = C::kRows * head_dim, kKeyElements = C::kKeys * head_dim;
  static constexpr std::size_t kBytes =
      (2 * kRowElements + 4 * kKeyElements) * sizeof(T) + sizeof(WorkTile) +
      C::kRows * (2 * sizeof(std::int64_t) + sizeof(LseDelta) + sizeof(KeyRange) + sizeof(std::uint32_t));

  tile::SwizzledTile<T, head_dim> q, d_out;
  T* keys;                              // two buffers of keys, with their values behind each
  WorkTile* work;                       // here, for there are no registers to spare
  std::int64_t *q_offsets, *d_offsets;  // [kRows], kNoRow behind the last
  LseDelta* sums;                       // [kRows]
  KeyRange* bounds;                     // [kRows], keys that a row sees
  std::uint32_t* slots;                 // [kRows]

  MOBA_DEVICE explicit Shared(std::byte* memory) {
    q.data = reinterpret_cast<T*>(memory);
    d_out.data = q.data + kRowElements;
    keys = d_out.data + kRowElements;
    work = reinterpret_cast<WorkTile*>(keys + 4 * kKeyElements);
    q_offsets = reinterpret_cast<std::int64_t*>(work + 1);
    d_offsets = q_offsets + C::kRows;
    sums = reinterpret_cast<LseDelta*>(d_offsets + C::kRows);
    bounds = reinterpret_cast<KeyRange*>(sums + C::kRows);
    slots = reinterpret_cast<std::uint32_t*>(bounds + C::kRows);
  }
  MOBA_DEVICE tile::SwizzledTile<T, head_dim> k(int buffer) const {
    return {keys + 2 * buffer * kKeyElements};
  }
  MOBA_DEVICE tile::SwizzledTile<T, head_dim> v(int buffer) const {
    return {keys + (2 * buffer + 1) * kKeyElements};
  }
};

/// Notes where row r of the tile is, and what it sees.
template <typename T, int head_dim>
MOBA_DEVICE void store_row(const RowsParams<T>& p, const Shared<T, head_dim>& shared, std::int64_t head,
                           int r, std::int64_t row, std::uint32_t slot, const KeyRange& visible) {
  const std::int64_t token = p.token0 + row / p.group, q_head = (p.head0 + head) * p.group + row % p.group;
  shared.q_offsets[r] = token * p.q.token_stride + q_head * p.q.head_stride;
  shared.d_offsets[r] = token * p.d_out.token_stride + q_head * p.d_out.head_stride;
  shared.sums[r] = p.sums[head * p.sums_rows + row];
  shared.slots[r] = slot;
  shared.bounds[r] = visible;
}

template <typename T, int head_dim>
MOBA_DEVICE void store_no_row(const Shared<T, head_dim>& shared, int r) {
  shared.q_offsets[r] = shared.d_offsets[r] = kNoRow;
  shared.sums[r] = {ptx::infinity(), 0};
  shared.slots[r] = 0;
  shared.bounds[r] = {};
}

/// The keys of its own block that the query at `position` sees, or of all when nothing is causal.
template <typename T>
MOBA_DEVICE KeyRange diagonal_keys(const RowsParams<T>& p, std::int32_t position, std::int32_t keys) {
  if (!p.causal) return {0, keys};
  if (position < 0) return {0, 0};
  return {static_cast<std::int32_t>(position / p.block_size * p.block_size), position + 1};
}

/// Rows of a tile of neighbouring rows, from its row `first` on: tile `index` of all heads, those of the last
/// queries first, which see most. Keys are cut as for the whole tile, so that a row meets them alike whatever
/// else is in its part.
template <typename T, int head_dim>
MOBA_DEVICE WorkTile diagonal_work(const RowsParams<T>& p, const Shared<T, head_dim>& shared,
                                   std::int64_t index, int first) {
  const Tile tile = tile_at(
      p.batch, static_cast<std::int32_t>(p.batch.tile_starts[p.batch.sequences] - 1 - index / p.heads),
      p.token0, p.token1, p.group);
  const auto visible = [&](int r) {
    return diagonal_keys(p, tile.position_of(first + r, p.group), tile.keys);
  };
  const std::int32_t left = tile.count - first,
                     count = left < TileShape<head_dim>::kRows ? left : TileShape<head_dim>::kRows;
  if (count <= 0) return {};
  const KeyRange first_visible = visible(0), last_visible = visible(count - 1);
  const WorkTile work{.head = index % p.heads,
                      .count = count,
                      .first_key = tile.first_key,
                      .begin = diagonal_keys(p, tile.position_at(tile.cut, p.group), tile.keys).begin,
                      .end = last_visible.end,
                      .all_begin = last_visible.begin,
                      .all_end = first_visible.end};
  for (int r = ptx::thread(); r < TileShape<head_dim>::kRows; r += TileShape<head_dim>::kThreads) {
    const std::int64_t row = tile.first_row + first + r;
    if (r < count) {
      store_row(p, shared, work.head, r, row, static_cast<std::uint32_t>(row * p.ranks + p.width),
                visible(r));
    } else {
      store_no_row(shared, r);
    }
  }
  return work;
}

/// Rows that chose a block, from row `first` of the tile on.
template <typename T, int head_dim>
MOBA_DEVICE WorkTile routed_work(const RowsParams<T>& p, const Shared<T, head_dim>& shared,
                                 const RoutedTile& tile, int first) {
  const std::int32_t sequence = sequence_of(p.batch.block_starts, p.batch.sequences, tile.block);
  const std::int32_t k_begin = p.batch.k_starts[sequence];
  const KeyRange keys = keys_of(tile.block - p.batch.block_starts[sequence], p.block_size,
                                p.batch.k_starts[sequence + 1] - k_begin);
  const std::int32_t left = static_cast<std::int32_t>(tile.count) - first,
                     count = left < TileShape<head_dim>::kRows ? left : TileShape<head_dim>::kRows;
  if (count <= 0) return {};
  const std::uint32_t* entries = p.plan.entries + tile.head * p.rows * p.width + tile.first;
  for (int r = ptx::thread(); r < TileShape<head_dim>::kRows; r += TileShape<head_dim>::kThreads) {
    if (r < count) {
      const std::uint32_t slot = entries[first + r];
      store_row(p, shared, tile.head, r, slot / static_cast<std::uint32_t>(p.ranks), slot, keys);
    } else {
      store_no_row(shared, r);
    }
  }
  return {.head = tile.head,
          .count = count,
          .first_key = k_begin,
          .begin = keys.begin,
          .end = keys.end,
          .all_begin = keys.begin,
          .all_end = keys.end};
}

/// d_logits, until now gradients of weights, become gradients of logits.
template <typename T, int head_dim, int row_tiles, int key_tiles>
MOBA_DEVICE void to_d_logits(float (&d_logits)[row_tiles][key_tiles][4],
                             const float (&logits)[row_tiles][key_tiles][4],
                             const Shared<T, head_dim>& shared, float scale, int warp_row) {
  MOBA_UNROLL
  for (int i = 0; i < row_tiles; ++i) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const LseDelta sums = shared.sums[warp_row + 16 * i + 8 * half + ptx::lane() / 4];
      MOBA_UNROLL
      for (int j = 0; j < key_tiles; ++j) {
        MOBA_UNROLL
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const float weight = ptx::exp2(ptx::fma(logits[i][j][e], scale, -sums.lse));
          d_logits[i][j][e] = weight * (d_logits[i][j][e] - sums.delta);
        }
      }
    }
  }
}

/// 0 where a row does not see a key. `key` is that of the first column.
template <typename T, int head_dim, int row_tiles, int key_tiles>
MOBA_DEVICE void apply_mask(float (&d_logits)[row_tiles][key_tiles][4], const Shared<T, head_dim>& shared,
                            std::int32_t key, int warp_row) {
  MOBA_UNROLL
  for (int i = 0; i < row_tiles; ++i) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const KeyRange visible = shared.bounds[warp_row + 16 * i + 8 * half + ptx::lane() / 4];
      MOBA_UNROLL
      for (int j = 0; j < key_tiles; ++j) {
        MOBA_UNROLL
        for (int e = 0; e < 2; ++e) {
          const std::int32_t column = key + 8 * j + ptx::lane() % 4 * 2 + e;
          if (column < visible.begin || column >= visible.end) d_logits[i][j][2 * half + e] = 0;
        }
      }
    }
  }
}

/// Writes the rows of this warp, through its own rows of q's shared memory so that 16-byte vectors go out.
template <typename T, int head_dim, int row_tiles>
MOBA_DEVICE void store_out(const RowsParams<T>& p, const Shared<T, head_dim>& shared, const WorkTile& work,
                           const float (&dq)[row_tiles][TileShape<head_dim>::kColumns / 8][4], int warp_row,
                           int first_vec) {
  const int lane = ptx::lane();
  MOBA_UNROLL
  for (int i = 0; i < row_tiles; ++i) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * i + 8 * half + lane / 4;
      MOBA_UNROLL
      for (int j = 0; j < TileShape<head_dim>::kColumns / 8; ++j) {
        auto* to = reinterpret_cast<std::uint32_t*>(shared.q.vec(row, first_vec + j)) + lane % 4;
        *to = ptx::pack<T>(dq[i][j][2 * half] * p.scale, dq[i][j][2 * half + 1] * p.scale);
      }
    }
  }
  ptx::syncwarp();
  constexpr int kVecs = TileShape<head_dim>::kColumns / tile::kVecElements;
  for (int i = lane; i < 16 * row_tiles * kVecs; i += ptx::kLanes) {
    const int row = warp_row + i / kVecs, vec = first_vec + i % kVecs;
    if (row >= work.count) break;
    const std::uint32_t slot = shared.slots[row];
    T* to = p.width == 0
                ? p.dq.row(p.token0 + slot / p.group, (p.head0 + work.head) * p.group + slot % p.group)
                : p.slots + slot_at(work.head, p.rows, p.ranks, slot) * head_dim;
    *reinterpret_cast<ptx::Vec16*>(to + vec * tile::kVecElements) =
        *reinterpret_cast<const ptx::Vec16*>(shared.q.vec(row, vec));
  }
}

/// dq of the work's rows through its keys.
template <typename T, int head_dim>
MOBA_DEVICE void add_keys(const RowsParams<T>& p, const Shared<T, head_dim>& shared, const WorkTile& work) {
  using C = TileShape<head_dim>;
  constexpr int kRowTiles = C::kRowTiles, kKeyTiles = C::kKeys / 8;
  const int warp_row = ptx::warp() / C::kShares * 16 * kRowTiles;
  const int first_vec = ptx::warp() % C::kShares * (C::kColumns / tile::kVecElements);
  const bool has_rows = warp_row < work.count;  // others only help to load
  const std::int64_t kv_head = p.head0 + work.head;
  const auto load = [&](std::int32_t key, int buffer) {
    const std::int64_t first = work.first_key + key;
    tile::load_rows<C::kKeys, C::kThreads>(shared.k(buffer), p.k.row(first, kv_head), p.k.token_stride,
                                           work.end - key);
    tile::load_rows<C::kKeys, C::kThreads>(shared.v(buffer), p.v.row(first, kv_head), p.v.token_stride,
                                           work.end - key);
    ptx::cp_async_commit();
  };

  tile::gather_rows<C::kRows, C::kThreads>(shared.q, [&](int row) {
    const std::int64_t offset = shared.q_offsets[row];
    return offset == kNoRow ? nullptr : p.q.data + offset;
  });
  tile::gather_rows<C::kRows, C::kThreads>(shared.d_out, [&](int row) {
    const std::int64_t offset = shared.d_offsets[row];
    return offset == kNoRow ? nullptr : p.d_out.data + offset;
  });
  load(work.begin, 0);

  float dq[kRowTiles][C::kColumns / 8][4] = {};
  int buffer = 0;
  for (std::int32_t key = work.begin; key < work.end; key += C::kKeys, buffer ^= 1) {
    ptx::cp_async_wait<0>();
    ptx::syncthreads();  // this buffer is filled, and the other has been used
    if (key + C::kKeys < work.end) load(key + C::kKeys, buffer ^ 1);
    if (!has_rows) continue;
    float logits[kRowTiles][kKeyTiles][4] = {}, d_logits[kRowTiles][kKeyTiles][4] = {};
    tile::gemm_nt(logits, shared.q, warp_row, shared.k(buffer));
    tile::gemm_nt(d_logits, shared.d_out, warp_row, shared.v(buffer));
    to_d_logits(d_logits, logits, shared, p.log2_scale, warp_row);
    if (key < work.all_begin || key + C::kKeys > work.all_end) apply_mask(d_logits, shared, key, warp_row);
    tile::gemm_rs(dq, d_logits, shared.k(buffer), first_vec);
  }
  ptx::cp_async_wait<0>();
  ptx::syncthreads();  // q has been used, and its rows are there even with no keys: their gradients will lie
                       // there
  if (has_rows) store_out(p, shared, work, dq, warp_row, first_vec);
}

template <typename T, int head_dim>
MOBA_KERNEL(TileShape<head_dim>::kThreads, TileShape<head_dim>::kBlocksPerMultiprocessor)
attend_backward_dq_kernel(MOBA_GRID_CONSTANT RowsParams<T> p) {
  using C = TileShape<head_dim>;
  const Shared<T, head_dim> shared(ptx::shared());
  const std::uint32_t full = p.plan.totals[Plan::kFull], rest = p.plan.totals[Plan::kPartial];
  const std::uint32_t routed = full + rest;
  const std::int64_t diagonal = p.diagonal ? p.batch.tile_starts[p.batch.sequences] * p.heads : 0;
  const std::uint32_t index = ptx::block_x() / C::kShares;
  const int first = static_cast<int>(ptx::block_x() % C::kShares) * C::kRows;
  if (index >= routed + diagonal) return;
  const WorkTile work =
      index >= routed
          ? diagonal_work(p, shared, std::int64_t{index} - routed, first)
          : routed_work(p, shared, index < full ? p.plan.full[index] : p.plan.partial[index - full], first);
  if (work.count == 0) return;
  if (ptx::thread() == 0) *shared.work = work;
  ptx::syncthreads();
  add_keys(p, shared, *shared.work);
}

template <typename T>
struct AddParams {
  const T* slots;                 // [heads, rows * ranks, D]
  const std::int32_t* selection;  // [heads, rows, width]
  std::int64_t rows, width, ranks, group, head0, token0;
  View<T> dq;
};

/// head_dim / kElements threads share a row.
template <typename T, int head_dim>
MOBA_KERNEL(kSumThreads, 8)
sum_dq_slots_kernel(MOBA_GRID_CONSTANT AddParams<T> p) {
  constexpr int kColumns = head_dim / kElements, kRows = kSumThreads / kColumns;
  const std::int64_t head = ptx::block_y();
  const std::int64_t row = std::int64_t{ptx::block_x()} * kRows + ptx::thread() / kColumns;
  const int column = ptx::thread() % kColumns;
  if (ptx::thread() >= kRows * kColumns || row >= p.rows) return;

  // The places behind the last choice hold nothing; the diagonal keys' is always filled.
  const std::int32_t* chosen = p.selection + (head * p.rows + row) * p.width;
  const T* slot = p.slots + (head * p.rows + row) * p.ranks * head_dim + column * kElements;
  float sum[kElements] = {};
  for (std::int64_t rank = 0; rank < p.ranks; ++rank, slot += head_dim) {
    if (rank < p.width && chosen[rank] < 0) continue;
    const ptx::Vec16 v = ptx::load_streaming(slot);
    const std::uint32_t pairs[] = {v.x, v.y, v.z, v.w};
    MOBA_UNROLL
    for (int i = 0; i < 4; ++i) {
      sum[2 * i] += ptx::unpack_low<T>(pairs[i]);
      sum[2 * i + 1] += ptx::unpack_high<T>(pairs[i]);
    }
  }
  T* to = p.dq.row(p.token0 + row / p.group, (p.head0 + head) * p.group + row % p.group);
  *reinterpret_cast<ptx::Vec16*>(to + column * kElements) = {
      ptx::pack<T>(sum[0], sum[1]), ptx::pack<T>(sum[2], sum[3]), ptx::pack<T>(sum[4], sum[5]),
      ptx::pack<T>(sum[6], sum[7])};
}

}  // namespace

std::size_t attend_backward_shared_bytes(std::int64_t head_dim) {
  const std::size_t rows = head_dim > 128 ? Shared<float16, 256>::kBytes : Shared<float16, 128>::kBytes;
  return std::max(rows, attend_backward_dkv_shared_bytes(head_dim));
}

void compute_delta(Stream& stream, const Task& task, const WorkSlice& part, const Backward& backward,
                   LseDelta* sums) {
  with_type(task, [&]<typename T, int head_dim>() {
    constexpr int kRows = kSumThreads / (head_dim / kElements);
    const DeltaParams<T> params{.out = view_of<const T>(backward.out),
                                .d_out = view_of<const T>(backward.d_out),
                                .lse = backward.lse,
                                .sums = sums,
                                .rows = task.rows(part),
                                .group = task.group,
                                .head0 = part.head0,
                                .tokens = task.tokens};
    stream.launch("compute_delta", compute_delta_kernel<T, head_dim>,
                  {divide_up(task.rows(part), kRows), part.heads()}, kSumThreads, kSumThreads * sizeof(float),
                  params);
  });
}

void* carve_dq_slots(ArenaLayout& layout, const Task& task, const WorkSlice& part) {
  if (task.width == 0) return nullptr;
  return layout.take<std::uint16_t>(part.heads() * task.rows(part) * task.ranks() * task.head_dim);
}

void attend_backward_dq(Stream& stream, const Task& task, const WorkSlice& part, const Batch& batch,
                        const Plan& plan, const LseDelta* sums, const Backward& backward, void* slots) {
  with_type(task, [&]<typename T, int head_dim>() {
    using C = TileShape<head_dim>;
    const RowsParams<T> params{.q = view_of<const T>(task.q),
                               .k = view_of<const T>(task.k),
                               .v = view_of<const T>(task.v),
                               .d_out = view_of<const T>(backward.d_out),
                               .batch = batch,
                               .plan = plan,
                               .sums = sums,
                               .sums_rows = task.tokens * task.group,
                               .block_size = task.routing.block_size,
                               .group = task.group,
                               .head0 = part.head0,
                               .heads = part.heads(),
                               .rows = task.rows(part),
                               .width = task.width,
                               .ranks = task.ranks(),
                               .token0 = static_cast<std::int32_t>(part.token0),
                               .token1 = static_cast<std::int32_t>(part.token1),
                               .diagonal = task.has_diagonal(),
                               .causal = task.routing.causal,
                               .scale = task.scale,
                               .log2_scale = task.scale * ptx::kLog2E,
                               .dq = view_of<T>(backward.gradients.dq),
                               .slots = static_cast<T*>(slots)};
    const std::int64_t max_work_tiles =
        part.heads() * (task.rows(part) * task.width / kTileRows + (task.width > 0 ? task.most_blocks() : 0) +
                        task.most_tiles(part));
    stream.launch("attend_backward_dq", attend_backward_dq_kernel<T, head_dim>, {max_work_tiles * C::kShares},
                  C::kThreads, Shared<T, head_dim>::kBytes, params);
  });
}

void sum_dq_slots(Stream& stream, const Task& task, const WorkSlice& part, const std::int32_t* selection,
                  const void* slots, const Backward& backward) {
  if (task.width == 0) return;
  with_type(task, [&]<typename T, int head_dim>() {
    const AddParams<T> params{.slots = static_cast<const T*>(slots),
                              .selection = selection,
                              .rows = task.rows(part),
                              .width = task.width,
                              .ranks = task.ranks(),
                              .group = task.group,
                              .head0 = part.head0,
                              .token0 = part.token0,
                              .dq = view_of<T>(backward.gradients.dq)};
    constexpr int kRows = kSumThreads / (head_dim / kElements);
    stream.launch("sum_dq_slots", sum_dq_slots_kernel<T, head_dim>,
                  {divide_up(params.rows, kRows), part.heads()}, kSumThreads, 0, params);
  });
}

}  // namespace moba::cuda
