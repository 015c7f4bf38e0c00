#!/usr/bin/env python3
"""Time flash-moba 2.0 beside moba and dense attention of torch (cuDNN, else FlashAttention) on a CUDA device.

All run in one process, on the same packed bf16 tensors of one sequence (16 heads of head_dim 128, causal), interleaved; times are
medians of CUDA events. A forward includes the selection of blocks. Both count the own block among top-k, so both read the same
number of blocks. Before that, at 8K tokens, the blocks of all rows are compared, and outputs and gradients of the rows with the
same blocks. Results are written to `<gpu>-<date>-flash-moba.md` and `.json` after every length; lengths that do not fit into the
time limit are skipped and named. The exit code is 1 if results disagree or a call failed.

    benchmarks/peers/build_flash_moba.sh ...      # describes its arguments; needs nvcc, no GPU
    python3 benchmarks/peers/flash_moba.py --flash-moba build/peers/flash-moba --seconds 60
"""

import argparse
import datetime
import importlib.util
import json
import sys
import time
from pathlib import Path

# Under another name than `cuda`, which is a package of NVIDIA's.
CUDA_PY = Path(__file__).resolve().parents[1] / "cuda.py"
spec = importlib.util.spec_from_file_location("moba_cuda", CUDA_PY)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

KI = bench.KI
CHOICES = [(128, 8), (512, 3)]
PEER = "flash-moba"
SELECT, FORWARD, BOTH = "selection", "forward", "forward and backward"
# Tokens, what is timed, and maximum seconds at the speeds of an H100; most important first.
PARTS = [
    (32 * KI, (PEER, "moba", f"dense {FORWARD}", f"dense {BOTH}"), 4),
    (128 * KI, (PEER, "moba", f"dense {FORWARD}", f"dense {BOTH}"), 12),
    (512 * KI, (PEER, "moba", f"dense {FORWARD}"), 25),
    (512 * KI, (f"dense {BOTH}",), 18),
]
CHECKED_TOKENS = 8 * KI
# Both round the probabilities and their gradients to bf16, which is 4e-3 of a value at most.
MAX_ERROR = 2e-2
# Blocks whose scores are equal but for the order of sums may be chosen differently.
MIN_SAME_ROWS = 0.99


# ---- calls ----


class Calls:
    """The calls of flash-moba, moba and dense attention on the tensors of `bench.Inputs`, all in its layout."""

    def __init__(self, package, dense, inputs):
        import torch

        self.package, self.dense_peer, self.inputs = package, dense, inputs
        self.leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
        self.d_out = torch.randn_like(inputs.q)

    def options(self, choice):
        """Return the arguments that both of flash-moba's functions take after the tensors."""
        inputs, (block_size, top_k) = self.inputs, choice
        return {
            "cu_seqlens_q": inputs.cu,
            "cu_seqlens_k": inputs.cu,
            "max_seqlen_q": inputs.tokens,
            "max_seqlen_k": inputs.tokens,
            "moba_chunk_size": block_size,
            "moba_topk": top_k,
            "causal": True,
        }

    def select(self, choice):
        """Return flash-moba's selection by column: for each head and block the rows that selected it."""
        q, k = self.inputs.q, self.inputs.k
        return self.package.flash_topk_varlen_func(q, k, **self.options(choice))

    def flash_moba(self, choice, q, k, v):
        return self.package.flash_moba_varlen_func(q, k, v, **self.options(choice))

    def select_with_moba(self, choice):
        from moba import ops

        return ops.select(self.inputs.q, self.inputs.k, self.inputs.cu, self.inputs.cu, *choice)

    def moba(self, choice, q, k, v):
        from moba.functional import varlen

        return varlen(q, k, v, self.inputs.cu, self.inputs.cu, *choice)[0]

    def dense(self, choice, q, k, v):
        views = self.inputs.dense(self.dense_peer, q, k, v)
        return views.transpose(1, 2).flatten(0, 1)

    def forward(self, attend, choice):
        inputs = self.inputs
        return attend(choice, inputs.q, inputs.k, inputs.v)

    def both(self, attend, choice, d_out=None):
        """Return the gradients of q, k and v after a forward."""
        import torch

        out = attend(choice, *self.leaves)
        return torch.autograd.grad(out, self.leaves, self.d_out if d_out is None else d_out)

    def timed(self, what):
        """Return the calls of a part, {(who, call, choice): function}."""
        calls = {}
        for choice in CHOICES:
            for who, select, attend in (
                (PEER, self.select, self.flash_moba),
                ("moba", self.select_with_moba, self.moba),
            ):
                if who in what:
                    calls[who, SELECT, choice] = lambda f=select, c=choice: f(c)
                    calls[who, FORWARD, choice] = lambda f=attend, c=choice: self.forward(f, c)
                    calls[who, BOTH, choice] = lambda f=attend, c=choice: self.both(f, c)
        if f"dense {FORWARD}" in what:
            calls["dense", FORWARD, None] = lambda: self.forward(self.dense, None)
        if f"dense {BOTH}" in what:
            calls["dense", BOTH, None] = lambda: self.both(self.dense, None)
        return calls


