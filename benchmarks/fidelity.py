#!/usr/bin/env python3
"""Compare full attention, MoBA and the hybrid of both, trained on the same tokens from the same seeds.

Real text installed on the machine is split into streams for training and one for evaluation. `moba train` trains a model of
every size from scratch, on sequences so short that MoBA is full attention, and continues at the long context with each
attention; `moba eval loss` scores the evaluation text. Stages, in this order:

  speed    the short sequences and a few long ones, and from them the minutes that the rest needs
  sharing  a hybrid run that begins as a copy of the MoBA run is bit-identical to the hybrid run
  sizes    three sizes with full attention, MoBA, and MoBA for 90% of the steps, then full attention
  blocks   sizes of blocks and top-k at equal sparsity, the smallest size
  layers   fine-tuning on outlines of source code, with the last layers full
  seeds    the smallest size with another seed, to measure the variance between seeds
  longer   the smallest size with as many steps again, twice, over the same long text
  needle   the heatmap of models/needle-2m

Writes benchmarks/results/fidelity-<machine>-<date>.json, .md and plots after every stage. --continue resumes a run that was
stopped; --only names stages.

    .venv/bin/python benchmarks/fidelity.py --threads 2
"""

import argparse
import datetime
import functools
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import cpu_name

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from needles import texts  # noqa: E402

SEQ_LEN, SHORT_LEN = 8192, 512
TRAILING = SEQ_LEN // 16  # the paper's 2K of 32K
BUCKETS = 16
VOCABULARY = 2048
SEED = 1


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    lr: float

    @property
    def inner(self):
        return 8 * self.width // 3 // 16 * 16

    @property
    def parameters(self):
        """Number of parameters: embeddings (tied to the output head) and layers with two norms each."""
        layer = 4 * self.width**2 + 3 * self.width * self.inner + 2 * self.width
        return VOCABULARY * self.width + self.layers * layer + self.width

    def config(self):
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.width // 32,
            "num_key_value_heads": self.width // 32,
            "max_position_embeddings": SEQ_LEN,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }


SIZES = {"small": Size(64, 2, 4e-3), "middle": Size(128, 3, 3e-3), "large": Size(192, 4, 2e-3)}
SHORT_STEPS, SHORT_BATCH = 480, 4096
STEPS = 120
BLOCKS = (128, 4)
MODES = {
    "full": ["--attn", "full"],
    "MoBA": ["--attn", "moba"],
    "hybrid": ["--attn-schedule", "moba:0.9,full:0.1"],
}
LONGER = 3 * STEPS
# Each attends to 512 tokens of 8192 (93.75% sparsity), and to all of 512; with the first, to the own block only.
OWN_BLOCK = (512, 1)
EQUAL_SPARSITY = (OWN_BLOCK, (256, 2), BLOCKS, (64, 8), (32, 16))
# Fine-tuning continues from the hybrid of this size; TUNING_TRAILING tokens of outline are scored.
TUNED, TUNING_STEPS, TUNING_TRAILING = "middle", 60, 256
EVALUATED = 16  # sequences


# ---------------------------------------------------------------- arithmetic


def relative_difference(ours, theirs, draws=1000):
    """Return the relative difference of two models' mean losses, ours to theirs, with the 95% interval of a bootstrap over
    sequences. Both lists hold the losses of the same sequences, all of one length."""
    if len(ours) != len(theirs):
        raise ValueError(
            f"relative_difference: theirs: expected {len(ours)} losses (those of the same sequences), got {len(theirs)}"
        )
    a, b = np.array(ours), np.array(theirs)
    drawn = np.random.default_rng(0).integers(0, len(a), (draws, len(a)))
    low, high = np.percentile(a[drawn].sum(1) / b[drawn].sum(1) - 1, (2.5, 97.5))
    return {"relative": float(a.sum() / b.sum() - 1), "low": float(low), "high": float(high)}


def smoothed(values, width):
    """Return the trailing mean of `values` over at most `width` of them; a causal filter."""
    sums = np.concatenate([[0], np.cumsum(values)])
    ends = np.arange(1, len(sums))
    begins = np.maximum(0, ends - width)
    return (sums[ends] - sums[begins]) / (ends - begins)


def sparsity(blocks, seq_len=SEQ_LEN):
    """Return the share of the keys that the last query of a sequence does not attend to."""
    return 1 - blocks[0] * blocks[1] / seq_len


def switch_at(steps):
    """Return the number of steps of the hybrid before it switches to full attention."""
    return steps * 9 // 10


