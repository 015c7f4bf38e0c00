// Inverts the selection: count, scan, stable scatter, and lists of routed tiles. The selections of a head,
// numbered row * width + rank, are split into partitions of consecutive ones, and a warp scatters a part of
// its partition in order, so that the entries of a block ascend without a sort.
#include <algorithm>
#include <limits>

#include "cuda/divisor.h"
#include "cuda/plan.h"
#include "cuda/ptx/atomic.h"
#include "cuda/tile/scan.h"

namespace moba::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kScatterThreads = 128, kScatterWarps = kScatterThreads / ptx::kLanes;
constexpr std::int64_t kMinPartition = 4096;
/// Selections that a thread block scatters at a time: its cursors have 16 bits.
constexpr std::uint32_t kRound = 1 << 15;
/// Blocks that fit in the 99 KiB of shared memory that any device has: a 16-bit cursor for each warp and a
/// base. Where there are more, each thread block handles a window of them, and skips the others.
constexpr std::int64_t kMaxWindow = (99 << 10) / (2 * kScatterWarps + 4);
static_assert(kMaxWindow % 2 == 0);

/// Selections of a partition: at least as many as there are blocks, so that the counts take no more memory
/// than the selections.
std::int64_t partition_size(const DeviceCall& call) {
  return std::max(kMinPartition, divide_up(call.max_blocks(), ptx::kLanes) * ptx::kLanes);
}
std::int64_t partitions_of(const DeviceCall& call, const WorkSlice& slice) {
  return std::max<std::int64_t>(1, divide_up(call.rows(slice) * call.width(), partition_size(call)));
}

struct PlanParams {
  Plan plan;
  Batch batch;
  const std::int32_t* selection;             // of the first query head and token of the slice
  std::int64_t token_stride, head_stride;    // of the selection
  std::uint32_t selections, partition_size;  // of a head, of a partition
  std::int32_t partitions, windows, window;  // window: blocks, an even number
  std::int32_t max_blocks, block_size, token0;
  Divisor width, heads_per_kv;
  bool causal, has_diagonal;

  MOBA_DEVICE std::uint32_t* counts(std::int64_t head, std::int32_t partition) const {
    return plan.counts + (head * partitions + partition) * max_blocks;
  }
  MOBA_DEVICE std::uint32_t* offsets(std::int64_t head) const {
    return plan.offsets + head * (max_blocks + 1);
  }
};

/// Selections [begin, end) of a head.
struct Part {
  std::uint32_t begin = 0, end = 0;

  /// Part `index` of `count`, in multiples of a warp.
  MOBA_DEVICE Part part(int index, int count) const {
    const std::uint32_t lanes = ptx::kLanes * static_cast<unsigned>(count);
    const std::uint32_t size = (end - begin + lanes - 1) / lanes * ptx::kLanes;
    return {least(begin + index * size), least(begin + (index + 1) * size)};
  }
  MOBA_DEVICE std::uint32_t least(std::uint32_t index) const { return index < end ? index : end; }
};

/// What a thread block handles: a partition of a head, and the blocks of a window.
struct Share {
  std::int64_t head = 0;
  std::int32_t partition = 0;
  std::int32_t first_block = 0, blocks = 0;  // packed
  Part selections{};
};

MOBA_DEVICE Share share_of(const PlanParams& p) {
  const auto index = static_cast<std::int32_t>(ptx::block_x());
  Share share{.head = ptx::block_y(), .partition = index / p.windows};
  share.first_block = index % p.windows * p.window;
  const std::int32_t left = p.max_blocks - share.first_block;
  share.blocks = left < p.window ? left : p.window;
  const std::uint32_t begin = static_cast<std::uint32_t>(share.partition) * p.partition_size;
  share.selections = Part{begin, p.selections};
  share.selections.end = share.selections.least(begin + p.partition_size);
  return share;
}

