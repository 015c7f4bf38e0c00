// Inverts the selection: count, scan, stable scatter. The selections of a head are split into partitions of
// consecutive rows, and a warp scatters its partition in order, so that the entries of a block ascend
// without a sort.
#include <algorithm>

#include "cuda/plan.h"
#include "cuda/ptx/atomic.h"
#include "cuda/tile/scan.h"

namespace moba::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMinPartition = 2048;

/// Selections that a warp scatters: at least as many as there are blocks, so that the counts take no more
/// memory than the selections.
std::int64_t partition_size(const DeviceCall& call) {
  return std::max(kMinPartition, divide_up(call.max_blocks(), ptx::kLanes) * ptx::kLanes);
}
std::int64_t partitions_of(const DeviceCall& call, const WorkSlice& slice) {
  return divide_up(call.rows(slice) * call.width(), partition_size(call));
}

struct PlanParams {
  Plan plan;
  Batch batch;
  SelectionRows selection;
  std::int64_t head0, rows, width, ranks, heads_per_kv, block_size;
  std::int64_t max_blocks, partitions, partition_size;
  std::int32_t token0;
  bool causal;
};

/// Returns the packed block that entry `index % width` of row `index / width` of a head holds. Returns -1 for
/// padding, for the row's own block, and for what is no block of the row.
MOBA_DEVICE std::int32_t scored_block(const PlanParams& p, std::int64_t head, std::int64_t index) {
  const std::int64_t row = index / p.width, q_head = (p.head0 + head) * p.heads_per_kv + row % p.heads_per_kv;
  const auto token = static_cast<std::int32_t>(p.token0 + row / p.heads_per_kv);
  const std::int32_t block = p.selection.of(q_head, token)[index % p.width];
  if (block < 0) return -1;
  const std::int32_t s = sequence_of(p.batch.q_starts, p.batch.sequences, token);
  if (block >= scored_end(p.batch, s, token, p.block_size, p.causal)) return -1;
  return p.batch.block_starts[s] + block;
}

MOBA_KERNEL(kThreads, 4) count_kernel(MOBA_GRID_CONSTANT PlanParams p) {
  const std::int64_t head = ptx::block_y();
  const std::int64_t index = std::int64_t{ptx::block_x()} * kThreads + ptx::thread();
  if (index >= p.rows * p.width) return;
  const std::int32_t block = scored_block(p, head, index);
  if (block >= 0)
    ptx::atomic_add(p.plan.counts + (head * p.partitions + index / p.partition_size) * p.max_blocks + block,
                    1);
}

/// Replaces the counts of a block in every partition by exclusive prefix sums; returns the total.
MOBA_DEVICE std::uint32_t scan_partitions(const PlanParams& p, std::int64_t head, std::int64_t block) {
  constexpr int kUnroll = 8;  // loads in flight
  std::uint32_t* counts = p.plan.counts + head * p.partitions * p.max_blocks + block;
  std::uint32_t sum = 0;
  for (std::int64_t first = 0; first < p.partitions; first += kUnroll) {
    std::uint32_t loaded[kUnroll];
    MOBA_UNROLL
    for (int i = 0; i < kUnroll; ++i)
      loaded[i] = first + i < p.partitions ? counts[(first + i) * p.max_blocks] : 0;
    MOBA_UNROLL
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i < p.partitions) counts[(first + i) * p.max_blocks] = sum;
      sum += loaded[i];
    }
  }
  return sum;
}

/// Writes the sizes of blocks to offsets[block + 1], to be summed.
MOBA_KERNEL(kThreads, 4) size_kernel(MOBA_GRID_CONSTANT PlanParams p) {
  const std::int64_t head = ptx::block_y();
  const std::int64_t block = std::int64_t{ptx::block_x()} * kThreads + ptx::thread();
  if (block >= p.max_blocks) return;
  p.plan.offsets[head * (p.max_blocks + 1) + block + 1] = scan_partitions(p, head, block);
}

