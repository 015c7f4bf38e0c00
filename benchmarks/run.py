#!/usr/bin/env python3
"""The standing set: attention alone against the machine's limit and against its peers, in one run with the same threads.

Every figure of ours comes from `moba bench`, which checks its answers before it times them; peers run in processes of
their own, before and after ours. Writes benchmarks/results/<machine>-<date>.json and .md after every group, and plots
at the end.

    .venv/bin/python benchmarks/run.py                 # everything, about 25 minutes on two cores
    .venv/bin/python benchmarks/run.py --quick         # a minute or two
    .venv/bin/python benchmarks/run.py --only forward,decode   # anew; the day's other groups stay
"""

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST_PEER_SECONDS = 120
KI, MI = 1 << 10, 1 << 20
FULL = (512, 0)
# Chunk size and top-k, in the order of the targets.
CHOICES = [FULL, (4096, 12), (512, 3), (128, 8)]


def cpu_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine_name():
    words = re.sub(r"\((r|tm)\)|cpu|processor|@.*", " ", cpu_name().lower())
    return "-".join(re.findall(r"[a-z0-9]+", words)) + f"-{os.cpu_count()}-cores"


def length(tokens):
    return f"{tokens // MI}M" if tokens % MI == 0 else f"{tokens // KI}K" if tokens % KI == 0 else str(tokens)


def blocks(choice):
    return "full" if choice[1] == 0 else f"({choice[0]}, {choice[1]})"


class Bench:
    """Runs what a group asks for and keeps what came of it."""

    def __init__(self, options):
        self.options = options
        self.rows, self.peers, self.failures = [], [], []

    def keep(self, report, groups):
        """Takes over what an earlier run of the day found in other groups."""
        for name in ["rows", "peers", "failures"]:
            setattr(self, name, [entry for entry in report[name] if entry["group"] not in groups])

    def moba(self, group, tokens, choices, threads=None, environment=None, **flags):
        """One call of `moba bench`; underscores in the names of flags are dashes."""
        command = [self.options.moba, "bench", "-o", "json", "-t", str(threads or self.options.threads),
                   "--tokens", ",".join(str(n) for n in tokens),
                   "--chunk-size", ",".join(str(size) for size, _ in choices),
                   "--topk", ",".join(str(k) for _, k in choices)]
        for name, value in flags.items():
            command += ["--" + name.replace("_", "-"), str(value)]
        print("  moba", shlex.join(command[1:]), file=sys.stderr)
        try:
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})},
                                  timeout=self.options.timeout)
        except subprocess.TimeoutExpired:
            return self.fail(group, command, f"took more than {self.options.timeout} s")
        if done.returncode != 0:
            return self.fail(group, command, done.stderr.strip())
        for row in json.loads(done.stdout):
            self.rows.append({"group": group, **row, **(environment or {})})

    def peer(self, group, name, lengths, choice=FULL, **flags):
        """A peer over rising lengths. One that would take too long is extrapolated from the shorter ones."""
        known = []
        for tokens in lengths:
            row = {"group": group, "peer": name, "tokens": tokens, "chunk_size": choice[0], "topk": choice[1], **flags}
            expected = growth(known)(tokens) if len(known) >= 2 else 0
            if expected > LONGEST_PEER_SECONDS:
                self.peers.append({**row, "seconds_median": expected, "extrapolated": True})
                continue
            command = [sys.executable, str(ROOT / "benchmarks/peers/time_peer.py"), name, "--tokens", str(tokens),
                       "--chunk-size", str(choice[0]), "--topk", str(choice[1]), "--threads", str(self.options.threads)]
            for flag, value in flags.items():
                command += ["--" + flag.replace("_", "-"), str(value)]
            print("  peer", name, length(tokens), file=sys.stderr)
            # Huge pages, as ours has them.
            environment = {**os.environ, "OMP_NUM_THREADS": str(self.options.threads), "THP_MEM_ALLOC_ENABLE": "1"}
            try:
                done = subprocess.run(command, capture_output=True, text=True, env=environment,
                                      timeout=8 * LONGEST_PEER_SECONDS)
            except subprocess.TimeoutExpired:
                return self.fail(group, command, "did not end")
            if done.returncode != 0:
                return self.fail(group, command, (done.stderr.strip().splitlines() or ["killed"])[-1])
            found = json.loads(done.stdout)
            row |= found | {"seconds_median": statistics.median(found["seconds"]), "extrapolated": False}
            known.append((tokens, row["seconds_median"]))
            self.peers.append(row)

    def fail(self, group, command, message):
        print("  failed:", message, file=sys.stderr)
        program = Path(command[0]).name if "peers" not in command[1] else "peer"
        self.failures.append({"group": group, "command": shlex.join([program, *command[2:]]), "message": message})

    def find(self, choice=None, **wanted):
        """Rows of ours, sorted by length."""
        if choice:
            wanted |= {"topk": choice[1]} if choice[1] == 0 else {"chunk_size": choice[0], "topk": choice[1]}
        return sorted((r for r in self.rows if all(r.get(k) == v for k, v in wanted.items())),
                      key=lambda r: r["tokens"])

    def seconds(self, choice, **wanted):
        found = self.find(choice, **wanted)
        return found[0]["seconds_median"] if found else None

    def peer_row(self, name, tokens, **wanted):
        wanted |= {"peer": name, "tokens": tokens}
        return next((p for p in self.peers if all(p.get(k) == v for k, v in wanted.items())), None)


