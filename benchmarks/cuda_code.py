#!/usr/bin/env python3
"""Count the instructions of the CUDA gate without a GPU.

Compiles src/cuda/gate.cu and disassembles it. For each head_dim, prints registers, spilled bytes, bytes of code, and
instructions per score: those of the products (MMA and operand loads), those of the filter, which every score passes,
and those of appending, per score of a group that passes as a whole. Needs nvcc and nvdisasm (PyPI:
nvidia-cuda-nvdisasm).

    benchmarks/cuda_code.py --arch sm_90a --nvdisasm PATH
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
LANES, MMA_SCORES, MMA_DEPTH, APPENDED = 32, 16 * 8, 16, 8
"""Scores and depth of an mma.m16n8k16; scores that an append block of gate.cu covers per lane."""


def compile_gate(nvcc, arch, folder):
    """Return the cubin's path, and registers and spilled bytes by mangled kernel name."""
    cubin = Path(folder) / "gate.cubin"
    command = [nvcc, "-std=c++20", "--expt-relaxed-constexpr", "-O3", f"-arch={arch}", "-cubin"]
    command += ["-Xptxas", "-v", "-I", ROOT / "include", "-I", ROOT / "src"]
    done = subprocess.run(
        [*command, ROOT / "src/cuda/gate.cu", "-o", cubin], capture_output=True, text=True
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


def count(blocks, head_dim):
    """Return instructions per score of products, filter and appending."""
    counted = [(len(block), Counter(block)) for block in blocks]
    products, mma = max(((size, c["HMMA"]) for size, c in counted), key=lambda pair: pair[1])
    scores = mma * MMA_SCORES // LANES // (head_dim // MMA_DEPTH)
    filters = [size for size, c in counted if c["FSETP"] >= scores]
    appends = [size for size, c in counted if c["STS"] == APPENDED]
    units = scores // APPENDED
    return products / scores, min(filters) / scores, sum(appends[:units]) / scores


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90a", help="as nvcc names it [sm_90a]")
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--nvdisasm", default="nvdisasm")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cubin, usage = compile_gate(options.nvcc, options.arch, folder)
        text = subprocess.run(
            [options.nvdisasm, "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
    print(f"gate, {options.arch}, bf16: instructions per score\n")
    print("| head_dim | registers | spilled | code | products | filter | append |")
    print("|---|---|---|---|---|---|---|")
    for section in text.split("\n.text.")[1:]:
        name, *lines = section.splitlines()
        name = name.rstrip(":")
        found = re.search(r"gate_kernel.*8bfloat16ELi(\d+)E", name)
        if not found:
            continue
        head_dim = int(found.group(1))
        code = 16 * sum(bool(INSTRUCTION.match(line)) for line in lines)
        registers, spilled = usage[name]
        parts = " | ".join(f"{part:.1f}" for part in count(basic_blocks(lines), head_dim))
        print(f"| {head_dim} | {registers} | {spilled} B | {code / 1024:.0f} KiB | {parts} |")


if __name__ == "__main__":
    main()
