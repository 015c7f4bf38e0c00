// Decoding: one query per sequence over a paged cache, bound by memory bandwidth. Reads the means of the
// candidates, then k and v of the selected blocks, which are divided into splits so that all multiprocessors
// read. Up to 16 query heads of a kv head are the rows of a tile and share all that is read. Each warp has a
// pipeline of its own, of tiles of 16 keys or means, without barriers of the block.
#include "cuda/decode.h"

#include <algorithm>
#include <limits>

#include "cuda/ptx/atomic.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/grid.h"
#include "cuda/tile/order.h"
#include "cuda/tile/scan.h"
#include "cuda/tile/softmax.h"
#include "cuda/tile/swizzled_tile.h"
#include "selection.h"

namespace moba::cuda {
namespace {

constexpr int kTile = 16;  // query heads; keys or means of a warp
constexpr int kElements = 8;
constexpr int kGroup = Decoding::kGroup;
static_assert(kGroup == kTile);

constexpr int kWarps = 4, kThreads = kWarps * ptx::kLanes;
/// Tiles of a warp in shared memory: those of k and v of two steps, or of the means of four.
constexpr int kStages = 4;

/// Thread blocks that fit the shared memory of a multiprocessor of sm_90.
constexpr int blocks_per_multiprocessor(int head_dim) {
  return head_dim > 128 ? 1 : head_dim > 96 ? 3 : 4;
}

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
std::int64_t groups_of(const DeviceCall& call) {
  return divide_up((call.max_seqlen_k - 1) / call.routing.block_size, kGroup);
}
/// A block size beyond 32 bits is that of a single block.
std::int32_t clamped(std::int64_t block_size) {
  return static_cast<std::int32_t>(
      std::min<std::int64_t>(block_size, std::numeric_limits<std::int32_t>::max()));
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
  std::int64_t max_groups;
  std::int64_t head0, sequence0;
  std::uint32_t heads_per_kv, heads;
  std::uint32_t tiles;  // of a kv head's query heads
  std::int32_t block_size;
  std::int32_t width, ranks, sinks;
  std::int32_t split_size, splits;
  tile::Scale scale;
};

struct Unit {
  std::int64_t sequence = 0;             // of all
  std::int64_t kv_head = 0, q_head = 0;  // of all; the first of the tile
  std::int64_t row = 0;                  // of the slice: [sequences, query heads], the first of the tile
  std::int32_t count = 0;                // query heads
  std::int32_t start = 0, length = 0;    // of the sequence: its first token in its pages, and how many
  std::int32_t own_block = 0;            // block of the last token, before which all are candidates
};

MOBA_DEVICE std::int32_t own_block_of(std::int32_t length, std::int32_t block_size) {
  return length == 0 ? 0 : (length - 1) / block_size;
}

template <typename T>
MOBA_DEVICE Unit unit_at(const DecodeParams<T>& p, std::uint32_t index) {
  const std::uint32_t tile = index % p.tiles, head = index / p.tiles % p.heads,
                      sequence = index / p.tiles / p.heads;
  const std::uint32_t first = tile * kTile, left = p.heads_per_kv - first;
  const KeyRange span = p.spans.of(p.sequence0 + sequence);
  return {.sequence = p.sequence0 + sequence,
          .kv_head = p.head0 + head,
          .q_head = (p.head0 + head) * p.heads_per_kv + first,
          .row = (std::int64_t{sequence} * p.heads + head) * p.heads_per_kv + first,
          .count = static_cast<std::int32_t>(left < kTile ? left : kTile),
          .start = span.begin,
          .length = span.size(),
          .own_block = own_block_of(span.size(), p.block_size)};
}

/// Shared memory of decode_score and decode_attend. Outputs of the warps overwrite the stages.
template <typename T, int head_dim>
struct Shared {
  static constexpr int kTileElements = kTile * head_dim;
  static constexpr std::size_t kBytes =
      (1 + kWarps * kStages) * kTileElements * sizeof(T) + 2 * kTile * sizeof(std::int32_t);

  tile::SwizzledTile<T, head_dim> q;
  T* stages;                // [kWarps, kStages, kTile, D]
  std::int32_t* ranks;      // [kTile], of the block among a query head's; -1 where it is none
  std::int32_t* is_merged;  // [kTile], whether this thread block merges the query head's splits

