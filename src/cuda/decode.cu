// Decoding: one query per sequence over a paged cache, bound by memory bandwidth. Reads the means of the
// candidates, then k and v of the selected blocks, which are divided into splits so that all multiprocessors
// read. Up to 16 query heads of a kv head are the rows of a tile and share all that is read.
#include "cuda/decode.h"

#include <algorithm>

#include "cuda/ptx/barrier.h"
#include "cuda/tile/order.h"
#include "cuda/tile/scan.h"
#include "cuda/tile/softmax.h"
#include "cuda/tile/swizzled_tile.h"

namespace moba::cuda {
namespace {

constexpr int kTile = 16;  // query heads
constexpr int kElements = 8;

/// Tile shape. A warp takes 16 keys or means of a tile; at head_dim 256 loading takes more threads than
/// computing.
template <int head_dim>
struct TileShape {
  static constexpr int kMmaWarps = 4, kKeys = 16 * kMmaWarps;
  static constexpr int kThreads = (head_dim > 128 ? 8 : kMmaWarps) * ptx::kLanes;
};

/// Keys of a split: at least kMin, so that merging is cheap, and at most 64 splits of a block.
std::int64_t split_size_of(const DeviceCall& call) {
  constexpr std::int64_t kMin = 256, kMaxSplits = 64, kStep = 64;
  return std::max(kMin, divide_up(divide_up(call.routing.block_size, kMaxSplits), kStep) * kStep);
}
std::int64_t splits_per_block(const DeviceCall& call) {
  return divide_up(call.routing.block_size, split_size_of(call));
}
std::int64_t tiles_of_group(const DeviceCall& call) {
  return divide_up(call.heads_per_kv, kTile);
}
std::int64_t candidates_of(const DeviceCall& call) {
  return (call.max_seqlen_k - 1) / call.routing.block_size;
}

template <typename T>
Pages<T> pages_of(const Tensor& t, const PagedCache& cache) {
  return {.data = static_cast<T*>(t.data),
          .page_stride = t.strides[0],
          .token_stride = t.strides[1],
          .head_stride = t.strides[2],
          .page_tokens = static_cast<std::int32_t>(cache.k.sizes[1]),
          .table = cache.page_table,
          .table_stride = cache.table_stride};
}

/// Parameters of all stages. A unit is a sequence and a tile of the query heads of one kv head.
template <typename T>
struct DecodeParams {
  View<const T> q;
  Pages<const T> k, v, means;
  Spans spans;  // [Tq]
  Decoding decoding;
  std::int64_t block_size, max_candidates;
  std::int64_t heads_per_kv, head0, heads, sequence0;
  std::int64_t tiles;  // of a kv head's query heads
  std::int32_t width, ranks, sinks;
  std::int32_t split_size, splits;
  tile::Scale scale;

