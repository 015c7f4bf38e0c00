"""Run a module or a script that loads models through `transformers`, with MoBA's attention implementations registered.

    python -m moba -m lm_eval --model hf --model_args pretrained=PATH,attn_implementation=moba --tasks gsm8k
    python -m moba --moba-chunk-size 4096 --moba-topk 12 script.py ARGUMENTS

Without --moba-chunk-size and --moba-topk, a model's config.json has the routing, as `moba train` writes it.
"""

import argparse
import runpy
import sys
from pathlib import Path

from . import MoBAConfig, register_moba


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moba",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--moba-chunk-size", type=int, metavar="TOKENS", help="tokens in a block")
    add("--moba-topk", type=int, metavar="N", help="blocks a token attends to, its own included")
    add("--moba-sink", type=int, default=0, metavar="N", help="first blocks, always selected")
    add(
        "--moba-full-tail", type=int, default=0, metavar="N", help="last tokens with full attention"
    )
    add("--moba-full-layers", type=_layers, default=(), metavar="LIST", help="such as 0,-1")
    add("--decode", default="full", choices=("full", "moba"), help="attention of generated tokens")
    rest = argparse.REMAINDER
    add("-m", dest="module", nargs=rest, help="the module to run, and its arguments")
    add("script", nargs=rest, help="the script to run, and its arguments")
    parsed = parser.parse_args(words)
    given = [parsed.moba_chunk_size, parsed.moba_topk]
    if given.count(None) == 1:
        parser.error("--moba-chunk-size, --moba-topk: expected both or neither, got one")
    if not (parsed.module or parsed.script):
        parser.error("expected -m MODULE or a script, got neither")
    return parsed


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(layer) for layer in text.split(","))


def _config(parsed: argparse.Namespace) -> MoBAConfig | None:
    if parsed.moba_chunk_size is None:
        return None
    return MoBAConfig(
        parsed.moba_chunk_size,
        parsed.moba_topk,
        parsed.moba_full_layers,
        parsed.moba_full_tail,
        parsed.moba_sink,
        parsed.decode,
    )


def main() -> None:
    parsed = parse(sys.argv[1:])
    try:
        register_moba(_config(parsed))
    except ValueError as error:
        sys.exit(f"python -m moba: {error}")
    sys.argv = parsed.module or parsed.script
    if parsed.module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