  MOBA_DEVICE explicit Shared(std::byte* memory) {
    q.data = reinterpret_cast<T*>(memory);
    stages = q.data + kTileElements;
    ranks = reinterpret_cast<std::int32_t*>(stages + kWarps * kStages * kTileElements);
    is_merged = ranks + kTile;
  }
  /// Returns a tile of this warp.
  MOBA_DEVICE tile::SwizzledTile<T, head_dim> stage(int index) const {
    return {stages + (ptx::warp() * kStages + index) * kTileElements};
  }
  /// Returns output [D] of a warp for a query head.
  MOBA_DEVICE float* output(int warp, int row) const {
    return reinterpret_cast<float*>(stages) + (warp * kTile + row) * head_dim;
  }
  MOBA_DEVICE float& lse(int warp, int row) const { return output(kWarps, 0)[warp * kTile + row]; }
  static_assert(kWarps * kTile * (head_dim + 1) * sizeof(float) <=
                kWarps * kStages * kTileElements * sizeof(T));
};

/// Loads the queries of a unit, by the first warp.
template <int head_dim, typename T>
MOBA_DEVICE void load_queries(const DecodeParams<T>& p, const Unit& unit,
                              const tile::SwizzledTile<T, head_dim>& to) {
  if (ptx::warp() != 0) return;
  tile::warp_load_rows(
      to, ptx::lane() < unit.count ? p.q.row(unit.sequence, unit.q_head + ptx::lane()) : nullptr);
}

template <typename T>
struct ScoreParams {
  DecodeParams<T> decode;
  std::uint32_t chunks;       // of a unit
  std::int32_t chunk_groups;  // groups of a chunk
};

/// Scores a chunk of the candidates of a unit. A tile of 16 means is a group.
template <typename T, int head_dim>
MOBA_KERNEL(kThreads, blocks_per_multiprocessor(head_dim))
decode_score_kernel(MOBA_GRID_CONSTANT ScoreParams<T> s) {
  ptx::griddepcontrol_launch_dependents();
  const DecodeParams<T>& p = s.decode;
  const Unit unit = unit_at(p, ptx::block_x() / s.chunks);
  const std::int32_t candidates = unit.own_block, groups = (candidates + kGroup - 1) / kGroup;
  const auto first = static_cast<std::int32_t>(ptx::block_x() % s.chunks) * s.chunk_groups;
  const std::int32_t last = std::min(first + s.chunk_groups, groups);
  if (first >= last) return;
  const Shared<T, head_dim> shared(ptx::shared());

  const auto load = [&](std::int32_t group, int stage) {
    if (group < last) {
      const std::int32_t block = group * kGroup + ptx::lane();
      const bool exists = ptx::lane() < kGroup && block < candidates;
      tile::warp_load_rows(shared.stage(stage),
                           exists ? p.means.mean(unit.sequence, block, p.block_size, unit.kv_head) : nullptr);
    }
    ptx::cp_async_commit();
  };
  load_queries(p, unit, shared.q);
  std::int32_t group = first + ptx::warp();
  MOBA_NO_UNROLL
  for (int i = 0; i < kStages; ++i) load(group + i * kWarps, i);
  ptx::cp_async_wait<kStages - 1>();
  ptx::syncthreads();  // queries

  for (int stage = 0; group < last; group += kWarps, stage = (stage + 1) % kStages) {
    ptx::cp_async_wait<kStages - 1>();
    ptx::syncwarp();
    float scores[1][2][4] = {};
    tile::gemm_nt(scores, shared.q, 0, shared.stage(stage));
    ptx::syncwarp();
    load(group + kStages * kWarps, stage);
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = ptx::lane() / 4 + 8 * half;
      const std::int64_t to = (unit.row + row) * p.max_groups + group;
      std::uint32_t max = 0;
      MOBA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int column = i / 2 * 8 + ptx::lane() % 4 * 2 + i % 2;
        const std::int32_t block = group * kGroup + column;
        const std::uint32_t order = block >= candidates ? 0
                                    : block < p.sinks   ? tile::kForced
                                                        : tile::order_of(scores[0][i / 2][2 * half + i % 2]);
        max = std::max(max, order);
        if (row < unit.count) p.decoding.orders[to * kGroup + column] = order;
      }
      max = std::max(max, ptx::shfl_xor(max, 1));
      max = std::max(max, ptx::shfl_xor(max, 2));
      if (ptx::lane() % 4 == 0 && row < unit.count) p.decoding.maxima[to] = max;
    }
  }
}

/// `count` orders, of which a warp selects the best. They lie in runs of kRun; a lane holds one at a time.
template <typename RunAt>
struct WarpOrders {
  static constexpr int kRun = kGroup, kHeld = kRun * ptx::kLanes;