  MOBA_DEVICE std::int64_t q_heads() const { return heads * heads_per_kv; }
};

struct Unit {
  std::int64_t sequence = 0;             // of all
  std::int64_t kv_head = 0, q_head = 0;  // of all; the first of the tile
  std::int64_t row = 0;                  // of the slice: [sequences, query heads], the first of the tile
  std::int32_t count = 0;                // query heads
  std::int32_t start = 0, length = 0;    // of the sequence: its first token in its pages, and how many
};

template <typename T>
MOBA_DEVICE Unit unit_at(const DecodeParams<T>& p, std::int64_t index) {
  const std::int64_t tile = index % p.tiles, head = index / p.tiles % p.heads,
                     sequence = index / p.tiles / p.heads;
  const std::int64_t left = p.heads_per_kv - tile * kTile;
  const KeyRange span = p.spans.of(p.sequence0 + sequence);
  return {.sequence = p.sequence0 + sequence,
          .kv_head = p.head0 + head,
          .q_head = (p.head0 + head) * p.heads_per_kv + tile * kTile,
          .row = sequence * p.q_heads() + head * p.heads_per_kv + tile * kTile,
          .count = static_cast<std::int32_t>(left < kTile ? left : kTile),
          .start = span.begin,
          .length = span.size()};
}

/// Number of complete blocks before the block of the last token.
template <typename T>
MOBA_DEVICE std::int32_t own_block(const DecodeParams<T>& p, std::int32_t length) {
  return length == 0 ? 0 : static_cast<std::int32_t>((length - 1) / p.block_size);
}

template <int head_dim, typename T>
MOBA_DEVICE void load_queries(const DecodeParams<T>& p, const Unit& unit,
                              const tile::SwizzledTile<T, head_dim>& to) {
  tile::gather_rows<kTile, TileShape<head_dim>::kThreads>(
      to, [&](int row) { return row < unit.count ? p.q.row(unit.sequence, unit.q_head + row) : nullptr; });
}

/// Rows of this warp, from 16 * warp on.
template <typename T, int head_dim>
MOBA_DEVICE tile::SwizzledTile<T, head_dim> of_warp(const tile::SwizzledTile<T, head_dim>& rows) {
  return {rows.data + ptx::warp() * 16 * head_dim};
}

template <typename T, int head_dim>
MOBA_KERNEL(TileShape<head_dim>::kThreads, head_dim > 128 ? 2 : 4)
decode_score_kernel(MOBA_GRID_CONSTANT DecodeParams<T> p) {
  using C = TileShape<head_dim>;
  const std::int64_t key_tiles = divide_up(p.max_candidates, C::kKeys);
  const Unit unit = unit_at(p, ptx::block_x() / key_tiles);
  const auto first = static_cast<std::int32_t>(ptx::block_x() % key_tiles * C::kKeys);
  const std::int32_t candidates = own_block(p, unit.length);
  if (first >= candidates) return;
  const tile::SwizzledTile<T, head_dim> q{reinterpret_cast<T*>(ptx::shared())},
      means{q.data + kTile * head_dim};
  load_queries(p, unit, q);
  tile::gather_rows<C::kKeys, C::kThreads>(means, [&](int row) -> const T* {
    if (first + row >= candidates) return nullptr;
    return p.means.mean(unit.sequence, first + row, p.block_size, unit.kv_head);
  });
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::syncthreads();
  if (ptx::warp() >= C::kMmaWarps) return;
  float scores[1][2][4] = {};
  tile::gemm_nt(scores, q, 0, of_warp(means));
  MOBA_UNROLL
  for (int j = 0; j < 2; ++j) {
    MOBA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int row = ptx::lane() / 4 + e / 2 * 8;
      const std::int32_t block = first + ptx::warp() * 16 + 8 * j + ptx::lane() % 4 * 2 + e % 2;
      if (row >= unit.count || block >= candidates) continue;
      p.decoding.orders[(unit.row + row) * p.max_candidates + block] =
          block < p.sinks ? tile::kForced : tile::order_of(scores[0][j][e]);
    }
  }
}

constexpr int kSelectThreads = 512;

struct SelectParams {
  Decoding decoding;
  Spans spans;
  std::int64_t block_size, max_candidates, q_heads, sequence0;
  std::int32_t width;
};

/// Counts `orders` that are at least `min`.
MOBA_DEVICE std::int32_t count_from(const std::uint32_t* orders, std::int32_t count, std::uint32_t min,
                                    std::int32_t* shared) {
  constexpr int kUnroll = 8;  // loads in flight
  std::int32_t own = 0;
  for (std::int64_t first = ptx::thread(); first < count; first += kUnroll * kSelectThreads) {
    MOBA_UNROLL
    for (int i = 0; i < kUnroll; ++i) {
      const std::int64_t index = first + i * kSelectThreads;
      own += index < count && orders[index] >= min ? 1 : 0;
    }
  }
  return tile::scan<kSelectThreads>(own, shared).total;
}

/// Selects the top-k of a query head: finds the order of the lowest kept score bit by bit; of equal scores
/// keeps the most recent blocks.
MOBA_KERNEL(kSelectThreads, 2) decode_select_kernel(MOBA_GRID_CONSTANT SelectParams p) {
  auto* sums = reinterpret_cast<std::int32_t*>(ptx::shared());
  const std::int64_t row = ptx::block_x();
  const std::int32_t length = p.spans.of(p.sequence0 + row / p.q_heads).size();
  const auto candidates = length == 0 ? 0 : static_cast<std::int32_t>((length - 1) / p.block_size);
  const std::uint32_t* orders = p.decoding.orders + row * p.max_candidates;
  std::int32_t* to = p.decoding.selection + row * p.width;
  const std::int32_t kept = candidates < p.width ? candidates : p.width;

  std::uint32_t worst = 0;
  if (kept < candidates) {
    for (std::uint32_t bit = 1U << 31; bit != 0; bit >>= 1) {
      const std::int32_t count = count_from(orders, candidates, worst | bit, sums);
      if (count >= kept) worst |= bit;
      if (count == kept) break;
    }
  }
  const std::int32_t above = worst == 0xFFFFFFFFU ? 0 : count_from(orders, candidates, worst + 1, sums);
  const std::int32_t equal = count_from(orders, candidates, worst, sums) - above;
  const std::int32_t passed_over = equal - (kept - above);  // the oldest of equals

  std::int32_t written = 0, equal_before = 0;
  for (std::int32_t first = 0; first < candidates; first += kSelectThreads) {
    const std::int32_t block = first + ptx::thread();
    const bool exists = block < candidates;
    const bool is_equal = exists && orders[block] == worst;
    const auto equals = tile::scan<kSelectThreads>(is_equal ? 1 : 0, sums);
    const bool is_kept =
        exists && (is_equal ? equal_before + equals.before >= passed_over : orders[block] > worst);
    const auto places = tile::scan<kSelectThreads>(is_kept ? 1 : 0, sums);
    if (is_kept) to[written + places.before] = block;
    written += places.total;
    equal_before += equals.total;
  }
  for (std::int32_t i = kept + ptx::thread(); i < p.width; i += kSelectThreads) to[i] = -1;
}

/// Shared memory of decode_attend. Outputs of the warps overwrite k and v.
template <typename T, int head_dim>
struct Shared {
  using C = TileShape<head_dim>;
  static constexpr int kKeyElements = C::kKeys * head_dim;
  static constexpr std::size_t kBytes =
      (kTile * head_dim + 4 * kKeyElements) * sizeof(T) + kTile * sizeof(std::int32_t);

