// Scores and top-k, fused: a worker takes a few hundred rows, visits the block means one panel at a time, and
// keeps each row's best blocks in a short sorted list. Most scores are dismissed by one comparison against
// the worst of the list; no matrix of scores is stored. With many candidates the scores are first bounded in
// int8 (gate_int8.h), and only the blocks whose bounds overlap the top-k are scored in f32.
#include <cstdlib>
#include <string_view>

#include "cpu/gate_int8.h"
#include "cpu/gate_task.h"
#include "cpu/sizes.h"
#include "cpu/stages.h"
#include "cpu/topk.h"
#include "number.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/gate.cpp"
#include <hwy/foreach_target.h>
// foreach_target first
#include <hwy/highway.h>

#include "cpu/gate_int8-inl.h"
#include "cpu/gate_rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

void score_exactly(GateRows& rows, TileScratch& tile, float* packed) {
  for (std::int64_t begin = 0; begin < rows.last_block(); begin += kTileBlocks) {
    const std::int64_t count = std::min(kTileBlocks, rows.last_block() - begin);
    const auto mean = [&](std::size_t i, float*) { return rows.mean(begin + static_cast<std::int64_t>(i)); };
    pack_transposed(static_cast<std::size_t>(count), rows.depth(), mean, tile.f32_rows, packed);
    for_tiles(rows, static_cast<std::int64_t>(kTileRows), [&](std::int64_t from, std::int64_t to) HWY_ATTR {
      const std::int64_t columns = std::min(rows.candidates[to - 1].last - begin, count);
      if (columns <= 0) return;
      for (std::int64_t row = from; row < to; ++row) {
        load_f32(rows.query(row), rows.call.q.dtype, rows.depth(), 1.0F,
                 tile.rows + static_cast<std::size_t>(row - from) * kRowStride);
        rows.prefetch_query(row + to - from);
      }
      for (std::size_t panel = 0; panel < panels(static_cast<std::size_t>(columns)); ++panel) {
        kScoreTiles[static_cast<std::size_t>(to - from - 1)](tile.rows, packed + panel * rows.depth() * kCols,
                                                             rows.depth(), tile.scores + panel * kCols);
      }
      for (std::int64_t row = from; row < to; ++row) {
        Candidates& c = rows.candidates[row];
        const std::int64_t first = std::max(c.first, begin), last = std::min(c.last, begin + count);
        if (first >= last || c.k == 0) continue;
        TopK topk = rows.topk(row);
        push_all(tile.scores + static_cast<std::size_t>(row - from) * kScoreStride + (first - begin), first,
                 last, c.own, topk);
        c.count = topk.count;
      }
    });
  }
}

}  // namespace

/// `memory` holds gate_bytes() bytes.
void gate_rows(const Call& call, const BlockMeans& means, const GateTask& task,
               const SliceSelection& selection, std::byte* memory) {
  const auto take = [&memory](auto* /*type*/ kind, std::int64_t count) {
    auto* taken = reinterpret_cast<decltype(kind)>(memory);
    memory += round_up(static_cast<std::size_t>(count) * sizeof(*kind), Scratch::kAlignment);
    return taken;
  };
  const SequenceView& sequence = call.sequences[task.sequence];
  const std::int64_t count = (task.q1 - task.q0) * call.heads_per_kv, width = call.width();
  TileScratch& tile = *take(static_cast<TileScratch*>(nullptr), 1);
  float* packed = take(static_cast<float*>(nullptr), kTileBlocks * call.head_dim);
  GateRows rows{call,
                means,
                task,
                sequence,
                width,
                count,
                selection,
                take(static_cast<float*>(nullptr), count * width),
                take(static_cast<Candidates*>(nullptr), count)};
  std::fill(std::begin(tile.f32_rows), std::end(tile.f32_rows), 0.0F);
  rows.take_all();
  if (task.screened == nullptr) {
    score_exactly(rows, tile, packed);
  } else {
    const auto depth = static_cast<std::int64_t>(ScreenedMeans::depth(call.head_dim));
    const ScreenMemory screen{
        take(static_cast<std::uint8_t*>(nullptr), (count + static_cast<std::int64_t>(kTileCapacity)) * depth),
        take(static_cast<ScreenState*>(nullptr), count),
        take(static_cast<float*>(nullptr), count * width),
        take(static_cast<std::int32_t*>(nullptr), count * width),
        take(static_cast<std::int32_t*>(nullptr), count * kMaxSurvivors),
        take(static_cast<float*>(nullptr), count * kMaxSurvivors)};
    score_screened(rows, screen, tile, packed);
  }
  rows.finish();
}

