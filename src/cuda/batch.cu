// Uploads the sequences' offsets and computes prefix sums of their blocks and query tiles.
#include <algorithm>

#include "cuda/stages.h"
#include "cuda/tile/scan.h"

namespace moba::cuda {
namespace {

constexpr int kThreads = 256;

/// Words per launch: kernel parameters are limited to 4 KiB.
constexpr int kWordsOfALaunch = 960;

struct UploadParams {
  std::int32_t* to;
  std::int32_t count;
  std::int32_t words[kWordsOfALaunch];
};

MOBA_KERNEL(kThreads, 1) upload_kernel(MOBA_GRID_CONSTANT UploadParams p) {
  for (int i = ptx::thread(); i < p.count; i += kThreads) p.to[i] = p.words[i];
}

struct LayOutParams {
  Batch batch;
  std::int64_t block_size, heads_per_kv;
  std::int32_t token0, token1;
  std::int32_t *block_starts, *tile_starts;  // [sequences + 1]
};

MOBA_KERNEL(kThreads, 1) lay_out_kernel(MOBA_GRID_CONSTANT LayOutParams p) {
  auto* sums = reinterpret_cast<std::int32_t*>(ptx::shared());
  std::int32_t blocks_before = 0, tiles_before = 0;
  for (std::int32_t first = 0; first < p.batch.sequences; first += kThreads) {
    const std::int32_t s = first + ptx::thread();
    std::int32_t blocks = 0, tiles = 0;
    if (s < p.batch.sequences) {
      const KeyRange queries = queries_of(p.batch, s, p.token0, p.token1);
      blocks =
          static_cast<std::int32_t>(divide_up(p.batch.k_starts[s + 1] - p.batch.k_starts[s], p.block_size));
      tiles = tiles_of(queries, p.heads_per_kv);
    }
    const auto scanned_blocks = tile::scan<kThreads>(blocks, sums);
    const auto scanned_tiles = tile::scan<kThreads>(tiles, sums);
    if (s < p.batch.sequences) {
      p.block_starts[s] = blocks_before + scanned_blocks.before;
      p.tile_starts[s] = tiles_before + scanned_tiles.before;
    }
    blocks_before += scanned_blocks.total;
    tiles_before += scanned_tiles.total;
  }
  if (ptx::thread() == 0) {
    p.block_starts[p.batch.sequences] = blocks_before;
    p.tile_starts[p.batch.sequences] = tiles_before;
  }
}

void upload(Stream& stream, const std::int32_t* from, std::int64_t count, std::int32_t* to) {
  for (std::int64_t done = 0; done < count; done += kWordsOfALaunch) {
    UploadParams params{
        .to = to + done,
        .count = static_cast<std::int32_t>(std::min<std::int64_t>(kWordsOfALaunch, count - done)),
        .words = {}};
    std::copy_n(from + done, params.count, params.words);
    stream.launch("upload", upload_kernel, {}, kThreads, 0, params);
  }
}

}  // namespace

Starts carve_starts(ArenaLayout& layout, const DeviceCall& call, const DeviceBatch& batch) {
  const std::int64_t count = call.sequences + 1;
  Starts starts;
  if (!batch.on_device) {
    starts.q = layout.take<std::int32_t>(count);
    starts.k = layout.take<std::int32_t>(count);
  }
  starts.blocks = layout.take<std::int32_t>(count);
  starts.tiles = layout.take<std::int32_t>(count);
  return starts;
}

Batch lay_out(Stream& stream, const DeviceCall& call, const DeviceBatch& batch, const WorkSlice& slice,
              const Starts& starts) {
  Batch on_device{.sequences = static_cast<std::int32_t>(call.sequences),
                  .q_starts = batch.q_starts,
                  .k_starts = batch.k_starts,
                  .block_starts = starts.blocks,
                  .tile_starts = starts.tiles};
  if (!batch.on_device) {
    upload(stream, batch.q_starts, call.sequences + 1, starts.q);
    upload(stream, batch.k_starts, call.sequences + 1, starts.k);
    on_device.q_starts = starts.q;
    on_device.k_starts = starts.k;
  }
  const LayOutParams params{.batch = on_device,
                            .block_size = call.routing.block_size,
                            .heads_per_kv = call.heads_per_kv,
                            .token0 = static_cast<std::int32_t>(slice.token0),
                            .token1 = static_cast<std::int32_t>(slice.token1),
                            .block_starts = starts.blocks,
                            .tile_starts = starts.tiles};
  stream.launch("lay_out", lay_out_kernel, {}, kThreads, kThreads / ptx::kLanes * sizeof(std::int32_t),
                params);
  return on_device;
}

}  // namespace moba::cuda
