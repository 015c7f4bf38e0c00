// The PyTorch operators of CUDA tensors on the emulated device, as a library "moba_emulated" of their own
// whose tensors are torch's on the CPU. tests/python/test_emulated.py loads it.
#include "operators.h"

using namespace moba::pytorch;

STABLE_TORCH_LIBRARY(moba_emulated, library) {
  define_operators(library);
}

STABLE_TORCH_LIBRARY_IMPL(moba_emulated, CPU, library) {
  implement_on_device(library);
}