def growth(points):
    """Seconds by length, a n^2 + b n, fitted to relative errors."""
    import numpy as np
    tokens, seconds = np.array(points).T
    matrix = np.stack([tokens**2, tokens], 1) / seconds[:, None]
    a, b = np.linalg.lstsq(matrix, np.ones(len(points)), rcond=None)[0]
    if b < 0:  # faster than quadratic growth cannot be told from noise
        a, b = 1 / np.mean(tokens**2 / seconds), 0
    return lambda n: float(a * n**2 + b * n)


# ---- the groups, most telling first ----

def forward(bench):
    bench.peer("forward", "sdpa", [8 * KI, 16 * KI, 32 * KI, 64 * KI, 128 * KI, 256 * KI, 512 * KI, MI])
    bench.moba("forward", [32 * KI], [FULL, (512, 3), (128, 8)])
    bench.moba("forward", [64 * KI, 128 * KI, 256 * KI, 512 * KI, MI], [(512, 3), (128, 8)])
    bench.moba("forward", [8 * KI, 16 * KI], [FULL, (512, 3), (128, 8)])
    bench.moba("forward", [128 * KI], [FULL, (4096, 12)], sample=0.25)
    bench.moba("forward", [MI], [FULL], sample=0.004)
    bench.moba("forward", [MI], [(4096, 12)], sample=0.05)


def backward(bench):
    bench.moba("backward", [32 * KI], [FULL, (512, 3), (128, 8)], **{"pass": "backward"})
    bench.moba("backward", [128 * KI], [(512, 3), (128, 8)], **{"pass": "backward"})
    bench.peer("backward", "sdpa-backward", [8 * KI, 16 * KI, 32 * KI])


def decode(bench):
    for dtype in ["f32", "f16", "i8"]:
        for choice in [(4096, 12), (128, 8)]:
            bench.moba("decode", [MI], [choice], heads=4, dtype=dtype, **{"pass": "decode"})


def gate(bench):
    for form in ["f32", "int8"]:
        bench.moba("gate", [MI], [(128, 8)], environment={"MOBA_CPU_GATE": form}, **{"pass": "gate"})


def naive(bench):
    choice = (2048, 3)
    lengths = [4 * KI, 8 * KI, 16 * KI, 32 * KI]
    for tokens in lengths:  # a process each, so that memory can be told
        bench.moba("naive", [tokens], [choice])
    bench.peer("naive", "moba-naive", lengths, choice)


