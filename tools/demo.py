#!/usr/bin/env python3
"""Show MoBA in three tables: a real model finds a fact in a long text, one attention head over texts of increasing length, and
the model in models/, which was trained with MoBA, finds a fact at lengths at which full attention is slow. `make demo` builds
the program and fetches the model."""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import needles

ROOT = Path(__file__).resolve().parents[1]
FACT = "The password of the lighthouse is 7349."
QUESTION = "What is the password of the lighthouse?"
SECRET = "7349"
DEPTH = 0.4
LENGTHS = [8, 16, 32, 64, 128, 256]  # times 1024 tokens
ALL_QUERIES = 64  # times 1024 tokens; up to this length all queries are timed
BLOCK, TOP_K = 512, 3
TRAINED = ROOT / "models/needle-2m"
TRAINED_LENGTHS = [32, 128]  # times 1024 tokens; few texts of the training were longer than 32K
CHARACTERS = 2.6  # per token, approximately

COLOURS = {"bold": "1", "green": "32", "red": "31", "dim": "2"}
ON_TERMINAL = sys.stdout.isatty() and "NO_COLOR" not in os.environ


def paint(text, colour):
    return f"\033[{COLOURS[colour]}m{text}\033[0m" if ON_TERMINAL else text


def fail(message):
    sys.exit(f"demo: {message}")


