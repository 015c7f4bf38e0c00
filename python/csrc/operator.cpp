#include "operators.h"

using namespace moba::pytorch;

/// Returns the message of the last argument error that an operator threw on this thread, or "".
extern "C" __attribute__((visibility("default"))) const char* moba_last_argument_error() {
  return last_argument_error.c_str();
}

STABLE_TORCH_LIBRARY(moba, library) {
  define_operators(library);
}

STABLE_TORCH_LIBRARY_IMPL(moba, CPU, library) {
  implement<"attention", attention<HostCall>>(library);
  implement<"attention_backward", attention_backward<HostCall>>(library);
  implement<"decode", decode<HostCall>>(library);
  implement<"paged_attention", paged_attention<HostCall>>(library);
  implement<"paged_decode", paged_decode<HostCall>>(library);
  implement<"select", select_blocks<HostCall>>(library);
  implement<"select_by_gate", select_by_gate<HostCall>>(library);
  implement<"block_features", block_features<HostCall>>(library);
  implement<"update_means", update_means<HostCall>>(library);
}

STABLE_TORCH_LIBRARY_IMPL(moba, CUDA, library) {
  implement_on_device(library);
}