/// The sequence of a thread's tokens, which ascend.
struct SequenceCursor {
  std::int32_t sequence = 0, q_end = 0, first_block = 0;
  std::int32_t keys = 0, before = 0;  // before: position of packed token 0

  MOBA_DEVICE void seek(const Batch& batch, std::int32_t token) {
    sequence += sequence_of(batch.q_starts + sequence, batch.sequences - sequence, token);
    q_end = batch.q_starts[sequence + 1];
    first_block = batch.block_starts[sequence];
    keys = batch.k_starts[sequence + 1] - batch.k_starts[sequence];
    before = keys - q_end;
  }
};

/// Calls visit(index, row, block) for 32 consecutive selections at a time, ascending; all lanes call. `block`
/// counts from the first of the window; it is negative for padding, for the row's own block, for what is no
/// block of the row and for blocks outside the window.
template <typename Visit>
MOBA_DEVICE void for_each_selection(const PlanParams& p, const Share& share, const Part& part,
                                    Visit&& visit) {
  constexpr int kUnroll = 4;  // loads in flight
  const std::int32_t* selection = p.selection + share.head * p.heads_per_kv.divisor * p.head_stride;
  SequenceCursor cursor;
  for (std::uint32_t first = part.begin + ptx::lane(); first < part.end + ptx::lane();
       first += kUnroll * ptx::kLanes) {
    std::uint32_t rows[kUnroll];
    std::int32_t tokens[kUnroll], blocks[kUnroll];
    MOBA_UNROLL
    for (int i = 0; i < kUnroll; ++i) {
      const std::uint32_t index = first + i * ptx::kLanes;
      rows[i] = p.width.quotient(index);
      const std::uint32_t query = p.heads_per_kv.quotient(rows[i]);
      const std::int64_t member = rows[i] - query * p.heads_per_kv.divisor,
                         rank = index - rows[i] * p.width.divisor;
      tokens[i] = p.token0 + static_cast<std::int32_t>(query);
      blocks[i] = index < part.end ? selection[member * p.head_stride + query * p.token_stride + rank] : -1;
    }
    MOBA_UNROLL
    for (int i = 0; i < kUnroll; ++i) {
      std::int32_t block = -1;
      if (blocks[i] >= 0) {
        if (tokens[i] >= cursor.q_end) cursor.seek(p.batch, tokens[i]);
        // block < scored_end(...), without a division.
        const bool is_scored = p.causal
                                   ? (std::int64_t{blocks[i]} + 1) * p.block_size <= tokens[i] + cursor.before
                                   : std::int64_t{blocks[i]} * p.block_size < cursor.keys;
        if (is_scored) block = cursor.first_block + blocks[i] - share.first_block;
        if (block >= share.blocks) block = -1;
      }
      visit(first + i * ptx::kLanes, rows[i], block);
    }
  }
}

/// Counts the selections of every block in a partition.
MOBA_KERNEL(kThreads, 4) count_kernel(MOBA_GRID_CONSTANT PlanParams p) {
  auto* counts = reinterpret_cast<std::uint32_t*>(ptx::shared());  // [window]
  const Share share = share_of(p);
  if (ptx::block_x() == 0 && ptx::thread() == 0) {
    p.plan.arrivals[share.head] = 0;
    if (share.head == 0) p.plan.totals[Plan::kFull] = p.plan.totals[Plan::kPartial] = 0;
  }
  for (int i = ptx::thread(); i < share.blocks; i += kThreads) counts[i] = 0;
  ptx::syncthreads();
  for_each_selection(p, share, share.selections.part(ptx::warp(), kThreads / ptx::kLanes),
                     [&](std::uint32_t /*index*/, std::uint32_t /*row*/, std::int32_t block) {
                       if (block >= 0) ptx::atomic_add(counts + block, 1);
                     });
  ptx::syncthreads();
  std::uint32_t* to = p.counts(share.head, share.partition) + share.first_block;
  for (int i = ptx::thread(); i < share.blocks; i += kThreads) to[i] = counts[i];
}