  RunAt run_at;  // returns the address of a run
  std::int32_t count;
  std::uint32_t held[kRun];
  std::int32_t first_held = -1;

  MOBA_DEVICE WarpOrders(RunAt run, std::int32_t of) : run_at(run), count(of) {}

  MOBA_DEVICE std::int32_t lane_first(std::int32_t first) const { return first + ptx::lane() * kRun; }
  /// Holds the orders from `first` on, and 0 behind the last.
  MOBA_DEVICE void hold(std::int32_t first) {
    if (first == first_held) return;
    first_held = first;
    const std::int32_t left = count - lane_first(first);
    const std::uint32_t* run = left > 0 ? run_at(lane_first(first) / kRun) : nullptr;
    MOBA_UNROLL
    for (int i = 0; i < kRun; ++i) held[i] = i < left ? run[i] : 0;
  }
  /// Counts the orders that are at least `min`, which is above 0.
  MOBA_DEVICE std::int32_t count_from(std::uint32_t min) {
    std::int32_t sums[4] = {};  // shorter chains of additions
    for (std::int32_t first = 0; first < count; first += kHeld) {
      hold(first);
      MOBA_UNROLL
      for (int i = 0; i < kRun; ++i) sums[i % 4] += held[i] >= min ? 1 : 0;
    }
    return ptx::reduce_add(sums[0] + sums[1] + (sums[2] + sums[3]));
  }
  MOBA_DEVICE std::uint32_t lane_max() {
    std::uint32_t max = 0;
    for (std::int32_t first = 0; first < count; first += kHeld) {
      hold(first);
      MOBA_UNROLL
      for (int i = 0; i < kRun; ++i) max = std::max(max, held[i]);
    }
    return max;
  }
  /// Calls emit(n, index) for the n-th of the `kept` best, in ascending order of their indices; of equals the
  /// last are kept. Returns the lowest kept order, or a lower bound that selects as many. `low` is a lower
  /// bound of it, 0 if unknown: the bits that it shares with the highest order need no search.
  template <typename Emit>
  MOBA_DEVICE std::uint32_t select(std::int32_t kept, std::uint32_t low, std::int32_t* shared, Emit&& emit) {
    if (low == 0 && kept <= ptx::kLanes) low = ptx::reduce_min(lane_max());  // every lane has one as high
    std::uint32_t worst = low;
    std::int32_t reached = low == 0 ? count : count_from(low);  // orders that are at least `worst`
    if (reached > kept) {
      const std::uint32_t differing = low ^ ptx::reduce_max(lane_max());
      std::uint32_t bit = differing == 0 ? 0 : 1U << (31 - ptx::leading_zeros(differing));
      worst &= bit == 0 ? ~0U : ~(2 * bit - 1);
      for (; bit != 0 && reached > kept; bit >>= 1) {
        const std::int32_t found = count_from(worst | bit);
        if (found < kept) continue;
        worst |= bit;
        reached = found;
      }
    }
    const std::int32_t passed_over = reached - kept;  // the first of equals
    std::int32_t emitted = 0, equals = 0;
    for (std::int32_t first = 0; first < count; first += kHeld) {
      hold(first);
      const std::int32_t left = count - lane_first(first);
      std::int32_t own = 0;
      MOBA_UNROLL
      for (int i = 0; i < kRun; ++i) own += i < left && held[i] == worst ? 1 : 0;
      const auto equal = tile::scan<ptx::kLanes>(own, shared);
      std::int32_t equal_index = equals + equal.before;
      std::uint32_t mask = 0;
      MOBA_UNROLL
      for (int i = 0; i < kRun; ++i) {
        if (i >= left || held[i] < worst) continue;
        if (held[i] > worst || equal_index++ >= passed_over) mask |= 1U << i;
      }
      const auto places = tile::scan<ptx::kLanes>(ptx::popc(mask), shared);
      std::int32_t n = emitted + places.before;
      for (; mask != 0; mask &= mask - 1) emit(n++, lane_first(first) + ptx::lowest_set_bit(mask));
      emitted += places.total;
      equals += equal.total;
    }
    return worst;
  }
};

struct SelectParams {
  Decoding decoding;
  Spans spans;
  std::int64_t max_groups, sequence0;
  std::uint32_t q_heads;
  std::int32_t block_size, width;
};

