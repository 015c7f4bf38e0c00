#!/usr/bin/env python3
"""Measure attention against the machine's ceilings and against its peers, in one run with the same threads.

Rows of moba come from `moba bench`, which checks its results before it times them; each peer runs in its own process.
Results are in benchmarks/results/<machine>-<date>.json and .md after every call, plots at the end; a call that is repeated
on the same day replaces its rows.

    .venv/bin/python benchmarks/run.py                 # all groups, about 25 minutes on two cores
    .venv/bin/python benchmarks/run.py --continue      # only calls without rows of today
    .venv/bin/python benchmarks/run.py --only forward,decode   # again; the day's other groups stay
    .venv/bin/python benchmarks/run.py --quick         # a minute or two
"""

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from machine import cpu_field, cpu_name, machine_name

ROOT = Path(__file__).resolve().parents[1]
LONGEST_PEER_SECONDS = 120
# Seconds for the timed runs of a row: five runs if each takes less than 12 s.
BUDGET_SECONDS = 60
KI, MI = 1 << 10, 1 << 20
FULL = (512, 0)
# Chunk size and top-k.
CHOICES = [FULL, (4096, 12), (512, 3), (128, 8)]


# ---- the machine ----


def cpu_units():
    """Return the instruction sets that kernels may use, in the order of the CPU's list."""
    known = {
        "fma",
        "avx2",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "amx_bf16",
        "amx_int8",
        "asimd",
        "bf16",
        "i8mm",
    }
    return [unit for unit in (cpu_field("flags") or cpu_field("Features")).split() if unit in known]


# ---- calls ----


def length(tokens):
    return (
        f"{tokens // MI}M"
        if tokens % MI == 0
        else f"{tokens // KI}K"
        if tokens % KI == 0
        else str(tokens)
    )


def blocks(choice):
    return "full" if choice[1] == 0 else f"({choice[0]}, {choice[1]})"


@dataclasses.dataclass(frozen=True)
class Call:
    """One process, which measures one or several rows."""

    group: str
    expected: float  # seconds on two cores, for the estimate of the remaining time
    flags: dict
    threads: int | None = None  # None: those of the command line
    environment: dict = dataclasses.field(default_factory=dict)
    peer: str | None = None  # None: moba bench
    tokens: int = 0  # of a peer
    choice: tuple = FULL  # of a peer

    def arguments(self, threads):
        words = ["-t" if self.peer is None else "--threads", str(self.threads or threads)]
        for name, value in self.flags.items():
            words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
        return words

    def key(self, threads):
        """Return the text that identifies this call in the results."""
        words = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([self.group, *words, self.peer or "moba", *self.arguments(threads)])

    def text(self, threads):
        words = [f"{name}={value}" for name, value in self.environment.items()]
        program = (
            ["moba", "bench"]
            if self.peer is None
            else ["python", "benchmarks/peers/time_peer.py", self.peer]
        )
        return shlex.join([*words, *program, *self.arguments(threads)])


def ours(
    group, expected, tokens, choices, threads=None, environment=None, budget=BUDGET_SECONDS, **flags
):
    """Return a call of `moba bench`; underscores in the names of flags become dashes."""
    return Call(
        group,
        expected,
        {
            "tokens": ",".join(length(n).lower() for n in tokens),
            "chunk_size": ",".join(str(size) for size, _ in choices),
            "topk": ",".join(str(k) for _, k in choices),
            "budget": budget,
            **flags,
        },
        threads,
        environment or {},
    )


def theirs(group, name, expected_by_tokens, choice=FULL, **flags):
    """Return the calls of a peer at rising lengths, one process each. A length that would take too long is extrapolated from
    the shorter ones."""
    return [
        Call(
            group,
            expected,
            {
                "tokens": tokens,
                "chunk_size": choice[0],
                "topk": choice[1],
                "budget": BUDGET_SECONDS,
                **flags,
            },
            peer=name,
            tokens=tokens,
            choice=choice,
        )
        for tokens, expected in expected_by_tokens.items()
    ]