  tile::SwizzledTile<T, head_dim> q;
  T* keys;              // two buffers of k, each followed by v
  std::int32_t* ranks;  // [kTile], of the block among a query head's; -1 where it is none

  MOBA_DEVICE explicit Shared(std::byte* memory) {
    q.data = reinterpret_cast<T*>(memory);
    keys = q.data + kTile * head_dim;
    ranks = reinterpret_cast<std::int32_t*>(keys + 4 * kKeyElements);
  }
  MOBA_DEVICE tile::SwizzledTile<T, head_dim> k(int buffer) const {
    return {keys + 2 * buffer * kKeyElements};
  }
  MOBA_DEVICE tile::SwizzledTile<T, head_dim> v(int buffer) const {
    return {keys + (2 * buffer + 1) * kKeyElements};
  }
  MOBA_DEVICE float* outputs() const { return reinterpret_cast<float*>(keys); }  // [warps, kTile, D]
  MOBA_DEVICE float* warp_lse() const {
    return outputs() + C::kMmaWarps * kTile * head_dim;
  }  // [warps, kTile]
  static_assert(C::kMmaWarps * kTile * (head_dim + 1) * sizeof(float) <= 4 * kKeyElements * sizeof(T));
};

/// Slot of the partial output of a query head over one split of the block of rank `rank`.
template <typename T>
MOBA_DEVICE std::int64_t slot_of(const DecodeParams<T>& p, std::int64_t row, std::int32_t rank,
                                 std::int32_t split) {
  return (row * p.ranks + rank) * p.splits + split;
}

/// Finds the query heads that attend to a block. Returns false when the thread block of an earlier head
/// takes the block.
template <typename T, int head_dim>
MOBA_DEVICE bool find_query_heads(const DecodeParams<T>& p, const Shared<T, head_dim>& shared,
                                  const Unit& unit, std::int32_t block, int first_head) {
  const int row = ptx::thread();
  if (row < kTile) {
    std::int32_t rank = -1;
    if (row < unit.count && block < 0) rank = p.width;
    if (row < unit.count && block >= 0) {
      const std::int32_t* chosen = p.decoding.selection + (unit.row + row) * p.width;
      for (std::int32_t i = 0; i < p.width; ++i) {
        if (chosen[i] == block) rank = i;
      }
    }
    shared.ranks[row] = rank;
  }
  ptx::syncthreads();
  for (int before = 0; before < first_head; ++before) {
    if (shared.ranks[before] >= 0) return false;
  }
  return true;
}

/// Normalises the output of each warp and merges them in the order of the warps.
template <typename T, int head_dim>
MOBA_DEVICE void merge_warps(const DecodeParams<T>& p, const Shared<T, head_dim>& shared, const Unit& unit,
                             std::int32_t split, const float (&out)[1][head_dim / 8][4],
                             const tile::Softmax<1>& softmax) {
  using C = TileShape<head_dim>;
  ptx::syncthreads();  // k and v are no longer read
  const int lane = ptx::lane(), warp = ptx::warp();
  if (warp < C::kMmaWarps) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = 8 * half + lane / 4;
      float total = 0;
      const float lse = softmax.log2_sum(0, half, p.scale.scale, total);
      const float share = total == 0 ? 0 : 1 / total;
      float* to = shared.outputs() + (warp * kTile + row) * head_dim + lane % 4 * 2;
      MOBA_UNROLL
      for (int j = 0; j < head_dim / 8; ++j) {
        to[8 * j] = out[0][j][2 * half] * share;
        to[8 * j + 1] = out[0][j][2 * half + 1] * share;
      }
      if (lane % 4 == 0) shared.warp_lse()[warp * kTile + row] = lse;
    }
  }
  ptx::syncthreads();
  for (int i = ptx::thread(); i < unit.count * head_dim; i += C::kThreads) {
    const int row = i / head_dim, column = i % head_dim;
    const std::int32_t rank = shared.ranks[row];
    if (rank < 0) continue;
    float max_lse = -ptx::infinity();
    MOBA_UNROLL
    for (int w = 0; w < C::kMmaWarps; ++w) max_lse = ptx::fmax(max_lse, shared.warp_lse()[w * kTile + row]);
    const float base = max_lse == -ptx::infinity() ? 0 : max_lse;
    float sum = 0, acc = 0;
    MOBA_UNROLL
    for (int w = 0; w < C::kMmaWarps; ++w) {
      const float weight = ptx::exp2(shared.warp_lse()[w * kTile + row] - base);
      sum += weight;
      acc = ptx::fma(weight, shared.outputs()[(w * kTile + row) * head_dim + column], acc);
    }
    const std::int64_t slot = slot_of(p, unit.row + row, rank, split);
    p.decoding.partials[slot * head_dim + column] = sum == 0 ? 0 : acc / sum;
    if (column == 0) p.decoding.partial_lse[slot] = base + ptx::log2(sum);
  }
}

