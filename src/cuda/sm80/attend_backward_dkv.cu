// dk and dv. A thread block holds a key tile of one block and its gradients; the rows that see it stream
// past, first those that selected the block, then the diagonal ones. S and dP are computed with keys as
// rows, so that P and dS leave one product as the A operand of the next.
//
// A block that very many rows selected (an attention sink) is split into segments of rows. Segments after
// the first are summed by thread blocks of their own; the thread block of the first adds them in order.
#include "cuda/attend_backward_key_tiles.h"
#include "cuda/ptx/atomic.h"
#include "cuda/ptx/barrier.h"
#include "cuda/tile/scan.h"

namespace moba::cuda {
namespace {

template <int head_dim>
struct TileShape {
  /// Warps that share 16 keys: at head_dim 256 each accumulates half of the columns, since all would not fit
  /// the registers.
  static constexpr int kShares = head_dim > 128 ? 2 : 1;
  static constexpr int kThreads = kDkvThreads, kWarps = kThreads / ptx::kLanes;
  static constexpr int kKeys = kWarps / kShares * 16;
  static_assert(kKeys == keys_per_tile(head_dim));
  static constexpr int kRows = head_dim > 64 ? 32 : 64;
  static constexpr int kColumns = head_dim / kShares;
};

constexpr int kPlanThreads = 256;

struct DkvPlanParams {
  DkvPlan plan;
  Batch batch;
  const std::uint32_t* offsets;  // [heads, max_blocks + 1]
  std::int64_t block_size, key_tile, max_blocks, segment;
};

/// Counts the key tiles before each sequence.
MOBA_KERNEL(kPlanThreads, 1) key_tile_starts_kernel(MOBA_GRID_CONSTANT DkvPlanParams p) {
  auto* sums = reinterpret_cast<std::int32_t*>(ptx::shared());
  std::int32_t before = 0;
  for (std::int32_t first = 0; first < p.batch.sequences; first += kPlanThreads) {
    const std::int32_t s = first + ptx::thread();
    std::int64_t key_tiles = 0;
    if (s < p.batch.sequences) {
      const std::int64_t keys = p.batch.k_starts[s + 1] - p.batch.k_starts[s];
      key_tiles = keys / p.block_size * divide_up(p.block_size, p.key_tile) +
                  divide_up(keys % p.block_size, p.key_tile);
    }
    const auto scanned = tile::scan<kPlanThreads>(static_cast<std::int32_t>(key_tiles), sums);
    if (s < p.batch.sequences) p.plan.key_tile_starts[s] = before + scanned.before;
    before += scanned.total;
  }
  if (ptx::thread() == 0) p.plan.key_tile_starts[p.batch.sequences] = before;
}

/// Lists the segments of every block, in no particular order of blocks.
MOBA_KERNEL(kPlanThreads, 4) segment_kernel(MOBA_GRID_CONSTANT DkvPlanParams p) {
  const std::int64_t head = ptx::block_y();
  const std::int64_t block = std::int64_t{ptx::block_x()} * kPlanThreads + ptx::thread();
  if (block >= p.batch.block_starts[p.batch.sequences]) return;
  const std::uint32_t* offsets = p.offsets + head * (p.max_blocks + 1) + block;
  const auto rows = static_cast<std::uint32_t>(p.segment);
  const std::uint32_t begin = offsets[0], end = offsets[1];
  if (end - begin <= rows) return;
  const std::uint32_t more = (end - begin - 1) / rows;
  const std::uint32_t first = ptx::atomic_add(p.plan.count, more);
  p.plan.first_segment[head * p.max_blocks + block] = first;
  for (std::uint32_t i = 0; i < more; ++i) {
    const std::uint32_t from = begin + (i + 1) * rows;
    p.plan.segments[first + i] = {static_cast<std::int32_t>(head), static_cast<std::int32_t>(block), from,
                                  end - from < rows ? end - from : rows};
  }
}

template <typename T, int head_dim>
struct Shared {
  using C = TileShape<head_dim>;
  static constexpr int kKeyElements = C::kKeys * head_dim, kRowElements = C::kRows * head_dim;
  static constexpr std::size_t kBytes =
      (2 * kKeyElements + 4 * kRowElements) * sizeof(T) +
      2 * C::kRows * (sizeof(LseDelta) + sizeof(RowInfo) + sizeof(std::int32_t)) + sizeof(KeyTile);

