// Inverts the selection: count, scan, stable scatter, and lists of routed tiles. The rows of a head are split
// into partitions. The warps of a thread block scatter the selections of a partition in turn, so that the
// entries of a block ascend without a sort.
#include <algorithm>

#include "cuda/divisor.h"
#include "cuda/plan.h"
#include "cuda/ptx/atomic.h"
#include "cuda/tile/scan.h"

namespace moba::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / ptx::kLanes;
constexpr std::int64_t kMinPartition = 4096;
/// Blocks whose counts fit in the 99 KiB of shared memory that any device has. Where there are more, each
/// thread block handles a window of them, and skips the others.
constexpr std::int64_t kMaxWindow = (99 << 10) / sizeof(std::uint32_t);

/// Rows of a partition: with at least as many selections as there are blocks, so that the counts take no more
/// memory than the selections.
std::int64_t partition_rows(const DeviceCall& call) {
  const std::int64_t selections = std::max(kMinPartition, call.max_blocks());
  return divide_up(divide_up(selections, call.width()), kThreads) * kThreads;
}
std::int64_t partitions_of(const DeviceCall& call, const WorkSlice& slice) {
  return std::max<std::int64_t>(1, divide_up(call.rows(slice), partition_rows(call)));
}

struct PlanParams {
  Plan plan;
  Batch batch;
  const std::int32_t* selection;  // of the first token of the slice
  std::int64_t head_stride;       // of the selection
  std::uint32_t first_head;       // of the slice, among the query heads of the selection
  std::uint32_t token_stride;
  std::uint32_t rows, selections;  // of a head
  std::uint32_t partition_rows;
  std::int32_t partitions, windows, window;
  std::int32_t max_blocks, token0;
  Divisor width, heads_per_kv, heads_per_row, block_size;
  bool causal, has_diagonal;

  MOBA_DEVICE std::uint32_t* counts(std::int64_t head, std::int32_t partition) const {
    return plan.counts + (head * partitions + partition) * max_blocks;
  }
  MOBA_DEVICE std::uint32_t* offsets(std::int64_t head) const {
    return plan.offsets + head * (max_blocks + 1);
  }
};

/// Share of a thread block: the rows of a partition of a head, and the packed blocks of a window.
struct Share {
  std::int64_t head = 0;
  std::int32_t partition = 0, first_block = 0, blocks = 0;
  std::uint32_t first_row = 0, end_row = 0;
};

MOBA_DEVICE Share share_of(const PlanParams& p) {
  const auto index = static_cast<std::int32_t>(ptx::block_x());
  Share share;
  share.head = ptx::block_y();
  share.partition = index / p.windows;
  share.first_block = index % p.windows * p.window;
  const std::int32_t blocks = p.max_blocks - share.first_block;
  share.blocks = blocks < p.window ? blocks : p.window;
  share.first_row = static_cast<std::uint32_t>(share.partition) * p.partition_rows;
  const std::uint32_t end = share.first_row + p.partition_rows;
  share.end_row = end < p.rows ? end : p.rows;
  return share;
}

/// Row of a share and the blocks that it may have selected by score.
struct Row {
  const std::int32_t* selection;
  std::uint32_t end;   // of the scored blocks, counted in the sequence
  std::int32_t shift;  // from them to the blocks of the window

  /// Returns the block of the window that `block` is. Returns -1 if it is outside, and for padding, for the
  /// row's own block and for what is no block of the row.
  MOBA_DEVICE std::int32_t in_window(std::int32_t block, std::int32_t blocks) const {
    const std::uint32_t scored = static_cast<std::uint32_t>(block),
                        found = scored + static_cast<std::uint32_t>(shift);
    return scored < end && found < static_cast<std::uint32_t>(blocks) ? static_cast<std::int32_t>(found) : -1;
  }
};

/// Rows of a share, that a thread visits in ascending order.
class Rows {
 public:
  MOBA_DEVICE Rows(const PlanParams& p, const Share& share)
      : p_(p),
        first_block_(share.first_block),
        first_head_(p.first_head + static_cast<std::uint32_t>(share.head) * p.heads_per_kv.divisor) {}