template <typename T, int head_dim>
MOBA_KERNEL(TileShape<head_dim>::kThreads, head_dim > 128 ? 1 : 2)
decode_attend_kernel(MOBA_GRID_CONSTANT DecodeParams<T> p) {
  using C = TileShape<head_dim>;
  const Shared<T, head_dim> shared(ptx::shared());
  const int heads = static_cast<int>(p.heads_per_kv < kTile ? p.heads_per_kv : kTile);
  const std::int64_t work_items = (std::int64_t{heads} * p.width + 1) * p.splits;
  const Unit unit = unit_at(p, ptx::block_x() / work_items);
  const auto work = static_cast<std::int32_t>(ptx::block_x() % work_items);
  const std::int32_t split = work % p.splits, choice = work / p.splits - 1;  // -1: the own block
  const int q_head_index = choice < 0 ? 0 : choice / p.width;
  if (q_head_index >= unit.count || unit.length == 0) return;
  const std::int32_t chosen =
      choice < 0 ? -1 : p.decoding.selection[(unit.row + q_head_index) * p.width + choice % p.width];
  if (choice >= 0 && chosen < 0) return;
  const std::int64_t begin = (chosen < 0 ? own_block(p, unit.length) : chosen) * p.block_size;
  const std::int64_t first = begin + std::int64_t{split} * p.split_size;
  std::int64_t end = first + p.split_size;
  end = end < begin + p.block_size ? end : begin + p.block_size;
  end = end < unit.length ? end : unit.length;
  if (first >= end) return;
  if (!find_query_heads(p, shared, unit, chosen, q_head_index)) return;

  const auto last = static_cast<std::int32_t>(end);
  const auto load = [&](std::int32_t key, int buffer) {
    const auto source = [&](const Pages<const T>& pages) {
      return [&, key](int row) {
        return key + row < last ? pages.row(unit.sequence, unit.start + key + row, unit.kv_head) : nullptr;
      };
    };
    tile::gather_rows<C::kKeys, C::kThreads>(shared.k(buffer), source(p.k));
    tile::gather_rows<C::kKeys, C::kThreads>(shared.v(buffer), source(p.v));
    ptx::cp_async_commit();
  };
  load_queries(p, unit, shared.q);
  load(static_cast<std::int32_t>(first), 0);

  float out[1][head_dim / 8][4] = {};
  tile::Softmax<1> softmax;
  softmax.init();
  int buffer = 0;
  for (auto key = static_cast<std::int32_t>(first); key < last; key += C::kKeys, buffer ^= 1) {
    ptx::cp_async_wait<0>();
    ptx::syncthreads();  // this buffer is full, the other one is no longer read
    if (key + C::kKeys < last) load(key + C::kKeys, buffer ^ 1);
    const std::int32_t warp_key = key + ptx::warp() * 16;
    if (ptx::warp() >= C::kMmaWarps || warp_key >= last) continue;
    float logits[1][2][4] = {};
    tile::gemm_nt(logits, shared.q, 0, of_warp(shared.k(buffer)));
    MOBA_UNROLL
    for (int j = 0; j < 2; ++j) {
      MOBA_UNROLL
      for (int e = 0; e < 4; ++e) {
        const bool is_hidden = warp_key + 8 * j + ptx::lane() % 4 * 2 + e % 2 >= last;
        float& logit = logits[0][j][e];
        logit = is_hidden ? -ptx::infinity() : p.scale.negate ? -logit : logit;
      }
    }
    softmax.update(logits, out, p.scale.scale);
    tile::gemm_rs(out, logits, of_warp(shared.v(buffer)));
  }
  merge_warps(p, shared, unit, split, out, softmax);
}