# ---- the groups, most important first ----


def forward():
    sparse, three = [(512, 3), (128, 8)], [FULL, (512, 3), (128, 8)]
    return [
        *theirs(
            "forward",
            "sdpa",
            {8 * KI: 4, 16 * KI: 6, 32 * KI: 13, 64 * KI: 45, 128 * KI: 60, MI: 0},
        ),
        ours("forward", 10, [32 * KI], three),
        ours("forward", 5, [8 * KI, 16 * KI], three),
        ours("forward", 12, [64 * KI, 128 * KI], sparse),
        ours("forward", 40, [256 * KI, 512 * KI], sparse),
        ours("forward", 65, [MI], sparse),
        ours("forward", 20, [128 * KI], [FULL], sample=0.25),
        ours("forward", 18, [128 * KI], [(4096, 12)], sample=0.25),
        ours("forward", 40, [MI], [FULL], sample=0.004),
        ours("forward", 45, [MI], [(4096, 12)], sample=0.0625),
    ]


def units():
    """Measure f32 attention by multiply-adds and, where the CPU has it, by AMX."""
    forms = ["fma", "amx"] if "amx_bf16" in cpu_units() else ["fma"]
    return [
        ours("units", 12, [32 * KI], [FULL, (512, 3), (128, 8)], environment={"MOBA_CPU_F32": form})
        for form in forms
    ]


def backward():
    return [
        ours("backward", 22, [32 * KI], [FULL, (512, 3), (128, 8)], **{"pass": "backward"}),
        ours("backward", 20, [128 * KI], [(512, 3), (128, 8)], **{"pass": "backward"}),
        *theirs("backward", "sdpa-backward", {32 * KI: 30}),
    ]


def decode():
    return [
        ours("decode", 10, [MI], [choice], heads=4, dtype=dtype, **{"pass": "decode"})
        for dtype in ["f32", "f16", "i8"]
        for choice in [(4096, 12), (128, 8)]
    ]


def gate():
    return [
        ours(
            "gate",
            expected,
            [MI],
            [(128, 8)],
            environment={"MOBA_CPU_GATE": form},
            **{"pass": "gate"},
        )
        for form, expected in [("f32", 28), ("int8", 16)]
    ]


def naive():
    choice = (2048, 3)
    return [
        *(ours("naive", 2, [tokens], [choice]) for tokens in [4 * KI, 8 * KI, 16 * KI, 32 * KI]),
        *theirs("naive", "moba-naive", {4 * KI: 4, 8 * KI: 6, 16 * KI: 15, 32 * KI: 50}, choice),
    ]


def bf16():
    return [
        ours("bf16", 25, [32 * KI], [FULL, (512, 3), (128, 8)], dtype="f32,bf16,f16"),
        *theirs("bf16", "sdpa", {32 * KI: 15}, dtype="bfloat16"),
    ]


def routings():
    patterns = "independent,clustered,sink"
    return [
        ours("routings", 15, [64 * KI], [(512, 3), (128, 8)], routing=patterns),
        ours("routings", 25, [64 * KI], [(4096, 12)], routing=patterns, sample=0.25),
    ]


def heads():
    return [
        ours("heads", 12, [32 * KI], [(512, 3), (128, 8)], heads=9, kv_heads=kv_heads)
        for kv_heads in [9, 3]
    ]