  MOBA_DEVICE Row at(std::uint32_t row) {
    const std::uint32_t query = p_.heads_per_kv.quotient(row), member = row - query * p_.heads_per_kv.divisor;
    const auto token = p_.token0 + static_cast<std::int32_t>(query);
    if (token >= q_end_) seek(token);
    const std::int32_t position = token + before_;
    const std::uint32_t head = p_.heads_per_row.quotient(first_head_ + member);
    return {
        p_.selection + std::uint64_t{query} * p_.token_stride + head * p_.head_stride,
        p_.causal ? p_.block_size.quotient(static_cast<std::uint32_t>(position > 0 ? position : 0)) : blocks_,
        shift_};
  }

 private:
  MOBA_DEVICE void seek(std::int32_t token) {
    const Batch& batch = p_.batch;
    sequence_ += sequence_of(batch.q_starts + sequence_, batch.sequences - sequence_, token);
    q_end_ = batch.q_starts[sequence_ + 1];
    const std::int32_t first = batch.block_starts[sequence_],
                       keys = batch.k_starts[sequence_ + 1] - batch.k_starts[sequence_];
    before_ = keys - q_end_;
    blocks_ = static_cast<std::uint32_t>(batch.block_starts[sequence_ + 1] - first);
    shift_ = first - first_block_;
  }

  const PlanParams& p_;
  std::int32_t first_block_;
  std::uint32_t first_head_;
  std::int32_t sequence_ = 0, q_end_ = 0, before_ = 0, shift_ = 0;
  std::uint32_t blocks_ = 0;
};

