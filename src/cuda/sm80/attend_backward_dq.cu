// delta and dq. As in `attend`, a thread block takes one work tile and writes the dq of its rows through
// these keys to slots, which are summed in the order of their ranks. Rows with diagonal keys alone are
// written to dq at once.
//
// Slots hold 16 bits: they are most of the memory traffic of small blocks, and each is a sum of products
// that were rounded to 16 bits before, so one more rounding costs what rounding dq does.
#include <algorithm>

#include "cuda/attend_backward_dq.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/warp.h"
#include "cuda/tile/swizzled_tile.h"

namespace moba::cuda {
namespace {

/// Tile shape, as in sm80/attend.cu. At head_dim 256 a thread block takes half of a work tile, and two warps
/// share their rows, each with half of the columns of dq: more would fit neither shared memory nor the
/// registers.
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
  std::int64_t rows, heads_per_kv, head0, tokens;
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

/// Computes delta = <d_out, out>, which equals the sum over keys of P * dP, and the base-2 LSE. head_dim /
/// kElements threads share a row.
template <typename T, int head_dim>
MOBA_KERNEL(kSumThreads, 8)
compute_delta_kernel(MOBA_GRID_CONSTANT DeltaParams<T> p) {
  constexpr int kColumns = head_dim / kElements, kRows = kSumThreads / kColumns;
  auto* products = reinterpret_cast<float*>(ptx::shared());  // [kRows, kColumns]
  const int in_block = ptx::thread() / kColumns, column = ptx::thread() % kColumns;
  const std::int64_t head = ptx::block_y(), row = std::int64_t{ptx::block_x()} * kRows + in_block;
  const bool exists = in_block < kRows && row < p.rows;
  const std::int64_t token = row / p.heads_per_kv,
                     q_head = (p.head0 + head) * p.heads_per_kv + row % p.heads_per_kv;
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
  p.sums[head * p.rows + row] = {lse == -ptx::infinity() ? ptx::infinity() : lse * kLog2E, delta};
}

/// Shared memory of one thread block.
template <typename T, int head_dim>
struct Shared {
  using C = TileShape<head_dim>;
  static constexpr int kRowElements = C::kRows * head_dim, kKeyElements = C::kKeys * head_dim;
  static constexpr std::size_t kBytes =
      (2 * kRowElements + 4 * kKeyElements) * sizeof(T) + sizeof(WorkTile) +
      C::kRows * (2 * sizeof(std::int64_t) + sizeof(LseDelta) + sizeof(KeyRange) + sizeof(std::uint32_t)) +
      C::kKeys * sizeof(float);

  tile::SwizzledTile<T, head_dim> q, d_out;
  T* keys;                                  // two buffers of k, each followed by v
  WorkTile* work;                           // in shared memory, which saves registers
  std::int64_t *q_offsets, *d_out_offsets;  // [kRows], kNoRow from `count` on
  LseDelta* lse_delta;                      // [kRows]
  KeyRange* bounds;                         // [kRows], keys that a row sees
  std::uint32_t* slots;                     // [kRows]
  float* poison;                            // [kKeys], of a mixed tile

  MOBA_DEVICE explicit Shared(std::byte* memory) {
    q.data = reinterpret_cast<T*>(memory);
    d_out.data = q.data + kRowElements;
    keys = d_out.data + kRowElements;
    work = reinterpret_cast<WorkTile*>(keys + 4 * kKeyElements);
    q_offsets = reinterpret_cast<std::int64_t*>(work + 1);
    d_out_offsets = q_offsets + C::kRows;
    lse_delta = reinterpret_cast<LseDelta*>(d_out_offsets + C::kRows);
    bounds = reinterpret_cast<KeyRange*>(lse_delta + C::kRows);
    slots = reinterpret_cast<std::uint32_t*>(bounds + C::kRows);
    poison = reinterpret_cast<float*>(slots + C::kRows);
  }
  MOBA_DEVICE tile::SwizzledTile<T, head_dim> k(int buffer) const {
    return {keys + 2 * buffer * kKeyElements};
  }
  MOBA_DEVICE tile::SwizzledTile<T, head_dim> v(int buffer) const {
    return {keys + (2 * buffer + 1) * kKeyElements};
  }
};

/// Recomputes P, at most 1 whatever the rounding of LSE, and computes dS = P * (dP - delta); `ds` holds dP
/// on entry.
template <typename T, int head_dim, int row_tiles, int key_tiles>
MOBA_DEVICE void compute_ds(float (&ds)[row_tiles][key_tiles][4],
                            const float (&logits)[row_tiles][key_tiles][4], const Shared<T, head_dim>& shared,
                            float scale, int warp_row) {
  MOBA_UNROLL
  for (int i = 0; i < row_tiles; ++i) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const LseDelta row_stats = shared.lse_delta[warp_row + 16 * i + 8 * half + ptx::lane() / 4];
      MOBA_UNROLL
      for (int j = 0; j < key_tiles; ++j) {
        MOBA_UNROLL
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const float weight = ptx::exp2(ptx::at_most_zero(ptx::fma(logits[i][j][e], scale, -row_stats.lse)));
          ds[i][j][e] = weight * (ds[i][j][e] - row_stats.delta);
        }
      }
    }
  }
}

