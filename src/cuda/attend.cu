// Attention by blocks of keys. A thread block takes one item: a tile of rows that chose the same block of
// keys or, "near", a tile of neighbouring rows with the keys of their own block (in dense attention, with all
// they may see). Whole tiles come first. Each item leaves its rows' partial answers in slots of their own,
// and `combine` merges them; rows with near keys alone are done.
//
// Partial answers are kept in 16 bits and normalised: writing and reading them is most of the memory traffic
// of small blocks, and rounding them costs no more than rounding the answer does.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cuda/attend.h"
#include "cuda/ptx/barrier.h"
#include "cuda/tile/rows.h"
#include "cuda/tile/softmax.h"

namespace moba::cuda {
namespace {

constexpr std::int64_t kNoRow = -1;
constexpr float kLn2 = 0.693147180559945309F, kLog2E = 1.44269504088896341F;

/// How the work on a tile is cut. A warp of 32 rows reads every key and value out of shared memory half as
/// often as one of 16, but at D 256 its sums would not fit the registers. Nor would products with 64 keys
/// beside the sums of D 96.
template <int head_dim>
struct Cut {
  static constexpr int kWarps = head_dim > 128 ? 8 : 4;
  static constexpr int kThreads = kWarps * ptx::kLanes;
  static constexpr int kRowTiles = kTileRows / (16 * kWarps);
  static constexpr int kKeys = head_dim > 64 ? 32 : 64;
  static constexpr int kBlocksPerMultiprocessor = head_dim > 128 ? 1 : 2;
};

template <typename T>
struct AttendParams {
  View<const T> q, k, v;
  Batch batch;
  Plan plan;
  const std::uint32_t* entries;
  std::int64_t block_size, group, head0, heads;
  std::int64_t rows, width, ranks;  // of a head
  std::int32_t token0, token1;
  bool near, causal;
  tile::Scale scale;
  // Where width is 0, the answer.
  View<T> out;
  float* lse;  // [Hq, Tq], may be null
  std::int64_t tokens;
  // Elsewhere, slots.
  T* partials;         // [heads, rows * ranks, D]
  float* partial_lse;  // [heads, rows * ranks]
};

/// Shared memory of one thread block.
template <typename T, int head_dim>
struct Shared {
  static constexpr int kKeys = Cut<head_dim>::kKeys, kKeyElements = kKeys * head_dim;
  static constexpr std::size_t kBytes =
      (kTileRows * head_dim + 4 * kKeyElements) * sizeof(T) +
      kTileRows * (sizeof(std::int64_t) + sizeof(Stretch) + sizeof(std::uint32_t));

  tile::Rows<T, head_dim> q;
  T* keys;                  // two buffers of keys, with their values behind each
  std::int64_t* q_offsets;  // [kTileRows], kNoRow behind the last
  Stretch* bounds;          // [kTileRows], keys that a near row sees
  std::uint32_t* slots;     // [kTileRows]