/// Selects the top-k of a query head. Only the k groups with the best maxima can hold them: a candidate of
/// another group is worse than k maxima.
MOBA_KERNEL(ptx::kLanes, 16) decode_select_kernel(MOBA_GRID_CONSTANT SelectParams p) {
  ptx::griddepcontrol_launch_dependents();
  auto* sums = reinterpret_cast<std::int32_t*>(ptx::shared());
  const std::int64_t row = ptx::block_x();
  const std::int32_t candidates =
      own_block_of(p.spans.of(p.sequence0 + ptx::block_x() / p.q_heads).size(), p.block_size);
  const std::int32_t groups = (candidates + kGroup - 1) / kGroup;
  const std::int32_t kept = std::min(candidates, p.width), kept_groups = std::min(groups, p.width);
  const std::uint32_t* maxima = p.decoding.maxima + row * p.max_groups;
  const std::uint32_t* orders = p.decoding.orders + row * p.max_groups * kGroup;
  std::int32_t* best = p.decoding.best_groups + row * p.width;
  std::int32_t* to = p.decoding.selection + row * p.width;
  ptx::griddepcontrol_wait();

  WarpOrders by_group([=](std::int32_t run) { return maxima + run * kGroup; }, groups);
  const std::uint32_t worst =
      by_group.select(kept_groups, 0, sums, [=](std::int32_t n, std::int32_t group) { best[n] = group; });
  ptx::syncthreads();
  WarpOrders by_block([=](std::int32_t run) { return orders + std::int64_t{best[run]} * kGroup; },
                      kept_groups * kGroup);
  by_block.select(kept, kept == kept_groups ? worst : 0, sums, [=](std::int32_t n, std::int32_t index) {
    to[n] = best[index / kGroup] * kGroup + index % kGroup;
  });
  MOBA_NO_UNROLL
  for (std::int32_t i = kept + ptx::lane(); i < p.width; i += ptx::kLanes) to[i] = -1;
  if (ptx::lane() == 0) p.decoding.arrivals[row] = 0;
}

struct TakeParams {
  Decoding decoding;
  Spans spans;
  SelectionRows selection;
  std::int64_t sequence0, head0;  // query head
  std::uint32_t q_heads;
  std::int32_t block_size, width, ranks, splits, head_dim;
};

/// Copies the blocks of a query head that its query may see, in ascending order. The slots of those that are
/// missing are empty and have arrived.
MOBA_KERNEL(ptx::kLanes, 16) decode_take_selection_kernel(MOBA_GRID_CONSTANT TakeParams p) {
  ptx::griddepcontrol_launch_dependents();
  const std::int64_t row = ptx::block_x(), sequence = p.sequence0 + ptx::block_x() / p.q_heads;
  const std::int32_t own = own_block_of(p.spans.of(sequence).size(), p.block_size);
  const std::int32_t* from = p.selection.of(p.head0 + ptx::block_x() % p.q_heads, sequence);
  std::int32_t* to = p.decoding.selection + row * p.width;
  auto* found = reinterpret_cast<std::int32_t*>(ptx::shared());
  if (ptx::lane() == 0) {
    std::int32_t count = 0, last = -1;
    MOBA_NO_UNROLL
    for (std::int32_t i = 0; i < p.width; ++i) {
      if (from[i] <= last || from[i] >= own) continue;
      to[count++] = last = from[i];
    }
    MOBA_NO_UNROLL
    for (std::int32_t i = count; i < p.width; ++i) to[i] = -1;
    *found = count;
  }
  ptx::syncthreads();
  const std::int32_t missing = std::min(own, p.width) - *found;
  const std::int64_t first = (row * p.ranks + *found) * p.splits, slots = std::int64_t{missing} * p.splits;
  if (ptx::lane() == 0) p.decoding.arrivals[row] = static_cast<std::uint32_t>(slots);
  MOBA_NO_UNROLL
  for (std::int64_t i = ptx::lane(); i < slots; i += ptx::kLanes)
    p.decoding.partial_lse[first + i] = -ptx::infinity();
  MOBA_NO_UNROLL
  for (std::int64_t i = ptx::lane(); i < slots * p.head_dim; i += ptx::kLanes)
    p.decoding.partials[first * p.head_dim + i] = 0;
}

template <typename T>
struct AttendParams {
  DecodeParams<T> decode;
  std::uint32_t work_items;  // of a unit: splits of its own block, then of every block of every query head
  View<T> out;
  float* lse;  // [Hq, Tq], may be null
  std::int64_t tokens;
};

