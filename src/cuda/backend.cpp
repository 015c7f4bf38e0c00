#include "backend.h"

#include "cuda/flow.h"

namespace moba {
namespace {

constexpr DeviceFlow kFlow{.attention = cuda::attention, .attention_backward = cuda::attention_backward};

}  // namespace

const Backend cuda_backend{.name = "cuda", .device = &kFlow};

}  // namespace moba