/// Zeroes dS of keys outside the range of a row. `key` is the key of the first column.
template <typename T, int head_dim, int row_tiles, int key_tiles>
MOBA_DEVICE void apply_mask(float (&ds)[row_tiles][key_tiles][4], const Shared<T, head_dim>& shared,
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
          if (column < visible.begin || column >= visible.end) ds[i][j][2 * half + e] = 0;
        }
      }
    }
  }
}

/// Main loop and epilogue of one work tile.
template <typename T, int head_dim>
MOBA_DEVICE void mainloop(const DqParams<T>& p, const Shared<T, head_dim>& shared, const WorkTile& work) {
  using C = TileShape<head_dim>;
  constexpr int kRowTiles = C::kRowTiles, kKeyTiles = C::kKeys / 8;
  const int warp_row = ptx::warp() / C::kShares * 16 * kRowTiles;
  const int first_vec = ptx::warp() % C::kShares * (C::kColumns / tile::kVecElements);
  const bool has_rows = warp_row < work.count;  // other warps only load
  const auto load = [&](std::int32_t key, int buffer) {
    const std::int64_t first = std::int64_t{work.first_key} + key;
    const std::int64_t kv_head = p.attend.head0 + work.head;  // read again here: saves registers
    tile::load_rows<C::kKeys, C::kThreads>(shared.k(buffer), p.attend.k.row(first, kv_head),
                                           p.attend.k.token_stride, work.end - key);
    tile::load_rows<C::kKeys, C::kThreads>(shared.v(buffer), p.attend.v.row(first, kv_head),
                                           p.attend.v.token_stride, work.end - key);
    ptx::cp_async_commit();
  };

  tile::gather_rows<C::kRows, C::kThreads>(shared.q, [&](int row) {
    const std::int64_t offset = shared.q_offsets[row];
    return offset == kNoRow ? nullptr : p.attend.q.data + offset;
  });
  tile::gather_rows<C::kRows, C::kThreads>(shared.d_out, [&](int row) {
    const std::int64_t offset = shared.d_out_offsets[row];
    return offset == kNoRow ? nullptr : p.d_out.data + offset;
  });
  load(work.begin, 0);

  float dq[kRowTiles][C::kColumns / 8][4] = {};
  int buffer = 0;
  for (std::int32_t key = work.begin; key < work.end; key += C::kKeys, buffer ^= 1) {
    ptx::cp_async_wait<0>();
    ptx::syncthreads();  // this buffer is full, the other one is no longer read
    if (key + C::kKeys < work.end) load(key + C::kKeys, buffer ^ 1);
    const bool mixed = work.is_mixed(key, C::kKeys);
    if (mixed) {
      tile::isolate_nonfinite<C::kThreads, C::kKeys>(shared.k(buffer), ptx::thread(), shared.poison);
      ptx::syncthreads();
    }
    if (!has_rows) continue;
    float logits[kRowTiles][kKeyTiles][4] = {}, ds[kRowTiles][kKeyTiles][4] = {};
    tile::gemm_nt(logits, shared.q, warp_row, shared.k(buffer));
    tile::gemm_nt(ds, shared.d_out, warp_row, shared.v(buffer));
    compute_ds(ds, logits, shared, p.log2_scale, warp_row);
    if (mixed) add_poison(ds, shared.poison);
    if (work.is_masked(key, C::kKeys)) apply_mask(ds, shared, key, warp_row);
    tile::gemm_rs(dq, ds, shared.k(buffer), first_vec);
  }
  ptx::cp_async_wait<0>();
  ptx::syncthreads();  // q is complete even without keys: the epilogue overwrites it
  if (has_rows) store_dq<head_dim>(p, shared.q, shared.slots, work, dq, warp_row, first_vec);
}

template <typename T, int head_dim>
MOBA_KERNEL(TileShape<head_dim>::kThreads, TileShape<head_dim>::kBlocksPerMultiprocessor)
attend_backward_dq_kernel(MOBA_GRID_CONSTANT DqParams<T> p) {
  using C = TileShape<head_dim>;
  const Shared<T, head_dim> shared(ptx::shared());
  const std::int64_t index = ptx::block_x() / C::kShares;
  const int first = static_cast<int>(ptx::block_x() % C::kShares) * C::kRows;
  if (index >= p.attend.work_tiles()) return;
  const WorkTile work = work_tile_at<C::kRows>(p.attend, static_cast<std::uint32_t>(index), first);
  if (work.count <= 0) return;
  for (int r = ptx::thread(); r < C::kRows; r += C::kThreads)
    store_row(p, work, shared, r, slot_of(p.attend, work, r));
  if (ptx::thread() == 0) *shared.work = work;
  ptx::syncthreads();
  mainloop(p, shared, *shared.work);
}

template <typename T>
struct AddParams {
  const T* slots;  // [heads, rows * ranks, D]
  SelectionRows selection;
  Batch batch;
  std::int64_t rows, width, ranks, heads_per_kv, head0, token0, block_size;
  bool causal;
  View<T> dq;
};