def threads():
    return [
        ours("threads", 24 // count, [32 * KI], [FULL, (512, 3), (128, 8)], threads=count)
        for count in [1, 2]
    ]


def small_heads():
    return [
        ours("small-heads", 8, [32 * KI], [FULL, (512, 3), (128, 8)], head_dim=64),
        ours("small-heads", 7, [128 * KI], [(512, 3), (128, 8)], head_dim=64),
        ours("small-heads", 12, [128 * KI], [(4096, 12)], head_dim=64, sample=0.25),
        ours("small-heads", 45, [MI], [(512, 3), (128, 8)], head_dim=64),
        ours("small-heads", 25, [MI], [FULL], head_dim=64, sample=0.004),
        ours("small-heads", 28, [MI], [(4096, 12)], head_dim=64, sample=0.0625),
    ]


def flex():
    return theirs("flex", "flex", {8 * KI: 25, 32 * KI: 35, 128 * KI: 80}, (512, 3))


def ten_million():
    tokens, sixty_four = 10 * MI, (10 * MI // 64, 3)
    return [
        ours("ten-million", 170, [tokens], [(512, 3)], dtype="bf16", budget=30, workspace="2g"),
        ours("ten-million", 80, [tokens], [FULL], dtype="bf16", budget=30, sample=0.0005),
        ours("ten-million", 240, [tokens], [sixty_four], dtype="bf16", budget=30, sample=0.1),
    ]


def quick():
    return [
        *theirs("forward", "sdpa", {4 * KI: 4, 8 * KI: 4, 16 * KI: 6}),
        ours("forward", 15, [8 * KI, 16 * KI, 32 * KI], [FULL, (512, 3), (128, 8)]),
        ours("backward", 4, [8 * KI], [FULL, (512, 3)], **{"pass": "backward"}),
        ours("gate", 3, [32 * KI], [(128, 8)], **{"pass": "gate"}),
        ours("decode", 10, [64 * KI], [(512, 3)], heads=4, dtype="f32,i8", **{"pass": "decode"}),
    ]


GROUPS = {
    "forward": forward,
    "units": units,
    "backward": backward,
    "decode": decode,
    "gate": gate,
    "naive": naive,
    "bf16": bf16,
    "routings": routings,
    "heads": heads,
    "threads": threads,
    "small-heads": small_heads,
    "flex": flex,
    "ten-million": ten_million,
}


def growth(points):
    """Return seconds as a function of the length, a n^2 + b n, fitted to relative errors."""
    import numpy as np

    tokens, seconds = np.array(points).T
    matrix = np.stack([tokens**2, tokens], 1) / seconds[:, None]
    a, b = np.linalg.lstsq(matrix, np.ones(len(points)), rcond=None)[0]
    if b < 0:  # growth faster than quadratic is noise
        a, b = 1 / np.mean(tokens**2 / seconds), 0
    return lambda n: float(a * n**2 + b * n)


class Results:
    """Rows of `moba bench` and of its peers."""

    def __init__(self, rows=(), peers=()):
        self.rows, self.peers = list(rows), list(peers)

    def find(self, choice=None, **wanted):
        """Return the rows of `moba bench` with these values, sorted by length."""
        if choice:
            wanted |= (
                {"topk": choice[1]}
                if choice[1] == 0
                else {"chunk_size": choice[0], "topk": choice[1]}
            )
        return sorted(
            (r for r in self.rows if all(r.get(k) == v for k, v in wanted.items())),
            key=lambda r: r["tokens"],
        )

    def seconds(self, choice, **wanted):
        found = self.find(choice, **wanted)
        return found[0]["seconds_median"] if found else None

    def peer_row(self, name, tokens, **wanted):
        wanted |= {"peer": name, "tokens": tokens}
        return next((p for p in self.peers if all(p.get(k) == v for k, v in wanted.items())), None)


class Bench(Results):
    """Runs calls and keeps their results in the order of the plan."""

    def __init__(self, options, plan):
        super().__init__()
        self.options = options
        self.order = {call.key(options.threads): place for place, call in enumerate(plan)}
        self.failures = []
        self.wall_seconds = {}  # by call

    def keep(self, report):
        """Take over the results of an earlier run of the day for calls of the plan."""
        for name in ["rows", "peers", "failures"]:
            setattr(
                self, name, [entry for entry in report[name] if entry.get("call") in self.order]
            )
        self.wall_seconds = {
            key: s for key, s in report.get("wall_seconds", {}).items() if key in self.order
        }

    def has(self, call):
        key = call.key(self.options.threads)
        return any(entry["call"] == key for entry in [*self.rows, *self.peers])

    def make(self, call, show=lambda _: None):
        """Run a call; its results replace those of an earlier run of it."""
        key, start = call.key(self.options.threads), time.time()
        found = self.peer(call, show) if call.peer else self.moba(call, show)
        self.wall_seconds[key] = time.time() - start
        for name in ["rows", "peers", "failures"]:
            kept = [entry for entry in getattr(self, name) if entry["call"] != key]
            kept += [{"group": call.group, "call": key, **entry} for entry in found.get(name, [])]
            setattr(self, name, sorted(kept, key=lambda entry: self.order[entry["call"]]))
        return found

    def moba(self, call, show):
        command = [self.options.moba, "bench", "-o", "json", *call.arguments(self.options.threads)]
        text, failure = self.run(call, command, self.options.timeout, show)
        return failure or {"rows": [{**row, **call.environment} for row in json.loads(text)]}

    def peer(self, call, show):
        row = {
            "peer": call.peer,
            "tokens": call.tokens,
            "chunk_size": call.choice[0],
            "topk": call.choice[1],
            **{
                name: value
                for name, value in call.flags.items()
                if name in ["dtype", "heads", "head_dim"]
            },
        }
        known = self.shorter(call.group, row)
        expected = growth(known)(call.tokens) if len(known) >= 2 else 0
        if expected > LONGEST_PEER_SECONDS:
            return {"peers": [{**row, "seconds_median": expected, "extrapolated": True}]}
        command = [
            sys.executable,
            str(ROOT / "benchmarks/peers/time_peer.py"),
            call.peer,
            *call.arguments(self.options.threads),
        ]
        text, failure = self.run(call, command, 8 * LONGEST_PEER_SECONDS, show)
        if failure:
            return failure
        found = json.loads(text)
        return {
            "peers": [
                {
                    **row,
                    **found,
                    "seconds_median": statistics.median(found["seconds"]),
                    "extrapolated": False,
                }
            ]
        }

    def shorter(self, group, row):
        """Return (tokens, seconds) of the same peer, measured at shorter lengths."""
        series = {name: value for name, value in row.items() if name != "tokens"}
        return [
            (p["tokens"], p["seconds_median"])
            for p in self.peers
            if p["group"] == group
            and p["tokens"] < row["tokens"]
            and not p["extrapolated"]
            and all(p.get(name) == value for name, value in series.items())
        ]

    def run(self, call, command, timeout, show):
        """Return the output of a command, or a failure. Calls `show` every second with the seconds that have passed."""
        # Huge pages for torch, as moba uses them.
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(call.threads or self.options.threads),
            "THP_MEM_ALLOC_ENABLE": "1",
            **call.environment,
        }

        def failure(message):
            return None, {
                "failures": [{"command": call.text(self.options.threads), "message": message}]
            }

        start = time.time()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            while True:
                try:
                    output, errors = process.communicate(timeout=1)
                    break
                except subprocess.TimeoutExpired:
                    show(time.time() - start)
                    if time.time() - start > timeout:
                        process.kill()
                        return failure(f"took more than {timeout} s")
                except BaseException:
                    process.kill()
                    raise
        if process.returncode != 0:
            return failure(
                (errors.strip().splitlines() or [f"terminated by signal {-process.returncode}"])[-1]
            )
        return output, None


# ---- report ----


def duration(seconds):
    return (
        f"{seconds:.3g} s"
        if seconds >= 1
        else f"{seconds * 1e3:.3g} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.3g} us"
    )


def table(header, lines):
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(line) + " |" for line in lines),
        "",
    ]


