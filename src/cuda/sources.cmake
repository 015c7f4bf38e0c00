# What nvcc compiles for the device and the emulation's build for the host; and what surrounds it.
set(moba_cuda_kernels attend.cu batch.cu centroids.cu combine.cu gate.cu plan.cu)
set(moba_cuda_sources flow.cpp parts.cpp task.cpp)
