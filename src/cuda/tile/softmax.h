#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cuda/ptx/convert.h"
#include "cuda/ptx/warp.h"

namespace moba::cuda::tile {

/// Over the four lanes that share a row of a product.
MOBA_DEVICE float row_max_of(float value) {
  value = ptx::fmax(value, ptx::shfl_xor(value, 1));
  return ptx::fmax(value, ptx::shfl_xor(value, 2));
}
MOBA_DEVICE float row_sum_of(float value) {
  value += ptx::shfl_xor(value, 1);
  return value + ptx::shfl_xor(value, 2);
}

/// How logits come from products: logit = sign * product, weight = 2^(scale * logit - ...). scale is never 0,
/// so that -inf stays what it is.
struct Scale {
  float scale = 1;
  bool negate = false;
};

/// The scale in powers of 2. One of 0 becomes the smallest that keeps -inf, which is where the hidden are.
inline Scale scale_of(float scale) {
  return {.scale = std::max(std::fabs(scale) * ptx::kLog2E, FLT_MIN), .negate = scale < 0};
}

/// The running softmax of the rows of `row_tiles` tiles: rows lane / 4 and lane / 4 + 8 of each.
template <int row_tiles>
struct Softmax {
  float row_max[row_tiles][2];  // largest logit yet, unscaled
  float row_sum[row_tiles][2];  // of this lane's weights

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

  /// Turns logits into weights relative to the largest so far, and scales down what `out` has summed.
  template <int column_tiles, int out_tiles>
  MOBA_DEVICE void update(float (&logits)[row_tiles][column_tiles][4], float (&out)[row_tiles][out_tiles][4],
                          float scale) {
    MOBA_UNROLL
    for (int i = 0; i < row_tiles; ++i) {
      MOBA_UNROLL
      for (int half = 0; half < 2; ++half) {
        float new_max = row_max[i][half];
        MOBA_UNROLL
        for (int j = 0; j < column_tiles; ++j)
          new_max = ptx::fmax(new_max, ptx::fmax(logits[i][j][2 * half], logits[i][j][2 * half + 1]));
        new_max = row_max_of(new_max);
        const float base = new_max == -ptx::infinity() ? 0 : new_max * scale;
        const float rescale = ptx::exp2(ptx::fma(row_max[i][half], scale, -base));
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
        row_sum[i][half] = ptx::fma(row_sum[i][half], rescale, tile_sum);
        MOBA_UNROLL
        for (int j = 0; j < out_tiles; ++j) {
          out[i][j][2 * half] *= rescale;
          out[i][j][2 * half + 1] *= rescale;
        }
      }
    }
  }

  /// log2 of the whole row's sum of 2^(scale * logit); -inf where nothing was above -inf. `total` becomes the
  /// row's sum of weights.
  MOBA_DEVICE float log2_sum(int i, int half, float scale, float& total) const {
    total = row_sum_of(row_sum[i][half]);
    const float base = row_max[i][half] == -ptx::infinity() ? 0 : row_max[i][half] * scale;
    return base + ptx::log2(total);
  }
};

}  // namespace moba::cuda::tile