def form(row):
    """Return the variant that environment variables forced, for the row's label."""
    return "".join(
        f", {row[name]} {what}"
        for name, what in [("MOBA_CPU_GATE", "gate"), ("MOBA_CPU_F32", "unit")]
        if name in row
    )


def row_line(row):
    choice, runs = (row["chunk_size"], row["topk"]), len(row["seconds"])
    spread = 50 * (row["seconds_max"] - row["seconds_min"]) / row["seconds_median"]
    rate = (
        f"{row['read_bytes'] / row['seconds_median'] / 1e9:.1f} GB/s"
        if row["pass"] == "decode"
        else f"{row['gflops']:.0f} GFLOP/s"
    )
    return [
        row["pass"] + form(row),
        length(row["tokens"]) + (f", {row['share']:g} sampled" if row["share"] < 1 else ""),
        blocks(choice),
        f"{row['heads']}/{row['kv_heads']}",
        str(row["head_dim"]),
        row["dtype"],
        row["routing"],
        str(row["threads"]),
        duration(row["seconds_median"]) + (f" +-{spread:.0f}%" if runs > 1 else ""),
        str(runs),
        rate,
        f"{row['fraction_of_peak']:.3f} {row['ceiling']}",
        " / ".join(duration(row[s + "_seconds"]) for s in ["centroids", "gate", "plan", "attend"]),
        f"{row['workspace_bytes'] / MI:.0f} MiB",
        f"{row['peak_rss_bytes'] / 2**30:.2f} GiB",
    ]


