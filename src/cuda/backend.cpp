#include "backend.h"

#include "cuda/flow.h"

namespace moba {
namespace {

constexpr DeviceFlow kFlow{.attention = cuda::attention,
                           .select = cuda::select,
                           .features = cuda::features,
                           .attention_backward = cuda::attention_backward,
                           .decode = cuda::decode,
                           .update_means = cuda::update_means};

}  // namespace

const Backend cuda_backend{.name = "cuda", .device = &kFlow};

}  // namespace moba
