"""Times vLLM on the CPU with the plugin and without: seconds to the first token of a prompt, and those spent in attention.

Runs in the project's environment and starts vLLM's for every measurement, in turns: without, with, without, ... The prompts of
a process are different random token ids after one to warm up, so the prefix cache has none of them. Attention's own seconds are
those of vLLM's layers, the writing of keys and values included.

    benchmarks/vllm.py --model FOLDER --tokens 7700 --rounds 5 --json benchmarks/results/vllm.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def measure(options):
    """Print the seconds to the first token and in attention of every prompt, in vLLM's environment."""
    import random

    from vllm import LLM, SamplingParams

    seconds = 0.0

    def timed(function):
        def run(*arguments, **named):
            nonlocal seconds
            begin = time.perf_counter()
            result = function(*arguments, **named)
            seconds += time.perf_counter() - begin
            return result

        return run

    engine = LLM(
        options.model,
        dtype=options.dtype,
        max_model_len=options.tokens + 8,
        max_num_batched_tokens=options.chunk,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    for layer in runner.compilation_config.static_forward_context.values():
        layer.impl.forward = timed(layer.impl.forward)
        layer.impl.do_kv_cache_update = timed(layer.impl.do_kv_cache_update)
    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    random.seed(1)
    for _ in range(options.prompts + 1):
        prompt = [random.randrange(1000, 2000) for _ in range(options.tokens)]
        seconds = 0.0
        begin = time.perf_counter()
        engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        print(json.dumps([time.perf_counter() - begin, seconds]), flush=True)


def run(options, settings, plugin):
    environment = {
        "PYTHONPATH": plugin,
        "PYTHONSAFEPATH": "1",  # this folder's vllm.py is not vLLM
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_PLUGINS": "moba" if settings else "none",
        "MOBA_VLLM": json.dumps(settings) if settings else "",
    }
    command = [options.vllm / "bin/python", __file__, "--measure", *sys.argv[1:]]
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, check=True, text=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return lines[1:]  # the first warms up


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--vllm", type=Path, default=ROOT / "build/peers/vllm")
    parser.add_argument("--tokens", type=int, default=7700)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--sink", type=int, default=1)
    parser.add_argument("--full-tail", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="processes with and without each")
    parser.add_argument("--prompts", type=int, default=1, help="prompts of a process")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options)

    import importlib.metadata

    settings = {
        "moba_chunk_size": options.block_size,
        "moba_topk": options.top_k,
        "moba_sink": options.sink,
        "moba_full_tail": options.full_tail,
    }
    found = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as plugin:
        package = importlib.metadata.distribution("moba")
        for part in (package.locate_file("moba"), package._path):
            Path(plugin, Path(part).name).symlink_to(part)
        for _ in range(options.rounds):
            found["without"] += run(options, None, plugin)
            found["with"] += run(options, settings, plugin)
    medians = {
        name: [statistics.median(column) for column in zip(*rows)] for name, rows in found.items()
    }
    for index, what in enumerate(("time to first token", "attention")):
        without, plugged = medians["without"][index], medians["with"][index]
        print(
            f"{what}: {without:.2f} s without, {plugged:.2f} s with, {without / plugged:.2f} times"
        )
    if options.json:
        report = {"command": sys.argv, "settings": settings, "seconds": found, "medians": medians}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