constexpr int kCombineThreads = 128;

template <typename T>
struct CombineParams {
  DecodeParams<T> decode;
  View<T> out;
  float* lse;  // [Hq, Tq], may be null
  std::int64_t tokens;
};

/// Merges the splits of a query head, one thread block each.
template <typename T, int head_dim>
MOBA_KERNEL(kCombineThreads, 8)
decode_combine_kernel(MOBA_GRID_CONSTANT CombineParams<T> c) {
  const DecodeParams<T>& p = c.decode;
  const std::int64_t row = ptx::block_x(), sequence = p.sequence0 + row / p.q_heads(),
                     q_head = p.head0 * p.heads_per_kv + row % p.q_heads();
  const std::int32_t length = p.spans.of(sequence).size();
  const std::int32_t own = static_cast<std::int32_t>(length - std::int64_t{own_block(p, length)} *
                                                                  p.block_size);  // keys of the own block
  const auto splits_at = [&](std::int32_t rank) -> std::int32_t {
    if (rank == p.width) return static_cast<std::int32_t>(divide_up(own, p.split_size));
    return p.decoding.selection[row * p.width + rank] < 0 ? 0 : p.splits;
  };
  float max_lse = -ptx::infinity();
  for (std::int32_t rank = 0; rank < p.ranks; ++rank) {
    const std::int32_t splits = splits_at(rank);
    for (std::int32_t i = 0; i < splits; ++i)
      max_lse = ptx::fmax(max_lse, p.decoding.partial_lse[slot_of(p, row, rank, i)]);
  }
  const float base = max_lse == -ptx::infinity() ? 0 : max_lse;
  for (int pair = ptx::thread(); pair < head_dim / 2; pair += kCombineThreads) {
    float sum = 0, low = 0, high = 0;
    for (std::int32_t rank = 0; rank < p.ranks; ++rank) {
      const std::int32_t splits = splits_at(rank);
      for (std::int32_t i = 0; i < splits; ++i) {
        const std::int64_t slot = slot_of(p, row, rank, i);
        const float weight = ptx::exp2(p.decoding.partial_lse[slot] - base);
        const float* from = p.decoding.partials + slot * head_dim + 2 * pair;
        sum += weight;
        low = ptx::fma(weight, from[0], low);
        high = ptx::fma(weight, from[1], high);
      }
    }
    const float share = sum == 0 ? 0 : 1 / sum;
    reinterpret_cast<std::uint32_t*>(c.out.row(sequence, q_head))[pair] =
        ptx::pack<T>(low * share, high * share);
    if (pair == 0 && c.lse != nullptr) c.lse[q_head * c.tokens + sequence] = kLn2 * (base + ptx::log2(sum));
  }
}

