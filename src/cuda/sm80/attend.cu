// Forward attention over work tiles. A routed work tile holds rows that selected the same block of keys; a
// diagonal work tile holds consecutive rows and the keys of their own block (all visible keys in dense
// attention). A thread block takes one work tile, full ones first, and writes partial outputs to slots,
// which `combine` merges. Rows with diagonal keys alone are written to the output at once.
//
// Partial outputs are normalised and kept in 16 bits: they are most of the memory traffic of small blocks,
// and rounding them costs no more than rounding the output does.
#include "cuda/attend_work_tiles.h"
#include "cuda/ptx/barrier.h"
#include "cuda/tile/swizzled_tile.h"

namespace moba::cuda {
namespace {

/// Tile shape. A warp of 32 rows reads k and v from shared memory half as often as one of 16, but at
/// head_dim 256 its accumulators would not fit the registers; nor would S of 64 keys beside the accumulators
/// of head_dim 96.
template <int head_dim>
struct TileShape {
  static constexpr int kWarps = head_dim > 128 ? 8 : 4;
  static constexpr int kThreads = kWarps * ptx::kLanes;
  static constexpr int kRowTiles = kTileRows / (16 * kWarps);
  static constexpr int kKeys = head_dim > 64 ? 32 : 64;
  static constexpr int kBlocksPerMultiprocessor = head_dim > 128 ? 1 : 2;
};

/// Shared memory of one thread block.
template <typename T, int head_dim>
struct Shared {
  static constexpr int kKeys = TileShape<head_dim>::kKeys, kKeyElements = kKeys * head_dim;
  static constexpr std::size_t kBytes =
      (kTileRows * head_dim + 4 * kKeyElements) * sizeof(T) +
      kTileRows * (sizeof(std::int64_t) + sizeof(KeyRange) + sizeof(std::uint32_t)) + kKeys * sizeof(float);

  tile::SwizzledTile<T, head_dim> q;
  T* keys;                  // two buffers of k, each followed by v
  std::int64_t* q_offsets;  // [kTileRows], kNoRow from `count` on
  KeyRange* bounds;         // [kTileRows], keys that a diagonal row sees
  std::uint32_t* slots;     // [kTileRows]
  float* poison;            // [kKeys], of the values of a mixed tile

