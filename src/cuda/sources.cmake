# Kernels, which nvcc compiles for the device and the emulation for the host; and host sources of the backend.
set(moba_cuda_kernels batch.cu centroids.cu combine.cu decode.cu plan.cu selection.cu
                      sm80/attend.cu sm80/attend_backward_dkv.cu sm80/attend_backward_dq.cu sm80/gate.cu
                      sm90/attend.cu sm90/attend_backward_dkv.cu sm90/attend_backward_dq.cu sm90/gate.cu)
set(moba_cuda_sources flow.cpp flow_backward.cpp flow_decode.cpp call.cpp)