def peer_line(row):
    choice = (row["chunk_size"], row["topk"])
    memory = f"{row['peak_rss_bytes'] / 2**30:.2f} GiB" if "peak_rss_bytes" in row else ""
    return [
        row["peer"],
        length(row["tokens"]),
        blocks(choice),
        row.get("dtype", "float32"),
        duration(row["seconds_median"]),
        "extrapolated"
        if row["extrapolated"]
        else f"median of {len(row['seconds'])}"
        if len(row["seconds"]) > 1
        else "one run",
        memory,
    ]


def ceilings(bench):
    best = {
        name: max((r[name] for r in bench.rows), default=0)
        for name in ["fma_gflops", "bf16_gflops", "read_gb_per_s"]
    }
    texts = [
        f"{best['fma_gflops']:.0f} GFLOP/s of f32 multiply-adds" if best["fma_gflops"] else "",
        f"{best['bf16_gflops']:.0f} of the CPU's bf16 products" if best["bf16_gflops"] else "",
        f"{best['read_gb_per_s']:.1f} GB/s read" if best["read_gb_per_s"] else "",
    ]
    text = f"Highest ceilings measured: {', '.join(filter(None, texts))}. Every fraction is of the ceiling measured around its own row."
    if "amx_bf16" not in cpu_units():
        return text
    sixth = f", {best['bf16_gflops'] / 6:.0f} GFLOP/s" if best["bf16_gflops"] else ""
    return text + (
        " f32 attention runs on AMX here, as six products of bf16 (each float32 is the sum of three bf16), so its ceiling "
        f"is a sixth of the bf16 products{sixth}, and its fraction of the multiply-adds' peak may exceed 1; rows "
        "with a `fma` unit do not use AMX."
    )


def markdown(bench, report):
    lines = [
        f"# Attention on {report['machine']}",
        "",
        f"Instruction sets: {', '.join(report['units'])}. {report['date']}, "
        f"{report['threads']} threads. Made with `{report['command']}`; its calls took {report['minutes']:.0f} minutes. "
        f"{ceilings(bench)} Times are medians; fewer than five runs are those that would take longer than "
        f"{BUDGET_SECONDS} s together, and a row of one run has the time of the run whose result was checked.",
        "",
    ]
    lines += [
        "## Rows of `moba bench`",
        "",
        *table(
            [
                "pass",
                "tokens",
                "blocks",
                "heads",
                "D",
                "dtype",
                "routing",
                "threads",
                "time",
                "runs",
                "rate",
                "of peak",
                "centroids / gate / plan / attend",
                "workspace",
                "peak memory",
            ],
            map(row_line, bench.rows),
        ),
    ]
    if bench.peers:
        lines += [
            "## Peers",
            "",
            "torch "
            + report["torch"]
            + ". `flex` is FlexAttention, compiled, with the block mask of "
            "MoBA's selection, which is computed before timing; `moba-naive` is MoBA with a mask over all pairs. A time "
            f"that would exceed {LONGEST_PEER_SECONDS} s is extrapolated from the peer's shorter lengths, a n^2 + b n.",
            "",
            *table(
                ["peer", "tokens", "blocks", "dtype", "time", "how", "peak memory"],
                map(peer_line, bench.peers),
            ),
        ]
    if bench.failures:
        lines += [
            "## Failed",
            "",
            *(f"- `{f['command']}`: {f['message']}" for f in bench.failures),
            "",
        ]
    return "\n".join(lines)