/// Rounds means [panel * kMatrixCols, + kMatrixCols) of `blocks` into their panel.
void round_means(const float* means, std::int64_t stride, std::int64_t blocks, std::int64_t head_dim,
                 std::int64_t panel, const ScreenedMeans& out) {
  const std::size_t depth = ScreenedMeans::depth(head_dim);
  std::int8_t* to = out.panels + static_cast<std::size_t>(panel) * depth * kMatrixCols;
  std::fill(to, to + depth * kMatrixCols, std::int8_t{0});
  alignas(64) float values[kMaxHeadDim];
  alignas(64) std::int32_t levels[kMaxHeadDim];
  for (std::size_t column = 0; column < kMatrixCols; ++column) {
    const std::int64_t block =
        panel * static_cast<std::int64_t>(kMatrixCols) + static_cast<std::int64_t>(column);
    Rounded rounded;
    std::int32_t sum = 0;
    if (block < blocks) {
      std::copy_n(means + block * stride, head_dim, values);
      rounded = round_to_int8(values, static_cast<std::size_t>(head_dim), levels);
      for (std::size_t i = 0; i < static_cast<std::size_t>(head_dim); ++i) {
        const std::int32_t level = std::clamp(levels[i], -127, 127);
        to[(i / 4 * kMatrixCols + column) * 4 + i % 4] = static_cast<std::int8_t>(level);
        sum += level;
      }
    }
    out.scale[block] = rounded.scale;
    out.norm[block] = rounded.norm * 1.001F;
    out.error[block] = rounded.error * 1.001F + rounded.norm * 0x1p-20F;
    out.offset[block] = 128 * sum;
  }
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {

HWY_EXPORT(gate_rows);
HWY_EXPORT(round_means);

namespace {

/// Returns the number of candidates from which a sequence is screened in int8; MOBA_CPU_GATE (f32, int8)
/// decides for all.
std::int64_t screen_from() {
  constexpr std::int64_t kNeverScreen = std::numeric_limits<std::int64_t>::max();
  const char* forced = std::getenv("MOBA_CPU_GATE");
  const std::string_view wanted = forced == nullptr ? "" : forced;
  if (wanted == "f32" || int8_tiles() == nullptr) return kNeverScreen;
  return wanted == "int8" ? 1 : kScreenFrom;
}

std::int64_t candidate_count(const Call& call, const SequenceView& s) {
  return call.needs_scores() ? call.candidate_blocks(s) : 0;
}

std::int64_t rows_of_task(const Call& call, bool screened) {
  return std::max(screened ? kScreenRows : kGateRows, call.heads_per_kv);
}

}  // namespace

std::size_t screened_bytes(const Call& call, std::int64_t heads) {
  std::size_t bytes = 0;
  for (const SequenceView& s : call.sequences) {
    if (candidate_count(call, s) >= screen_from())
      bytes += ScreenedMeans::bytes(candidate_count(call, s), call.head_dim);
  }
  return bytes * static_cast<std::size_t>(heads);
}

std::size_t gate_bytes(const Call& call) {
  if (!call.needs_scores()) return 0;
  const auto width = static_cast<std::size_t>(call.width()),
             head_dim = static_cast<std::size_t>(call.head_dim);
  const bool screened = screened_bytes(call, 1) > 0;
  // Beside screened sequences there may be others in the same batch, with more rows a task.
  const auto rows = static_cast<std::size_t>(rows_of_task(call, false));
  std::size_t bytes = sizeof(TileScratch) + kKeyTileSize * head_dim * sizeof(float) +
                      rows * (width * sizeof(float) + sizeof(Candidates));
  if (screened) {
    const auto few = static_cast<std::size_t>(rows_of_task(call, true)),
               survivors = static_cast<std::size_t>(kMaxSurvivors);
    bytes += (few + kTileCapacity) * ScreenedMeans::depth(call.head_dim) +
             few * (64 + (width + survivors) * 2 * sizeof(float));
  }
  return round_up(bytes, Scratch::kAlignment) + 16 * Scratch::kAlignment;
}

void gate(const Call& call, const BlockMeans& means, const SliceSelection& selection, Context& context) {
  const WorkSlice& slice = selection.slice;
  const Buffer<std::byte> screened_memory(context.scratch,
                                          static_cast<std::int64_t>(screened_bytes(call, slice.heads())));
  std::vector<ScreenedMeans> screened(call.sequences.size() * static_cast<std::size_t>(slice.heads()));
  std::vector<GateTask> tasks;
  std::byte* next = screened_memory.data();
  for (std::int64_t head = slice.head0; head < slice.head1; ++head) {
    for (std::size_t s = 0; s < call.sequences.size(); ++s) {
      const std::int64_t blocks = candidate_count(call, call.sequences[s]);
      ScreenedMeans* rounded = nullptr;
      if (blocks >= screen_from()) {
        rounded = &screened[static_cast<std::size_t>(head - slice.head0) * call.sequences.size() + s];
        *rounded = ScreenedMeans::in(next, blocks, call.head_dim);
        next += ScreenedMeans::bytes(blocks, call.head_dim);
        const auto round = &HWY_DYNAMIC_DISPATCH(round_means);
        const auto panel_count = static_cast<std::int64_t>(ScreenedMeans::padded(blocks) / kMatrixCols);
        context.parallel.run(panel_count, [&](std::int64_t panel, int) {
          round(means.of(s, head), means.block_stride, blocks, call.head_dim, panel, *rounded);
        });
      }
      const std::int64_t step =
          std::max<std::int64_t>(rows_of_task(call, rounded != nullptr) / call.heads_per_kv, 1);
      const auto [first, last] = slice.queries_of(call.sequences[s]);
      // Later queries have more candidates: begin with them.
      for (std::int64_t q1 = last; q1 > first; q1 -= step)
        tasks.push_back({s, head, std::max(q1 - step, first), q1, rounded});
    }
  }
  const std::size_t bytes = gate_bytes(call);
  const Buffer<std::byte> memory(context.scratch,
                                 context.parallel.threads * static_cast<std::int64_t>(bytes));
  const auto run = &HWY_DYNAMIC_DISPATCH(gate_rows);
  context.parallel.run(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t index, int worker) {
    run(call, means, tasks[static_cast<std::size_t>(index)], selection,
        memory.data() + static_cast<std::size_t>(worker) * bytes);
  });
}

}  // namespace moba::cpu
#endif