  MOBA_DEVICE explicit Shared(std::byte* memory) {
    q.data = reinterpret_cast<T*>(memory);
    keys = q.data + kTileRows * head_dim;
    q_offsets = reinterpret_cast<std::int64_t*>(keys + 4 * kKeyElements);
    bounds = reinterpret_cast<Stretch*>(q_offsets + kTileRows);
    slots = reinterpret_cast<std::uint32_t*>(bounds + kTileRows);
  }
  MOBA_DEVICE tile::Rows<T, head_dim> k(int buffer) const { return {keys + 2 * buffer * kKeyElements}; }
  MOBA_DEVICE tile::Rows<T, head_dim> v(int buffer) const { return {keys + (2 * buffer + 1) * kKeyElements}; }
};

/// What a thread block works on: rows whose places are in shared memory, and keys [begin, end) of a sequence.
/// All rows see keys in [all_begin, all_end).
struct Work {
  std::int64_t head = 0;  // of the part
  std::int32_t count = 0;
  std::int64_t first_key = 0;  // of the sequence, packed
  std::int32_t begin = 0, end = 0, all_begin = 0, all_end = 0;
};

/// The keys of its own block that the query at `position` sees, or of all when nothing is causal.
template <typename T>
MOBA_DEVICE Stretch near_keys(const AttendParams<T>& p, std::int32_t position, std::int32_t keys) {
  if (!p.causal) return {0, keys};
  if (position < 0) return {0, 0};
  return {static_cast<std::int32_t>(position / p.block_size * p.block_size), position + 1};
}

/// Where the elements of a row's query begin.
template <typename T>
MOBA_DEVICE std::int64_t q_offset(const AttendParams<T>& p, std::int64_t head, std::int64_t row) {
  return (p.token0 + row / p.group) * p.q.token_stride +
         ((p.head0 + head) * p.group + row % p.group) * p.q.head_stride;
}

/// A tile of neighbouring rows: tile `index` of all heads, those of the last queries first, which see most.
template <typename T, int head_dim>
MOBA_DEVICE Work near_work(const AttendParams<T>& p, const Shared<T, head_dim>& shared, std::int64_t index) {
  const Tile tile = tile_at(
      p.batch, static_cast<std::int32_t>(p.batch.tile_starts[p.batch.sequences] - 1 - index / p.heads),
      p.token0, p.token1, p.group);
  const auto sees = [&](int r) { return near_keys(p, tile.position_of(r, p.group), tile.keys); };
  const Stretch first_sees = sees(0), last_sees = sees(tile.count - 1);
  const Stretch cut_sees = near_keys(p, tile.position_at(tile.cut, p.group), tile.keys);
  const Work work{.head = index % p.heads,
                  .count = tile.count,
                  .first_key = tile.first_key,
                  .begin = cut_sees.begin,
                  .end = last_sees.end,
                  .all_begin = last_sees.begin,
                  .all_end = first_sees.end};
  for (int r = ptx::thread(); r < kTileRows; r += Cut<head_dim>::kThreads) {
    const bool exists = r < work.count;
    shared.q_offsets[r] = exists ? q_offset(p, work.head, tile.first_row + r) : kNoRow;
    shared.slots[r] = static_cast<std::uint32_t>((tile.first_row + r) * p.ranks + p.width);
    shared.bounds[r] = exists ? sees(r) : Stretch{};
  }
  return work;
}

/// Rows that chose a block.
template <typename T, int head_dim>
MOBA_DEVICE Work listed_work(const AttendParams<T>& p, const Shared<T, head_dim>& shared, const Item& item) {
  const std::int32_t sequence = sequence_of(p.batch.block_starts, p.batch.sequences, item.block);
  const std::int32_t k_begin = p.batch.k_starts[sequence];
  const Stretch keys = keys_of(item.block - p.batch.block_starts[sequence], p.block_size,
                               p.batch.k_starts[sequence + 1] - k_begin);
  const std::uint32_t* entries = p.entries + item.head * p.rows * p.width + item.first;
  for (int r = ptx::thread(); r < kTileRows; r += Cut<head_dim>::kThreads) {
    const bool exists = static_cast<std::uint32_t>(r) < item.count;
    const std::uint32_t slot = exists ? entries[r] : 0;
    shared.q_offsets[r] =
        exists ? q_offset(p, item.head, slot / static_cast<std::uint32_t>(p.ranks)) : kNoRow;
    shared.slots[r] = slot;
  }
  return {.head = item.head,
          .count = static_cast<std::int32_t>(item.count),
          .first_key = k_begin,
          .begin = keys.begin,
          .end = keys.end,
          .all_begin = keys.begin,
          .all_end = keys.end};
}

template <int row_tiles, int key_tiles>
MOBA_DEVICE void negate(float (&logits)[row_tiles][key_tiles][4]) {
  MOBA_UNROLL
  for (int i = 0; i < row_tiles; ++i) {
    MOBA_UNROLL
    for (int j = 0; j < key_tiles; ++j) {
      MOBA_UNROLL
      for (int e = 0; e < 4; ++e) logits[i][j][e] = -logits[i][j][e];
    }
  }
}

/// Hides logits of keys that a row does not see. `key` is that of the first column.
template <typename T, int head_dim, int row_tiles, int key_tiles>
MOBA_DEVICE void hide(float (&logits)[row_tiles][key_tiles][4], const Shared<T, head_dim>& shared,
                      const Work& work, bool by_row, std::int32_t key, int warp_row) {
  MOBA_UNROLL
  for (int i = 0; i < row_tiles; ++i) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * i + 8 * half + ptx::lane() / 4;
      const Stretch sees = by_row ? shared.bounds[row] : Stretch{work.begin, work.end};
      MOBA_UNROLL
      for (int j = 0; j < key_tiles; ++j) {
        MOBA_UNROLL
        for (int e = 0; e < 2; ++e) {
          const std::int32_t column = key + 8 * j + ptx::lane() % 4 * 2 + e;
          if (column < sees.begin || column >= sees.end) logits[i][j][2 * half + e] = -ptx::infinity();
        }
      }
    }
  }
}

