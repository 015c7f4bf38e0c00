#!/usr/bin/env python3
"""Compare a file of results, of run.py, models.py, fidelity.py, pytorch_operator.py or cuda.py, with the project's goals.

Prints a table of goals, measured values and whether each goal is met.

    .venv/bin/python benchmarks/targets.py benchmarks/results/<machine>-<date>.json
"""

import argparse
import json
from pathlib import Path

from run import CHOICES, FULL, KI, MI, Results, blocks, length, table

import models


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
    return (
        None
        if value is None
        else f"{value:.1f}x" + (" (peer extrapolated)" if extrapolated else "")
    )


def lowest_fraction(rows, bar):
    """Return the fractions of all lengths, and whether the lowest reaches the bar."""
    if not rows:
        return "not measured", None
    fractions = [
        f"{length(r['tokens'])}: {r['fraction_of_peak']:.3f}{' (sampled)' if r['share'] < 1 else ''}"
        for r in rows
    ]
    return ", ".join(fractions), min(r["fraction_of_peak"] for r in rows) >= bar


def forward_targets(results):
    for dim, group, bars in [
        (128, "forward", [0.85, 0.80, 0.72, 0.60]),
        (64, "small-heads", [0.75, 0.72, 0.62, 0.50]),
    ]:
        for choice, bar in zip(CHOICES, bars):
            rows = [
                r
                for r in results.find(choice, group=group, dtype="f32", head_dim=dim)
                if r["tokens"] >= 32 * KI
            ]
            yield (
                f"forward f32, D {dim}, {blocks(choice)}, of FMA peak",
                f">= {bar}",
                *lowest_fraction(rows, bar),
            )


def unit_targets(results):
    for choice in [FULL, *CHOICES[2:]]:
        found = [
            f"{form} {results.find(choice, group='units', MOBA_CPU_F32=form)[0]['fraction_of_peak']:.3f}"
            for form in ["fma", "amx"]
            if results.find(choice, group="units", MOBA_CPU_F32=form)
        ]
        yield (
            f"forward f32, D 128, {blocks(choice)}, 32K, of FMA peak, by unit",
            "shown",
            ", ".join(found) or "not measured",
            None,
        )


def routing_targets(results):
    for choice in CHOICES[1:]:
        base = results.seconds(choice, group="routings", routing="independent")
        for routing in ["clustered", "sink"]:
            change = ratio(results.seconds(choice, group="routings", routing=routing), base)
            yield (
                f"{routing} routing against independent, {blocks(choice)}, time",
                "<= 1.15",
                *at_most(change, 1.15),
            )


def head_targets(results):
    for choice in CHOICES[2:]:
        change = ratio(
            results.seconds(choice, group="heads", kv_heads=3),
            results.seconds(choice, group="heads", kv_heads=9),
        )
        yield (
            f"9 query heads on 3 kv heads against 9, {blocks(choice)}, time",
            "<= 1",
            *at_most(change, 1),
        )


def bf16_targets(results):
    for choice in [FULL, *CHOICES[2:]]:
        bf16_seconds = results.seconds(choice, group="bf16", dtype="bf16")
        change = ratio(bf16_seconds, results.seconds(choice, group="bf16", dtype="f32"))
        fma = ratio(bf16_seconds, results.seconds(choice, group="units", MOBA_CPU_F32="fma"))
        text = change and fma and f"{change:.3f} ({fma:.3f} of f32 by multiply-adds)"
        yield (
            f"forward bf16 against f32, {blocks(choice)}, 32K, time",
            "<= 0.62",
            *at_most(change, 0.62, text),
        )


def sdpa_targets(results):
    for choice, tokens, bar in [
        (FULL, 32 * KI, 3),
        ((512, 3), 32 * KI, 30),
        ((512, 3), 128 * KI, 120),
        ((128, 8), MI, 400),
    ]:
        peer = results.peer_row("sdpa", tokens, group="forward")
        speed = ratio(
            peer and peer["seconds_median"],
            results.seconds(choice, group="forward", tokens=tokens, dtype="f32"),
        )
        yield (
            f"forward against torch SDPA, {blocks(choice)}, {length(tokens)}",
            f">= {bar}x",
            *at_least(speed, bar, times(speed, peer and peer["extrapolated"])),
        )


def flex_targets(results):
    for tokens in [32 * KI, 128 * KI]:
        peer = results.peer_row("flex", tokens)
        speed = ratio(
            peer and peer["seconds_median"],
            results.seconds((512, 3), group="forward", tokens=tokens),
        )
        text = times(speed, peer and peer["extrapolated"])
        yield (
            f"forward against FlexAttention with MoBA's mask, (512, 3), {length(tokens)}",
            "shown",
            text or "not measured",
            None,
        )