def plot_time(bench, stem):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5.5))
    series = {
        f"moba {blocks(c)}": [
            (r["tokens"], r["seconds_median"], r["share"] < 1)
            for r in bench.find(c, group="forward", dtype="f32")
        ]
        for c in CHOICES
    }
    for name, label in [
        ("sdpa", "torch SDPA, full"),
        ("flex", "FlexAttention, MoBA (512, 3)"),
        ("moba-naive", "mask-based MoBA (2048, 3)"),
    ]:
        series[label] = sorted(
            (p["tokens"], p["seconds_median"], p["extrapolated"])
            for p in bench.peers
            if p["peer"] == name and p["group"] != "bf16"
        )
    for index, (label, points) in enumerate(s for s in series.items() if s[1]):
        style = {
            "color": f"C{index}",
            "marker": "o",
            "linestyle": "-" if label.startswith("moba") else "--",
        }
        axes.plot(
            [p[0] for p in points], [p[1] for p in points], label=label, markersize=5, **style
        )
        for tokens, seconds, _ in (p for p in points if p[2]):
            axes.plot(
                [tokens],
                [seconds],
                marker="o",
                markersize=5,
                markerfacecolor="white",
                color=f"C{index}",
            )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens",
        ylabel="seconds",
        title="One head, D 128, f32, causal: forward (hollow: extrapolated or sampled)",
    )
    axes.set_xscale("log", base=2)
    ticks = sorted({p[0] for points in series.values() for p in points})
    axes.set_xticks(ticks, [length(n) for n in ticks])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(f"{stem}-time.png", dpi=150, bbox_inches="tight")
    plt.close(figure)