/// Finds the query heads that attend to a block, -1 for the own one. Returns false when the thread block of
/// an earlier head takes the block.
template <typename T, int head_dim>
MOBA_DEVICE bool find_query_heads(const DecodeParams<T>& p, const Shared<T, head_dim>& shared,
                                  const Unit& unit, std::int32_t block, int first_head) {
  if (ptx::thread() < kTile)
    shared.ranks[ptx::thread()] = block < 0 && ptx::thread() < unit.count ? p.width : -1;
  ptx::syncthreads();
  if (block >= 0) {
    const std::int32_t* selection = p.decoding.selection + unit.row * p.width;
    MOBA_NO_UNROLL
    for (std::int32_t i = ptx::thread(); i < unit.count * p.width; i += kThreads) {
      if (selection[i] == block) shared.ranks[i / p.width] = i % p.width;
    }
  }
  ptx::syncthreads();
  MOBA_NO_UNROLL
  for (int before = 0; before < first_head; ++before) {
    if (shared.ranks[before] >= 0) return false;
  }
  return true;
}

struct Merged {
  float value, lse;
};

/// Merges an element of the outputs of the warps, in their order.
template <typename T, int head_dim>
MOBA_DEVICE Merged merge_warps(const Shared<T, head_dim>& shared, int row, int column) {
  float max_lse = -ptx::infinity();
  MOBA_UNROLL
  for (int w = 0; w < kWarps; ++w) max_lse = ptx::fmax(max_lse, shared.lse(w, row));
  const float base = max_lse == -ptx::infinity() ? 0 : max_lse;
  float sum = 0, acc = 0;
  MOBA_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    const float weight = ptx::exp2(shared.lse(w, row) - base);
    sum += weight;
    acc = ptx::fma(weight, shared.output(w, row)[column], acc);
  }
  return {sum == 0 ? 0 : acc * (1 / sum), base + ptx::log2(sum)};
}

/// Writes the output of this warp, normalised, to shared memory.
template <typename T, int head_dim>
MOBA_DEVICE void store_warp(const DecodeParams<T>& p, const Shared<T, head_dim>& shared,
                            const float (&out)[1][head_dim / 8][4], const tile::Softmax<1>& softmax) {
  MOBA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + ptx::lane() / 4;
    float total = 0;
    const float lse = softmax.log2_sum(0, half, p.scale.scale, total);
    const float share = total == 0 ? 0 : 1 / total;
    float* to = shared.output(ptx::warp(), row) + ptx::lane() % 4 * 2;
    MOBA_UNROLL
    for (int j = 0; j < head_dim / 8; ++j) {
      to[8 * j] = out[0][j][2 * half] * share;
      to[8 * j + 1] = out[0][j][2 * half + 1] * share;
    }
    if (ptx::lane() % 4 == 0) shared.lse(ptx::warp(), row) = lse;
  }
}

/// Partial results of the query heads of a unit: those of the selected blocks, then those of the own one.
template <typename T>
struct Slots {
  const DecodeParams<T>& p;
  std::int64_t selected;
  std::int32_t own;

  MOBA_DEVICE Slots(const DecodeParams<T>& params, const Unit& unit) : p(params) {
    const std::int32_t keys = unit.length - unit.own_block * p.block_size;
    selected = std::int64_t{std::min(unit.own_block, p.width)} * p.splits;
    own = std::max((keys - 1) / p.split_size + 1, 1);
  }
  MOBA_DEVICE std::int64_t count() const { return selected + own; }
  MOBA_DEVICE std::int64_t of(std::int64_t row, std::int32_t rank, std::int32_t split) const {
    return (row * p.ranks + rank) * p.splits + split;
  }
  MOBA_DEVICE std::int64_t at(std::int64_t row, std::int64_t index) const {
    const std::int64_t first = of(row, 0, 0);
    return first + (index < selected ? index : index - selected + std::int64_t{p.width} * p.splits);
  }
};

