#!/usr/bin/env bash
# Compiles the CPU backend for Arm's NEON with Debian's cross compiler; nothing is run. Highway's headers serve every target.
set -euo pipefail
cd "$(dirname "$0")/.."
compiler=aarch64-linux-gnu-g++
command -v "$compiler" >/dev/null || { echo "check_neon: $compiler is missing: apt-get install g++-aarch64-linux-gnu" >&2; exit 1; }
headers=$(mktemp -d)
trap 'rm -rf "$headers"' EXIT
ln -s /usr/include/hwy "$headers/hwy"
targets=$(grep -o '(HWY_SSSE3[^)]*)' src/CMakeLists.txt)
for file in src/cpu/*.cpp; do
  echo "NEON $file"
  "$compiler" -std=c++20 -O1 -fsyntax-only -Wall -Wextra -Wpedantic -Wconversion -Wno-sign-conversion -Werror -fopenmp \
    -Iinclude -Isrc -isystem "$headers" "-DHWY_DISABLED_TARGETS=$targets" "$file"
done