/// Writes the rows of this warp, through its own rows of q's shared memory so that whole pieces go out.
template <typename T, int head_dim, int row_tiles>
MOBA_DEVICE void write(const AttendParams<T>& p, const Shared<T, head_dim>& shared, const Work& work,
                       const float (&out)[row_tiles][head_dim / 8][4],
                       const tile::Softmax<row_tiles>& softmax, int warp_row) {
  const int lane = ptx::lane();
  const bool last_word = p.width == 0;
  MOBA_UNROLL
  for (int i = 0; i < row_tiles; ++i) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * i + 8 * half + lane / 4;
      float total = 0;
      const float lse = kLn2 * softmax.log2_sum(i, half, p.scale.scale, total);
      const float share = total == 0 ? 0 : 1 / total;
      MOBA_UNROLL
      for (int j = 0; j < head_dim / 8; ++j) {
        auto* to = reinterpret_cast<std::uint32_t*>(shared.q.piece(row, j)) + lane % 4;
        *to = ptx::pack<T>(out[i][j][2 * half] * share, out[i][j][2 * half + 1] * share);
      }
      if (lane % 4 != 0 || row >= work.count) continue;
      if (!last_word) {
        p.partial_lse[slot_at(work.head, p.rows, p.ranks, shared.slots[row])] = lse;
      } else if (p.lse != nullptr) {
        const std::int64_t part_row = shared.slots[row];
        const std::int64_t q_head = (p.head0 + work.head) * p.group + part_row % p.group;
        p.lse[q_head * p.tokens + p.token0 + part_row / p.group] = lse;
      }
    }
  }
  ptx::warp_barrier();
  constexpr int kPieces = head_dim / tile::kPiece;
  for (int i = lane; i < 16 * row_tiles * kPieces; i += ptx::kLanes) {
    const int row = warp_row + i / kPieces, piece = i % kPieces;
    if (row >= work.count) break;
    const std::uint32_t slot = shared.slots[row];
    T* to = last_word ? p.out.row(p.token0 + slot / p.group, (p.head0 + work.head) * p.group + slot % p.group)
                      : p.partials + slot_at(work.head, p.rows, p.ranks, slot) * head_dim;
    *reinterpret_cast<ptx::Vector*>(to + piece * tile::kPiece) =
        *reinterpret_cast<const ptx::Vector*>(shared.q.piece(row, piece));
  }
}

/// Attention of the work's rows over its keys.
template <typename T, int head_dim>
MOBA_DEVICE void attend_tile(const AttendParams<T>& p, const Shared<T, head_dim>& shared, const Work& work,
                             bool by_row) {
  using C = Cut<head_dim>;
  constexpr int kRowTiles = C::kRowTiles, kKeyTiles = C::kKeys / 8;
  const int warp_row = ptx::warp() * 16 * kRowTiles;
  const bool has_rows = warp_row < work.count;  // others only help to load
  const std::int64_t kv_head = p.head0 + work.head;
  const auto load = [&](std::int32_t key, int buffer) {
    const std::int64_t first = work.first_key + key;
    tile::load_rows<C::kKeys, C::kThreads>(shared.k(buffer), p.k.row(first, kv_head), p.k.token_stride,
                                           work.end - key);
    tile::load_rows<C::kKeys, C::kThreads>(shared.v(buffer), p.v.row(first, kv_head), p.v.token_stride,
                                           work.end - key);
    ptx::copy_commit();
  };

  tile::gather_rows<kTileRows, C::kThreads>(shared.q, [&](int row) {
    const std::int64_t offset = shared.q_offsets[row];
    return offset == kNoRow ? nullptr : p.q.data + offset;
  });
  load(work.begin, 0);

  float out[kRowTiles][head_dim / 8][4] = {};
  tile::Softmax<kRowTiles> softmax;
  softmax.clear();
  int buffer = 0;
  for (std::int32_t key = work.begin; key < work.end; key += C::kKeys, buffer ^= 1) {
    ptx::copy_wait<0>();
    ptx::barrier();  // this buffer is filled, and the other has been used
    if (key + C::kKeys < work.end) load(key + C::kKeys, buffer ^ 1);
    if (!has_rows) continue;
    float logits[kRowTiles][kKeyTiles][4] = {};
    tile::multiply_rows(logits, shared.q, warp_row, shared.k(buffer));
    if (p.scale.negate) negate(logits);
    if (key < work.all_begin || key + C::kKeys > work.all_end)
      hide(logits, shared, work, by_row, key, warp_row);
    softmax.add(logits, out, p.scale.scale);
    tile::add_weighted(out, logits, shared.v(buffer));
  }
  ptx::copy_wait<0>();
  ptx::barrier();  // with no keys at all, for the rows: they lie where the answers will
  if (has_rows) write(p, shared, work, out, softmax, warp_row);
}

