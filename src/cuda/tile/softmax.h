#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cuda/ptx/convert.h"
#include "cuda/ptx/warp.h"

namespace moba::cuda::tile {

/// Over the four lanes that share a row of a product.
MOBA_DEVICE float largest_of_row(float value) {
  value = ptx::larger(value, ptx::shuffle_xor(value, 1));
  return ptx::larger(value, ptx::shuffle_xor(value, 2));
}
MOBA_DEVICE float sum_of_row(float value) {
  value += ptx::shuffle_xor(value, 1);
  return value + ptx::shuffle_xor(value, 2);
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
  float most[row_tiles][2];  // largest logit yet, unscaled
  float sum[row_tiles][2];   // of this lane's weights

  MOBA_DEVICE void clear() {
    MOBA_UNROLL
    for (int i = 0; i < row_tiles; ++i) {
      MOBA_UNROLL
      for (int half = 0; half < 2; ++half) {
        most[i][half] = -ptx::infinity();
        sum[i][half] = 0;
      }
    }
  }

  /// StageBarriers logits into weights relative to the largest so far, and scales down what `out` has summed.
  template <int column_tiles, int out_tiles>
  MOBA_DEVICE void add(float (&logits)[row_tiles][column_tiles][4], float (&out)[row_tiles][out_tiles][4],
                       float scale) {
    MOBA_UNROLL
    for (int i = 0; i < row_tiles; ++i) {
      MOBA_UNROLL
      for (int half = 0; half < 2; ++half) {
        float largest = most[i][half];
        MOBA_UNROLL
        for (int j = 0; j < column_tiles; ++j)
          largest = ptx::larger(largest, ptx::larger(logits[i][j][2 * half], logits[i][j][2 * half + 1]));
        largest = largest_of_row(largest);
        const float base = largest == -ptx::infinity() ? 0 : largest * scale;
        const float shrink = ptx::exp2(ptx::multiply_add(most[i][half], scale, -base));
        most[i][half] = largest;
        float added = 0;
        MOBA_UNROLL
        for (int j = 0; j < column_tiles; ++j) {
          MOBA_UNROLL
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            logits[i][j][e] = ptx::exp2(ptx::multiply_add(logits[i][j][e], scale, -base));
            added += logits[i][j][e];
          }
        }
        sum[i][half] = ptx::multiply_add(sum[i][half], shrink, added);
        MOBA_UNROLL
        for (int j = 0; j < out_tiles; ++j) {
          out[i][j][2 * half] *= shrink;
          out[i][j][2 * half + 1] *= shrink;
        }
      }
    }
  }

  /// log2 of the whole row's sum of 2^(scale * logit); -inf where nothing was above -inf. `total` becomes the
  /// row's sum of weights.
  MOBA_DEVICE float log2_sum(int i, int half, float scale, float& total) const {
    total = sum_of_row(sum[i][half]);
    const float base = most[i][half] == -ptx::infinity() ? 0 : most[i][half] * scale;
    return base + ptx::log2(total);
  }
};

}  // namespace moba::cuda::tile