def run_moba(program, *arguments):
    """Run the program and return its JSON; its progress and its errors go to the terminal."""
    done = subprocess.run([program, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        fail(f"moba {arguments[0]}: expected exit code 0, got {done.returncode}")
    return json.loads(done.stdout)


class Table:
    """Table whose rows are printed at once, under (title, width) columns; all but the first are aligned to the right."""

    def __init__(self, columns):
        self.widths = [width for _, width in columns]
        print(paint(self.line([title for title, _ in columns]), "bold"))

    def line(self, cells):
        first, *others = zip(cells, self.widths)
        return "  ".join(
            [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]
        )

    def row(self, *cells):
        print(self.line(cells), flush=True)


def document(path):
    """Return a real text with one fact planted in it, at the start of a line."""
    text = path.read_text(encoding="utf-8")
    place = text.rindex("\n", 0, int(len(text) * DEPTH)) + 1
    return text[:place] + FACT + "\n" + text[place:]


def ask(options, text_file, attention):
    print(paint(f"running with {attention} attention ...", "dim"), flush=True)
    return run_moba(
        options.moba,
        "generate",
        "-m",
        options.model,
        "-f",
        text_file,
        "-p",
        QUESTION,
        "-n",
        32,
        "--attn",
        attention,
        "--json",
    )


def needle(options):
    """Ask for the fact with both attentions; return whether both answers contain it."""
    print(paint("\nA fact in a long document", "bold"))
    print(f"model     {options.model.name}")
    print(f"document  {options.document}, with this line at {DEPTH:.0%}: {FACT}")
    print(f"question  {QUESTION}\n")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as text_file:
        text_file.write(document(options.document))
        text_file.flush()
        results = {name: ask(options, text_file.name, name) for name in ("full", "moba")}

    print()
    table = Table(
        [
            ("attention", 10),
            ("prompt tokens", 13),
            ("first token", 11),
            ("attention time", 15),
            ("prefill tokens/s", 16),
            ("decode tokens/s", 15),
            ("peak memory", 11),
            ("answer", 0),
        ]
    )
    for name, result in results.items():
        tokens, first = len(result["prompt_ids"]), result["prefill_seconds"]
        table.row(
            "full" if name == "full" else "MoBA",
            f"{tokens}",
            f"{first:.2f} s",
            f"{result['attention_seconds']:.2f} s, {result['attention_seconds'] / first:3.0%}",
            f"{tokens / first:.0f}",
            f"{len(result['generated_ids']) / result['decode_seconds']:.1f}",
            f"{result['peak_rss_bytes'] / 2**30:.2f} GiB",
            " ".join(result["text"].split()),
        )
    settings = results["moba"]["settings"]
    print(
        f"MoBA: blocks of {settings['moba_chunk_size']} tokens, top-k {settings['moba_topk']}, the first block always "
        f"selected; the last {settings['moba_full_tail']} tokens of the prompt attend to everything."
    )

    wrong = [name for name, result in results.items() if SECRET not in result["text"]]
    for name in wrong:
        print(
            paint(
                f"With --attn {name} the answer does not contain {SECRET}: the model did not find the fact.",
                "red",
            )
        )
    if not wrong:
        print(paint("Both answers contain the fact.", "green"))
    return not wrong


def bench(options, tokens, top_k, share):
    rows = run_moba(
        options.moba,
        "bench",
        "--tokens",
        tokens,
        "--chunk-size",
        BLOCK,
        "--topk",
        top_k,
        "--heads",
        1,
        "--head-dim",
        128,
        "--sample",
        share,
        "-o",
        "json",
    )
    return rows[0]


def duration(seconds):
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def lengths(options):
    """Time one head of head_dim 128 over random keys, full attention against MoBA."""
    print(
        paint(
            f"\nOne attention head over texts of increasing length, blocks of {BLOCK} tokens, top-k {TOP_K}",
            "bold",
        )
    )
    table = Table(
        [("tokens", 8), ("full", 10), ("MoBA", 10), ("speed-up", 8), ("MoBA workspace", 14)]
    )
    estimated = False
    for thousands in LENGTHS:
        tokens = thousands * 1024
        # The work of full attention is quadratic in the length: beyond 64K a share of the queries is timed.
        share = min(1.0, (ALL_QUERIES / thousands) ** 2)
        full = bench(options, tokens, 0, share)["seconds_median"]
        moba = bench(options, tokens, TOP_K, 1)
        estimated = estimated or share < 1
        table.row(
            f"{thousands}K",
            f"{'~' if share < 1 else ''}{duration(full)}",
            duration(moba["seconds_median"]),
            f"{full / moba['seconds_median']:.1f}x",
            f"{moba['workspace_bytes'] / 2**20:.0f} MiB",
        )
    if estimated:
        print("~ timed on a share of the queries, spread evenly, and scaled to all of them")


def trained_prompt(tokens, chance):
    """Return real text that the model was not trained on, with one fact in it and the question, and the fact's number."""
    key, number = needles.listed_key(chance), str(chance.randrange(10000, 100000))
    texts = needles.texts("held-out")
    chance.shuffle(texts)
    text = "\n".join(texts)[: int(tokens * CHARACTERS)]
    place = text.rindex("\n", 0, int(len(text) * DEPTH)) + 1
    return (
        f"{text[:place]}{needles.fact(key, number)}\n{text[place:]}\n{needles.question(key)}",
        number,
    )


def trained(options):
    """Ask the model of this repository, which was trained with MoBA, for a fact in texts installed on this machine."""
    print(
        paint(
            f"\nA model trained with MoBA ({TRAINED.relative_to(ROOT)}) finds a number in real text",
            "bold",
        )
    )
    table = Table(
        [
            ("tokens", 8),
            ("attention", 9),
            ("first token", 11),
            ("attention time", 15),
            ("number", 10),
            ("answer", 10),
        ]
    )
    right = True
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompt_file:
        for thousands in TRAINED_LENGTHS:
            prompt, number = trained_prompt(thousands * 1024, random.Random(thousands))
            prompt_file.seek(0)
            prompt_file.truncate()
            prompt_file.write(prompt)
            prompt_file.flush()
            for name in ("full", "moba"):
                result = run_moba(
                    options.moba,
                    "generate",
                    "-m",
                    TRAINED,
                    "-f",
                    prompt_file.name,
                    "-n",
                    8,
                    "--no-chat",
                    "--dtype",
                    "bf16",
                    "--json",
                    "--attn",
                    name,
                )
                answer, first = needles.answer(result["text"]), result["prefill_seconds"]
                right = right and (answer == number or thousands > TRAINED_LENGTHS[0])
                table.row(
                    f"{len(result['prompt_ids'])}",
                    "full" if name == "full" else "MoBA",
                    f"{first:.2f} s",
                    f"{result['attention_seconds']:.2f} s, {result['attention_seconds'] / first:3.0%}",
                    number,
                    answer,
                )
    print(
        f"Its training had few texts of more than {TRAINED_LENGTHS[0]}K tokens, and none of more than {TRAINED_LENGTHS[-1]}K."
    )
    if not right:
        print(
            f"An answer at {TRAINED_LENGTHS[0]}K tokens is wrong: of 80 such facts the model finds 78."
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--moba", type=Path, default=ROOT / "build/release/moba", help="the program"
    )
    parser.add_argument(
        "--model", type=Path, default=ROOT / "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    parser.add_argument("--document", type=Path, default=Path("/usr/share/common-licenses/GPL-3"))
    options = parser.parse_args()
    for path, how in (
        (options.moba, "make build"),
        (options.model, "make setup"),
        (options.document, "--document"),
    ):
        if not path.exists():
            fail(f"{path}: expected a file ({how} provides it), got none")
    found = needle(options)
    lengths(options)
    trained(options)
    sys.exit(0 if found else 1)


if __name__ == "__main__":
    main()
