#pragma once

#include "cuda/attend_backward.h"
#include "cuda/attend_work_tiles.h"

/// Parameters, row table and epilogue of the dq kernels, which compute the forward's work tiles.
namespace moba::cuda {

template <typename T>
struct DqParams {
  AttendParams<T> attend;  // `out` and `partials` receive dq
  View<const T> d_out;
  const LseDelta* lse_delta;  // [heads, lse_delta_rows], of rows from the slice's first on
  std::int64_t lse_delta_rows;
  float scale, log2_scale;  // the latter for powers of 2
};

template <typename T>
DqParams<T> dq_params(const DeviceCall& call, const WorkSlice& slice, const Batch& batch, const Plan& plan,
                      const LseDelta* lse_delta, const Backward& backward, void* slots) {
  return {
      .attend = attend_params<T>(call, slice, batch, plan, {.out = slots}, {.out = backward.gradients.dq}),
      .d_out = view_of<const T>(backward.d_out),
      .lse_delta = lse_delta,
      .lse_delta_rows = call.tokens * call.heads_per_kv,
      .scale = call.scale,
      .log2_scale = call.scale * kLog2E};
}

/// Fills row `r` of the table of a work tile in shared memory. `slot` is that of the row.
template <typename T, typename Table>
MOBA_DEVICE void store_row(const DqParams<T>& p, const WorkTile& work, Table&& table, int r,
                           std::uint32_t slot) {
  const WorkRow row = row_of(p.attend, work, slot);
  const std::uint32_t q_row = p.attend.by_ranks.quotient(row.slot);
  const bool exists = row.q_offset != kNoRow;
  table.q_offsets[r] = row.q_offset;
  table.d_out_offsets[r] = exists ? row_offset(p.attend, p.d_out, work.head, q_row) : kNoRow;
  table.lse_delta[r] =
      exists ? p.lse_delta[work.head * p.lse_delta_rows + q_row] : LseDelta{ptx::infinity(), 0};
  table.bounds[r] = visible_at(p.attend, work, r);
  table.slots[r] = row.slot;
}

/// Adds the poison of the keys to dS, before the mask.
template <int row_tiles, int key_tiles>
MOBA_DEVICE void add_poison(float (&ds)[row_tiles][key_tiles][4], const float* poison) {
  MOBA_UNROLL
  for (int i = 0; i < row_tiles; ++i) {
    MOBA_UNROLL
    for (int j = 0; j < key_tiles; ++j) {
      MOBA_UNROLL
      for (int e = 0; e < 4; ++e) ds[i][j][e] += poison[8 * j + ptx::lane() % 4 * 2 + e % 2];
    }
  }
}

/// Writes this warp's rows of dq from 16-byte vector `first_vec` on, through its rows of q's shared memory.
template <int head_dim, typename T, typename Rows, int row_tiles, int column_tiles>
MOBA_DEVICE void store_dq(const DqParams<T>& p, const Rows& q, const std::uint32_t* slots,
                          const WorkTile& work, const float (&dq)[row_tiles][column_tiles][4], int warp_row,
                          int first_vec = 0) {
  const int lane = ptx::opaque(ptx::lane());
  MOBA_UNROLL
  for (int i = 0; i < row_tiles; ++i) {
    MOBA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * i + 8 * half + lane / 4;
      MOBA_UNROLL
      for (int j = 0; j < column_tiles; ++j) {
        auto* to = reinterpret_cast<std::uint32_t*>(q.vec(row, first_vec + j)) + lane % 4;
        *to = ptx::pack<T>(dq[i][j][2 * half] * p.scale, dq[i][j][2 * half + 1] * p.scale);
      }
    }
  }
  store_rows<head_dim, row_tiles, column_tiles>(p.attend, q, slots, work, warp_row, first_vec);
}

}  // namespace moba::cuda