/// Counts the selections of every block in a partition, a row per thread.
MOBA_KERNEL(kThreads, 4) count_kernel(MOBA_GRID_CONSTANT PlanParams p) {
  constexpr int kUnroll = 4;                                       // loads in flight
  auto* counts = reinterpret_cast<std::uint32_t*>(ptx::shared());  // [window]
  const Share share = share_of(p);
  if (ptx::block_x() == 0 && ptx::thread() == 0) {
    p.plan.arrivals[share.head] = 0;
    if (share.head == 0) p.plan.totals[Plan::kFull] = p.plan.totals[Plan::kPartial] = 0;
  }
  for (int i = ptx::thread(); i < share.blocks; i += kThreads) counts[i] = 0;
  ptx::syncthreads();
  Rows rows(p, share);
  const auto width = static_cast<int>(p.width.divisor);
  for (std::uint32_t index = share.first_row + static_cast<unsigned>(ptx::thread()); index < share.end_row;
       index += kThreads) {
    const Row row = rows.at(index);
    for (int first = 0; first < width; first += kUnroll) {
      std::int32_t blocks[kUnroll];
      MOBA_UNROLL
      for (int i = 0; i < kUnroll; ++i) blocks[i] = first + i < width ? row.selection[first + i] : -1;
      MOBA_UNROLL
      for (int i = 0; i < kUnroll; ++i) {
        const std::int32_t block = row.in_window(blocks[i], share.blocks);
        if (block >= 0) ptx::atomic_add(counts + block, 1);
      }
    }
  }
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
  ptx::syncthreads();
  if (ptx::thread() == 0) sums[0] = ptx::atomic_add_acq_rel(p.plan.arrivals + head, 1);
  ptx::syncthreads();
  const bool is_last = sums[0] + 1 == ptx::blocks_x();
  ptx::syncthreads();
  if (is_last) scan_blocks(p.offsets(head), p.max_blocks, sums);
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
MOBA_KERNEL(kThreads, 4) scatter_kernel(MOBA_GRID_CONSTANT PlanParams p) {
  constexpr int kUnroll = 4;
  constexpr std::uint32_t kOfWarp = kUnroll * ptx::kLanes, kRound = kWarps * kOfWarp;
  const Share share = share_of(p);
  const int warp = ptx::warp();
  for (std::int32_t first = (static_cast<std::int32_t>(ptx::block_x()) * kWarps + warp) * ptx::kLanes;
       first < p.max_blocks; first += static_cast<std::int32_t>(ptx::blocks_x()) * kThreads)
    list_tiles(p, static_cast<std::int32_t>(share.head), first);

  // Places of the next entries of the blocks.
  auto* cursors = reinterpret_cast<std::uint32_t*>(ptx::shared());  // [window]
  const std::uint32_t* offsets = p.offsets(share.head) + share.first_block;
  const std::uint32_t* counts = p.counts(share.head, share.partition) + share.first_block;
  for (int i = ptx::thread(); i < share.blocks; i += kThreads) cursors[i] = offsets[i] + counts[i];
  ptx::syncthreads();

  const std::uint32_t width = p.width.divisor, begin = share.first_row * width, end = share.end_row * width;
  std::uint32_t* entries = p.plan.entries + share.head * p.selections;
  Rows rows(p, share);
  for (std::uint32_t round = begin; round < end; round += kRound) {
    const std::uint32_t first =
        round + static_cast<unsigned>(warp) * kOfWarp + static_cast<unsigned>(ptx::lane());
    std::uint32_t chosen[kUnroll];
    std::int32_t blocks[kUnroll];
    Row row[kUnroll];
    MOBA_UNROLL
    for (int i = 0; i < kUnroll; ++i) {
      const bool exists = first + i * ptx::kLanes < end;
      const std::uint32_t index = exists ? first + i * ptx::kLanes : end - 1,
                          of_row = p.width.quotient(index);
      row[i] = rows.at(of_row);
      if (!exists) row[i].end = 0;
      blocks[i] = row[i].selection[index - of_row * width];
      chosen[i] = p.has_diagonal ? index + of_row : index;
    }
    // The first lane of those with the same block advances its cursor for all of them.
    unsigned alike[kUnroll], added[kUnroll];
    MOBA_UNROLL
    for (int i = 0; i < kUnroll; ++i) {
      blocks[i] = row[i].in_window(blocks[i], share.blocks);
      alike[i] = ptx::match_any(static_cast<std::uint32_t>(blocks[i]));
      const bool is_first = blocks[i] >= 0 && ptx::lowest_set_bit(alike[i]) == ptx::lane();
      added[i] = is_first ? static_cast<unsigned>(ptx::popc(alike[i])) : 0;
    }
    // After the warps before, and the selections before.
    std::uint32_t cursor[kUnroll];
    if (warp > 0 || round > begin) ptx::bar_sync(1 + warp, 2 * ptx::kLanes);
    MOBA_UNROLL
    for (int i = 0; i < kUnroll; ++i) {
      cursor[i] = ptx::atomic_add_nonzero(cursors + blocks[i], added[i]);
      ptx::syncwarp();
    }
    if (warp + 1 < kWarps || end - round > kRound) ptx::bar_arrive(1 + (warp + 1) % kWarps, 2 * ptx::kLanes);
    MOBA_UNROLL
    for (int i = 0; i < kUnroll; ++i) {
      const std::uint32_t at = ptx::shfl(cursor[i], ptx::lowest_set_bit(alike[i]));
      const auto rank = static_cast<unsigned>(ptx::popc(alike[i] & ((1U << ptx::lane()) - 1)));
      if (blocks[i] >= 0) entries[at + rank] = chosen[i];
    }
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
  const std::int64_t heads = slice.heads(), blocks = call.max_blocks();
  const std::int64_t windows = divide_up(blocks, kMaxWindow), window = divide_up(blocks, windows);
  const PlanParams params{
      .plan = plan,
      .batch = batch,
      .selection = selection.blocks + (slice.token0 - selection.token0) * selection.stride,
      .head_stride = selection.tokens * selection.stride,
      .first_head = static_cast<std::uint32_t>(slice.head0 * call.heads_per_kv - selection.head0),
      .token_stride = static_cast<std::uint32_t>(selection.stride),
      .rows = static_cast<std::uint32_t>(call.rows(slice)),
      .selections = static_cast<std::uint32_t>(call.rows(slice) * call.width()),
      .partition_rows = static_cast<std::uint32_t>(partition_rows(call)),
      .partitions = static_cast<std::int32_t>(partitions_of(call, slice)),
      .windows = static_cast<std::int32_t>(windows),
      .window = static_cast<std::int32_t>(window),
      .max_blocks = static_cast<std::int32_t>(blocks),
      .token0 = static_cast<std::int32_t>(slice.token0),
      .width = Divisor(call.width()),
      .heads_per_kv = Divisor(call.heads_per_kv),
      .heads_per_row = Divisor(selection.heads_per_row),
      .block_size = Divisor(std::min(call.routing.block_size, kMaxPosition)),
      .causal = call.routing.causal,
      .has_diagonal = call.has_diagonal()};
  const Grid shares{params.partitions * windows, heads};
  const std::size_t shared = static_cast<std::size_t>(window) * sizeof(std::uint32_t);
  stream.launch("count", count_kernel, shares, kThreads, shared, params);
  stream.launch("scan", scan_kernel, {divide_up(blocks, kThreads), heads}, kThreads,
                kWarps * sizeof(std::uint32_t), params);
  stream.launch("scatter", scatter_kernel, shares, kThreads, shared, params);
}

}  // namespace moba::cuda