def switch_of(losses):
    """Return relative differences of training losses on the same tokens around the hybrid's switch to full attention:
    `first` of that step against the MoBA run, whose weights are still the same; `before` and `after` of the tenth of the
    steps on either side against the run with full attention."""
    steps = len(losses["full"])
    switch = switch_at(steps)
    tenth = steps - switch

    def relative(a, b, begin, end):
        return sum(losses[a][begin:end]) / sum(losses[b][begin:end]) - 1

    return {
        "first": relative("hybrid", "MoBA", switch, switch + 1),
        "before": relative("hybrid", "full", switch - tenth, switch),
        "after": relative("hybrid", "full", switch, switch + tenth),
    }


def kept(evaluation):
    """Return the fields that the results keep of one attention's entry in the JSON of `moba eval loss`."""

    def losses(of):
        return {key: of[key] for key in ("loss", "low", "high")} | {
            "by_sequence": [s["loss"] for s in of["by_sequence"]]
        }

    return losses(evaluation) | {
        "trailing": losses(evaluation["trailing"]),
        "positions": [bucket["loss"] for bucket in evaluation["positions"]],
    }


def name_of(blocks):
    return f"{blocks[0]}x{blocks[1]}"


def last_layers(full, layers):
    """Return the value of --moba-full-layers for the last `full` of `layers` layers."""
    return f"{layers - full}-{layers - 1}"


# ---------------------------------------------------------------- text


def neighbours(documents, size):
    """Join neighbouring documents to texts of at least `size` characters."""
    groups, open_group = [], []
    for text in documents:
        open_group.append(text)
        if sum(map(len, open_group)) >= size:
            groups.append("\n\n".join(open_group))
            open_group = []
    return groups


def without(text, seen):
    """Return the text without the paragraphs that are in `seen`."""
    return "\n\n".join(paragraph for paragraph in text.split("\n\n") if paragraph not in seen)


def outline(text):
    """Return the lines that define functions and classes."""
    return [
        line.strip()
        for line in re.findall(r"^[ \t]*(?:async def|def|class) .*$", text, re.MULTILINE)
    ]


def outline_documents(groups, tokenizer, count, chance):
    """Return `count` of {"prompt", "completion"}: texts and their outlines, which begin just before the scored tokens
    and reach a little beyond the sequence."""
    prompt_tokens = SEQ_LEN - TUNING_TRAILING

    @functools.cache
    def starts(group):
        """Return the character at which each token of the group begins."""
        return [begin for begin, _ in tokenizer.encode(groups[group]).offsets]

    groups = [group for group in groups if len(outline(group)) > 100]
    documents = []
    while len(documents) < count:
        group = chance.randrange(len(groups))
        places = starts(group)
        first = chance.randrange(max(1, len(places) - prompt_tokens))
        lines = groups[group][
            places[first] : places[min(first + prompt_tokens - 8, len(places) - 1)]
        ].split("\n")[1:-1]
        prompt = "\n".join(lines) + "\nOutline:\n"
        tokens = len(tokenizer.encode(prompt).ids)
        if not prompt_tokens - 100 < tokens <= prompt_tokens:
            continue
        completion = ""
        for line in outline(prompt):
            completion += line + "\n"
            if tokens + len(tokenizer.encode(completion).ids) > SEQ_LEN + 4:
                documents.append({"prompt": prompt, "completion": completion})
                break
    return documents


def within_sequence(document, tokenizer):
    """Return the document with only as many lines of the outline as fit into a sequence."""
    lines = document["completion"].splitlines(keepends=True)
    while len(tokenizer.encode(document["prompt"] + "".join(lines)).ids) >= SEQ_LEN:
        lines.pop()
    return document | {"completion": "".join(lines)}


def make_tokenizer(folder, groups):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        groups,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return tokenizer


