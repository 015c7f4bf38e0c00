#include "operators.h"

using namespace moba::pytorch;

STABLE_TORCH_LIBRARY(moba, library) {
  define_operators(library);
}

STABLE_TORCH_LIBRARY_IMPL(moba, CPU, library) {
  library.impl("attention", TORCH_BOX(&attention<HostCall>));
  library.impl("attention_backward", TORCH_BOX(&attention_backward<HostCall>));
  library.impl("decode", TORCH_BOX(&decode));
  library.impl("select", TORCH_BOX(&select_blocks<HostCall>));
}

STABLE_TORCH_LIBRARY_IMPL(moba, CUDA, library) {
  implement_on_device(library);
}
