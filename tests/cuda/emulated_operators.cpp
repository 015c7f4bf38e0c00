// The PyTorch operators of CUDA tensors on the emulated device, registered as "moba_emulated" for torch's CPU
// tensors. tests/python/test_emulated.py loads this library.
#include "operators.h"

using namespace moba::pytorch;

STABLE_TORCH_LIBRARY(moba_emulated, library) {
  define_operators(library);
}

STABLE_TORCH_LIBRARY_IMPL(moba_emulated, CPU, library) {
  implement_on_device(library);
}