def backward_targets(results):
    for choice, bar in [(FULL, 0.75), ((512, 3), 0.65), ((128, 8), 0.55)]:
        yield (
            f"backward f32, D 128, {blocks(choice)}, of FMA peak",
            f">= {bar}",
            *lowest_fraction(results.find(choice, group="backward"), bar),
        )
    tokens = 32 * KI
    peer = results.peer_row("sdpa-backward", tokens)
    speed = ratio(
        peer and peer["seconds_median"], results.seconds(FULL, group="backward", tokens=tokens)
    )
    yield (
        f"backward against torch SDPA's, full, {length(tokens)}",
        ">= 3x",
        *at_least(speed, 3, times(speed, peer and peer["extrapolated"])),
    )


def gate_targets(results):
    f32 = results.find((128, 8), group="gate", MOBA_CPU_GATE="f32")
    int8 = results.seconds((128, 8), group="gate", MOBA_CPU_GATE="int8")
    yield "gate f32, B 128, of FMA peak", ">= 0.75", *lowest_fraction(f32, 0.75)
    speed = ratio(f32[0]["seconds_median"] if f32 else None, int8)
    yield "gate int8, exact, against f32, 1M", ">= 1.6x", *at_least(speed, 1.6, times(speed))


def decode_targets(results):
    for dtype, bar in [("f32", 0.90), ("f16", 0.85), ("i8", 0.80)]:
        for choice in [(4096, 12), (128, 8)]:
            yield (
                f"decode {dtype}, {blocks(choice)}, of read bandwidth",
                f">= {bar}",
                *lowest_fraction(results.find(choice, group="decode", dtype=dtype), bar),
            )


def linear_targets(results):
    seconds = {
        r["tokens"]: r["plan_seconds"] + r["attend_seconds"]
        for r in results.find((128, 8), group="forward")
        if r["share"] == 1
    }
    steps = {
        n: ratio(seconds[2 * n], seconds[n]) for n in seconds if 2 * n in seconds and n >= 32 * KI
    }
    text = ", ".join(f"{length(n)}: {step:.2f}" for n, step in steps.items())
    yield (
        "time(2N) / time(N), (128, 8), without the gate",
        "<= 2.1",
        *at_most(max(steps.values(), default=None), 2.1, text),
    )


