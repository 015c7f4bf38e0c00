// In place of the CUDA backend, where the build has no nvcc.
#include "backend.h"

namespace moba {

const Backend cuda_backend{.name = "cuda",
                           .missing = "it was built without nvcc (cmake --preset cuda builds with it)"};

}  // namespace moba