# ---- agreement ----


def rows_by_column(offsets, counts, rows, tokens):
    """Return which blocks a row selected, bool [heads, tokens, blocks], from flash-moba's selection of one sequence."""
    import torch

    _, heads, blocks = counts.shape
    lengths, starts = counts.flatten().long(), offsets.flatten()
    column = torch.arange(heads * blocks, device=rows.device).repeat_interleave(lengths)
    place = torch.arange(len(column), device=rows.device) - (lengths.cumsum(0) - lengths)[column]
    row = rows[starts[column] + place].long()
    chosen = torch.zeros(heads, tokens, blocks, dtype=torch.bool, device=rows.device)
    chosen[column // blocks, row, column % blocks] = True
    return chosen


def columns_by_row(selection, blocks):
    """Return which blocks a row selected, bool [heads, tokens, blocks], from a selection of moba."""
    import torch

    chosen = torch.zeros(
        *selection.shape[:2], blocks + 1, dtype=torch.bool, device=selection.device
    )
    listed = selection.long()
    return chosen.scatter_(2, torch.where(listed < 0, blocks, listed), True)[..., :blocks]


def relative_error(found, right):
    return float((found.float() - right.float()).norm() / right.float().norm())


def agreement(calls, choice):
    """Compare flash-moba with moba, whose own result is checked in float64; return a sentence, or raise AssertionError."""
    inputs = calls.inputs
    inputs.verify(choice)
    theirs = rows_by_column(*calls.select(choice), inputs.tokens)
    ours = columns_by_row(calls.select_with_moba(choice), theirs.shape[2])
    assert (theirs.sum(2) == ours.sum(2)).all(), (
        f"{choice}: expected as many blocks a row as moba selects, "
        f"got {theirs.sum(2).float().mean():.2f} in the mean instead of {ours.sum(2).float().mean():.2f}"
    )
    same = (theirs == ours).all(2).T  # [tokens, heads]
    share = float(same.float().mean())
    assert share >= MIN_SAME_ROWS, (
        f"{choice}: expected the same blocks in {100 * MIN_SAME_ROWS:.0f}% of the rows, got {100 * share:.2f}%"
    )
    found, right = (calls.forward(attend, choice) for attend in (calls.flash_moba, calls.moba))
    errors = {"output": relative_error(found[same], right[same])}
    # Only these rows receive a gradient, so that the others contribute to none.
    d_out = calls.d_out * same[:, :, None]
    gradients = (calls.both(attend, choice, d_out) for attend in (calls.flash_moba, calls.moba))
    for name, found, right in zip(("dq", "dk", "dv"), *gradients):
        errors[name] = relative_error(found, right)
    text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    assert all(error < MAX_ERROR for error in errors.values()), (
        f"{choice}: expected errors below {MAX_ERROR:.0e} of moba's results, got {text}"
    )
    return (
        f"{choice}, {bench.length(inputs.tokens)} tokens: the same number of blocks in all rows, "
        f"the same blocks in {100 * share:.3f}%; errors relative to moba's results: {text}"
    )


# ---- results ----


def rows_of(tokens, times):
    """Return a row of the result for each timed call."""
    length = bench.length(tokens)
    return [
        bench.row(
            f"{length}, {call}: {who}" if choice is None else f"{length} {choice}, {call}: {who}",
            entry["ms"],
            "ms",
            bench.timing(entry),
            tokens=tokens,
            choice=choice,
            call=call,
            by=who,
        )
        for (who, call, choice), entry in times.items()
    ]


def table(rows, dense):
    """Return the lines of a table of all calls, with those of dense attention in the rows of every choice."""
    found = {(row["tokens"], row["choice"], row["call"], row["by"]): row["value"] for row in rows}
    lines = [
        f"| tokens | block, top-k | call | {PEER}, ms | moba, ms | {dense}, ms | {PEER} / moba | {dense} / moba |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        for choice in CHOICES:
            for call in (SELECT, FORWARD, BOTH):
                theirs, ours = (found.get((tokens, choice, call, who)) for who in (PEER, "moba"))
                whole = found.get((tokens, None, call, "dense"))
                cells = [f"{ms:.3f}" if ms else "" for ms in (theirs, ours, whole)]
                cells += [f"{ms / ours:.2f}" if ms and ours else "" for ms in (theirs, whole)]
                head = [bench.length(tokens), "{}, {}".format(*choice), call]
                lines.append(f"| {' | '.join(head + cells)} |")
    return lines


def markdown(report):
    lines = [f"# flash-moba beside moba: {report['machine']['gpu']}, {report['date']}", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    lines += [f"- command: `{report['command']}`"]
    lines += [
        "- bf16, 16 heads of head_dim 128, causal, one sequence; a forward includes the selection"
    ]
    lines += [f"- agreement: {text}" for text in report["agreement"]]
    lines += ["", *table(report["rows"], report["dense"])]
    for title, entries in (("Skipped", report["skipped"]), ("Wrong or failed", report["failed"])):
        if entries:
            lines += ["", f"## {title}", *(f"- {entry}" for entry in entries)]
    return "\n".join(lines) + "\n"


def write(report, folder):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{bench.stem(report)}-flash-moba.md"
    path.write_text(markdown(report))
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    return path


# ---- run ----


def imported(folder):
    """Return torch and flash-moba of `folder`; exit with a sentence if something is missing."""
    if not (folder / "flash_moba_cuda.so").exists():
        sys.exit(
            f"flash_moba: --flash-moba: expected a folder of benchmarks/peers/build_flash_moba.sh, "
            f"got {folder} without flash_moba_cuda.so"
        )
    torch = bench.torch_with_device("flash_moba")
    sys.path.insert(0, str(folder.resolve()))
    try:
        import flash_moba
    except (ImportError, OSError) as error:
        sys.exit(
            f"flash_moba: --flash-moba: expected a build for torch {torch.__version__} and Python "
            f"{sys.version_info.major}.{sys.version_info.minor}, got one that cannot be imported: {error}"
        )
    return torch, flash_moba


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--flash-moba",
        type=Path,
        metavar="FOLDER",
        default=bench.ROOT / "build" / "peers" / "flash-moba",
        help="output of benchmarks/peers/build_flash_moba.sh, default build/peers/flash-moba",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=60,
        help="time limit, default 60; lengths that do not fit are skipped and named",
    )
    parser.add_argument("--results", type=Path, default=bench.ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    torch, package = imported(options.flash_moba)

    dense = bench.Bench()
    report = {
        "machine": bench.machine() | {PEER: getattr(package, "__version__", "unknown")},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python3", *sys.argv]),
        "dense": dense.peer,
        "agreement": [],
        "rows": [],
        "skipped": [],
        "failed": [],
    }

    def attempt(what, function):
        """Call `function`; record why it failed, if it does."""
        begin = time.monotonic()
        try:
            function()
        except torch.OutOfMemoryError:
            report["skipped"].append(f"{what}: the device has too little memory")
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            report["failed"].append(f"{what}: {reason}")
            print(f"FAILED {report['failed'][-1]}", flush=True)
        torch.cuda.empty_cache()
        print(f"  {what}: {time.monotonic() - begin:.0f} s", flush=True)

    def compare(choice):
        calls = Calls(package, dense.peers[dense.peer], bench.Inputs(CHECKED_TOKENS))
        report["agreement"].append(agreement(calls, choice))
        print(report["agreement"][-1], flush=True)

    def measure(tokens, what, seconds):
        calls = Calls(package, dense.peers[dense.peer], bench.Inputs(tokens)).timed(what)
        # The warm-up takes as long as a round, and the last round begins before its time is over.
        rows = rows_of(tokens, bench.interleaved(calls, seconds=seconds / 3))
        for entry in rows:
            print(f"{entry['what']}: {bench.measured(entry)}", flush=True)
        report["rows"] += rows

    for choice in CHOICES:
        attempt("agreement", lambda: compare(choice))
    path = write(report, options.results)
    for tokens, what, seconds in PARTS:
        name = f"{bench.length(tokens)}, {', '.join(what)}"
        left = deadline - time.monotonic()
        if left < seconds:
            report["skipped"].append(
                f"{name}: takes up to {seconds} s, {max(left, 0):.0f} s were left"
            )
        else:
            attempt(name, lambda: measure(tokens, what, seconds))
        path = write(report, options.results)
    for entry in report["skipped"]:
        print(f"skipped {entry}")
    print("\n".join(table(report["rows"], report["dense"])))
    print(f"written: {path}")
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.path.pop(0)  # hides this file, which has the name of flash-moba's package
    sys.exit(main())