/// Sums the sizes of the blocks of a head and lists its routed tiles.
MOBA_KERNEL(kThreads, 1) list_kernel(MOBA_GRID_CONSTANT PlanParams p) {
  auto* sums = reinterpret_cast<std::uint32_t*>(ptx::shared());
  const auto head = static_cast<std::int32_t>(ptx::block_y());
  std::uint32_t* offsets = p.plan.offsets + head * (p.max_blocks + 1);
  const std::int32_t blocks = p.batch.block_starts[p.batch.sequences];
  std::uint32_t before = 0;
  if (ptx::thread() == 0) offsets[0] = 0;
  for (std::int32_t first = 0; first < blocks; first += kThreads) {
    const std::int32_t block = first + ptx::thread();
    const std::uint32_t size = block < blocks ? offsets[block + 1] : 0;
    const auto scanned = tile::scan<kThreads>(size, sums);
    const std::uint32_t begin = before + scanned.before;
    before += scanned.total;
    if (block >= blocks) continue;
    offsets[block + 1] = begin + size;
    const std::uint32_t full = size / kTileRows, left = size % kTileRows;
    RoutedTile* tiles = p.plan.full + ptx::atomic_add(p.plan.totals + Plan::kFull, full);
    for (std::uint32_t i = 0; i < full; ++i) tiles[i] = {head, block, begin + i * kTileRows, kTileRows};
    if (left > 0)
      p.plan.partial[ptx::atomic_add(p.plan.totals + Plan::kPartial, 1)] = {head, block,
                                                                            begin + full * kTileRows, left};
  }
}

/// Scatters the selections of one partition per warp, 32 at a time, stably by block.
MOBA_KERNEL(kThreads, 4) scatter_kernel(MOBA_GRID_CONSTANT PlanParams p) {
  constexpr std::uint32_t kNone = 0xFFFFFFFFU;
  const std::int64_t head = ptx::block_y();
  const std::int64_t partition = std::int64_t{ptx::block_x()} * (kThreads / ptx::kLanes) + ptx::warp();
  if (partition >= p.partitions) return;
  const std::uint32_t* offsets = p.plan.offsets + head * (p.max_blocks + 1);
  std::uint32_t* cursors = p.plan.counts + (head * p.partitions + partition) * p.max_blocks;
  std::uint32_t* entries = p.plan.entries + head * p.rows * p.width;
  const std::int64_t begin = partition * p.partition_size, all = p.rows * p.width;
  const std::int64_t end = begin + p.partition_size < all ? begin + p.partition_size : all;
  const unsigned below = (1U << ptx::lane()) - 1;
  for (std::int64_t first = begin; first < end; first += ptx::kLanes) {
    const std::int64_t index = first + ptx::lane();
    const std::int32_t block = index < end ? scored_block(p, head, index) : -1;
    const unsigned alike = ptx::match_any(block < 0 ? kNone : static_cast<std::uint32_t>(block));
    std::uint32_t cursor = 0;
    if (block >= 0) cursor = cursors[block];
    ptx::syncwarp();  // all have read before the first of each writes
    if (block >= 0) {
      const unsigned rank = static_cast<unsigned>(ptx::popc(alike & below));
      if (rank == 0) cursors[block] = cursor + static_cast<unsigned>(ptx::popc(alike));
      entries[offsets[block] + cursor + rank] =
          static_cast<std::uint32_t>(index / p.width * p.ranks + index % p.width);
    }
    ptx::syncwarp();
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
  plan.full = layout.take<RoutedTile>(heads * (choices / kTileRows));
  plan.partial = layout.take<RoutedTile>(heads * blocks);
  return plan;
}

void plan(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
          const SelectionRows& selection, const Plan& plan) {
  stream.fill(plan.totals, 0, Plan::kTotals * sizeof(std::uint32_t));
  if (call.width() == 0) return;
  const PlanParams params{.plan = plan,
                          .batch = batch,
                          .selection = selection,
                          .head0 = slice.head0,
                          .rows = call.rows(slice),
                          .width = call.width(),
                          .ranks = call.ranks(),
                          .heads_per_kv = call.heads_per_kv,
                          .block_size = call.routing.block_size,
                          .max_blocks = call.max_blocks(),
                          .partitions = partitions_of(call, slice),
                          .partition_size = partition_size(call),
                          .token0 = static_cast<std::int32_t>(slice.token0),
                          .causal = call.routing.causal};
  const std::int64_t heads = slice.heads();
  stream.fill(
      plan.counts, 0,
      static_cast<std::size_t>(heads * params.partitions * params.max_blocks) * sizeof(std::uint32_t));
  stream.launch("count", count_kernel, {divide_up(params.rows * params.width, kThreads), heads}, kThreads, 0,
                params);
  stream.launch("size", size_kernel, {divide_up(params.max_blocks, kThreads), heads}, kThreads, 0, params);
  stream.launch("list", list_kernel, {1, heads}, kThreads, kThreads / ptx::kLanes * sizeof(std::uint32_t),
                params);
  stream.launch("scatter", scatter_kernel, {divide_up(params.partitions, kThreads / ptx::kLanes), heads},
                kThreads, 0, params);
}

}  // namespace moba::cuda