  MOBA_DEVICE explicit Shared(std::byte* memory) {
    q.data = reinterpret_cast<T*>(memory);
    keys = q.data + kTileRows * head_dim;
    q_offsets = reinterpret_cast<std::int64_t*>(keys + 4 * kKeyElements);
    bounds = reinterpret_cast<KeyRange*>(q_offsets + kTileRows);
    slots = reinterpret_cast<std::uint32_t*>(bounds + kTileRows);
    poison = reinterpret_cast<float*>(slots + kTileRows);
  }
  MOBA_DEVICE tile::SwizzledTile<T, head_dim> k(int buffer) const {
    return {keys + 2 * buffer * kKeyElements};
  }
  MOBA_DEVICE tile::SwizzledTile<T, head_dim> v(int buffer) const {
    return {keys + (2 * buffer + 1) * kKeyElements};
  }
};

/// Writes the row table of a work tile to shared memory.
template <typename T, int head_dim>
MOBA_DEVICE void store_row_table(const Shared<T, head_dim>& shared, const AttendParams<T>& p,
                                 const WorkTile& work) {
  for (int r = ptx::thread(); r < kTileRows; r += TileShape<head_dim>::kThreads) {
    const WorkRow row = row_of(p, work, slot_of(p, work, r));
    shared.q_offsets[r] = row.q_offset;
    shared.slots[r] = row.slot;
    shared.bounds[r] = visible_at(p, work, r);
  }
}

/// Main loop and epilogue of one work tile.
template <typename T, int head_dim>
MOBA_DEVICE void attend_tile(const AttendParams<T>& p, const Shared<T, head_dim>& shared,
                             const WorkTile& work) {
  using C = TileShape<head_dim>;
  constexpr int kRowTiles = C::kRowTiles, kKeyTiles = C::kKeys / 8;
  const int warp_row = ptx::warp() * 16 * kRowTiles;
  const bool has_rows = warp_row < work.count;  // other warps only load
  const std::int64_t kv_head = p.head0 + work.head;
  const auto load = [&](std::int32_t key, int buffer) {
    const std::int64_t first = std::int64_t{work.first_key} + key;
    tile::load_rows<C::kKeys, C::kThreads>(shared.k(buffer), p.k.row(first, kv_head), p.k.token_stride,
                                           work.end - key);
    tile::load_rows<C::kKeys, C::kThreads>(shared.v(buffer), p.v.row(first, kv_head), p.v.token_stride,
                                           work.end - key);
    ptx::cp_async_commit();
  };

  tile::gather_rows<kTileRows, C::kThreads>(shared.q, [&](int row) {
    const std::int64_t offset = shared.q_offsets[row];
    return offset == kNoRow ? nullptr : p.q.data + offset;
  });
  load(work.begin, 0);

  float out[kRowTiles][head_dim / 8][4] = {};
  tile::Softmax<kRowTiles> softmax;
  softmax.init();
  int buffer = 0;
  for (std::int32_t key = work.begin; key < work.end; key += C::kKeys, buffer ^= 1) {
    ptx::cp_async_wait<0>();
    ptx::syncthreads();  // this buffer is full, the other one is no longer read
    if (key + C::kKeys < work.end) load(key + C::kKeys, buffer ^ 1);
    const bool mixed = work.is_mixed(key, C::kKeys);
    if (mixed) {
      tile::isolate_nonfinite<C::kThreads, C::kKeys>(shared.v(buffer), ptx::thread(), shared.poison);
      ptx::syncthreads();
    }
    if (!has_rows) continue;
    float logits[kRowTiles][kKeyTiles][4] = {};
    tile::gemm_nt(logits, shared.q, warp_row, shared.k(buffer));
    if (p.scale.negate) negate(logits);
    if (work.is_masked(key, C::kKeys))
      apply_mask(logits, VisibleKeys<kRowTiles>(work, shared.bounds, warp_row), key);
    softmax.update(logits, out, p.scale.scale);
    if (mixed) add_poison(logits, shared.poison, VisibleKeys<kRowTiles>(work, shared.bounds, warp_row), key);
    tile::gemm_rs(out, logits, shared.v(buffer));
  }
  ptx::cp_async_wait<0>();  // copies remain where there are no keys
  if (!has_rows) return;
  std::uint32_t slots[kRowTiles][2];
  MOBA_UNROLL
  for (int i = 0; i < 2 * kRowTiles; ++i)
    slots[i / 2][i % 2] = shared.slots[warp_row + 8 * i + ptx::lane() / 4];
  store_out(p, work.head, work.count, warp_row, slots, out, softmax);
}

template <typename T, int head_dim>
MOBA_KERNEL(TileShape<head_dim>::kThreads, TileShape<head_dim>::kBlocksPerMultiprocessor)
attend_kernel(MOBA_GRID_CONSTANT AttendParams<T> p) {
  const Shared<T, head_dim> shared(ptx::shared());
  const std::int64_t index = ptx::block_x();
  if (index >= p.work_tiles()) return;
  const WorkTile work = work_tile_at(p, static_cast<std::uint32_t>(index));
  store_row_table(shared, p, work);
  ptx::syncthreads();
  attend_tile(p, shared, work);
}

}  // namespace

std::size_t attend_shared_bytes(std::int64_t head_dim) {
  return head_dim > 128 ? Shared<float16, 256>::kBytes : Shared<float16, 128>::kBytes;
}

void attend(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
            const Plan& plan, const Partials& partials, const Outputs& outputs) {
  with_type(call, [&]<typename T, int head_dim>() {
    using C = TileShape<head_dim>;
    stream.launch("attend", attend_kernel<T, head_dim>, {max_work_tiles(call, slice)}, C::kThreads,
                  Shared<T, head_dim>::kBytes, attend_params<T>(call, slice, batch, plan, partials, outputs));
  });
}

}  // namespace moba::cuda