/// Replaces the counts of a block in every partition by exclusive prefix sums; returns the total.
MOBA_DEVICE std::uint32_t scan_partitions(const PlanParams& p, std::int64_t head, std::int32_t block) {
  constexpr int kUnroll = 16;  // loads in flight
  std::uint32_t* counts = p.counts(head, 0) + block;
  std::uint32_t sum = 0;
  for (std::int32_t first = 0; first < p.partitions; first += kUnroll) {
    std::uint32_t loaded[kUnroll];
    MOBA_UNROLL
    for (int i = 0; i < kUnroll; ++i)
      loaded[i] = first + i < p.partitions ? counts[std::int64_t{first + i} * p.max_blocks] : 0;
    MOBA_UNROLL
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i < p.partitions) counts[std::int64_t{first + i} * p.max_blocks] = sum;
      sum += loaded[i];
    }
  }
  return sum;
}

/// Replaces the sizes of a head's blocks, at offsets[block + 1], by inclusive prefix sums.
MOBA_DEVICE void scan_blocks(std::uint32_t* offsets, std::int32_t blocks, std::uint32_t* sums) {
  constexpr int kItems = 8;
  std::uint32_t before = 0;
  for (std::int32_t first = ptx::thread() * kItems; first < blocks + ptx::thread() * kItems;
       first += kThreads * kItems) {
    std::uint32_t sizes[kItems], sum = 0;
    MOBA_UNROLL
    for (int i = 0; i < kItems; ++i) {
      sizes[i] = first + i < blocks ? offsets[first + i + 1] : 0;
      sum += sizes[i];
    }
    const auto scanned = tile::scan<kThreads>(sum, sums);
    std::uint32_t offset = before + scanned.before;
    before += scanned.total;
    MOBA_UNROLL
    for (int i = 0; i < kItems; ++i) {
      offset += sizes[i];
      if (first + i < blocks) offsets[first + i + 1] = offset;
    }
  }
  if (ptx::thread() == 0) offsets[0] = 0;
}

/// Scans the counts of a head: over partitions, then, in the thread block that arrives last, over blocks.
MOBA_KERNEL(kThreads, 2) scan_kernel(MOBA_GRID_CONSTANT PlanParams p) {
  auto* sums = reinterpret_cast<std::uint32_t*>(ptx::shared());  // [warps]
  const std::int64_t head = ptx::block_y();
  const std::int32_t block = static_cast<std::int32_t>(ptx::block_x()) * kThreads + ptx::thread();
  if (block < p.max_blocks) p.offsets(head)[block + 1] = scan_partitions(p, head, block);
  ptx::threadfence();
  ptx::syncthreads();
  if (ptx::thread() == 0) sums[0] = ptx::atomic_add(p.plan.arrivals + head, 1);
  ptx::syncthreads();
  const bool is_last = sums[0] + 1 == ptx::blocks_x();
  ptx::syncthreads();
  if (!is_last) return;
  ptx::threadfence();
  scan_blocks(p.offsets(head), p.max_blocks, sums);
}