/// Merges the partial results of a query head. Each warp sums every kWarps-th of them.
template <typename T, int head_dim>
MOBA_DEVICE void combine(const AttendParams<T>& a, const Shared<T, head_dim>& shared, const Unit& unit,
                         const Slots<T>& slots, int row) {
  constexpr int kColumns = head_dim / ptx::kLanes, kBatch = 8;  // loads in flight
  const Decoding& decoding = a.decode.decoding;
  float max_lse = -ptx::infinity();
  MOBA_NO_UNROLL
  for (std::int64_t i = ptx::lane(); i < slots.count(); i += ptx::kLanes)
    max_lse = ptx::fmax(max_lse, decoding.partial_lse[slots.at(unit.row + row, i)]);
  MOBA_UNROLL
  for (int distance = 1; distance < ptx::kLanes; distance *= 2)
    max_lse = ptx::fmax(max_lse, ptx::shfl_xor(max_lse, distance));
  const float base = max_lse == -ptx::infinity() ? 0 : max_lse;

  float sum = 0, acc[kColumns] = {};
  MOBA_NO_UNROLL
  for (std::int64_t first = ptx::warp(); first < slots.count(); first += kBatch * kWarps) {
    float lse[kBatch], values[kBatch][kColumns];
    MOBA_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const std::int64_t index = first + i * kWarps;
      const bool exists = index < slots.count();
      const std::int64_t slot = exists ? slots.at(unit.row + row, index) : 0;
      lse[i] = exists ? decoding.partial_lse[slot] : -ptx::infinity();
      MOBA_UNROLL
      for (int c = 0; c < kColumns; ++c)
        values[i][c] = exists ? decoding.partials[slot * head_dim + c * ptx::kLanes + ptx::lane()] : 0;
    }
    MOBA_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const float weight = ptx::exp2(lse[i] - base);
      sum += weight;
      MOBA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[c] = ptx::fma(weight, values[i][c], acc[c]);
    }
  }
  const float share = sum == 0 ? 0 : 1 / sum;
  ptx::syncthreads();  // the outputs of the row before are no longer read
  MOBA_UNROLL
  for (int c = 0; c < kColumns; ++c)
    shared.output(ptx::warp(), row)[c * ptx::kLanes + ptx::lane()] = acc[c] * share;
  if (ptx::lane() == 0) shared.lse(ptx::warp(), row) = base + ptx::log2(sum);
  ptx::syncthreads();
  MOBA_NO_UNROLL
  for (int pair = ptx::thread(); pair < head_dim / 2; pair += kThreads) {
    const Merged low = merge_warps(shared, row, 2 * pair), high = merge_warps(shared, row, 2 * pair + 1);
    reinterpret_cast<std::uint32_t*>(a.out.row(unit.sequence, unit.q_head + row))[pair] =
        ptx::pack<T>(low.value, high.value);
    if (pair == 0 && a.lse != nullptr) a.lse[(unit.q_head + row) * a.tokens + unit.sequence] = kLn2 * low.lse;
  }
}

/// Writes the partial results of a split. The thread block that writes the last of a query head merges them.
template <typename T, int head_dim>
MOBA_DEVICE void finish(const AttendParams<T>& a, const Shared<T, head_dim>& shared, const Unit& unit,
                        std::int32_t split) {
  const DecodeParams<T>& p = a.decode;
  const Slots<T> slots(p, unit);
  MOBA_NO_UNROLL
  for (int i = ptx::thread(); i < unit.count * head_dim; i += kThreads) {
    const int row = i / head_dim, column = i % head_dim;
    const std::int32_t rank = shared.ranks[row];
    if (rank < 0) continue;
    const Merged merged = merge_warps(shared, row, column);
    const std::int64_t slot = slots.of(unit.row + row, rank, split);
    p.decoding.partials[slot * head_dim + column] = merged.value;
    if (column == 0) p.decoding.partial_lse[slot] = merged.lse;
  }
  ptx::syncthreads();
  if (const int row = ptx::thread(); row < unit.count) {
    shared.is_merged[row] =
        shared.ranks[row] >= 0 &&
        ptx::atomic_add_acq_rel(p.decoding.arrivals + unit.row + row, 1) + 1 == slots.count();
  }
  ptx::syncthreads();
  MOBA_NO_UNROLL
  for (int row = 0; row < unit.count; ++row) {
    if (shared.is_merged[row] != 0) combine(a, shared, unit, slots, row);
  }
}

