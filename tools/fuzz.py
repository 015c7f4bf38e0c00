#!/usr/bin/env python3
"""Runs the fuzzers of tests/fuzz for some seconds each, from seeds with the structure of real files.

    tools/fuzz.py                     20 s each
    tools/fuzz.py -s 600 gguf         one of them, for ten minutes

Corpora grow in build/fuzz/corpus. A crash leaves its input in build/fuzz/crashes and ends with exit code 1.
"""

import argparse
import json
import math
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import make_bad_files
from flag_tables import ROOT

BUILD = ROOT / "build" / "fuzz"
NAMES = (
    "gguf",
    "safetensors",
    "config_json",
    "tokenizer_json",
    "tokenizer_text",
    "chat_template",
    "checkpoint",
)

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 6, "content": "<|end|>", "special": True, "normalized": False}],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "post_processor": {"type": "ByteLevel"},
    "decoder": {"type": "ByteLevel"},
    "model": {
        "type": "BPE",
        "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "\u0120": 5},
        "merges": ["a b", ["ab", "c"]],
    },
}
TEXTS = (
    "",
    "Hello, world!\n",
    "  <|im_end|> 12345 ",
    "\u00e9\u4e2d\U0001f600\u200d",
    "don't\t\r\n\r\n",
)
TEMPLATES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}{% endif %}",
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}",
    "{{ bos_token + '[INST] ' + '<<SYS>>\\n' + m['content'] + '\\n<</SYS>>\\n\\n' + ' [/INST]' + eos_token }}",
)
SECTIONS = {
    f"{section}/{name}": shape
    for section in ("adam.m", "adam.v")
    for name, shape in {"weight": [4, 2], "norm": [4]}.items()
}


def checkpoint():
    """Return the optimiser's file of a model of two tensors, as safetensors."""
    header, end = {}, 0
    for name, shape in SECTIONS.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def write_seeds(folder):
    """Write FOLDER/NAME/* for every fuzzer: the files of the tests of damaged files, and texts."""
    for name in NAMES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        make_bad_files.write_corpus(Path(corpus))
        kinds = {".gguf": "gguf", ".safetensors": "safetensors", ".json": "config_json"}
        for file in sorted(Path(corpus).rglob("*.*")):
            if file.suffix in kinds and file.name != "manifest.json":
                seed = folder / kinds[file.suffix] / f"seed-{file.parent.name}-{file.name}"
                seed.write_bytes(file.read_bytes())
    (folder / "tokenizer_json" / "seed").write_text(json.dumps(TOKENIZER))
    (folder / "checkpoint" / "seed").write_bytes(checkpoint())
    for i, template in enumerate(TEMPLATES):
        (folder / "chat_template" / f"seed-{i}").write_text(template)
    for i, text in enumerate(TEXTS):
        (folder / "tokenizer_text" / f"seed-{i}").write_text(text)
    (folder / "tokenizer_text" / "seed-bytes").write_bytes(bytes(range(256)))


def run(name, seconds):
    """Fuzz for `seconds` and return whether no input crashed."""
    corpus, crashes = BUILD / "corpus" / name, BUILD / "crashes"
    crashes.mkdir(exist_ok=True)
    limits = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=65536"]
    command = [BUILD / "tests" / "fuzz" / f"fuzz_{name}", corpus, f"-max_total_time={seconds}", *limits,
               f"-artifact_prefix={crashes}/{name}-", "-print_final_stats=1"]  # fmt: skip
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    if done.returncode != 0:
        print(done.stderr[-6000:], file=sys.stderr)
        print(f"{name}: an input crashed or was too slow; it is in {crashes}", file=sys.stderr)
        return False
    executions = re.search(r"number_of_executed_units: (\d+)", done.stderr)[1]
    edges = re.findall(r"cov: (\d+)", done.stderr)[-1]
    print(f"{name}: {executions} executions, {edges} edges covered", flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-s", "--seconds", type=int, default=20)
    parser.add_argument("names", metavar="NAME", nargs="*", help=", ".join(NAMES))
    options = parser.parse_args()
    for name in options.names:
        if name not in NAMES:
            parser.error(f"expected some of {', '.join(NAMES)}, got {name}")
    write_seeds(BUILD / "corpus")
    sound = [run(name, options.seconds) for name in options.names or NAMES]
    sys.exit(not all(sound))


if __name__ == "__main__":
    main()