  tile::SwizzledTile<T, head_dim> k, v;
  // Two buffers each.
  T* rows;  // buffers of q, each followed by d_out
  LseDelta* lse_delta_data;
  RowInfo* row_infos_data;
  std::int32_t* visible_keys_data;
  KeyTile* key_tile;  // read again by the epilogue, which saves registers

  MOBA_DEVICE explicit Shared(std::byte* memory) {
    k.data = reinterpret_cast<T*>(memory);
    v.data = k.data + kKeyElements;
    rows = v.data + kKeyElements;
    lse_delta_data = reinterpret_cast<LseDelta*>(rows + 4 * kRowElements);
    row_infos_data = reinterpret_cast<RowInfo*>(lse_delta_data + 2 * C::kRows);
    visible_keys_data = reinterpret_cast<std::int32_t*>(row_infos_data + 2 * C::kRows);
    key_tile = reinterpret_cast<KeyTile*>(visible_keys_data + 2 * C::kRows);
  }
  MOBA_DEVICE tile::SwizzledTile<T, head_dim> q(int buffer) const {
    return {rows + 2 * buffer * kRowElements};
  }
  MOBA_DEVICE tile::SwizzledTile<T, head_dim> d_out(int buffer) const {
    return {rows + (2 * buffer + 1) * kRowElements};
  }
  MOBA_DEVICE LseDelta* lse_delta(int buffer) const { return lse_delta_data + buffer * C::kRows; }
  MOBA_DEVICE RowInfo* row_infos(int buffer) const { return row_infos_data + buffer * C::kRows; }
  MOBA_DEVICE std::int32_t* visible_keys(int buffer) const { return visible_keys_data + buffer * C::kRows; }
};

/// Accumulates dk and dv of this warp's keys over one tile of rows.
template <typename T, int head_dim>
MOBA_DEVICE void accumulate_dk_dv(const DkvParams<T>& p, const Shared<T, head_dim>& shared, int buffer,
                                  bool unmasked, int warp_key, int first_vec,
                                  float (&dk)[1][TileShape<head_dim>::kColumns / 8][4],
                                  float (&dv)[1][TileShape<head_dim>::kColumns / 8][4]) {
  constexpr int kTiles = TileShape<head_dim>::kRows / 8;
  float probs[1][kTiles][4] = {}, ds[1][kTiles][4] = {};
  tile::gemm_nt(probs, shared.k, warp_key, shared.q(buffer));
  tile::gemm_nt(ds, shared.v, warp_key, shared.d_out(buffer));
  recompute_p(probs[0], shared.lse_delta(buffer), p.log2_scale);
  compute_ds(ds[0], probs[0], shared.lse_delta(buffer));
  if (!unmasked) {
    apply_mask(probs[0], shared.visible_keys(buffer), warp_key);
    apply_mask(ds[0], shared.visible_keys(buffer), warp_key);
  }
  tile::gemm_rs(dv, probs, shared.d_out(buffer), first_vec);
  tile::gemm_rs(dk, ds, shared.q(buffer), first_vec);
}

/// Main loop over the rows of a key tile. Row metadata is fetched two tiles ahead, q and d_out one tile
/// ahead.
template <typename T, int head_dim>
MOBA_DEVICE void mainloop(const DkvParams<T>& p, const Shared<T, head_dim>& shared, const KeyTile& key_tile,
                          int warp_key, int first_vec, float (&dk)[1][TileShape<head_dim>::kColumns / 8][4],
                          float (&dv)[1][TileShape<head_dim>::kColumns / 8][4]) {
  using C = TileShape<head_dim>;
  const int mine = ptx::thread();
  const bool owns_row = mine < C::kRows;
  const auto gather = [&](int buffer) {
    const RowInfo* row_infos = shared.row_infos(buffer);
    tile::gather_rows<C::kRows, C::kThreads>(shared.q(buffer), [&](int row) {
      return row_infos[row].row == kNoEntry ? nullptr : p.q.data + row_infos[row].q;
    });
    tile::gather_rows<C::kRows, C::kThreads>(shared.d_out(buffer), [&](int row) {
      return row_infos[row].row == kNoEntry ? nullptr : p.d_out.data + row_infos[row].d_out;
    });
    ptx::cp_async_commit();
  };

  if (owns_row) {
    for (int tile = 0; tile < 2; ++tile) {
      const auto index = static_cast<std::uint32_t>(tile * C::kRows + mine);
      shared.row_infos(tile)[mine] = row_info_of(p, key_tile, index, entry_at(key_tile, index));
    }
    shared.lse_delta(0)[mine] = lse_delta_of(p, key_tile, shared.row_infos(0)[mine]);
    shared.visible_keys(0)[mine] = shared.row_infos(0)[mine].visible_keys;
  }
  ptx::syncthreads();
  gather(0);
  int buffer = 0;
  for (std::uint32_t first = 0; first < key_tile.rows(); first += C::kRows, buffer ^= 1) {
    ptx::cp_async_wait<0>();
    ptx::syncthreads();  // this buffer is full, the other one is no longer read
    const bool unmasked = is_unmasked<C::kRows>(p, key_tile, first);
    if (!unmasked && is_mixed<C::kRows>(p, *shared.key_tile, first)) {  // read again: saves registers
      isolate_nonfinite_rows<C::kThreads, C::kRows>(shared.q(buffer), shared.d_out(buffer), mine,
                                                    shared.lse_delta(buffer));
      ptx::syncthreads();
    }
    if (first + C::kRows < key_tile.rows()) gather(buffer ^ 1);
    const std::uint32_t ahead = first + 2 * C::kRows + static_cast<std::uint32_t>(mine);
    std::uint32_t entry = kNoEntry;
    LseDelta next;
    if (owns_row) {
      entry = entry_at(key_tile, ahead);
      next = lse_delta_of(p, key_tile, shared.row_infos(buffer ^ 1)[mine]);
    }
    if (warp_key < key_tile.count) accumulate_dk_dv(p, shared, buffer, unmasked, warp_key, first_vec, dk, dv);
    if (owns_row) {
      shared.lse_delta(buffer ^ 1)[mine] = next;
      shared.visible_keys(buffer ^ 1)[mine] = shared.row_infos(buffer ^ 1)[mine].visible_keys;
      shared.row_infos(buffer)[mine] = row_info_of(p, key_tile, ahead, entry);
    }
  }
}

template <typename T, int head_dim>
MOBA_KERNEL(kDkvThreads, 1)
attend_backward_dkv_kernel(MOBA_GRID_CONSTANT DkvParams<T> p) {
  using C = TileShape<head_dim>;
  const KeyTile key_tile =
      p.segments ? key_tile_of_segment<head_dim>(p, ptx::block_x())
                 : key_tile_at<head_dim>(p, ptx::block_y(), static_cast<std::int32_t>(ptx::block_x()));
  if (key_tile.count == 0) return;
  const Shared<T, head_dim> shared(ptx::shared());
  if (ptx::thread() == 0) *shared.key_tile = key_tile;
  tile::load_rows<C::kKeys, C::kThreads>(shared.k, p.k.row(key_tile.first_key, p.head0 + key_tile.head),
                                         p.k.token_stride, key_tile.count);
  tile::load_rows<C::kKeys, C::kThreads>(shared.v, p.v.row(key_tile.first_key, p.head0 + key_tile.head),
                                         p.v.token_stride, key_tile.count);
  const int warp_key = ptx::warp() / C::kShares * 16;
  const int first_vec = ptx::warp() % C::kShares * (C::kColumns / tile::kVecElements);
  float dk[1][C::kColumns / 8][4] = {}, dv[1][C::kColumns / 8][4] = {};
  mainloop(p, shared, key_tile, warp_key, first_vec, dk, dv);
  ptx::cp_async_wait<0>();
  ptx::syncthreads();  // k and v are no longer read: the epilogue overwrites them
  const KeyTile& done = *shared.key_tile;
  if (warp_key >= done.count) return;
  if (p.segments) {
    store_partial_sums(p, done.sums, 0, ptx::thread(), dk[0]);
    store_partial_sums(p, done.sums, 1, ptx::thread(), dv[0]);
    return;
  }
  add_partial_sums(p, done, 0, ptx::thread(), dk[0]);
  add_partial_sums(p, done, 1, ptx::thread(), dv[0]);
  const std::int64_t kv_head = p.head0 + done.head;
  store_gradient(p.dk, shared.k, done, kv_head, warp_key, first_vec, p.scale, dk[0]);
  store_gradient(p.dv, shared.v, done, kv_head, warp_key, first_vec, 1, dv[0]);
}

}  // namespace

std::size_t attend_backward_dkv_shared_bytes(std::int64_t head_dim) {
  return head_dim > 128 ? Shared<float16, 256>::kBytes : Shared<float16, 128>::kBytes;
}

DkvPlan carve_dkv_plan(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice) {
  DkvPlan dkv_plan{.key_tile_starts = layout.take<std::int32_t>(call.sequences + 1)};
  const std::int64_t segments = max_segments(call, slice);
  if (segments == 0) return dkv_plan;
  dkv_plan.segments = layout.take<Segment>(segments);
  dkv_plan.first_segment = layout.take<std::uint32_t>(slice.heads() * call.max_blocks());
  dkv_plan.count = layout.take<std::uint32_t>(1);
  dkv_plan.sums = layout.take<float>(segments * key_tiles_per_block(call) * 2 * keys_per_tile(call.head_dim) *
                                     call.head_dim);
  return dkv_plan;
}

void plan_dkv(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
              const Plan& plan, const DkvPlan& dkv_plan) {
  const DkvPlanParams params{.plan = dkv_plan,
                             .batch = batch,
                             .offsets = plan.offsets,
                             .block_size = call.routing.block_size,
                             .key_tile = keys_per_tile(call.head_dim),
                             .max_blocks = call.max_blocks(),
                             .segment = segment_of(call)};
  stream.launch("key_tile_starts", key_tile_starts_kernel, {}, kPlanThreads,
                kPlanThreads / ptx::kLanes * sizeof(std::int32_t), params);
  if (max_segments(call, slice) == 0) return;
  stream.fill(dkv_plan.count, 0, sizeof(std::uint32_t));
  stream.launch("segment", segment_kernel, {divide_up(call.max_blocks(), kPlanThreads), slice.heads()},
                kPlanThreads, 0, params);
}

void attend_backward_dkv(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
                         const Plan& plan, const LseDelta* sums, const Backward& backward,
                         const DkvPlan& dkv_plan) {
  with_type(call, [&]<typename T, int head_dim>() {
    DkvParams<T> params = dkv_params<T>(call, slice, batch, plan, sums, backward, dkv_plan);
    const auto launch = [&](bool segments, Grid grid) {
      params.segments = segments;
      stream.launch("attend_backward_dkv", attend_backward_dkv_kernel<T, head_dim>, grid, kDkvThreads,
                    Shared<T, head_dim>::kBytes, params);
    };
    launch(true, {max_segments(call, slice) * params.key_tiles});
    launch(false, {max_key_tiles(call), slice.heads()});
  });
}

}  // namespace moba::cuda