def bf16(bench):
    bench.moba("bf16", [32 * KI], [FULL, (512, 3), (128, 8)], dtype="f32,bf16,f16")
    bench.peer("bf16", "sdpa", [32 * KI], dtype="bfloat16")


def routings(bench):
    bench.moba("routings", [64 * KI], [(4096, 12), (512, 3), (128, 8)], routing="independent,clustered,sink")


def heads(bench):
    for kv_heads in [9, 3]:
        bench.moba("heads", [32 * KI], [(512, 3), (128, 8)], heads=9, kv_heads=kv_heads)


def threads(bench):
    for count in [1, 2]:
        bench.moba("threads", [32 * KI], [FULL, (512, 3), (128, 8)], threads=count)


def small_heads(bench):
    bench.moba("small-heads", [32 * KI], [FULL, (512, 3), (128, 8)], head_dim=64)
    bench.moba("small-heads", [128 * KI], [(512, 3), (128, 8)], head_dim=64)
    bench.moba("small-heads", [128 * KI], [(4096, 12)], head_dim=64, sample=0.25)


def flex(bench):
    bench.peer("flex", "flex", [8 * KI, 16 * KI, 32 * KI, 64 * KI, 128 * KI], (512, 3))


def ten_million(bench):
    tokens, sixty_four = 10 * MI, (10 * MI // 64, 3)
    share = 0.1 if bench.options.long else 0.002
    bench.moba("ten-million", [tokens], [sixty_four], dtype="bf16", sample=share)
    bench.moba("ten-million", [tokens], [FULL], dtype="bf16", sample=share / 8)
    bench.moba("ten-million", [tokens], [(512, 3)], dtype="bf16", sample=1 if bench.options.long else 0.05)


def quick(bench):
    bench.peer("forward", "sdpa", [4 * KI, 8 * KI, 16 * KI])
    bench.moba("forward", [8 * KI, 16 * KI, 32 * KI], [FULL, (512, 3), (128, 8)])
    bench.moba("backward", [8 * KI], [FULL, (512, 3)], **{"pass": "backward"})
    bench.moba("gate", [32 * KI], [(128, 8)], **{"pass": "gate"})
    bench.moba("decode", [64 * KI], [(512, 3)], heads=4, dtype="f32,i8", **{"pass": "decode"})


GROUPS = {"forward": forward, "backward": backward, "decode": decode, "gate": gate, "naive": naive, "bf16": bf16,
          "routings": routings, "heads": heads, "threads": threads, "small-heads": small_heads, "flex": flex,
          "ten-million": ten_million}


# ---- the targets: what was asked, what was found, whether it is met (None: not measured) ----

def at_least(value, bar, text=None):
    if value is None:
        return "not measured", None
    return text or f"{value:.3f}", value >= bar


def at_most(value, bar, text=None):
    if value is None:
        return "not measured", None
    return text or f"{value:.3f}", value <= bar


def ratio(above, below):
    return above / below if above is not None and below is not None else None


def times(value, extrapolated=False):
    return None if value is None else f"{value:.1f}x" + (" (peer extrapolated)" if extrapolated else "")


def lowest_fraction(rows, bar):
    """Of all lengths, the worst, and where it was."""
    if not rows:
        return "not measured", None
    fractions = [f"{length(r['tokens'])}: {r['fraction_of_peak']:.3f}{' (sampled)' if r['share'] < 1 else ''}"
                 for r in rows]
    return ", ".join(fractions), min(r["fraction_of_peak"] for r in rows) >= bar


def forward_targets(bench):
    for dim, group, bars in [(128, "forward", [0.85, 0.80, 0.72, 0.60]),
                             (64, "small-heads", [0.75, 0.72, 0.62, 0.50])]:
        for choice, bar in zip(CHOICES, bars):
            rows = [r for r in bench.find(choice, group=group, dtype="f32", head_dim=dim) if r["tokens"] >= 32 * KI]
            yield f"forward f32, D {dim}, {blocks(choice)}, of FMA peak", f">= {bar}", *lowest_fraction(rows, bar)


def routing_targets(bench):
    for choice in CHOICES[1:]:
        base = bench.seconds(choice, group="routings", routing="independent")
        for routing in ["clustered", "sink"]:
            change = ratio(bench.seconds(choice, group="routings", routing=routing), base)
            yield (f"{routing} routing against independent, {blocks(choice)}, time", "<= 1.15", *at_most(change, 1.15))


def head_targets(bench):
    for choice in CHOICES[2:]:
        change = ratio(bench.seconds(choice, group="heads", kv_heads=3), bench.seconds(choice, group="heads", kv_heads=9))
        yield f"9 query heads on 3 kv heads against 9, {blocks(choice)}, time", "<= 1", *at_most(change, 1)


def bf16_targets(bench):
    for choice in [FULL, *CHOICES[2:]]:
        change = ratio(bench.seconds(choice, group="bf16", dtype="bf16"), bench.seconds(choice, group="bf16", dtype="f32"))
        yield f"forward bf16 against f32, {blocks(choice)}, time", "<= 0.62", *at_most(change, 0.62)


def sdpa_targets(bench):
    for choice, tokens, bar in [(FULL, 32 * KI, 3), ((512, 3), 32 * KI, 30), ((512, 3), 128 * KI, 120),
                                ((128, 8), MI, 400)]:
        peer = bench.peer_row("sdpa", tokens, group="forward")
        speed = ratio(peer and peer["seconds_median"],
                      bench.seconds(choice, group="forward", tokens=tokens, dtype="f32"))
        yield (f"forward against torch SDPA, {blocks(choice)}, {length(tokens)}", f">= {bar}x",
               *at_least(speed, bar, times(speed, peer and peer["extrapolated"])))


def backward_targets(bench):
    for choice, bar in [(FULL, 0.75), ((512, 3), 0.65), ((128, 8), 0.55)]:
        yield (f"backward f32, D 128, {blocks(choice)}, of FMA peak", f">= {bar}",
               *lowest_fraction(bench.find(choice, group="backward"), bar))
    tokens = 32 * KI
    peer = bench.peer_row("sdpa-backward", tokens)
    speed = ratio(peer and peer["seconds_median"], bench.seconds(FULL, group="backward", tokens=tokens))
    yield (f"backward against torch SDPA's, full, {length(tokens)}", ">= 3x",
           *at_least(speed, 3, times(speed, peer and peer["extrapolated"])))


def gate_targets(bench):
    f32 = bench.find((128, 8), group="gate", MOBA_CPU_GATE="f32")
    int8 = bench.seconds((128, 8), group="gate", MOBA_CPU_GATE="int8")
    yield "gate f32, B 128, of FMA peak", ">= 0.75", *lowest_fraction(f32, 0.75)
    speed = ratio(f32[0]["seconds_median"] if f32 else None, int8)
    yield "gate int8, exact, against f32, 1M", ">= 1.6x", *at_least(speed, 1.6, times(speed))


def decode_targets(bench):
    for dtype, bar in [("f32", 0.90), ("f16", 0.85), ("i8", 0.80)]:
        for choice in [(4096, 12), (128, 8)]:
            yield (f"decode {dtype}, {blocks(choice)}, of read bandwidth", f">= {bar}",
                   *lowest_fraction(bench.find(choice, group="decode", dtype=dtype), bar))


def linear_targets(bench):
    seconds = {r["tokens"]: r["plan_seconds"] + r["attend_seconds"]
               for r in bench.find((128, 8), group="forward") if r["share"] == 1}
    steps = {n: ratio(seconds[2 * n], seconds[n]) for n in seconds if 2 * n in seconds and n >= 32 * KI}
    text = ", ".join(f"{length(n)}: {step:.2f}" for n, step in steps.items())
    yield ("time(2N) / time(N), (128, 8), without the gate", "<= 2.1",
           *at_most(max(steps.values(), default=None), 2.1, text))


def ten_million_targets(bench):
    rows = bench.find(group="ten-million")
    whole = [r for r in rows if r["chunk_size"] == 512 and r["topk"] == 3]
    text = ", ".join(f"{r['seconds_median']:.1f} s{' (sampled)' if r['share'] < 1 else ''}" for r in whole)
    yield "10M tokens, bf16, (512, 3)", "runs", text or "not measured", bool(whole) or None
    dense = bench.seconds(FULL, group="ten-million")
    speed = ratio(dense, bench.seconds((10 * MI // 64, 3), group="ten-million"))
    yield "10M tokens, bf16, 64 blocks, K 3, against full, both sampled", ">= 12x", *at_least(speed, 12, times(speed))


def naive_targets(bench):
    choice, tokens = (2048, 3), 32 * KI
    peer = bench.peer_row("moba-naive", tokens)
    speed = ratio(peer and peer["seconds_median"], bench.seconds(choice, group="naive", tokens=tokens))
    yield (f"against the mask-based form, {blocks(choice)}, {length(tokens)}", ">= 100x",
           *at_least(speed, 100, times(speed, peer and peer["extrapolated"])))

    def grown(rows):
        """Memory that a doubling of the longest length adds, over what the doubling before added."""
        memory = [r["peak_rss_bytes"] for r in sorted(rows, key=lambda r: r["tokens"]) if "peak_rss_bytes" in r]
        return (memory[-1] - memory[-2]) / max(memory[-2] - memory[-3], 1) if len(memory) >= 3 else None

    ours, theirs = grown(bench.find(group="naive")), grown([p for p in bench.peers if p["group"] == "naive"])
    text = f"{ours:.1f} against {theirs:.1f}" if ours and theirs else None
    yield ("memory added by a doubling over the doubling before: ours about 2, the mask's about 4", "<= 2.5",
           *at_most(ours, 2.5, text))


def thread_targets(bench):
    for choice in [FULL, *CHOICES[2:]]:
        speed = ratio(bench.seconds(choice, group="threads", threads=1), bench.seconds(choice, group="threads", threads=2))
        yield f"two threads against one, {blocks(choice)}", ">= 1.9x", *at_least(speed, 1.9, times(speed))


def generate_targets(bench):
    reports = sorted(bench.options.out.glob("ttft-*.json"))
    share = None
    if reports:
        row = json.loads(reports[-1].read_text())["results"]["moba, MoBA"]
        share = row["attention_seconds"] / row["seconds"]
    yield "`moba generate`: attention's share of MoBA's time to first token", "<= 15%", *at_most(
        share, 0.15, share and f"{100 * share:.1f}% ({reports[-1].name})")


TARGETS = [forward_targets, routing_targets, head_targets, bf16_targets, sdpa_targets, backward_targets, gate_targets,
           decode_targets, linear_targets, ten_million_targets, naive_targets, thread_targets, generate_targets]


# ---- the report ----

def duration(seconds):
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def table(header, lines):
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header),
            *("| " + " | ".join(line) + " |" for line in lines), ""]


def row_line(row):
    choice = (row["chunk_size"], row["topk"])
    spread = 50 * (row["seconds_max"] - row["seconds_min"]) / row["seconds_median"]
    rate = f"{row['read_bytes'] / row['seconds_median'] / 1e9:.1f} GB/s" if row["pass"] == "decode" else \
        f"{row['gflops']:.0f} GFLOP/s"
    form = f", {row['MOBA_CPU_GATE']} gate" if "MOBA_CPU_GATE" in row else ""
    return [row["pass"] + form, length(row["tokens"]) + (f", {row['share']:g} sampled" if row["share"] < 1 else ""),
            blocks(choice), f"{row['heads']}/{row['kv_heads']}", str(row["head_dim"]), row["dtype"], row["routing"],
            str(row["threads"]), f"{duration(row['seconds_median'])} +-{spread:.0f}%", rate,
            f"{row['fraction_of_peak']:.3f} {row['ceiling']}",
            " / ".join(duration(row[s + "_seconds"]) for s in ["centroids", "gate", "plan", "attend"]),
            f"{row['workspace_bytes'] / MI:.0f} MiB"]


def peer_line(row):
    choice = (row["chunk_size"], row["topk"])
    memory = f"{row['peak_rss_bytes'] / 2**30:.2f} GiB" if "peak_rss_bytes" in row else ""
    return [row["peer"], length(row["tokens"]), blocks(choice), row.get("dtype", "float32"),
            duration(row["seconds_median"]), "extrapolated" if row["extrapolated"] else
            f"median of {len(row['seconds'])}", memory]


def markdown(bench, report):
    best = {name: max((r[name] for r in bench.rows), default=0) for name in ["fma_gflops", "bf16_gflops", "read_gb_per_s"]}
    lines = [f"# Attention on {report['machine']}", "",
             f"{report['date']}, {report['threads']} threads. Made with `{report['command']}` in "
             f"{report['minutes']:.0f} minutes. Best ceilings seen: {best['fma_gflops']:.0f} GFLOP/s of f32 "
             f"multiply-adds, {best['bf16_gflops']:.0f} of the CPU's bf16 products, {best['read_gb_per_s']:.1f} GB/s read. "
             "Every fraction is of the ceiling measured around its own row. Medians of at least 5 runs.", ""]
    if report["targets"]:
        marks = {True: "met", False: "not met", None: ""}
        lines += ["## Targets", "", *table(["what", "target", "measured", ""], [
            [t["what"], t["target"], t["measured"], marks[t["met"]]] for t in report["targets"]])]
    lines += ["## Rows of `moba bench`", "", *table(
        ["pass", "tokens", "blocks", "heads", "D", "dtype", "routing", "threads", "time", "rate", "of peak",
         "centroids / gate / plan / attend", "scratch"], map(row_line, bench.rows))]
    if bench.peers:
        lines += ["## Peers", "", "torch " + report["torch"] + ". `flex` is FlexAttention, compiled, with the block mask of "
                  "MoBA's selection, whose making is not timed; `moba-naive` is MoBA with a mask over all pairs. A time "
                  f"that would exceed {LONGEST_PEER_SECONDS} s is extrapolated by the peer's own growth, a n^2 + b n.", "",
                  *table(["peer", "tokens", "blocks", "dtype", "time", "how", "peak memory"], map(peer_line, bench.peers))]
    if bench.failures:
        lines += ["## Failed", "", *(f"- `{f['command']}`: {f['message']}" for f in bench.failures), ""]
    return "\n".join(lines)


def plot_time(bench, stem):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 5))
    series = {f"moba {blocks(c)}": [(r["tokens"], r["seconds_median"], r["share"] < 1)
                                    for r in bench.find(c, group="forward", dtype="f32")] for c in CHOICES}
    for name, label in [("sdpa", "torch SDPA, full"), ("flex", "FlexAttention, MoBA (512, 3)"),
                        ("moba-naive", "mask-based MoBA (2048, 3)")]:
        series[label] = sorted((p["tokens"], p["seconds_median"], p["extrapolated"]) for p in bench.peers
                               if p["peer"] == name and p["group"] != "bf16")
    for index, (label, points) in enumerate(s for s in series.items() if s[1]):
        style = {"color": f"C{index}", "marker": "o", "linestyle": "-" if label.startswith("moba") else "--"}
        axes.plot([p[0] for p in points], [p[1] for p in points], label=label, **style)
        for tokens, seconds, _ in (p for p in points if p[2]):
            axes.plot([tokens], [seconds], marker="o", markerfacecolor="white", color=f"C{index}")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds",
             title="One head, D 128, f32, causal: forward (hollow: extrapolated or sampled)")
    axes.set_xscale("log", base=2)
    ticks = sorted({p[0] for points in series.values() for p in points})
    axes.set_xticks(ticks, [length(n) for n in ticks])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(f"{stem}-time.png", dpi=150, bbox_inches="tight")
    plt.close(figure)


