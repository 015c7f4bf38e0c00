#!/usr/bin/env python3
"""Installs a wheel of the package in clean virtual environments, offline, and uses it there.

    tools/check_wheel.py dist/moba-1.0.0-py3-none-manylinux_2_34_x86_64.whl python3.10=2.10.0 python3.13=2.15.0

Each PYTHON=TORCH names an interpreter and the version of torch to install for it, which takes a download of gigabytes on
PyPI; the environments are kept in build/wheel-check. Ends with exit code 1 at the first failure.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "wheel-check"

# Runs in the environment, in an empty folder.
USE = """
import sys
import torch
import moba

assert "wheel-check" in moba.__file__, moba.__file__
generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 300, heads, 64, generator=generator) for heads in (4, 2, 2))
q.requires_grad_(), k.requires_grad_(), v.requires_grad_()

def sdpa():
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    full = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    return full.transpose(1, 2)

def gradients(out):
    return torch.autograd.grad(out.square().sum(), (q, k, v))

# With every block selected the result is full attention.
every, full = moba.attention(q, k, v, block_size=64, top_k=5), sdpa()
torch.testing.assert_close(every, full, rtol=1e-4, atol=1e-5)
for ours, theirs in zip(gradients(every), gradients(full)):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
few = moba.attention(q, k, v, block_size=64, top_k=2)
assert not torch.allclose(few, full, atol=1e-2)

half = moba.attention(*(t.detach().bfloat16() for t in (q, k, v)), block_size=64, top_k=2)
torch.testing.assert_close(half.float(), few.detach(), rtol=5e-2, atol=5e-2)
try:
    moba.attention(q, k.double(), v, block_size=64, top_k=2)
except TypeError as error:
    assert "k: expected torch.float32" in str(error), error
else:
    raise AssertionError("a wrong dtype was accepted")

with open("/proc/self/maps") as maps:
    loaded = {line.split()[-1] for line in maps if "libgomp" in line or "libhwy" in line}
assert len(loaded) == 1 and "torch" in loaded.pop(), "expected torch's libgomp alone"
print(f"moba {moba.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
"""


def run(*command, **options):
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(words[:6])}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def environment(python, torch):
    """Return the Python of an environment with this torch and without moba."""
    folder = FOLDER / f"{Path(python).name}-torch-{torch}"
    own = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run(python, "-m", "venv", folder)
        run(own, "-m", "pip", "install", "-q", f"torch=={torch}", "numpy")
        (folder / "complete").touch()
    run(own, "-m", "pip", "uninstall", "-q", "-y", "moba")
    return own


def check(wheel, python, torch):
    own = environment(python, torch)
    started = time.perf_counter()
    install = ["install", "-q", "--no-index", f"--find-links={wheel.parent}", "moba"]
    run(own, "-m", "pip", *install, env=os.environ | {"PIP_CONFIG_FILE": os.devnull})
    seconds = time.perf_counter() - started
    empty = FOLDER / "empty"
    empty.mkdir(exist_ok=True)
    print(run(own, "-c", USE, cwd=empty) + f": installed in {seconds:.1f} s, works", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("environments", metavar="PYTHON=TORCH", nargs="+")
    options = parser.parse_args()
    for words in options.environments:
        python, _, torch = words.partition("=")
        if not torch:
            parser.error(f"expected PYTHON=TORCH, such as python3.13=2.15.0, got {words}")
        check(options.wheel.resolve(), python, torch)


if __name__ == "__main__":
    main()