/// Attends to a split of a block, for all query heads of a unit that attend to it.
template <typename T, int head_dim>
MOBA_KERNEL(kThreads, blocks_per_multiprocessor(head_dim))
decode_attend_kernel(MOBA_GRID_CONSTANT AttendParams<T> a) {
  const DecodeParams<T>& p = a.decode;
  const Shared<T, head_dim> shared(ptx::shared());
  const Unit unit = unit_at(p, ptx::block_x() / a.work_items);
  const auto work = static_cast<std::int32_t>(ptx::block_x() % a.work_items);
  const std::int32_t split = work % p.splits, choice = work / p.splits - 1;  // -1: the own block
  ptx::griddepcontrol_wait();

  const int q_head_index = choice < 0 ? 0 : choice / p.width;
  if (q_head_index >= unit.count) return;
  const std::int32_t chosen = choice < 0 ? -1 : p.decoding.selection[unit.row * p.width + choice];
  if (choice >= 0 && chosen < 0) return;
  const std::int64_t begin = std::int64_t{chosen < 0 ? unit.own_block : chosen} * p.block_size;
  const std::int64_t from = begin + std::int64_t{split} * p.split_size;
  const auto last = static_cast<std::int32_t>(
      std::min(std::min(from + p.split_size, begin + p.block_size), std::int64_t{unit.length}));
  if (from >= last && work > 0) return;  // an empty sequence has one empty split
  const auto first = static_cast<std::int32_t>(from);
  if (!find_query_heads(p, shared, unit, chosen, q_head_index)) return;

  const auto load = [&](const Pages<const T>& pages, std::int32_t key, int stage) {
    if (key < last) {
      const bool exists = ptx::lane() < kTile && key + ptx::lane() < last;
      tile::warp_load_rows(
          shared.stage(stage),
          exists ? pages.row(unit.sequence, unit.start + key + ptx::lane(), unit.kv_head) : nullptr);
    }
    ptx::cp_async_commit();
  };
  constexpr int kStep = kWarps * kTile;  // keys of all warps
  static_assert(kStages == 4);           // k and v of a step, k and v of the next one
  std::int32_t key = first + ptx::warp() * kTile;
  load_queries(p, unit, shared.q);
  MOBA_NO_UNROLL
  for (int i = 0; i < 2; ++i) {
    load(p.k, key + i * kStep, 2 * i);
    load(p.v, key + i * kStep, 2 * i + 1);
  }
  ptx::cp_async_wait<kStages - 1>();
  ptx::syncthreads();  // queries

  float out[1][head_dim / 8][4] = {};
  tile::Softmax<1> softmax;
  softmax.init();
  for (int stage = 0; key < last; key += kStep, stage ^= 2) {
    ptx::cp_async_wait<kStages - 1>();
    ptx::syncwarp();
    float logits[1][2][4] = {};
    tile::gemm_nt(logits, shared.q, 0, shared.stage(stage));
    ptx::syncwarp();
    load(p.k, key + 2 * kStep, stage);
    MOBA_UNROLL
    for (int j = 0; j < 2; ++j) {
      MOBA_UNROLL
      for (int e = 0; e < 4; ++e) {
        const bool is_hidden = key + 8 * j + ptx::lane() % 4 * 2 + e % 2 >= last;
        float& logit = logits[0][j][e];
        logit = is_hidden ? -ptx::infinity() : p.scale.negate ? -logit : logit;
      }
    }
    softmax.update(logits, out, p.scale.scale);
    ptx::cp_async_wait<kStages - 1>();
    ptx::syncwarp();
    tile::gemm_rs(out, logits, shared.stage(stage + 1));
    ptx::syncwarp();
    load(p.v, key + 2 * kStep, stage + 1);
  }
  ptx::syncthreads();  // the stages are no longer read
  store_warp(p, shared, out, softmax);
  ptx::syncthreads();
  finish(a, shared, unit, split);
}

constexpr int kMeanThreads = 128;

template <typename T>
struct MeansParams {
  Pages<const T> k;
  Pages<T> means;
  const std::int32_t* before;  // [sequences]; null: 0
  Spans spans;
  std::int32_t block_size;
  std::int64_t blocks, heads;
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
          .max_groups = groups_of(call),
          .head0 = slice.head0,
          .sequence0 = slice.token0,
          .heads_per_kv = static_cast<std::uint32_t>(call.heads_per_kv),
          .heads = static_cast<std::uint32_t>(slice.heads()),
          .tiles = static_cast<std::uint32_t>(tiles_of_group(call)),
          .block_size = clamped(call.routing.block_size),
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
    decoding.orders = layout.take<std::uint32_t>(rows * groups_of(call) * kGroup);
    decoding.maxima = layout.take<std::uint32_t>(rows * groups_of(call));
    decoding.best_groups = layout.take<std::int32_t>(rows * call.width());
  }
  if (call.is_routed()) decoding.selection = layout.take<std::int32_t>(rows * call.width());
  const std::int64_t slots = rows * call.ranks() * splits_per_block(call);
  decoding.partials = layout.take<float>(slots * call.head_dim);
  decoding.partial_lse = layout.take<float>(slots);
  decoding.arrivals = layout.take<std::uint32_t>(rows);
  return decoding;
}