def make_data(folder):
    """Write the tokenizer, short.txt, long.txt and held-out.txt (streams of neighbouring files), and outlines to train on and
    to score."""
    shutil.rmtree(folder, ignore_errors=True)  # of an unfinished run
    chance = random.Random(SEED)
    training, held_out = texts("training"), texts("held-out") + texts("tuning")
    seen = {paragraph for text in training for paragraph in text.split("\n\n")}
    groups = neighbours(training, 100_000)
    chance.shuffle(groups)
    tokenizer = make_tokenizer(folder / "tokenizer", groups[:20])

    def write(name, pool, tokens):
        """Write texts of the pool that have at least `tokens` tokens together, removing them from it."""
        taken, total = [], 0
        while total < tokens:
            if not pool:
                sys.exit(
                    f"fidelity: {name}: expected at least {tokens:.0f} tokens of text on this machine, got {total}"
                )
            taken.append(pool.pop())
            total += len(tokenizer.encode(taken[-1]).ids)
        (folder / name).write_text("\n\n".join(taken))

    fresh = list(groups)
    write("short.txt", fresh, SHORT_STEPS * SHORT_BATCH * 1.02)
    write("long.txt", fresh, STEPS * SEQ_LEN * 1.02)
    left = neighbours(
        [text for text in (without(text, seen) for text in held_out) if text], 100_000
    )
    chance.shuffle(left)
    write("held-out.txt", list(left), (EVALUATED + 1) * SEQ_LEN)

    with (folder / "outlines.jsonl").open("w") as file:
        for document in outline_documents(groups, tokenizer, TUNING_STEPS, chance):
            file.write(json.dumps(within_sequence(document, tokenizer)) + "\n")
    (folder / "outlines").mkdir()
    for number, document in enumerate(outline_documents(left, tokenizer, EVALUATED, chance)):
        (folder / "outlines" / f"{number:02}.txt").write_text(
            document["prompt"] + document["completion"]
        )


# ---------------------------------------------------------------- runs


