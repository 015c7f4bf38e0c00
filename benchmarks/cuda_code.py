#!/usr/bin/env python3
"""Count the instructions of the CUDA gate without a GPU.

Compiles the gate for sm_80 and sm_90a and disassembles it. For each kernel and head_dim, prints registers, spilled
bytes, bytes of code, and instructions per score: those of the products (MMA and operand loads), those of the filter,
which every score passes, and those of appending, per score of a group that passes as a whole. Needs nvcc and nvdisasm
(PyPI: nvidia-cuda-nvdisasm).

    benchmarks/cuda_code.py --nvdisasm PATH
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?(\w+)")
MMA_DEPTH = 16
# Scores per lane of an instruction: mma.m16n8k16, and wgmma.m64n64k16, which four warps issue.
SCORES = {"HMMA": 16 * 8 // 32, "HGMMA": 64 * 64 // 128}
# Scores per lane of a block that appends.
APPENDED = 8
# The code that filters: its instruction, their least number in a basic block, and the scores of a lane that it filters.
FILTERS = {"": ("FSETP", 32, 32), "Many": ("FSETP", 16, 16), "Few": ("FMNMX", 24, 32)}
# Source, product, and the parts of kernels' names that say how they select.
KERNELS = {
    "sm_80": ("sm80/gate.cu", "HMMA", [""]),
    "sm_90a": ("sm90/gate.cu", "HGMMA", ["Few", "Many"]),
}
SELECTING = {"Few": "top-k to 8", "Many": "larger"}


def compile_gate(nvcc, arch, source, folder):
    """Return the cubin's path, and registers and spilled bytes by mangled kernel name."""
    cubin = Path(folder) / "gate.cubin"
    command = [nvcc, "-std=c++20", "--expt-relaxed-constexpr", "-O3", f"-arch={arch}", "-cubin"]
    command += ["-Xptxas", "-v", "-DMOBA_CUDA_SM90", "-I", ROOT / "include", "-I", ROOT / "src"]
    done = subprocess.run(
        [*command, ROOT / "src/cuda" / source, "-o", cubin], capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(f"cuda_code: nvcc failed:\n{done.stderr}")
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers",
        done.stderr,
        re.S,
    )
    return cubin, {name: (int(registers), int(spilled)) for name, spilled, registers in found}


def basic_blocks(lines):
    """Yield the opcodes of each basic block: it ends at a label, a branch or an exit."""
    block = []
    for line in lines:
        found = INSTRUCTION.match(line)
        if found:
            block.append(found.group(1))
        if re.match(r"\.L_", line) or (found and found.group(1) in ("BRA", "EXIT", "RET")):
            if block:
                yield block
            block = []
    if block:
        yield block


def count(blocks, head_dim, mma, code, least, filtered):
    """Return instructions per score of products, filter and appending."""
    counted = [(len(block), Counter(block)) for block in blocks]
    products, issued = max(((size, c[mma]) for size, c in counted), key=lambda pair: pair[1])
    scores = issued * SCORES[mma] // (head_dim // MMA_DEPTH)
    filters = [size for size, c in counted if c[code] >= least]
    appends = [size for size, c in counted if c["STS"] == APPENDED]
    return products / scores, min(filters) / filtered, min(appends) / APPENDED


def print_kernel(nvcc, nvdisasm, arch):
    source, mma, kinds = KERNELS[arch]
    with tempfile.TemporaryDirectory() as folder:
        cubin, usage = compile_gate(nvcc, arch, source, folder)
        text = subprocess.run(
            [nvdisasm, "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
    for section in text.split("\n.text.")[1:]:
        name, *lines = section.splitlines()
        name = name.rstrip(":")
        found = re.search(r"gate_kernel.*8bfloat16ELi(\d+)E", name)
        if not found:
            continue
        head_dim = int(found.group(1))
        selecting = next(kind for kind in kinds if kind in name)
        code_bytes = 16 * sum(bool(INSTRUCTION.match(line)) for line in lines)
        registers, spilled = usage[name]
        instruction, least, filtered = FILTERS[selecting]
        # Tiles at head_dim 256 are half as high.
        share = 2 if head_dim == 256 else 1
        parts = count(
            basic_blocks(lines), head_dim, mma, instruction, least // share, filtered // share
        )
        cells = [
            f"{arch} {SELECTING.get(selecting, '')}".strip(),
            head_dim,
            registers,
            f"{spilled} B",
            f"{code_bytes / 1024:.0f} KiB",
        ]
        print("| " + " | ".join(map(str, [*cells, *(f"{part:.1f}" for part in parts)])) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--nvdisasm", default="nvdisasm")
    options = parser.parse_args()
    print("| kernel | head_dim | registers | spilled | code | products | filter | append |")
    print("|---|---|---|---|---|---|---|---|")
    for arch in KERNELS:
        print_kernel(options.nvcc, options.nvdisasm, arch)


if __name__ == "__main__":
    main()