constexpr int kMeanThreads = 128;

template <typename T>
struct MeansParams {
  Pages<const T> k;
  Pages<T> means;
  const std::int32_t* before;  // [sequences]; null: 0
  Spans spans;
  std::int64_t block_size, blocks, heads;
};

/// Averages the keys of a completed block, one thread block per block and head. Like `centroids`, but from
/// pages.
template <typename T, int head_dim>
MOBA_KERNEL(kMeanThreads, 8)
decode_means_kernel(MOBA_GRID_CONSTANT MeansParams<T> p) {
  constexpr int kColumns = head_dim / kElements, kRows = kMeanThreads / kColumns;
  auto* sums = reinterpret_cast<float*>(ptx::shared());  // [kRows, D]
  const std::int64_t head = ptx::block_x() / p.blocks % p.heads,
                     sequence = ptx::block_x() / p.blocks / p.heads;
  const KeyRange span = p.spans.of(sequence);
  const KeyRange held{span.begin, p.before == nullptr ? 0 : p.before[sequence]};
  const std::int64_t block = held.size() / p.block_size + ptx::block_x() % p.blocks;
  const std::int64_t begin = block * p.block_size, end = begin + p.block_size;
  if (end > span.size()) return;
  const int column = ptx::thread() % kColumns, row = ptx::thread() / kColumns;
  if (row < kRows) {
    float sum[kElements] = {};
    for (std::int64_t key = begin + row; key < end; key += kRows) {
      const ptx::Vec16 v = ptx::load_streaming(
          p.k.row(sequence, static_cast<std::int32_t>(span.begin + key), head) + column * kElements);
      const std::uint32_t pairs[] = {v.x, v.y, v.z, v.w};
      MOBA_UNROLL
      for (int i = 0; i < 4; ++i) {
        sum[2 * i] += ptx::unpack_low<T>(pairs[i]);
        sum[2 * i + 1] += ptx::unpack_high<T>(pairs[i]);
      }
    }
    MOBA_UNROLL
    for (int i = 0; i < kElements; ++i) sums[row * head_dim + column * kElements + i] = sum[i];
  }
  ptx::syncthreads();
  const auto count = static_cast<float>(p.block_size);
  auto* mean = reinterpret_cast<std::uint32_t*>(
      p.means.mean(sequence, static_cast<std::int32_t>(block), p.block_size, head));
  for (int pair = ptx::thread(); pair < head_dim / 2; pair += kMeanThreads) {
    float low = 0, high = 0;
    for (int r = 0; r < kRows; ++r) {
      low += sums[r * head_dim + 2 * pair];
      high += sums[r * head_dim + 2 * pair + 1];
    }
    mean[pair] = ptx::pack<T>(low / count, high / count);
  }
}

template <typename T>
DecodeParams<T> params_of(const DeviceCall& call, const WorkSlice& slice, const PagedCache& cache,
                          const Decoding& decoding) {
  return {.q = view_of<const T>(call.q),
          .k = pages_of<const T>(cache.k, cache),
          .v = pages_of<const T>(cache.v, cache),
          .means = pages_of<const T>(cache.means, cache),
          .spans = {cache.starts, cache.lengths},
          .decoding = decoding,
          .block_size = call.routing.block_size,
          .max_candidates = candidates_of(call),
          .heads_per_kv = call.heads_per_kv,
          .head0 = slice.head0,
          .heads = slice.heads(),
          .sequence0 = slice.token0,
          .tiles = tiles_of_group(call),
          .width = static_cast<std::int32_t>(call.width()),
          .ranks = static_cast<std::int32_t>(call.ranks()),
          .sinks = static_cast<std::int32_t>(call.routing.sink_blocks),
          .split_size = static_cast<std::int32_t>(split_size_of(call)),
          .splits = static_cast<std::int32_t>(splits_per_block(call)),
          .scale = tile::scale_of(call.scale)};
}