def ten_million_targets(results):
    whole = results.find((512, 3), group="ten-million")
    text = ", ".join(
        f"{r['seconds_median']:.1f} s, {r['peak_rss_bytes'] / 2**30:.1f} GiB" for r in whole
    )
    yield (
        "10M tokens, bf16, (512, 3), whole",
        "runs in 24 GiB",
        text or "not measured",
        max(r["peak_rss_bytes"] for r in whole) <= 24 * 2**30 if whole else None,
    )
    sampled = results.find((10 * MI // 64, 3), group="ten-million")
    dense = results.find(FULL, group="ten-million")
    speed = ratio(
        dense[0]["seconds_median"] if dense else None,
        sampled[0]["seconds_median"] if sampled else None,
    )
    text = (
        speed
        and f"{speed:.1f}x (shares of {sampled[0]['share']:g} and {dense[0]['share']:g}, scaled)"
    )
    yield (
        "10M tokens, bf16, 64 blocks, K 3, against full, both sampled",
        ">= 12x",
        *at_least(speed, 12, text),
    )


def naive_targets(results):
    choice, tokens = (2048, 3), 32 * KI
    row, peer = (
        results.find(choice, group="naive", tokens=tokens),
        results.peer_row("moba-naive", tokens),
    )
    speed = ratio(peer and peer["seconds_median"], row[0]["seconds_median"] if row else None)
    yield (
        f"against the mask-based form, {blocks(choice)}, {length(tokens)}",
        ">= 100x",
        *at_least(speed, 100, times(speed, peer and peer["extrapolated"])),
    )

    def grown(rows):
        """Return the memory that the last doubling of the length adds over the memory that the doubling before it added."""
        memory = [
            r["peak_rss_bytes"]
            for r in sorted(rows, key=lambda r: r["tokens"])
            if "peak_rss_bytes" in r
        ]
        return (
            (memory[-1] - memory[-2]) / max(memory[-2] - memory[-3], 1)
            if len(memory) >= 3
            else None
        )

    mine, masked = (
        grown(results.find(group="naive")),
        grown([p for p in results.peers if p["group"] == "naive"]),
    )
    text = (
        mine
        and masked
        and row
        and peer
        and "peak_rss_bytes" in peer
        and (
            f"{mine:.1f} against {masked:.1f}; {length(tokens)} takes {row[0]['peak_rss_bytes'] / 2**30:.2f} GiB against "
            f"{peer['peak_rss_bytes'] / 2**30:.1f}"
        )
        or None
    )
    yield (
        "memory added by a doubling over the doubling before: ours about 2, the mask's about 4",
        "<= 2.5",
        *at_most(mine, 2.5, text),
    )


def thread_targets(results):
    for choice in [FULL, *CHOICES[2:]]:
        speed = ratio(
            results.seconds(choice, group="threads", threads=1),
            results.seconds(choice, group="threads", threads=2),
        )
        yield (
            f"two threads against one, {blocks(choice)}",
            ">= 1.9x",
            *at_least(speed, 1.9, times(speed)),
        )


TARGETS = [
    forward_targets,
    unit_targets,
    routing_targets,
    head_targets,
    bf16_targets,
    sdpa_targets,
    flex_targets,
    backward_targets,
    gate_targets,
    decode_targets,
    linear_targets,
    ten_million_targets,
    naive_targets,
    thread_targets,
]


def fidelity_targets(results):
    """Yield (what, target, measured, met) of results of benchmarks/fidelity.py."""
    import fidelity

    for what, mode, trailing, bar in [
        ("MoBA's loss against full attention's", "MoBA", False, 0.005),
        ("the hybrid's trailing loss against full attention's", "hybrid", True, 0.003),
    ]:
        for size, runs in fidelity.complete(results).items():
            ours, theirs = (fidelity.own_evaluation(runs, name) for name in (mode, "full"))
            difference = fidelity.compared(ours, theirs, trailing)["relative"]
            yield (
                f"{what}, {size}",
                f"<= {bar:.1%}",
                *at_most(difference, bar, f"{difference:+.3%}"),
            )


# Goals for benchmarks/cuda.py by part and block setting: stage 1 (mma.sync) and stage 2 (wgmma).
CUDA_STAGES = {
    "forward": {
        (4096, 12): (0.45, 0.92),
        (2048, 3): (0.45, 0.92),
        (512, 3): (0.40, 0.80),
        (128, 8): (0.30, 0.50),
    },
    "backward": {(2048, 3): (0.40, 0.90), (512, 3): (0.35, 0.75), (128, 8): (0.30, 0.60)},
    "batch_of_two": {(128, 8): (6, 11)},
    "million": {
        (128, 8): (60, 110),
        (512, 3): (110, 230),
        (2048, 3): (45, 85),
        (4096, 12): (5, 10),
    },
    "decode": {(128, 8): (0.60, 0.80), (4096, 12): (0.60, 0.80)},
}
CUDA_MEMORY_GIB = 80
CUDA_DECODE_MICROSECONDS = 20  # instead of the fraction of stage 2


def cuda_targets(report):
    """Yield (what, target, measured, met) of results of benchmarks/cuda.py."""
    for row in report["rows"]:
        what, value, unit = row["what"], row["value"], row["unit"]
        if row["part"] == "memory":
            yield (
                what,
                f"<= {CUDA_MEMORY_GIB} GiB",
                *at_most(value, CUDA_MEMORY_GIB, f"{value:.3g} GiB"),
            )
        stages = CUDA_STAGES.get(row["part"], {}).get(tuple(row.get("choice", ())), ())
        for stage, bar in enumerate(stages, 1):
            target = f">= {bar:g}{unit}"
            measured, met = at_least(value, bar, f"{value:.3g}{unit}")
            if row["part"] == "decode" and stage == 2:
                target += f", or <= {CUDA_DECODE_MICROSECONDS} us"
                measured += f", {row['microseconds']:.1f} us"
                met = met or row["microseconds"] <= CUDA_DECODE_MICROSECONDS
            yield f"{what}, stage {stage}", target, measured, met


def pytorch_targets(report):
    """Yield (what, target, measured, met) of results of benchmarks/pytorch_operator.py."""
    rows = [row for part in report["parts"].values() for row in part]
    peaks = {
        name: row["value"]
        for row in rows
        for name in ("sdpa", "moba")
        if row["what"].endswith(f"{name}: peak of the process")
    }
    for row in rows:
        what, value = row["what"], row["value"]
        shown = f"{value:.4g} {row['unit']}"
        if what.startswith("a call") and not what.endswith("forward and backward"):
            yield what, "<= 30 us", *at_most(value, 30, shown)
        elif what.endswith(": added"):
            yield what, "< 3%", *at_most(value, 3, shown)
        elif what.endswith("sdpa / moba"):
            yield what, ">= 4x", *at_least(value, 4, shown)
        elif what.endswith("moba: peak of the process"):
            yield what, "<= SDPA's", *at_most(value, peaks["sdpa"], shown)


PROMPT_SECTIONS = {"ttft": "SmolLM2", "q4_0": "1B Q4_0", "q8_0": "1B Q8_0"}
MEMORY_MARGIN = 300 * MI


def models_targets(report):
    """Yield (what, target, measured, met) of results of benchmarks/models.py."""
    sections = report["sections"]
    for name in PROMPT_SECTIONS:
        if name in sections:
            yield from prompt_targets(PROMPT_SECTIONS[name], sections[name])
    for name, title, part in [
        ("decode", "SmolLM2", "rows"),
        ("q4_0", "1B Q4_0", "empty_context"),
        ("q8_0", "1B Q8_0", "empty_context"),
    ]:
        if name in sections:
            rows = sections[name][part]
            ratio = models.speedup(
                rows, "decode_tokens_per_second", models.MOBA_FULL, models.LLAMA_CPP
            )
            yield (
                f"{title}: decode without context, against llama.cpp",
                ">= 1.5x",
                *at_least(ratio, 1.5, times(ratio)),
            )
    if "start" in sections:
        seconds = sections["start"]["seconds"]
        yield "start, whole process", "<= 0.5 s", *at_most(seconds, 0.5, f"{seconds:.2f} s")
    if "fidelity" in sections:
        yield from distribution_targets(sections["fidelity"])


def prompt_targets(title, section):
    """Yield the goals of a long prompt: time to first token, decode after it, memory."""
    rows, tokens = section["rows"], section["prompt_tokens"]
    own_and_peers = [
        ("MoBA", models.MOBA, "vLLM", models.VLLM, 2),
        ("MoBA", models.MOBA, "llama.cpp", models.LLAMA_CPP, 8),
        ("full", models.MOBA_FULL, "vLLM", models.VLLM, 1.3),
        ("full", models.MOBA_FULL, "llama.cpp", models.LLAMA_CPP, 5),
        *(
            (f"MoBA, {d}", models.Engine("moba", d, "moba"), "transformers", peer, 4)
            for d, peer in models.TRANSFORMERS.items()
        ),
    ]
    for attention, own, name, peer, bar in own_and_peers:
        ratio = models.speedup(rows, "first_token_seconds", own, peer)
        yield (
            f"{title}: first token of {tokens}, {attention}, against {name}",
            f">= {bar}x",
            *at_least(ratio, bar, times(ratio)),
        )
    for attention, own, bar in [("full", models.MOBA_FULL, 1.5), ("MoBA", models.MOBA, 4)]:
        ratios = [
            models.speedup(rows, "decode_tokens_per_second", own, peer)
            for peer in (models.LLAMA_CPP, models.VLLM)
        ]
        ratio = None if None in ratios else min(ratios)
        yield (
            f"{title}: decode after {tokens}, {attention}, against the better of llama.cpp and vLLM",
            f">= {bar}x",
            *at_least(ratio, bar, times(ratio)),
        )
    for attention, own in [("full", models.MOBA_FULL), ("MoBA", models.MOBA)]:
        row = models.find(rows, own)
        if row:
            bar = section["model_bytes"] + row["kv_cache_bytes"] + MEMORY_MARGIN
            peak = row["peak_rss_bytes"]
            yield (
                f"{title}: peak memory with {tokens}, {attention}",
                f"<= {bar / MI:.0f} MiB",
                *at_most(peak, bar, f"{peak / MI:.0f} MiB"),
            )
    row = models.find(rows, models.MOBA)
    share = row and row["attention_seconds"] / row["first_token_seconds"]
    yield (
        f"{title}: attention's share of MoBA's time to first token",
        "<= 15%",
        *at_most(share, 0.15, share and f"{100 * share:.1f}%"),
    )


def distribution_targets(section):
    """Yield the goals of the distance to f32, relative to llama.cpp's."""
    rows = {row["engine"]: row for row in section["rows"]}
    if rows.keys() >= {"moba", "llama.cpp"}:
        own, peer = rows["moba"], rows["llama.cpp"]
        value = own["kl_mean"] / peer["kl_mean"]
        yield "KL from f32 against llama.cpp's", "<= 1.5x", *at_most(value, 1.5, f"{value:.3g}x")
        own, peer = own["equal_tokens_mean"], peer["equal_tokens_mean"]
        yield "tokens as f32's", f">= {peer:.1f}", *at_least(own, peer, f"{own:.1f}")


def attention_targets(report):
    """Yield (what, target, measured, met) of results of benchmarks/run.py."""
    results = Results(report["rows"], report["peers"])
    for targets in TARGETS:
        yield from targets(results)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="a JSON file that one of these benchmarks wrote")
    options = parser.parse_args()
    report = json.loads(options.results.read_text())
    if "peers" in report:
        found = attention_targets(report)
    elif "sections" in report:
        found = models_targets(report)
    elif "parts" in report:
        found = pytorch_targets(report)
    elif "rows" in report:
        found = cuda_targets(report)
    else:
        found = fidelity_targets(report)
    marks = {True: "met", False: "not met", None: ""}
    rows = [(what, target, measured, marks[met]) for what, target, measured, met in found]
    print("\n".join(table(["what", "target", "measured", "met?"], rows)))


if __name__ == "__main__":
    main()