/// Sums the slots of a row in the order of their ranks. head_dim / kElements threads share a row.
template <typename T, int head_dim>
MOBA_KERNEL(kSumThreads, 8)
sum_dq_slots_kernel(MOBA_GRID_CONSTANT AddParams<T> p) {
  constexpr int kColumns = head_dim / kElements, kRows = kSumThreads / kColumns;
  const std::int64_t head = ptx::block_y();
  const std::int64_t row = std::int64_t{ptx::block_x()} * kRows + ptx::thread() / kColumns;
  const int column = ptx::thread() % kColumns;
  if (ptx::thread() >= kRows * kColumns || row >= p.rows) return;

  const auto token = static_cast<std::int32_t>(p.token0 + row / p.heads_per_kv);
  const std::int64_t q_head = (p.head0 + head) * p.heads_per_kv + row % p.heads_per_kv;
  // Slots of entries that the plan left out are empty; the diagonal slot is always filled.
  const std::int32_t* selected = p.selection.of(q_head, token);
  const std::int32_t s = sequence_of(p.batch.q_starts, p.batch.sequences, token);
  const std::int64_t end = scored_end(p.batch, s, token, p.block_size, p.causal);
  const T* slot = p.slots + (head * p.rows + row) * p.ranks * head_dim + column * kElements;
  float sum[kElements] = {};
  for (std::int64_t rank = 0; rank < p.ranks; ++rank, slot += head_dim) {
    if (rank < p.width && (selected[rank] < 0 || selected[rank] >= end)) continue;
    const ptx::Vec16 v = ptx::load_streaming(slot);
    const std::uint32_t pairs[] = {v.x, v.y, v.z, v.w};
    MOBA_UNROLL
    for (int i = 0; i < 4; ++i) {
      sum[2 * i] += ptx::unpack_low<T>(pairs[i]);
      sum[2 * i + 1] += ptx::unpack_high<T>(pairs[i]);
    }
  }
  T* to = p.dq.row(token, q_head);
  *reinterpret_cast<ptx::Vec16*>(to + column * kElements) = {
      ptx::pack<T>(sum[0], sum[1]), ptx::pack<T>(sum[2], sum[3]), ptx::pack<T>(sum[4], sum[5]),
      ptx::pack<T>(sum[6], sum[7])};
}

}  // namespace

std::size_t attend_backward_shared_bytes(std::int64_t head_dim) {
  const std::size_t rows = head_dim > 128 ? Shared<float16, 256>::kBytes : Shared<float16, 128>::kBytes;
  return std::max(rows, attend_backward_dkv_shared_bytes(head_dim));
}

void compute_delta(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Backward& backward,
                   LseDelta* sums) {
  with_type(call, [&]<typename T, int head_dim>() {
    constexpr int kRows = kSumThreads / (head_dim / kElements);
    const DeltaParams<T> params{.out = view_of<const T>(backward.out),
                                .d_out = view_of<const T>(backward.d_out),
                                .lse = backward.lse,
                                .sums = sums,
                                .rows = call.rows(slice),
                                .heads_per_kv = call.heads_per_kv,
                                .head0 = slice.head0,
                                .tokens = call.tokens};
    stream.launch("compute_delta", compute_delta_kernel<T, head_dim>,
                  {divide_up(call.rows(slice), kRows), slice.heads()}, kSumThreads,
                  kSumThreads * sizeof(float), params);
  });
}

void* carve_dq_slots(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice) {
  if (call.width() == 0) return nullptr;
  return layout.take<std::uint16_t>(slice.heads() * call.rows(slice) * call.ranks() * call.head_dim);
}

void attend_backward_dq(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
                        const Plan& plan, const LseDelta* lse_delta, const Backward& backward, void* slots) {
  with_type(call, [&]<typename T, int head_dim>() {
    using C = TileShape<head_dim>;
    stream.launch("attend_backward_dq", attend_backward_dq_kernel<T, head_dim>,
                  {max_work_tiles(call, slice) * C::kShares}, C::kThreads, Shared<T, head_dim>::kBytes,
                  dq_params<T>(call, slice, batch, plan, lse_delta, backward, slots));
  });
}

void sum_dq_slots(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
                  const SelectionRows& selection, const void* slots, const Backward& backward) {
  if (!call.merges()) return;
  with_type(call, [&]<typename T, int head_dim>() {
    const AddParams<T> params{.slots = static_cast<const T*>(slots),
                              .selection = selection,
                              .batch = batch,
                              .rows = call.rows(slice),
                              .width = call.width(),
                              .ranks = call.ranks(),
                              .heads_per_kv = call.heads_per_kv,
                              .head0 = slice.head0,
                              .token0 = slice.token0,
                              .block_size = call.routing.block_size,
                              .causal = call.routing.causal,
                              .dq = view_of<T>(backward.gradients.dq)};
    constexpr int kRows = kSumThreads / (head_dim / kElements);
    stream.launch("sum_dq_slots", sum_dq_slots_kernel<T, head_dim>,
                  {divide_up(params.rows, kRows), slice.heads()}, kSumThreads, 0, params);
  });
}

}  // namespace moba::cuda