def plot_peak(bench, stem):
    import matplotlib.pyplot as plt
    rows = [r for r in bench.rows if r["group"] in ["forward", "backward", "gate", "decode", "bf16"]]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.22 * len(rows)))
    labels = [f"{r['pass']} {r['dtype']} {length(r['tokens'])} {blocks((r['chunk_size'], r['topk']))}"
              + (f" {r['MOBA_CPU_GATE']}" if "MOBA_CPU_GATE" in r else "") for r in rows]
    places = list(range(len(rows)))
    colours = {"fma_f32": "C0", "read_bandwidth": "C2"}
    axes.barh(places, [r["fraction_of_peak"] for r in rows], color=[colours.get(r["ceiling"], "C1") for r in rows])
    axes.set_yticks(places, labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.5)
    names = {"fma_f32": "of f32 multiply-adds", "read_bandwidth": "of read bandwidth"}
    for ceiling in dict.fromkeys(r["ceiling"] for r in rows):
        axes.barh([0], [0], color=colours.get(ceiling, "C1"), label=names.get(ceiling, f"of {ceiling}"))
    axes.set(xlabel="fraction of the ceiling measured in the same run")
    axes.legend()
    figure.savefig(f"{stem}-peak.png", dpi=150, bbox_inches="tight")
    plt.close(figure)


