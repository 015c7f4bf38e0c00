#pragma once

#include "backend.h"

/// The flow of calls on backends that work on the host's memory.
namespace moba::host {

/// Writes `outputs`, or the selection alone if `outputs.out` has no data. `cached` holds the block means of a
/// KV cache; null: they are computed.
void forward(const Call& call, const BlockMeans* cached, const Outputs& outputs, const Execution& execution);
/// Overwrites the gradients. Checks `saved.selection` first.
void backward(const Call& call, const Tensor& d_out, const Saved& saved, const Gradients& gradients,
              const Execution& execution);
/// Writes the features that have data.
void features(const Call& call, const BlockFeatures& features, const Execution& execution);
/// Decodes one query for every sequence; `means` are the cache's.
void decode(const Call& call, const BlockMeans& means, const Outputs& outputs, const Execution& execution);

}  // namespace moba::host
