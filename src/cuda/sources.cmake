# What nvcc compiles for the device and the emulation's build for the host; and what surrounds it.
set(moba_cuda_kernels attend.cu attend_backward_keys.cu attend_backward_keys_hopper.cu attend_backward_rows.cu attend_backward_rows_hopper.cu attend_hopper.cu batch.cu centroids.cu combine.cu decode.cu gate.cu plan.cu)
set(moba_cuda_sources flow.cpp flow_backward.cpp flow_decode.cpp parts.cpp task.cpp)