class Lab:
    """Runs of the program, their folders and the results."""

    def __init__(self, options, results):
        self.options, self.work, self.data, self.results = (
            options,
            options.work,
            options.work / "data",
            results,
        )

    def moba(self, *arguments):
        command = [
            str(word) for word in (self.options.moba, *arguments, "-t", self.options.threads)
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{shlex.join(command)}\n{done.stderr}")
        return done.stdout

    def train(self, out, steps, *flags):
        """Return the lines of the log of `moba train`; a run that is complete is only read."""
        self.moba(
            "train",
            "--out",
            out,
            "--steps",
            steps,
            "--dtype",
            "bf16",
            "--save-every",
            max(1, steps // 10),
            "--resume",
            *flags,
        )
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

    def begin(self, size, seed=SEED):
        """Return the folder of a model of this size that was trained on short sequences."""
        out, config = self.work / f"short-{size}-{seed}", self.work / f"{size}.json"
        config.write_text(json.dumps(SIZES[size].config(), indent=2) + "\n")
        self.once(
            [out.name],
            lambda: [
                line["loss"]
                for line in self.train(
                    out,
                    SHORT_STEPS,
                    "--config",
                    config,
                    "--tokenizer",
                    self.data / "tokenizer",
                    "--data",
                    self.data / "short.txt",
                    "--seq-len",
                    SHORT_LEN,
                    "--batch-tokens",
                    SHORT_BATCH,
                    "--lr",
                    SIZES[size].lr,
                    "--lr-schedule",
                    "constant",
                    "--warmup",
                    SHORT_STEPS // 20,
                    "--seed",
                    seed,
                    *MODES["full"],
                )
            ],
        )
        return out

    def lengthen(self, out, size, mode, steps=STEPS, blocks=BLOCKS, seed=SEED, seq_len=SEQ_LEN):
        """Continue training at the long context."""
        return self.train(
            out,
            steps,
            "-m",
            self.begin(size, seed),
            "--data",
            self.data / "long.txt",
            "--seq-len",
            seq_len,
            "--batch-tokens",
            seq_len,
            "--lr",
            SIZES[size].lr,
            "--seed",
            seed,
            "--warmup",
            steps // 20,
            *MODES[mode],
            *(block_flags(blocks) if mode != "full" else ()),
        )

    def evaluate(self, model, *flags, blocks=BLOCKS, attn="full,moba"):
        """Return the losses by attention."""
        report = json.loads(
            self.moba(
                "eval",
                "loss",
                "-m",
                model,
                "--seq-len",
                SEQ_LEN,
                "--dtype",
                "f32",
                "-o",
                "json",
                "--attn",
                attn,
                *(block_flags(blocks) if "moba" in attn else ()),
                "--buckets",
                BUCKETS,
                *flags,
            )
        )
        return {entry["attn"]: kept(entry) for entry in report["by_attn"]}

    def evaluate_text(self, model, sequences=EVALUATED, **how):
        return self.evaluate(
            model,
            "--data",
            self.data / "held-out.txt",
            "--join",
            "--max-tokens",
            sequences * SEQ_LEN,
            "--trailing",
            TRAILING,
            **how,
        )

    def once(self, place, make):
        """Return the results at this place, which `make` computes if they are missing."""
        folder = self.results
        for name in place[:-1]:
            folder = folder.setdefault(name, {})
        if place[-1] not in folder:
            print(f"{datetime.datetime.now():%H:%M:%S} {' '.join(place)}", flush=True)
            folder[place[-1]] = make()
            (self.work / "results.json").write_text(json.dumps(self.results))
        return folder[place[-1]]

    def trained(self, place, size, mode, attn="full,moba", steps=STEPS, **how):
        """Train and evaluate; return the training losses and the evaluation."""

        def make():
            out = self.work / "-".join(place)
            if mode == "hybrid":
                begin_as(out, self.work / "-".join([*place[:-1], "MoBA"]), switch_at(steps))
            log = self.lengthen(out, size, mode, steps=steps, **how)
            evaluation = self.evaluate_text(out, attn=attn, blocks=how.get("blocks", BLOCKS))
            return {
                "losses": [line["loss"] for line in log],
                "tokens": sum(line["tokens"] for line in log),
                "evaluation": evaluation,
            }

        return self.once(place, make)


def block_flags(blocks):
    return ["--moba-chunk-size", blocks[0], "--moba-topk", blocks[1], "--moba-sink", 0]


def begin_as(out, other, step):
    """Copy the state of a run at this step."""
    if out.exists():
        return
    half_done = out.with_name(out.name + ".part")
    shutil.rmtree(half_done, ignore_errors=True)
    for name in (f"step-{step:08}", "data"):
        shutil.copytree(other / name, half_done / name)
    shutil.copy(other / "log.jsonl", half_done)
    half_done.rename(out)


def do_speed(lab):
    """Estimate the minutes of all stages from one short run each."""

    def measure(size, mode):
        start = time.perf_counter()
        base = lab.begin(size)
        begun = time.perf_counter() - start
        with tempfile.TemporaryDirectory(dir=lab.work) as folder:
            out = Path(folder) / "run"
            log = lab.lengthen(out, size, mode, steps=4)
            start = time.perf_counter()
            lab.evaluate_text(base, sequences=2, attn=mode.lower())
            return {
                "begin_seconds": begun,
                "step_seconds": min(line["seconds"] for line in log[1:]),
                "evaluation_seconds": (time.perf_counter() - start) * EVALUATED / 2,
                "memory_gib": log[-1]["memory_gib"],
                "attention_share": log[-1]["attention_share"],
            }

    of = {
        size: {
            mode: lab.once(["speed", size, mode], lambda: measure(size, mode))
            for mode in ("full", "MoBA")
        }
        for size in SIZES
    }

    def minutes(size, full, moba):
        """Return the minutes of training steps with either attention and of their evaluations."""
        a, b = of[size]["full"], of[size]["MoBA"]
        return (
            full * a["step_seconds"]
            + moba * b["step_seconds"]
            + max(1, full // STEPS) * a["evaluation_seconds"]
            + max(1, moba // STEPS) * b["evaluation_seconds"]
        ) / 60

    smallest = next(iter(SIZES))
    needs = {
        "sizes": sum(minutes(size, STEPS * 3, STEPS * 3) for size in SIZES),
        "blocks": minutes(smallest, 0, STEPS * 4),
        "layers": 3 * minutes(TUNED, TUNING_STEPS, TUNING_STEPS),
        "seeds": of[smallest]["full"]["begin_seconds"] / 60 + minutes(smallest, STEPS, STEPS),
        "longer": minutes(smallest, LONGER, 2 * LONGER),
    }
    print(
        "minutes, at most: "
        + ", ".join(f"{stage} {needed:.0f}" for stage, needed in needs.items()),
        flush=True,
    )


def do_sharing(lab):
    def compare():
        steps, seq_len, size = 10, 1024, next(iter(SIZES))
        with tempfile.TemporaryDirectory(dir=lab.work) as folder:
            whole, moba, copy = (Path(folder) / name for name in ("whole", "moba", "copy"))
            losses = lab.lengthen(whole, size, "hybrid", steps, seq_len=seq_len)
            lab.lengthen(moba, size, "MoBA", steps, seq_len=seq_len)
            begin_as(copy, moba, switch_at(steps))
            shared = lab.lengthen(copy, size, "hybrid", steps, seq_len=seq_len)
            same = [a["loss"] for a in losses] == [b["loss"] for b in shared]
            same &= (whole / "model.safetensors").read_bytes() == (
                copy / "model.safetensors"
            ).read_bytes()
        if not same:
            sys.exit("a hybrid run that begins as a copy of the MoBA run is another run")
        return {"steps": steps, "identical": True}

    lab.once(["sharing"], compare)


def do_sizes(lab):
    for size in SIZES:
        for mode in MODES:
            lab.trained(["sizes", size, mode], size, mode)


def do_blocks(lab):
    smallest = next(iter(SIZES))
    for blocks in EQUAL_SPARSITY:
        if blocks != BLOCKS:
            lab.trained(["blocks", name_of(blocks)], smallest, "MoBA", attn="moba", blocks=blocks)


def do_layers(lab):
    layers, base = SIZES[TUNED].layers, lab.work / f"sizes-{TUNED}-hybrid"

    def tune(full):
        out = lab.work / f"layers-{full}"
        is_full = full == layers
        some = ["--moba-full-layers", last_layers(full, layers)] if 0 < full < layers else []
        log = lab.train(
            out,
            TUNING_STEPS,
            "-m",
            base,
            "--data",
            lab.data / "outlines.jsonl",
            "--loss",
            "completion",
            "--seq-len",
            SEQ_LEN,
            "--batch-tokens",
            SEQ_LEN,
            "--lr",
            SIZES[TUNED].lr / 2,
            "--seed",
            SEED,
            *(MODES["full"] if is_full else [*MODES["MoBA"], *block_flags(BLOCKS), *some]),
        )
        evaluation = lab.evaluate(
            out,
            "--data",
            lab.data / "outlines",
            "--trailing",
            TUNING_TRAILING,
            *some,
            attn="full" if is_full else "moba",
        )
        return {"losses": [line["loss"] for line in log], "evaluation": evaluation}

    lab.once(
        ["layers", "before"],
        lambda: {
            "evaluation": lab.evaluate(
                base, "--data", lab.data / "outlines", "--trailing", TUNING_TRAILING
            )
        },
    )
    for full in range(layers + 1):
        lab.once(["layers", str(full)], lambda: tune(full))


def do_seeds(lab):
    smallest = next(iter(SIZES))
    for mode in ("full", "MoBA"):
        lab.trained(["seeds", mode], smallest, mode, attn=mode.lower(), seed=SEED + 1)


def do_longer(lab):
    for mode in MODES:
        lab.trained(["longer", mode], next(iter(SIZES)), mode, steps=LONGER)
    lab.trained(
        ["longer", name_of(OWN_BLOCK)],
        next(iter(SIZES)),
        "MoBA",
        attn="moba",
        steps=LONGER,
        blocks=OWN_BLOCK,
    )


def do_needle(lab):
    def find():
        lengths = ",".join(f"{n}k" for n in range(4, 33, 4))
        report = json.loads(
            lab.moba(
                "eval",
                "needle",
                "-m",
                ROOT / "models/needle-2m",
                "--lengths",
                lengths,
                "--depths",
                10,
                "--digits",
                5,
                "--dtype",
                "bf16",
                "--data",
                lab.work / "needle.txt",
                "-o",
                "json",
                "--attn",
                "full,moba",
                "--png",
                place_of(lab.results, lab.options, "-needle.png"),
            )
        )
        return {key: report[key] for key in ("accuracy", "by_attn", "settings")} | {
            "cells": [
                {key: cell[key] for key in ("attn", "length", "depth", "found", "tried")}
                for cell in report["cells"]
            ]
        }

    (lab.work / "needle.txt").write_text("\n".join(texts("held-out")))
    lab.once(["needle"], find)


STAGES = {
    "speed": do_speed,
    "sharing": do_sharing,
    "sizes": do_sizes,
    "blocks": do_blocks,
    "layers": do_layers,
    "seeds": do_seeds,
    "longer": do_longer,
    "needle": do_needle,
}


# ---------------------------------------------------------------- report


def place_of(results, options, ending):
    return options.out / f"fidelity-{options.machine}-{results['date']}{ending}"


def dumped(results):
    """Return JSON with each list of numbers on one line and numbers of six decimals."""
    rounded = json.loads(json.dumps(results), parse_float=lambda number: round(float(number), 6))
    text = json.dumps(rounded, indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), text) + "\n"


def percent(difference):
    if isinstance(difference, float):
        return f"{difference:+.2%}"
    return f"{difference['relative']:+.2%} ({difference['low']:+.2%} to {difference['high']:+.2%})"


def own_evaluation(runs, mode):
    """Return the evaluation with the attention that the model was trained with; the hybrid's with full attention."""
    return runs[mode]["evaluation"]["moba" if mode == "MoBA" else "full"]


def compared(ours, theirs, trailing):
    """Return the relative difference of two evaluations, of all tokens or of the last of each sequence."""
    losses = [(e["trailing"] if trailing else e)["by_sequence"] for e in (ours, theirs)]
    return relative_difference(*losses)


def table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def complete(results):
    """Return the sizes whose three runs are complete."""
    return {
        size: runs for size, runs in results.get("sizes", {}).items() if set(runs) == set(MODES)
    }


def tables_of(models):
    """Return the tables of {name: {mode: run}}: the losses, the switch, and the losses with the other attention."""
    rows, switches, readings = [], [], []
    for name, runs in models.items():
        full, moba, hybrid = (own_evaluation(runs, mode) for mode in MODES)
        for trailing in (False, True):

            def loss(evaluation):
                return f"{(evaluation['trailing'] if trailing else evaluation)['loss']:.4f}"

            rows.append(
                [
                    name,
                    f"last {TRAILING}" if trailing else "all",
                    loss(full),
                    loss(moba),
                    percent(compared(moba, full, trailing)),
                    loss(hybrid),
                    percent(compared(hybrid, full, trailing)),
                ]
            )
        happened = switch_of({mode: run["losses"] for mode, run in runs.items()})
        switches.append([name, *(percent(happened[key]) for key in ("before", "first", "after"))])
        for attn in ("full", "moba"):
            readings.append(
                [
                    name,
                    "full attention" if attn == "full" else "MoBA",
                    *(f"{runs[mode]['evaluation'][attn]['loss']:.4f}" for mode in MODES),
                ]
            )
    lines = table(
        ["model", "tokens", "full", "MoBA", "MoBA to full", "hybrid", "hybrid to full"], rows
    )
    lines += [
        "Training losses around the hybrid's switch: against full attention in the tenth of the steps before, in the first "
        "step with full attention against MoBA with the same weights, against full attention after it.",
        "",
    ]
    lines += table(["model", "before", "first step", "after"], switches)
    lines += ["Every model evaluated with both attentions, all tokens:", ""]
    return lines + table(
        ["model", "evaluated with", *(f"trained: {mode}" for mode in MODES)], readings
    )


def size_tables(results):
    return ["## Sizes", ""] + tables_of(
        {
            f"{size}, {SIZES[size].parameters / 1e6:.2f}M": runs
            for size, runs in complete(results).items()
        }
    )


def longer_tables(results):
    runs = results["longer"]
    if not set(MODES) | {name_of(OWN_BLOCK)} <= set(runs):
        return []
    own, full = runs[name_of(OWN_BLOCK)]["evaluation"]["moba"], own_evaluation(runs, "full")
    return [
        f"## {LONGER} steps of long sequences",
        "",
        *tables_of({next(iter(SIZES)): runs}),
        f"Blocks of {OWN_BLOCK[0]}, own block only: {own['loss']:.4f}, to full attention "
        f"{percent(compared(own, full, False))}; last {TRAILING} {own['trailing']['loss']:.4f}, "
        f"{percent(compared(own, full, True))}.",
        "",
    ]


def position_table(results):
    size, runs = list(complete(results).items())[-1]
    readings = [own_evaluation(runs, mode)["positions"] for mode in MODES]
    rows = [
        [
            f"{SEQ_LEN * i // BUCKETS}-{SEQ_LEN * (i + 1) // BUCKETS - 1}",
            *(f"{r[i]:.4f}" for r in readings),
        ]
        for i in range(BUCKETS)
    ]
    return [f"## Loss by position, {size}", ""] + table(["tokens", *MODES], rows)


def smallest_runs(results):
    return complete(results)[next(iter(SIZES))]


def block_rows(results):
    """Return (blocks, evaluation) of the smallest size at equal sparsity."""
    runs = {BLOCKS: smallest_runs(results)["MoBA"]} | {
        blocks: results["blocks"][name_of(blocks)]
        for blocks in EQUAL_SPARSITY
        if name_of(blocks) in results["blocks"]
    }
    return [
        (blocks, runs[blocks]["evaluation"]["moba"]) for blocks in EQUAL_SPARSITY if blocks in runs
    ]


def block_table(results):
    full = own_evaluation(smallest_runs(results), "full")
    rows = [
        [
            f"{blocks[0]}, {blocks[1]}" + (": nothing to select" if blocks[1] == 1 else ""),
            f"{e['loss']:.4f}",
            percent(compared(e, full, False)),
            f"{e['trailing']['loss']:.4f}",
            percent(compared(e, full, True)),
        ]
        for blocks, e in block_rows(results)
    ]
    return [f"## Blocks of {sparsity(BLOCKS):.2%} sparsity, small", ""] + table(
        ["blocks, top-k", "loss", "to full attention", f"last {TRAILING}", "to full attention"],
        rows,
    )


def layer_rows(results):
    """Return (full layers, trailing loss of the outlines, difference from all layers full, None if that run is missing)."""
    layers, runs = SIZES[TUNED].layers, results["layers"]
    done = {
        full: next(iter(runs[str(full)]["evaluation"].values()))
        for full in range(layers + 1)
        if str(full) in runs
    }
    return [
        (full, e["trailing"], compared(e, done[layers], True) if layers in done else None)
        for full, e in done.items()
    ]


def layer_table(results):
    before = results["layers"]["before"]["evaluation"]
    rows = [
        [full, f"{trailing['loss']:.4f}", percent(difference) if difference else ""]
        for full, trailing, difference in layer_rows(results)
    ]
    return [
        f"## Fine-tuning with the last layers full, {TUNED} ({SIZES[TUNED].layers} layers)",
        "",
        f"Loss of {TUNING_TRAILING} tokens of outlines; before fine-tuning {before['full']['trailing']['loss']:.4f} with "
        f"full attention, {before['moba']['trailing']['loss']:.4f} with MoBA.",
        "",
    ] + table(["full layers", "loss", "to all layers full"], rows)


def seed_table(results):
    runs, first = results["seeds"], smallest_runs(results)
    rows = [
        [
            mode,
            *(
                percent(compared(own_evaluation(runs, mode), own_evaluation(first, mode), trailing))
                for trailing in (False, True)
            ),
        ]
        for mode in runs
    ]
    lines = ["## Another seed, small", ""] + table(
        ["attention", "loss to that of the first seed", f"last {TRAILING}"], rows
    )
    if len(runs) == 2:
        full, moba = (own_evaluation(runs, mode) for mode in ("full", "MoBA"))
        lines += [
            f"With this seed MoBA to full attention: {percent(compared(moba, full, False))}, last {TRAILING} "
            f"{percent(compared(moba, full, True))}.",
            "",
        ]
    return lines


def needle_table(results):
    cells = results["needle"]["cells"]
    lengths = sorted({cell["length"] for cell in cells})
    rows = []
    for attention in results["needle"]["by_attn"]:
        found = [
            sum(c["found"] for c in cells if c["attn"] == attention["attn"] and c["length"] == n)
            for n in lengths
        ]
        rows.append([attention["attn"], *found, f"{attention['found']} of {attention['tried']}"])
    return ["## Needles found, models/needle-2m", ""] + table(
        ["attention", *(f"{n // 1024}K" for n in lengths), "all"], rows
    )


def markdown(results):
    lines = [
        "# Full attention, MoBA and the hybrid",
        "",
        f"{results['machine']}, {results['threads']} threads, {results['date']}. Made with `{results['commands'][0]}`. "
        f"{SHORT_STEPS} steps of {SHORT_BATCH} tokens in sequences of {SHORT_LEN}, the same for all, then {STEPS} steps of one "
        f"sequence of {SEQ_LEN}; blocks of {BLOCKS[0]}, top-k {BLOCKS[1]} ({sparsity(BLOCKS):.2%} sparsity at the end of a "
        f"long sequence); {EVALUATED} sequences held out; nats a token, 95% intervals by a bootstrap over sequences. "
        f"A model is evaluated with the attention it was trained with, the hybrid with full attention.",
        "",
    ]
    if complete(results):
        lines += size_tables(results) + position_table(results)
        for stage, tables in (
            ("blocks", block_table),
            ("layers", layer_table),
            ("seeds", seed_table),
            ("longer", longer_tables),
        ):
            if stage in results:
                lines += tables(results)
    if "needle" in results:
        lines += needle_table(results)
    return "\n".join(lines)


COLOURS = {"full": "#1f4e79", "MoBA": "#e07b00", "hybrid": "#2e8b57"}


def draw_sizes(results, curves, positions):
    """Plot training losses (means of 15 steps) and losses by position, each above its difference from full attention's."""
    from matplotlib import pyplot

    done = complete(results)
    figures = []
    for title, across in (("step", curves), ("position, tokens", positions)):
        figure, axes = pyplot.subplots(
            2,
            len(done),
            figsize=(4.2 * len(done), 6),
            sharex=True,
            squeeze=False,
            layout="constrained",
            height_ratios=(3, 2),
        )
        figures.append((figure, across))
        for (size, runs), (above, below) in zip(done.items(), axes.T):
            for mode in MODES:
                if across is curves:
                    values = smoothed(runs[mode]["losses"], 15)
                    base = smoothed(runs["full"]["losses"], 15)
                    x = np.arange(1, len(values) + 1)
                else:
                    values, base = (
                        np.array(own_evaluation(runs, m)["positions"]) for m in (mode, "full")
                    )
                    x = (np.arange(BUCKETS) + 0.5) * SEQ_LEN / BUCKETS
                above.plot(x, values, color=COLOURS[mode], label=mode, linewidth=1.3)
                below.plot(x, 100 * (values / base - 1), color=COLOURS[mode], linewidth=1.3)
            if across is curves:
                for axis in (above, below):
                    axis.axvline(switch_at(STEPS) + 0.5, color="grey", linestyle=":", linewidth=1)
            above.set_title(f"{size}, {SIZES[size].parameters / 1e6:.2f}M parameters")
            below.set_xlabel(title)
        axes[0, 0].set_ylabel("training loss" if across is curves else "held-out loss")
        axes[1, 0].set_ylabel("to full attention, %")
        axes[0, 0].legend(frameon=False)
    for figure, path in figures:
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def draw_ablations(results, path):
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    full = own_evaluation(smallest_runs(results), "full")
    for trailing, colour, label in (
        (False, COLOURS["MoBA"], "all tokens"),
        (True, COLOURS["full"], f"last {TRAILING}"),
    ):
        points = [(f"{b[0]}, {b[1]}", compared(e, full, trailing)) for b, e in block_rows(results)]
        bars(left, points, colour, label)
    left.set(
        title=f"{sparsity(BLOCKS):.2%} sparsity, small",
        xlabel="blocks of, top-k",
        ylabel="loss to full attention, %",
    )
    left.legend(frameon=False)
    bars(
        right,
        [(full, difference) for full, _, difference in layer_rows(results) if difference],
        COLOURS["MoBA"],
        None,
    )
    right.set(
        title=f"outlines, {TUNED}",
        xlabel="last layers full in fine-tuning",
        ylabel="loss to all layers full, %",
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def bars(axis, points, colour, label):
    """Plot (name, difference) with the intervals, in percent."""
    names, differences = zip(*points)
    middle, low, high = (
        100 * np.array([d[key] for d in differences]) for key in ("relative", "low", "high")
    )
    axis.errorbar(
        [str(name) for name in names],
        middle,
        (middle - low, high - middle),
        color=colour,
        label=label,
        capsize=3,
        marker="o",
        markersize=4,
        linewidth=1,
    )


def report(results, options):
    text = markdown(results)
    place_of(results, options, ".json").write_text(dumped(results))
    place_of(results, options, ".md").write_text(text)
    if complete(results):
        draw_sizes(
            results,
            place_of(results, options, "-curves.png"),
            place_of(results, options, "-positions.png"),
        )
    if "blocks" in results and len(results.get("layers", ())) > SIZES[TUNED].layers + 1:
        draw_ablations(results, place_of(results, options, "-ablations.png"))
    return text


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--moba", type=Path, default=ROOT / "build/release/moba", help="the program"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build/fidelity", help="folder for data and checkpoints"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--machine", default="x86_64", help="a short name for the files of results")
    parser.add_argument("--only", help="stages, such as sizes,blocks")
    parser.add_argument(
        "--continue", dest="resume", action="store_true", help="continue a run that was stopped"
    )
    options = parser.parse_args()
    stages = options.only.split(",") if options.only else list(STAGES)
    if unknown := set(stages) - set(STAGES):
        parser.error(
            f"--only: expected some of {','.join(STAGES)}, got {','.join(sorted(unknown))}"
        )

    if options.work.exists() and not options.resume:
        parser.error(
            f"--work: expected a new folder, or --continue, got the existing {options.work}"
        )
    begun = options.work / "results.json"
    results = (
        json.loads(begun.read_text())
        if begun.exists()
        else {
            "commands": [],
            "machine": f"{cpu_name()}, {os.cpu_count()} cores",
            "threads": options.threads,
            "date": datetime.date.today().isoformat(),
        }
    )
    results["commands"].append(shlex.join(["python", "benchmarks/fidelity.py", *sys.argv[1:]]))
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.work / "data").exists():
        make_data(options.work / "data.part")
        (options.work / "data.part").rename(options.work / "data")
    lab = Lab(options, results)
    for stage in stages:
        STAGES[stage](lab)
        text = report(results, options)
    print(text)


if __name__ == "__main__":
    main()