/// Lists the routed tiles of 32 blocks of a head; all lanes call.
MOBA_DEVICE void list_tiles(const PlanParams& p, std::int32_t head, std::int32_t first_block) {
  const std::int32_t block = first_block + ptx::lane();
  const std::uint32_t* offsets = p.offsets(head) + block;
  const std::uint32_t begin = block < p.max_blocks ? offsets[0] : 0,
                      size = block < p.max_blocks ? offsets[1] - begin : 0;
  const std::uint32_t full = size / kTileRows, left = size % kTileRows;
  // One addition for the warp: those of every block would wait for each other.
  const auto before = tile::scan_warp(full);
  const unsigned partial = ptx::ballot(left > 0);
  std::uint32_t first_full = 0, first_partial = 0;
  if (ptx::lane() == 0 && before.total > 0)
    first_full = ptx::atomic_add(p.plan.totals + Plan::kFull, before.total);
  if (ptx::lane() == 0 && partial != 0)
    first_partial =
        ptx::atomic_add(p.plan.totals + Plan::kPartial, static_cast<unsigned>(ptx::popc(partial)));
  first_full = ptx::shfl(first_full, 0) + before.before;
  first_partial = ptx::shfl(first_partial, 0);
  if (left > 0) {
    p.plan.partial[first_partial + static_cast<unsigned>(ptx::popc(partial & ((1U << ptx::lane()) - 1)))] = {
        head, block, begin + full * kTileRows, left};
  }
  for (int i = 0; i < ptx::kLanes; ++i) {
    const std::uint32_t tiles = ptx::shfl(full, i), entry = ptx::shfl(begin, i);
    RoutedTile* to = p.plan.full + ptx::shfl(first_full, i);
    for (auto tile = static_cast<std::uint32_t>(ptx::lane()); tile < tiles; tile += ptx::kLanes)
      to[tile] = {head, first_block + i, entry + tile * kTileRows, kTileRows};
  }
}

/// Scatters the selections of a partition, stably by block.
MOBA_KERNEL(kScatterThreads, 4) scatter_kernel(MOBA_GRID_CONSTANT PlanParams p) {
  const Share share = share_of(p);
  for (std::int32_t first =
           (static_cast<std::int32_t>(ptx::block_x()) * kScatterWarps + ptx::warp()) * ptx::kLanes;
       first < p.max_blocks; first += static_cast<std::int32_t>(ptx::blocks_x()) * kScatterThreads)
    list_tiles(p, static_cast<std::int32_t>(share.head), first);

  // Where a warp puts the next selection of a block is the block's base plus the warp's cursor. Two cursors
  // are one word, so that sums of words are sums of cursors.
  const int words = p.window / 2;
  auto* cursors = reinterpret_cast<std::uint32_t*>(ptx::shared());  // [warps, words]
  std::uint32_t *bases = cursors + kScatterWarps * words, *own = cursors + ptx::warp() * words;
  std::uint32_t* entries = p.plan.entries + share.head * p.selections;
  const std::uint32_t* offsets = p.offsets(share.head) + share.first_block;
  const std::uint32_t* counts = p.counts(share.head, share.partition) + share.first_block;
  for (int i = ptx::thread(); i < share.blocks; i += kScatterThreads) bases[i] = offsets[i] + counts[i];

  for (Part round = share.selections; round.begin < round.end; round.begin += kRound) {
    const Part part = Part{round.begin, round.least(round.begin + kRound)}.part(ptx::warp(), kScatterWarps);
    for (int i = ptx::thread(); i < kScatterWarps * words; i += kScatterThreads) cursors[i] = 0;
    ptx::syncthreads();
    for_each_selection(p, share, part,
                       [&](std::uint32_t /*index*/, std::uint32_t /*row*/, std::int32_t block) {
                         if (block >= 0) ptx::atomic_add(own + block / 2, 1U << block % 2 * 16);
                       });
    ptx::syncthreads();
    for (int i = ptx::thread(); i < words; i += kScatterThreads) {
      std::uint32_t sum = 0;
      MOBA_UNROLL
      for (int warp = 0; warp < kScatterWarps; ++warp) {
        const std::uint32_t count = cursors[warp * words + i];
        cursors[warp * words + i] = sum;
        sum += count;
      }
    }
    ptx::syncthreads();
    for_each_selection(p, share, part, [&](std::uint32_t index, std::uint32_t row, std::int32_t block) {
      const unsigned alike = ptx::match_any(static_cast<std::uint32_t>(block));
      const auto rank = static_cast<unsigned>(ptx::popc(alike & ((1U << ptx::lane()) - 1)));
      const int shift = block % 2 * 16;
      std::uint32_t cursor = 0;
      if (block >= 0 && rank == 0)
        cursor = ptx::atomic_add(own + block / 2, static_cast<unsigned>(ptx::popc(alike)) << shift);
      // The shuffle waits for the additions, so those of later selections follow.
      cursor = ptx::shfl(cursor, ptx::lowest_set_bit(alike));
      if (block >= 0)
        entries[bases[block] + (cursor >> shift & 0xFFFFU) + rank] = p.has_diagonal ? index + row : index;
    });
    ptx::syncthreads();
    if (round.end - round.begin <= kRound) return;
    // The last warp's cursors have reached the sizes of the round.
    const std::uint32_t* sizes = cursors + (kScatterWarps - 1) * words;
    for (int i = ptx::thread(); i < share.blocks; i += kScatterThreads)
      bases[i] += sizes[i / 2] >> i % 2 * 16 & 0xFFFFU;
    ptx::syncthreads();
  }
}

}  // namespace