def plot_peak(bench, stem):
    import matplotlib.pyplot as plt

    rows = [
        r
        for r in bench.rows
        if r["group"] in ["forward", "units", "backward", "gate", "decode", "bf16"]
        and (r["group"] != "forward" or r["tokens"] in [32 * KI, 128 * KI, MI])
    ]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.2 * len(rows)))
    labels = [
        f"{r['pass']} {r['dtype']} {length(r['tokens'])} {blocks((r['chunk_size'], r['topk']))}{form(r)}"
        + (", sampled" if r["share"] < 1 else "")
        for r in rows
    ]
    places = list(range(len(rows)))
    colours = {"fma_f32": "C0", "read_bandwidth": "C2"}
    axes.barh(
        places,
        [r["fraction_of_peak"] for r in rows],
        color=[colours.get(r["ceiling"], "C1") for r in rows],
    )
    axes.set_yticks(places, labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.5)
    names = {"fma_f32": "of f32 multiply-adds", "read_bandwidth": "of read bandwidth"}
    for ceiling in dict.fromkeys(r["ceiling"] for r in rows):
        axes.barh(
            [0], [0], color=colours.get(ceiling, "C1"), label=names.get(ceiling, f"of {ceiling}")
        )
    axes.set(xlabel="fraction of the ceiling measured in the same run")
    if rows:
        axes.legend(fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(f"{stem}-peak.png", dpi=150, bbox_inches="tight")
    plt.close(figure)


def replace(path, text):
    """Write a file atomically: readers see the old text or the new."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(text)
    unfinished.replace(path)


def write(bench, stem):
    report = {
        "command": shlex.join(
            ["python", "benchmarks/run.py", *(["--quick"] if bench.options.quick else [])]
        ),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "units": cpu_units(),
        "date": datetime.date.today().isoformat(),
        "threads": bench.options.threads,
        "minutes": sum(bench.wall_seconds.values()) / 60,
        "torch": version("torch"),
        "rows": bench.rows,
        "peers": bench.peers,
        "failures": bench.failures,
        "wall_seconds": bench.wall_seconds,
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    replace(Path(f"{stem}.json"), json.dumps(report, indent=1) + "\n")
    replace(Path(f"{stem}.md"), markdown(bench, report))


# ---- the program ----


def say(text="", end="\n"):
    print(text, end=end, file=sys.stderr, flush=True)


def summary(found):
    """Yield a line for every result of a call."""
    for row in found.get("rows", []):
        yield (
            f"{length(row['tokens'])} {blocks((row['chunk_size'], row['topk']))} {row['dtype']}: "
            f"{duration(row['seconds_median'])}, {row['fraction_of_peak']:.3f} of {row['ceiling']}"
        )
    for row in found.get("peers", []):
        yield f"{length(row['tokens'])}: {duration(row['seconds_median'])}{', extrapolated' if row['extrapolated'] else ''}"
    for failure in found.get("failures", []):
        yield f"failed: {failure['message']}"


def run_all(bench, calls, stem):
    """Run the calls and write the results after each."""
    start, done = time.time(), 0
    for number, call in enumerate(calls, 1):
        passed, left = time.time() - start, sum(c.expected for c in calls[number - 1 :])
        if done > 60:  # until then the expected seconds are the better estimate
            left *= passed / done
        say(
            f"[{number}/{len(calls)}, {passed / 60:.0f} min so far, about {left / 60:.0f} left] "
            f"{call.group}: {call.text(bench.options.threads)}"
        )

        def show(seconds, expected=call.expected):
            if sys.stderr.isatty():
                say(f"\r    {seconds:.0f} s of about {expected:.0f}\033[K\r", end="")

        for line in summary(bench.make(call, show)):
            say("    " + line)
        done += call.expected
        write(bench, stem)


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few short rows")
    parser.add_argument("--only", help=f"groups, of {','.join(GROUPS)}")
    parser.add_argument(
        "--continue", action="store_true", dest="resume", help="skip calls that have rows of today"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the calls and their expected seconds, run none"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--timeout", type=int, default=900, help="seconds for one call of moba bench"
    )
    parser.add_argument("--moba", default=str(ROOT / "build/release/moba"), help="the program")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--name", help="stem of the result files [the machine and the date]")
    options = parser.parse_args(arguments)
    options.groups = options.only.split(",") if options.only else list(GROUPS)
    for group in options.groups:
        if group not in GROUPS:
            parser.error(f"--only: expected groups of {','.join(GROUPS)}, got {group}")
    if not Path(options.moba).exists():
        parser.error(
            f"--moba: expected the program (`make build`), got {options.moba}, which does not exist"
        )
    return options


def main(arguments=None):
    options = parse(arguments)
    name = (
        options.name
        or f"{machine_name()}-{datetime.date.today().isoformat()}{'-quick' if options.quick else ''}"
    )
    stem = options.out / name
    plan = quick() if options.quick else [call for group in GROUPS.values() for call in group()]
    bench = Bench(options, plan)
    if Path(f"{stem}.json").exists():
        bench.keep(json.loads(Path(f"{stem}.json").read_text()))
    calls = [
        call
        for call in plan
        if (options.quick or call.group in options.groups)
        and not (options.resume and bench.has(call))
    ]
    if options.list:
        for call in calls:
            print(f"{call.expected:4.0f} s  {call.group}: {call.text(options.threads)}")
        print(f"{sum(call.expected for call in calls) / 60:.0f} minutes")
        return 0
    try:
        run_all(bench, calls, stem)
        stopped = False
    except KeyboardInterrupt:
        say("\nstopped; --continue runs the missing calls")
        stopped = True
    write(bench, stem)
    plot_time(bench, stem)
    plot_peak(bench, stem)
    print(f"{stem}.md")
    return 130 if stopped else 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
