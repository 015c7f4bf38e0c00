#!/usr/bin/env bash
# Builds the CUDA extension of flash-moba 2.0 (github.com/mit-han-lab/flash-moba) for the calls of benchmarks/peers/flash_moba.py
# alone: bf16, head_dim 128, causal, at most 16 blocks a query. Three kernel files of 84 are compiled, in 4 minutes on two cores;
# the functions of the others raise an error. The extension runs on machines with the same torch and Python versions, so the
# machine with the GPU compiles nothing.
#
#   benchmarks/peers/build_flash_moba.sh SOURCES CUTLASS PYTHON_INCLUDE TORCH OUT
#
#   SOURCES         a checkout of flash-moba
#   CUTLASS         headers of CUTLASS 4: `include` of its repository, cutlass_library/source/include of PyPI's nvidia-cutlass
#   PYTHON_INCLUDE  the folder with Python.h
#   TORCH           the folder of the torch package, for CUDA; its pip packages `nvidia-*` are used if they lie beside it
#   OUT             gets flash_moba_cuda.so and the package flash_moba: the argument --flash-moba
#
# Environment: NVCC (nvcc), ARCH (90: the compute capability), JOBS (the number of processors).
set -euo pipefail
if [ $# -ne 5 ]; then
  echo "build_flash_moba.sh: expected SOURCES CUTLASS PYTHON_INCLUDE TORCH OUT, got $# arguments" >&2
  exit 2
fi
sources=$(realpath "$1") cutlass=$(realpath "$2") python=$(realpath "$3") torch=$(realpath "$4")
mkdir -p "$5"
out=$(realpath "$5")
for file in "$sources/csrc/flash_moba_binding.cpp" "$cutlass/cute/tensor.hpp" "$python/Python.h" "$torch/version.py"; do
  [ -e "$file" ] || { echo "build_flash_moba.sh: expected $file, which does not exist" >&2; exit 1; }
done
NVCC=${NVCC:-nvcc} ARCH=${ARCH:-90} JOBS=${JOBS:-$(nproc)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The functions that are left out: declared by flash.h and flash_topk.h for every dtype, head_dim, number of blocks and mask.
cat >"$work/left_out.cpp" <<'CPP'
#include <cuda_runtime.h>  // flash.h and CUTLASS rely on it

#include <cutlass/numeric_types.h>

#include "flash.h"
#include "flash_topk.h"

namespace flash {
using bf16 = cutlass::bfloat16_t;
using fp16 = cutlass::half_t;

// Compiled from flash-moba's own files.
template <> void run_moba_fwd_<bf16, 128, true>(Flash_moba_fwd_params&, cudaStream_t);
template <> void run_moba_bwd_<bf16, 128, true>(Flash_moba_bwd_params&, cudaStream_t);
template <> void run_fused_topk_<bf16, 128, 16, true>(Fused_topk_params&, cudaStream_t);

[[noreturn]] static void refuse() {
  TORCH_CHECK(false, "flash-moba: expected bf16, head_dim 128, a causal mask and at most 16 blocks, of which alone this build is");
}
template <typename T, int D, bool Causal> void run_moba_fwd_(Flash_moba_fwd_params&, cudaStream_t) { refuse(); }
template <typename T, int D, bool Causal> void run_moba_bwd_(Flash_moba_bwd_params&, cudaStream_t) { refuse(); }
template <typename T, int D, int TopK, bool Causal> void run_fused_topk_(Fused_topk_params&, cudaStream_t) { refuse(); }

// An explicit instantiation after a declared specialisation has no effect, so the compiled functions need no exception.
#define ATTENTION(T, D)                                                                \
  template void run_moba_fwd_<T, D, false>(Flash_moba_fwd_params&, cudaStream_t);      \
  template void run_moba_fwd_<T, D, true>(Flash_moba_fwd_params&, cudaStream_t);       \
  template void run_moba_bwd_<T, D, false>(Flash_moba_bwd_params&, cudaStream_t);      \
  template void run_moba_bwd_<T, D, true>(Flash_moba_bwd_params&, cudaStream_t);
#define TOPK(T, D, TopK)                                                               \
  template void run_fused_topk_<T, D, TopK, false>(Fused_topk_params&, cudaStream_t);  \
  template void run_fused_topk_<T, D, TopK, true>(Fused_topk_params&, cudaStream_t);
#define EVERY(T)                                                                       \
  ATTENTION(T, 32) ATTENTION(T, 64) ATTENTION(T, 96) ATTENTION(T, 128) ATTENTION(T, 192) ATTENTION(T, 256) \
  TOPK(T, 64, 16) TOPK(T, 64, 32) TOPK(T, 64, 64) TOPK(T, 128, 16) TOPK(T, 128, 32) TOPK(T, 128, 64)       \
  TOPK(T, 256, 16) TOPK(T, 256, 32) TOPK(T, 256, 64)
EVERY(bf16)
EVERY(fp16)
}  // namespace flash
CPP

# torch's headers need C++20 from 2.12 on.
minor=$(sed -n "s/^__version__ = '2\.\([0-9]*\)\..*/\1/p" "$torch/version.py")
standard=c++17
if [ "${minor:-12}" -ge 12 ]; then standard=c++20; fi
flags=(-O3 "-std=$standard" --expt-relaxed-constexpr --expt-extended-lambda --use_fast_math -Xcompiler -fPIC
  -U__CUDA_NO_HALF_OPERATORS__ -U__CUDA_NO_HALF_CONVERSIONS__ -U__CUDA_NO_HALF2_OPERATORS__ -U__CUDA_NO_BFLOAT16_CONVERSIONS__
  -DFLASHMOBA_DISABLE_DROPOUT -DFLASHMOBA_DISABLE_ALIBI -DFLASHMOBA_DISABLE_SOFTCAP -DFLASHMOBA_DISABLE_LOCAL
  -DTORCH_EXTENSION_NAME=flash_moba_cuda -gencode "arch=compute_$ARCH,code=sm_$ARCH"
  -I"$sources/csrc/flash_moba" -I"$sources/csrc/flash_moba/src" -I"$sources/csrc/flash_topk" -I"$sources/csrc/flash_topk/src"
  -I"$cutlass" -I"$torch/include" -I"$torch/include/torch/csrc/api/include" -I"$python")
# ATen/cuda includes headers of libraries such as cuSPARSE, which a toolkit may lack.
for folder in "$torch"/../nvidia/*/include; do
  if [ -d "$folder" ]; then flags+=(-Xcompiler "-idirafter,$folder"); fi
done

compile() {
  log=$work/$(basename "$1").log
  "$NVCC" -c "${flags[@]}" "$1" -o "$work/$(basename "$1").o" 2>"$log" || { cat "$log" >&2; exit 255; }
  echo "compiled $(basename "$1")"
}
cuda=("$sources"/csrc/flash_moba/src/flash_moba_{fwd,bwd}_hdim128_bf16_causal_sm80.cu
  "$sources/csrc/flash_topk/src/flash_topk16_hdim128_bf16_causal_sm80.cu" "$sources/csrc/flash_topk/src/varlen_sort.cu")
host=("$sources/csrc/flash_moba/flash_moba_api.cpp" "$sources/csrc/flash_topk/flash_topk_api.cpp"
  "$sources/csrc/flash_moba_binding.cpp" "$work/left_out.cpp")
export NVCC work
declare -p flags >"$work/flags"
export -f compile
printf '%s\0' "${cuda[@]}" "${host[@]}" |
  xargs -0 -n 1 -P "$JOBS" bash -c 'set -eu; source "$work/flags"; compile "$1"' compile

libraries=(-L"$torch/lib" -ltorch_python -ltorch -ltorch_cpu -ltorch_cuda -lc10 -lc10_cuda)
"$NVCC" -shared -cudart shared "$work"/*.o -o "$out/flash_moba_cuda.so" "${libraries[@]}"
# The linker leaves symbols to Python, also those that only a file which is left out defines.
if nm -D -u -C "$out/flash_moba_cuda.so" | grep "flash::"; then
  echo "build_flash_moba.sh: expected no undefined functions of flash-moba, got those above" >&2
  exit 1
fi
strip -s "$out/flash_moba_cuda.so"
mkdir -p "$out/flash_moba"
cp "$sources/LICENSE" "$sources"/flash_moba/{__init__,flash_moba_interface,triton_mean_pool}.py "$out/flash_moba/"
echo "built $out: $(du -sh "$out" | cut -f 1)"