Plan carve_plan(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice) {
  Plan plan{.totals = layout.take<std::uint32_t>(Plan::kTotals)};
  if (call.width() == 0) return plan;
  const std::int64_t heads = slice.heads(), choices = call.rows(slice) * call.width(),
                     blocks = call.max_blocks();
  plan.entries = layout.take<std::uint32_t>(heads * choices);
  plan.offsets = layout.take<std::uint32_t>(heads * (blocks + 1));
  plan.counts = layout.take<std::uint32_t>(heads * partitions_of(call, slice) * blocks);
  plan.arrivals = layout.take<std::uint32_t>(heads);
  plan.full = layout.take<RoutedTile>(heads * (choices / kTileRows));
  plan.partial = layout.take<RoutedTile>(heads * blocks);
  return plan;
}

void plan(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
          const SelectionRows& selection, const Plan& plan) {
  if (call.width() == 0) {
    stream.fill(plan.totals, 0, Plan::kTotals * sizeof(std::uint32_t));
    return;
  }
  const std::int64_t windows = divide_up(call.max_blocks(), kMaxWindow),
                     window = divide_up(call.max_blocks(), 2 * windows) * 2;
  constexpr std::int64_t kMaxBlockSize = std::numeric_limits<std::int32_t>::max();
  const PlanParams params{
      .plan = plan,
      .batch = batch,
      .selection = selection.of(slice.head0 * call.heads_per_kv, slice.token0),
      .token_stride = selection.stride,
      .head_stride = selection.tokens * selection.stride,
      .selections = static_cast<std::uint32_t>(call.rows(slice) * call.width()),
      .partition_size = static_cast<std::uint32_t>(partition_size(call)),
      .partitions = static_cast<std::int32_t>(partitions_of(call, slice)),
      .windows = static_cast<std::int32_t>(windows),
      .window = static_cast<std::int32_t>(window),
      .max_blocks = static_cast<std::int32_t>(call.max_blocks()),
      .block_size = static_cast<std::int32_t>(std::min(call.routing.block_size, kMaxBlockSize)),
      .token0 = static_cast<std::int32_t>(slice.token0),
      .width = Divisor(call.width()),
      .heads_per_kv = Divisor(call.heads_per_kv),
      .causal = call.routing.causal,
      .has_diagonal = call.has_diagonal()};
  const std::int64_t heads = slice.heads();
  const Grid shares{params.partitions * windows, heads};
  constexpr std::size_t kWord = sizeof(std::uint32_t);
  const auto words = static_cast<std::size_t>(window);
  stream.launch("count", count_kernel, shares, kThreads, words * kWord, params);
  stream.launch("scan", scan_kernel, {divide_up(call.max_blocks(), kThreads), heads}, kThreads,
                kThreads / ptx::kLanes * kWord, params);
  stream.launch("scatter", scatter_kernel, shares, kScatterThreads, (kScatterWarps / 2 + 1) * words * kWord,
                params);
}

}  // namespace moba::cuda
