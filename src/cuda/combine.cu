// Merges partial outputs in the order of their ranks: out = sum of 2^(lse_i - lse) out_i.
#include <limits>

#include "cuda/attend.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/warp.h"

namespace moba::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kElements = 8;
constexpr int kLoads = 4;  // slots of a row in flight

template <typename T>
struct CombineParams {
  const T* partials;         // [heads, rows * ranks, D]
  const float* partial_lse;  // [heads, rows * ranks]
  SelectionRows selection;
  Batch batch;
  std::int64_t block_size;
  bool causal;
  bool is_selected;  // by the caller, who may list blocks that the plan left out
  std::int64_t rows, width, ranks, heads_per_kv, head0, token0, tokens;
  View<T> out;
  float* lse;  // [Hq, Tq], may be null
};

/// Merges the slots of a row. head_dim / kElements threads share a row.
template <typename T, int head_dim>
MOBA_KERNEL(kThreads, 8)
combine_kernel(MOBA_GRID_CONSTANT CombineParams<T> p) {
  constexpr int kColumns = head_dim / kElements, kRows = kThreads / kColumns;
  const std::int64_t head = ptx::block_y();
  const std::int64_t row = std::int64_t{ptx::block_x()} * kRows + ptx::thread() / kColumns;
  const int column = ptx::thread() % kColumns;
  if (ptx::thread() >= kRows * kColumns || row >= p.rows) return;

  const std::int64_t token = p.token0 + row / p.heads_per_kv,
                     q_head = (p.head0 + head) * p.heads_per_kv + row % p.heads_per_kv;
  // Slots after the last block that was selected by score are empty; after that block, a causal row holds its
  // own. The diagonal slot is always filled.
  const std::int32_t* selected = p.selection.of(q_head, token) + (p.causal && !p.is_selected ? 1 : 0);
  std::int64_t end = std::numeric_limits<std::int32_t>::max();
  if (p.is_selected) {
    const auto packed = static_cast<std::int32_t>(token);
    const std::int32_t s = sequence_of(p.batch.q_starts, p.batch.sequences, packed);
    end = scored_end(p.batch, s, packed, p.block_size, p.causal);
  }
  const std::int64_t first = (head * p.rows + row) * p.ranks;
  const auto load_lse = [&](float(&lse)[kLoads], std::int64_t rank) {
    bool filled[kLoads];
    MOBA_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const std::int64_t r = rank + i;
      const std::int32_t block = selected[r < p.width ? r : 0];
      filled[i] = r == p.width || (block >= 0 && block < end);
    }
    MOBA_UNROLL
    for (int i = 0; i < kLoads; ++i)
      lse[i] = filled[i] && rank + i < p.ranks ? p.partial_lse[first + rank + i] : -ptx::infinity();
  };
  float lse[kLoads], max_lse = -ptx::infinity();
  for (std::int64_t rank = 0; rank < p.ranks; rank += kLoads) {
    load_lse(lse, rank);
    MOBA_UNROLL
    for (int i = 0; i < kLoads; ++i) max_lse = ptx::fmax(max_lse, lse[i]);
  }
  const float base = max_lse == -ptx::infinity() ? 0 : max_lse;

  float sum = 0, out[kElements] = {};
  for (std::int64_t rank = 0; rank < p.ranks; rank += kLoads) {
    ptx::Vec16 loaded[kLoads];
    load_lse(lse, rank);
    MOBA_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      loaded[i] = {0, 0, 0, 0};
      if (lse[i] != -ptx::infinity())
        loaded[i] = ptx::load_streaming(p.partials + (first + rank + i) * head_dim + column * kElements);
    }
    MOBA_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const float weight = ptx::exp2((lse[i] - base) * kLog2E);
      sum += weight;
      const std::uint32_t pairs[] = {loaded[i].x, loaded[i].y, loaded[i].z, loaded[i].w};
      MOBA_UNROLL
      for (int j = 0; j < 4; ++j) {
        out[2 * j] = ptx::fma(weight, ptx::unpack_low<T>(pairs[j]), out[2 * j]);
        out[2 * j + 1] = ptx::fma(weight, ptx::unpack_high<T>(pairs[j]), out[2 * j + 1]);
      }
    }
  }

  const float share = sum == 0 ? 0 : 1 / sum;
  auto* to = reinterpret_cast<ptx::Vec16*>(p.out.row(token, q_head) + column * kElements);
  *to = {ptx::pack<T>(out[0] * share, out[1] * share), ptx::pack<T>(out[2] * share, out[3] * share),
         ptx::pack<T>(out[4] * share, out[5] * share), ptx::pack<T>(out[6] * share, out[7] * share)};
  if (column == 0 && p.lse != nullptr) p.lse[q_head * p.tokens + token] = base + kLn2 * ptx::log2(sum);
}

}  // namespace

Partials carve_partials(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice) {
  if (!call.is_routed()) return {};
  const std::int64_t slots = slice.heads() * call.rows(slice) * call.ranks();
  return {layout.take<std::uint16_t>(slots * call.head_dim), layout.take<float>(slots)};
}

void combine(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
             const SelectionRows& selection, const Partials& partials, const Outputs& outputs) {
  if (!call.merges()) return;
  with_type(call, [&]<typename T, int head_dim>() {
    const CombineParams<T> params{.partials = static_cast<const T*>(partials.out),
                                  .partial_lse = partials.lse,
                                  .selection = selection,
                                  .batch = batch,
                                  .block_size = call.routing.block_size,
                                  .causal = call.routing.causal,
                                  .is_selected = call.is_selected(),
                                  .rows = call.rows(slice),
                                  .width = call.width(),
                                  .ranks = call.ranks(),
                                  .heads_per_kv = call.heads_per_kv,
                                  .head0 = slice.head0,
                                  .token0 = slice.token0,
                                  .tokens = call.tokens,
                                  .out = view_of<T>(outputs.out),
                                  .lse = outputs.lse};
    constexpr int kRows = kThreads / (head_dim / kElements);
    stream.launch("combine", combine_kernel<T, head_dim>, {divide_up(call.rows(slice), kRows), slice.heads()},
                  kThreads, 0, params);
  });
}

}  // namespace moba::cuda
