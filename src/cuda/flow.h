#pragma once

#include "backend.h"

/// The stages one after another, on a stream.
namespace moba::cuda {

void attention(const Tensor& q, const Tensor& k, const Tensor& v, const DeviceBatch& batch,
               const Routing& routing, const Outputs& outputs, const Execution& execution);

/// Computes a selection from the caller's gate inputs.
void select(const GateInputs& gate, const DeviceBatch& batch, const Routing& routing, const Outputs& outputs,
            const Execution& execution);

/// Writes the features that have data.
void features(const Tensor& k, const DeviceBatch& batch, std::int64_t block_size,
              const BlockFeatures& features, const Execution& execution);

void attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Saved& saved, const DeviceBatch& batch, const Routing& routing,
                        const Gradients& gradients, const Execution& execution);

void decode(const Tensor& q, const PagedCache& cache, const Routing& routing, const Outputs& outputs,
            const Execution& execution);

void update_means(const PagedCache& cache, std::int64_t block_size, const std::int32_t* before,
                  std::int64_t max_added, const Execution& execution);

}  // namespace moba::cuda