void decode_score(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const PagedCache& cache,
                  const Decoding& decoding) {
  with_type(call, [&]<typename T, int head_dim>() {
    // One wave of thread blocks, unless chunks would be so long that units of different lengths end unevenly.
    constexpr std::int64_t kMaxChunk = 64;
    const std::int64_t units = units_of(call, slice), groups = groups_of(call);
    const std::int64_t wave = current_hardware().multiprocessors * blocks_per_multiprocessor(head_dim);
    const std::int64_t chunk_groups = std::clamp<std::int64_t>(
        divide_up(groups, std::max<std::int64_t>(wave / std::max<std::int64_t>(units, 1), 1)), kWarps,
        kMaxChunk);
    const std::int64_t chunks = divide_up(groups, chunk_groups);
    stream.launch("decode_score", decode_score_kernel<T, head_dim>, {units * chunks}, kThreads,
                  Shared<T, head_dim>::kBytes,
                  ScoreParams<T>{.decode = params_of<T>(call, slice, cache, decoding),
                                 .chunks = static_cast<std::uint32_t>(chunks),
                                 .chunk_groups = static_cast<std::int32_t>(chunk_groups)});
  });
}

void decode_select(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const PagedCache& cache,
                   const Decoding& decoding) {
  const SelectParams params{.decoding = decoding,
                            .spans = {cache.starts, cache.lengths},
                            .max_groups = groups_of(call),
                            .sequence0 = slice.token0,
                            .q_heads = static_cast<std::uint32_t>(slice.heads() * call.heads_per_kv),
                            .block_size = clamped(call.routing.block_size),
                            .width = static_cast<std::int32_t>(call.width())};
  stream.launch_dependent("decode_select", decode_select_kernel, {slice.heads() * call.rows(slice)},
                          ptx::kLanes, sizeof(std::int32_t), params);
}

void decode_take_selection(Stream& stream, const DeviceCall& call, const WorkSlice& slice,
                           const PagedCache& cache, const Decoding& decoding) {
  const TakeParams params{.decoding = decoding,
                          .spans = {cache.starts, cache.lengths},
                          .selection = selected_rows(call),
                          .sequence0 = slice.token0,
                          .head0 = slice.head0 * call.heads_per_kv,
                          .q_heads = static_cast<std::uint32_t>(slice.heads() * call.heads_per_kv),
                          .block_size = clamped(call.routing.block_size),
                          .width = static_cast<std::int32_t>(call.width()),
                          .ranks = static_cast<std::int32_t>(call.ranks()),
                          .splits = static_cast<std::int32_t>(splits_per_block(call)),
                          .head_dim = static_cast<std::int32_t>(call.head_dim)};
  stream.launch("decode_take_selection", decode_take_selection_kernel, {slice.heads() * call.rows(slice)},
                ptx::kLanes, sizeof(std::int32_t), params);
}

void decode_attend(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const PagedCache& cache,
                   const Decoding& decoding, const Outputs& outputs) {
  with_type(call, [&]<typename T, int head_dim>() {
    const std::int64_t work_items =
        (std::min<std::int64_t>(call.heads_per_kv, kTile) * call.width() + 1) * splits_per_block(call);
    const std::int64_t rows = call.rows(slice) * slice.heads();
    const Grid grid{units_of(call, slice) * work_items};
    const AttendParams<T> params{.decode = params_of<T>(call, slice, cache, decoding),
                                 .work_items = static_cast<std::uint32_t>(work_items),
                                 .out = view_of<T>(outputs.out),
                                 .lse = outputs.lse,
                                 .tokens = call.tokens};
    if (call.is_routed()) {
      stream.launch_dependent("decode_attend", decode_attend_kernel<T, head_dim>, grid, kThreads,
                              Shared<T, head_dim>::kBytes, params);
    } else {
      stream.fill(decoding.arrivals, 0, static_cast<std::size_t>(rows) * sizeof(std::uint32_t));
      stream.launch("decode_attend", decode_attend_kernel<T, head_dim>, grid, kThreads,
                    Shared<T, head_dim>::kBytes, params);
    }
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
                                .block_size = clamped(block_size),
                                .blocks = std::min(max_added, call.max_seqlen_k) / block_size + 1,
                                .heads = call.kv_heads};
    constexpr int kRows = kMeanThreads / (head_dim / kElements);
    stream.launch("decode_means", decode_means_kernel<T, head_dim>,
                  {cache.sequences * params.heads * params.blocks}, kMeanThreads,
                  kRows * head_dim * sizeof(float), params);
  });
}

}  // namespace moba::cuda