std::int64_t units_of(const DeviceCall& call, const WorkSlice& slice) {
  return slice.tokens() * slice.heads() * tiles_of_group(call);
}

}  // namespace

std::size_t decode_shared_bytes(std::int64_t head_dim) {
  return head_dim > 128 ? Shared<float16, 256>::kBytes : Shared<float16, 128>::kBytes;
}

Decoding carve_decoding(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice) {
  const std::int64_t rows = call.rows(slice) * slice.heads();
  Decoding decoding;
  if (call.needs_scores()) {
    decoding.orders = layout.take<std::uint32_t>(rows * candidates_of(call));
    decoding.selection = layout.take<std::int32_t>(rows * call.width());
  }
  const std::int64_t slots = rows * call.ranks() * splits_per_block(call);
  decoding.partials = layout.take<float>(slots * call.head_dim);
  decoding.partial_lse = layout.take<float>(slots);
  return decoding;
}

void decode_score(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const PagedCache& cache,
                  const Decoding& decoding) {
  with_type(call, [&]<typename T, int head_dim>() {
    using C = TileShape<head_dim>;
    stream.launch("decode_score", decode_score_kernel<T, head_dim>,
                  {units_of(call, slice) * divide_up(candidates_of(call), C::kKeys)}, C::kThreads,
                  (kTile + C::kKeys) * head_dim * sizeof(T), params_of<T>(call, slice, cache, decoding));
  });
}

void decode_select(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const PagedCache& cache,
                   const Decoding& decoding) {
  const SelectParams params{.decoding = decoding,
                            .spans = {cache.starts, cache.lengths},
                            .block_size = call.routing.block_size,
                            .max_candidates = candidates_of(call),
                            .q_heads = slice.heads() * call.heads_per_kv,
                            .sequence0 = slice.token0,
                            .width = static_cast<std::int32_t>(call.width())};
  stream.launch("decode_select", decode_select_kernel, {slice.heads() * call.rows(slice)}, kSelectThreads,
                kSelectThreads / ptx::kLanes * sizeof(std::int32_t), params);
}

void decode_attend(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const PagedCache& cache,
                   const Decoding& decoding) {
  with_type(call, [&]<typename T, int head_dim>() {
    const std::int64_t work_items =
        (std::min<std::int64_t>(call.heads_per_kv, kTile) * call.width() + 1) * splits_per_block(call);
    stream.launch("decode_attend", decode_attend_kernel<T, head_dim>, {units_of(call, slice) * work_items},
                  TileShape<head_dim>::kThreads, Shared<T, head_dim>::kBytes,
                  params_of<T>(call, slice, cache, decoding));
  });
}

void decode_combine(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const PagedCache& cache,
                    const Decoding& decoding, const Outputs& outputs) {
  with_type(call, [&]<typename T, int head_dim>() {
    const CombineParams<T> params{.decode = params_of<T>(call, slice, cache, decoding),
                                  .out = view_of<T>(outputs.out),
                                  .lse = outputs.lse,
                                  .tokens = call.tokens};
    stream.launch("decode_combine", decode_combine_kernel<T, head_dim>, {slice.heads() * call.rows(slice)},
                  kCombineThreads, 0, params);
  });
}

void complete_means(Stream& stream, const DeviceCall& call, const PagedCache& cache,
                    const std::int32_t* before, std::int64_t max_added) {
  with_type(call, [&]<typename T, int head_dim>() {
    const std::int64_t block_size = call.requested.block_size;
    const MeansParams<T> params{.k = pages_of<const T>(cache.k, cache),
                                .means = pages_of<T>(cache.means, cache),
                                .before = before,
                                .spans = {cache.starts, cache.lengths},
                                .block_size = block_size,
                                .blocks = std::min(max_added, call.max_seqlen_k) / block_size + 1,
                                .heads = call.kv_heads};
    constexpr int kRows = kMeanThreads / (head_dim / kElements);
    stream.launch("decode_means", decode_means_kernel<T, head_dim>,
                  {cache.sequences * params.heads * params.blocks}, kMeanThreads,
                  kRows * head_dim * sizeof(float), params);
  });
}

}  // namespace moba::cuda