template <typename T, int head_dim>
MOBA_KERNEL(Cut<head_dim>::kThreads, Cut<head_dim>::kBlocksPerMultiprocessor)
attend_kernel(MOBA_PARAMETER AttendParams<T> p) {
  const Shared<T, head_dim> shared(ptx::shared());
  const std::uint32_t full = p.plan.totals[Plan::kFull], rest = p.plan.totals[Plan::kRest];
  const std::uint32_t listed = full + rest;
  const std::int64_t near = p.near ? p.batch.tile_starts[p.batch.sequences] * p.heads : 0;
  const std::uint32_t index = ptx::block_x();
  if (index >= listed + near) return;
  const bool is_near = index >= listed;
  const Work work =
      is_near ? near_work(p, shared, std::int64_t{index} - listed)
              : listed_work(p, shared, index < full ? p.plan.full[index] : p.plan.rest[index - full]);
  ptx::barrier();
  attend_tile(p, shared, work, is_near);
}

/// The scale in powers of 2. One of 0 becomes the smallest that keeps -inf, which is where the hidden are.
tile::Scale scale_of(float scale) {
  return {.scale = std::max(std::fabs(scale) * kLog2E, FLT_MIN), .negate = scale < 0};
}

}  // namespace

std::size_t attend_shared_bytes(std::int64_t head_dim) {
  return head_dim > 128 ? Shared<float16, 256>::kBytes : Shared<float16, 128>::kBytes;
}

void attend(Queue& queue, const Task& task, const Group& part, const Batch& batch, const Plan& plan,
            const Partials& partials, const Outputs& outputs) {
  with_type(task, [&]<typename T, int head_dim>() {
    using C = Cut<head_dim>;
    const AttendParams<T> params{.q = view_of<const T>(task.q),
                                 .k = view_of<const T>(task.k),
                                 .v = view_of<const T>(task.v),
                                 .batch = batch,
                                 .plan = plan,
                                 .entries = plan.entries,
                                 .block_size = task.routing.block_size,
                                 .group = task.group,
                                 .head0 = part.head0,
                                 .heads = part.heads(),
                                 .rows = task.rows(part),
                                 .width = task.width,
                                 .ranks = task.ranks(),
                                 .token0 = static_cast<std::int32_t>(part.token0),
                                 .token1 = static_cast<std::int32_t>(part.token1),
                                 .near = task.has_near_keys(),
                                 .causal = task.routing.causal,
                                 .scale = scale_of(task.scale),
                                 .out = view_of<T>(outputs.out),
                                 .lse = outputs.lse,
                                 .tokens = task.tokens,
                                 .partials = static_cast<T*>(partials.out),
                                 .partial_lse = partials.lse};
    const std::int64_t most_items =
        part.heads() * (task.rows(part) * task.width / kTileRows + (task.width > 0 ? task.most_blocks() : 0) +
                        task.most_tiles(part));
    queue.launch("attend", attend_kernel<T, head_dim>, {most_items}, C::kThreads, Shared<T, head_dim>::kBytes,
                 params);
  });
}

}  // namespace moba::cuda