def write(bench, stem, start):
    from importlib.metadata import version
    targets = [] if bench.options.quick else [
        dict(zip(["what", "target", "measured", "met"], target)) for each in TARGETS for target in each(bench)]
    report = {"command": shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
              "machine": f"{cpu_name()}, {os.cpu_count()} cores", "date": datetime.date.today().isoformat(),
              "threads": bench.options.threads, "minutes": (time.time() - start) / 60, "torch": version("torch"),
              "targets": targets, "rows": bench.rows, "peers": bench.peers, "failures": bench.failures}
    bench.options.out.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    Path(f"{stem}.md").write_text(markdown(bench, report))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few short rows")
    parser.add_argument("--only", help=f"groups, of {','.join(GROUPS)}")
    parser.add_argument("--long", action="store_true", help="10M tokens: (512, 3) whole, larger samples (hours)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one call of moba bench (an hour with --long)")
    parser.add_argument("--moba", default=str(ROOT / "build/release/moba"), help="the program")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--name", help="of the files of results [the machine and the date]")
    options = parser.parse_args()
    options.groups = options.only.split(",") if options.only else list(GROUPS)
    for group in options.groups:
        if group not in GROUPS:
            parser.error(f"--only: expected groups of {','.join(GROUPS)}; found {group}")
    if not Path(options.moba).exists():
        parser.error(f"--moba: {options.moba} is missing; `make build` makes it")
    if options.long:
        options.timeout = max(options.timeout, 3600)
    return options


def main():
    options = parse()
    name = options.name or f"{machine_name()}-{datetime.date.today().isoformat()}{'-quick' if options.quick else ''}"
    stem, start = options.out / name, time.time()
    bench = Bench(options)
    if options.only and Path(f"{stem}.json").exists():
        bench.keep(json.loads(Path(f"{stem}.json").read_text()), options.groups)
    groups = {"quick": quick} if options.quick else {group: GROUPS[group] for group in options.groups}
    for group, run in groups.items():
        print(f"{group} ({(time.time() - start) / 60:.0f} min)", file=sys.stderr)
        run(bench)
        write(bench, stem, start)
    plot_time(bench, stem)
    plot_peak(bench, stem)
    print(f"{stem}.md")


if __name__ == "__main__":
    main()
