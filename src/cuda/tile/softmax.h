#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cuda/ptx/convert.h"
#include "cuda/ptx/warp.h"

namespace moba::cuda::tile {

/// Reductions over the four lanes that hold a row of an accumulator.
MOBA_DEVICE float row_max_of(float value) {
  value = ptx::fmax(value, ptx::shfl_xor(value, 1));
  return ptx::fmax(value, ptx::shfl_xor(value, 2));
}
MOBA_DEVICE float row_sum_of(float value) {
  value += ptx::shfl_xor(value, 1);
  return value + ptx::shfl_xor(value, 2);
}

/// Scale of the softmax: logit = sign * product, weight = 2^(scale * logit - max). `scale` is never 0, so
/// that -inf stays -inf.
struct Scale {
  float scale = 1;
  bool negate = false;
};

/// Converts a softmax scale to base 2. A scale of 0 becomes the smallest positive one, which keeps masked
/// logits at -inf.
inline Scale scale_of(float scale) {
  return {.scale = std::max(std::fabs(scale) * kLog2E, FLT_MIN), .negate = scale < 0};
}

/// Online softmax of the rows of `row_tiles` tiles: rows lane / 4 and lane / 4 + 8 of each. Weights are
/// relative to `row_max`, which follows the running maximum only when that exceeds it by a factor of 2^8:
/// most tiles then need no rescaling of what was summed (FlashAttention-4), and weights stay below 2^8.
template <int row_tiles>
struct Softmax {
  static constexpr float kMaxExponent = 8;

  float row_max[row_tiles][2];  // of the unscaled logits
  float row_sum[row_tiles][2];  // partial, of this lane's columns
  float rescale[row_tiles][2];  // factors of earlier weights after the last update

  MOBA_DEVICE void init() {
    MOBA_UNROLL
    for (int i = 0; i < row_tiles; ++i) {
      MOBA_UNROLL
      for (int half = 0; half < 2; ++half) {
        row_max[i][half] = -ptx::infinity();
        row_sum[i][half] = 0;
      }
    }
  }

  /// Turns logits into weights.
  template <int column_tiles>
  MOBA_DEVICE void update(float (&logits)[row_tiles][column_tiles][4], float scale) {
    MOBA_UNROLL
    for (int i = 0; i < row_tiles; ++i) {
      MOBA_UNROLL
      for (int half = 0; half < 2; ++half) {
        float new_max = row_max[i][half];
        MOBA_UNROLL
        for (int j = 0; j < column_tiles; ++j)
          new_max = ptx::fmax(new_max, ptx::fmax(logits[i][j][2 * half], logits[i][j][2 * half + 1]));
        new_max = row_max_of(new_max);
        const bool rises = (new_max - row_max[i][half]) * scale > kMaxExponent;
        new_max = rises ? new_max : row_max[i][half];
        const float base = new_max == -ptx::infinity() ? 0 : new_max * scale;
        rescale[i][half] = ptx::exp2(rises ? ptx::fma(row_max[i][half], scale, -base) : 0);
        row_max[i][half] = new_max;
        float tile_sum = 0;
        MOBA_UNROLL
        for (int j = 0; j < column_tiles; ++j) {
          MOBA_UNROLL
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            logits[i][j][e] = ptx::exp2(ptx::fma(logits[i][j][e], scale, -base));
            tile_sum += logits[i][j][e];
          }
        }
        row_sum[i][half] = ptx::fma(row_sum[i][half], rescale[i][half], tile_sum);
      }
    }
  }

  /// Makes sums of earlier weights relative to `row_max` after the last update.
  template <int out_tiles>
  MOBA_DEVICE void rescale_out(float (&out)[row_tiles][out_tiles][4]) const {
    bool changed = false;
    MOBA_UNROLL
    for (int i = 0; i < row_tiles; ++i) changed = changed || rescale[i][0] != 1 || rescale[i][1] != 1;
    if (ptx::ballot(changed) == 0) return;
    MOBA_UNROLL
    for (int i = 0; i < row_tiles; ++i) {
      MOBA_UNROLL
      for (int j = 0; j < out_tiles; ++j) {
        MOBA_UNROLL
        for (int e = 0; e < 4; ++e) out[i][j][e] *= rescale[i][e / 2];
      }
    }
  }

  template <int column_tiles, int out_tiles>
  MOBA_DEVICE void update(float (&logits)[row_tiles][column_tiles][4], float (&out)[row_tiles][out_tiles][4],
                          float scale) {
    update(logits, scale);
    rescale_out(out);
  }

  /// Returns log2 of the sum of 2^(scale * logit) over a row; -inf where all logits are -inf. `total`
  /// becomes the sum of its weights.
  MOBA_DEVICE float log2_sum(int i, int half, float scale, float& total) const {
    total = row_sum_of(row_sum[i][half]);
    const float base = row_max[i][half] == -ptx::infinity() ? 0 : row_max[i][half] * scale;
    return base + ptx::log2(total);
  }
};

}  // namespace moba::cuda::tile
