#!/usr/bin/env python3
"""Measure MoBA on a CUDA device against dense attention through torch (cuDNN, else FlashAttention), in the same run.

Sampled rows of all inputs are checked in float64 before they are timed. Compared calls are interleaved; times are medians of
CUDA events and include the gate and the plan. Rows are written to benchmarks/results/<gpu>-<date>.json and .md after every
part, with the parts that were skipped for lack of time. The exit code is 1 if a result was wrong.

    python3 benchmarks/cuda.py --seconds 200
"""

import argparse
import datetime
import json
import re
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KI, MI = 1 << 10, 1 << 20
HEAD_DIM = 128
# Block size and top-k.
CHOICES = [(4096, 12), (2048, 3), (512, 3), (128, 8)]
DEVICE = "cuda"


# ---- useful work ----


def length(tokens):
    return f"{tokens // MI}M" if tokens % MI == 0 else f"{tokens // KI}K"


def dense_pairs(tokens):
    return tokens * (tokens + 1) // 2


def counts(tokens, block_size, top_k):
    """Return the numbers of (query, selected key) and of (query, scored block) pairs of one head."""
    blocks, rest = divmod(tokens, block_size)

    def sum_over_queries(of_block):
        return sum(of_block(own) for own in range(blocks)) * block_size + of_block(blocks) * rest

    own_block = blocks * block_size * (block_size + 1) // 2 + rest * (rest + 1) // 2
    chosen = sum_over_queries(lambda own: min(top_k - 1, own)) * block_size
    return own_block + chosen, sum_over_queries(lambda own: own)


def useful(tokens, choice, per_pair):
    pairs, scored = counts(tokens, *choice)
    return HEAD_DIM * (per_pair * pairs + (2 * scored if per_pair == 4 else 0))


# ---- rows ----


def row(what, value, unit, detail="", **more):
    """Return a row of the result. `more` goes to the JSON only: the block setting and what benchmarks/targets.py needs."""
    return {"what": what, "value": value, "unit": unit, "detail": detail, **more}


def measured(entry):
    return f"{entry['value']:.3g} {entry['unit']}".rstrip()


def markdown(report):
    lines = [f"# CUDA: {report['machine']['gpu']}, {report['date']}", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    lines += [f"- command: `{report['command']}`", ""]
    lines += ["| what | measured | detail |", "|---|---|---|"]
    for entry in report["rows"]:
        lines.append(f"| {entry['what']} | {measured(entry)} | {entry['detail']} |")
    for title, entries in (("Skipped", report["skipped"]), ("Wrong or failed", report["failed"])):
        if entries:
            lines += ["", f"## {title}", *(f"- {entry}" for entry in entries)]
    return "\n".join(lines) + "\n"


def stem(report):
    """Return the beginning of the names of result files: GPU and date."""
    gpu = re.sub(r"[^a-z0-9]+", "-", report["machine"]["gpu"].lower()).strip("-")
    return f"{gpu}-{report['date']}"


def write(report, folder):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / stem(report)
    for suffix, text in ((".json", json.dumps(report, indent=1) + "\n"), (".md", markdown(report))):
        path.with_suffix(suffix).write_text(text)
    return path.with_suffix(".md")


# ---- inputs ----


def offsets(batch, tokens):
    import torch

    return torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * tokens


class Inputs:
    """Packed q, k and v of `batch` sequences of normally distributed values. `routing`: the pattern of the selection."""

    def __init__(self, tokens, heads=16, kv_heads=None, batch=1, routing="independent"):
        import torch

        self.tokens, self.heads, self.batch = tokens, heads, batch
        self.q, self.k, self.v = (
            torch.randn(batch * tokens, h, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
            for h in (heads, kv_heads or heads, kv_heads or heads)
        )
        if routing == "clustered":  # segments of 1024 tokens share a direction with other segments
            topics = torch.randn(64, 1, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
            of = torch.randint(64, (batch * tokens // 1024 + 1,), device=DEVICE).repeat_interleave(
                1024
            )[: batch * tokens]
            self.q += topics[of]
            self.k += topics[of]
        elif routing == "sink-heavy":  # every query selects the first block
            direction = torch.randn(1, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
            self.q += direction
            self.k[:512] += direction
        self.cu = offsets(batch, tokens)

    def moba(self, choice, q=None, k=None, v=None, selection=False):
        from moba import ops

        q, k, v = (
            given if given is not None else own
            for given, own in ((q, self.q), (k, self.k), (v, self.v))
        )
        return ops.attention(q, k, v, self.cu, self.cu, *choice, return_selection=selection)

    def dense(self, peer, q=None, k=None, v=None):
        from torch.nn.attention import sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        tensors = [
            given if given is not None else own
            for given, own in ((q, self.q), (k, self.k), (v, self.v))
        ]
        views = [t.unflatten(0, (self.batch, self.tokens)).transpose(1, 2) for t in tensors]
        with sdpa_kernel(peer):
            return scaled_dot_product_attention(
                *views, is_causal=True, enable_gqa=tensors[0].shape[1] != tensors[1].shape[1]
            )

    def verify(self, choice, rows=32):
        """Check blocks and output of sampled rows of two heads in float64; raise AssertionError if they are wrong."""
        import torch

        block_size, top_k = choice
        poison = torch.full((2 * self.q.numel(),), float("nan"), dtype=self.q.dtype, device=DEVICE)
        del poison  # the output lies in its memory
        out, _, selection = self.moba(choice, selection=True)
        assert torch.isfinite(out).all(), f"{choice}: expected finite outputs, got others"
        position = torch.randint(self.tokens, (rows,), device=DEVICE)
        position[:2] = torch.tensor([0, self.tokens - 1])
        key = torch.arange(self.tokens, device=DEVICE)
        complete = self.tokens // block_size
        for head in (0, self.heads - 1):
            kv = head * self.k.shape[1] // self.heads
            q = self.q[position, head]
            keys, values = self.k[: self.tokens, kv], self.v[: self.tokens, kv]
            chosen = torch.zeros(rows, complete + 2, dtype=torch.bool, device=DEVICE)
            listed = selection[head, position].long()
            chosen.scatter_(1, torch.where(listed < 0, complete + 1, listed), True)
            assert chosen.gather(1, position[:, None] // block_size).all(), (
                f"{choice}: expected every query to select its own block"
            )
            if complete:
                means = (
                    keys[: complete * block_size]
                    .unflatten(0, (complete, block_size))
                    .float()
                    .mean(1)
                    .to(q.dtype)
                )
                scores = q.double() @ means.double().T
                candidate = torch.arange(complete, device=DEVICE) < position[:, None] // block_size
                worst = scores.masked_fill(~(candidate & chosen[:, :complete]), torch.inf).amin(1)
                missed = scores.masked_fill(~candidate | chosen[:, :complete], -torch.inf).amax(1)
                assert (missed <= worst + 1e-3 * (1 + scores.abs().amax(1))).all(), (
                    f"{choice}: expected the blocks of highest score, got others"
                )
                count = torch.minimum(candidate.sum(1), torch.tensor(top_k - 1))
                assert torch.equal((candidate & chosen[:, :complete]).sum(1), count), (
                    f"{choice}: expected top_k blocks per query, got other numbers"
                )
            logits = (q.double() @ keys.double().T) * HEAD_DIM**-0.5
            logits = logits.masked_fill(
                ~chosen[:, key // block_size] | (key > position[:, None]), -torch.inf
            )
            right = logits.softmax(-1) @ values.double()
            error = (out[position, head].double() - right).norm() / right.norm()
            assert error < 1e-2, f"{choice}: the output is off by {error:.2e}"


class Cache:
    """Keys and values of `tokens` tokens and the next query of one layer of a model."""

    def __init__(self, tokens, heads):
        import torch

        self.tokens, self.heads = tokens, heads
        self.q = torch.randn(1, heads, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
        self.k, self.v = (
            torch.randn(1, tokens, heads, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
            for _ in range(2)
        )
        self.begin, self.end = (
            torch.full((1,), at, dtype=torch.int32, device=DEVICE) for at in (0, tokens)
        )

    def means(self, block_size):
        import torch

        complete = self.tokens // block_size
        blocks = self.k[:, : complete * block_size].unflatten(1, (complete, block_size))
        return blocks.mean(2, dtype=torch.float32).to(self.k.dtype)

    def decode(self, choice, means):
        from moba import ops
        from moba._operator import means_dtype

        return ops.decode(
            self.q, self.k, self.v, means.to(means_dtype(self.k)), self.begin, self.end, *choice
        )[0]

    def read(self, choice):
        """Return the minimum of bytes read: means of the candidates, keys and values of the selected blocks."""
        block_size, top_k = choice
        candidates = (self.tokens - 1) // block_size
        keys = min(top_k - 1, candidates) * block_size + self.tokens - candidates * block_size
        return self.heads * HEAD_DIM * 2 * (candidates + 2 * keys)

    def verify(self, choice, means):
        """Check the output in float64; raise AssertionError if it is wrong."""
        import torch

        block_size, top_k = choice
        candidates = (self.tokens - 1) // block_size
        out = self.decode(choice, means)
        for head in range(self.heads):
            q = self.q[0, head].double()
            scores = means[0, :candidates, head].double() @ q
            chosen = [*scores.topk(min(top_k - 1, candidates)).indices.tolist(), candidates]
            keys, values = (
                torch.cat(
                    [t[0, b * block_size : (b + 1) * block_size, head] for b in chosen]
                ).double()
                for t in (self.k, self.v)
            )
            right = (keys @ q * HEAD_DIM**-0.5).softmax(0) @ values
            error = (out[0, head].double() - right).norm() / right.norm()
            assert error < 1e-2, f"{choice}: the output of head {head} is off by {error:.2e}"


class Captured:
    """A CUDA graph of `function`, whose replay excludes the host's time. Keeps `function`, which holds the inputs: the graph
    reads their memory but does not own it."""

    def __init__(self, function):
        import torch

        self.function = function
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            function()

    def __call__(self):
        self.graph.replay()


def interleaved(functions, rounds=5, seconds=20.0):
    """Return median milliseconds, spread and number of runs of each function, interleaved after one warm-up call. Rounds end
    after `seconds`, at the earliest after the first."""
    import torch

    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    torch.cuda.synchronize()
    begin = time.monotonic()
    for _ in range(rounds):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
        if time.monotonic() - begin > seconds:
            break
    return {
        name: {
            "ms": statistics.median(t),
            "spread": (max(t) - min(t)) / statistics.median(t),
            "runs": len(t),
        }
        for name, t in times.items()
    }


def timing(entry):
    return f"{entry['ms']:.3f} ms, {entry['runs']} runs, spread {100 * entry['spread']:.0f}%"


# ---- parts, most important first ----


class Bench:
    def __init__(self):
        import torch
        from torch.nn.attention import SDPBackend

        self.peers = {
            "cuDNN": SDPBackend.CUDNN_ATTENTION,
            "FlashAttention": SDPBackend.FLASH_ATTENTION,
        }
        self.peers = {name: self.peers[name] for name in self.takers(Inputs(1024, heads=2))}
        if not self.peers:
            sys.exit("cuda: expected cuDNN or FlashAttention in torch on this device, got neither")
        self.peer = next(iter(self.peers))
        torch.cuda.synchronize()

    def takers(self, inputs):
        """Yield the names of the peers that support the inputs, cuDNN first."""
        for name, peer in self.peers.items():
            try:
                inputs.dense(peer)
            except RuntimeError:
                continue
            yield name

    def dense(self, inputs, peer=None, **tensors):
        return inputs.dense(self.peers[peer or self.peer], **tensors)

    @staticmethod
    def copied():
        """Return the source and the destination of a copy of 4 GiB."""
        import torch

        source = torch.empty(MI * KI, dtype=torch.int32, device=DEVICE).random_()
        return source, torch.empty_like(source)

    def ceilings(self):
        import torch

        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        source, target = self.copied()
        times = interleaved(
            {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds=20
        )
        yield row(
            "ceiling: matrix product, 8192^3 bf16",
            2 * 8192**3 / times["product"]["ms"] / 1e9,
            "TFLOP/s",
        )
        yield row(
            "ceiling: copy, read and written", 2 * source.nbytes / times["copy"]["ms"] / 1e9, "TB/s"
        )

    def forward(self):
        tokens = 32 * KI
        inputs = Inputs(tokens)
        for choice in CHOICES:
            inputs.verify(choice)
        calls = {name: (lambda peer=peer: inputs.dense(peer)) for name, peer in self.peers.items()}
        times = interleaved(
            calls
            | {c: (lambda c=c: inputs.moba(c)) for c in CHOICES}
            | {"full": lambda: inputs.moba((512, 64))}
        )
        rate = {
            name: 4 * HEAD_DIM * 16 * dense_pairs(tokens) / times[name]["ms"] / 1e9
            for name in (*self.peers, "full")
        }
        for name, speed in rate.items():
            yield row(
                f"forward, 32K h16 d128, dense: {'ours' if name == 'full' else name}",
                speed,
                "TFLOP/s",
                detail=timing(times[name]),
            )
        for choice in CHOICES:
            speed = 16 * useful(tokens, choice, 4) / times[choice]["ms"] / 1e9
            yield row(
                f"forward, 32K h16 d128, {choice}: useful rate of {self.peer}'s",
                speed / rate[self.peer],
                "",
                detail=f"{speed:.0f} TFLOP/s, {timing(times[choice])}",
                choice=choice,
            )

    def backward(self):
        import torch
        from moba.functional import varlen

        tokens = 32 * KI
        inputs = Inputs(tokens)
        calls = {}

        def add(name, attend):
            leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
            out = attend(*leaves)
            d_out = torch.randn_like(out)
            calls[name] = lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)

        add(self.peer, lambda q, k, v: self.dense(inputs, q=q, k=k, v=v))
        for choice in CHOICES[1:]:
            add(choice, lambda q, k, v, c=choice: varlen(q, k, v, inputs.cu, inputs.cu, *c)[0])
        times = interleaved(calls)
        rate = 10 * HEAD_DIM * 16 * dense_pairs(tokens) / times[self.peer]["ms"] / 1e9
        yield row(
            f"backward, 32K h16 d128, dense: {self.peer}",
            rate,
            "TFLOP/s",
            detail=timing(times[self.peer]),
        )
        for choice in CHOICES[1:]:
            speed = 16 * useful(tokens, choice, 10) / times[choice]["ms"] / 1e9
            yield row(
                f"backward, 32K h16 d128, {choice}: useful rate of {self.peer}'s",
                speed / rate,
                "",
                detail=f"{speed:.0f} TFLOP/s, {timing(times[choice])}",
                choice=choice,
            )

    def against_dense(self, label, inputs, choices, seconds=20.0, peer=None):
        peer = peer or self.peer
        for choice in choices:
            inputs.verify(choice)
        ours = interleaved({c: (lambda c=c: inputs.moba(c)) for c in choices}, seconds=seconds)
        theirs = interleaved({peer: lambda: self.dense(inputs, peer)}, seconds=seconds / 2)[peer]
        for choice in choices:
            yield row(
                f"{label}, {choice}: whole forward against {peer}",
                theirs["ms"] / ours[choice]["ms"],
                "x",
                detail=f"{timing(ours[choice])}; dense {timing(theirs)}",
                choice=choice,
            )

    def batch_of_two(self):
        yield from self.against_dense("64K b2 h16 d128", Inputs(64 * KI, batch=2), [(128, 8)])

    def million(self):
        yield from self.against_dense("1M h16 d128", Inputs(MI), CHOICES, seconds=12)

    def memory(self):
        import torch
        from moba.functional import varlen

        for tokens in (512 * KI, MI):
            inputs = Inputs(tokens)
            leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            out = varlen(*leaves, inputs.cu, inputs.cu, 128, 8)[0]
            torch.autograd.grad(out, leaves, out.detach())
            torch.cuda.synchronize()
            yield row(
                f"{length(tokens)} h16 d128 (128, 8), forward and backward: peak memory with inputs",
                torch.cuda.max_memory_allocated() / 2**30,
                "GiB",
            )
            del inputs, leaves, out

    def decode(self):
        # Three caches, used in turn, so that the L2 cache holds little of one when it is read again.
        layers = [Cache(MI, 16) for _ in range(3)]
        source, target = self.copied()
        choices = [(128, 8), (4096, 12)]
        steps = {"copy": lambda: target.copy_(source)}
        for choice in choices:
            means = [layer.means(choice[0]) for layer in layers]
            layers[0].verify(choice, means[0])

            def step(choice=choice, means=means):
                return [layer.decode(choice, own) for layer, own in zip(layers, means)]

            steps[choice] = Captured(step)
        times = interleaved(steps, rounds=20)
        bytes_a_second = 2 * source.nbytes / times["copy"]["ms"] * 1e3
        for choice in choices:
            microseconds = times[choice]["ms"] * 1e3 / len(layers)
            floor = layers[0].read(choice) / bytes_a_second * 1e6
            yield row(
                f"decode, 1M h16 d128, {choice}: time of its bytes at copy bandwidth over its time",
                floor / microseconds,
                "",
                detail=f"{microseconds:.1f} us a call, {layers[0].read(choice) / 2**20:.0f} MiB; three of them {timing(times[choice])}",
                choice=choice,
                microseconds=microseconds,
            )

    def linearity(self):
        ours = {}
        for tokens in (256 * KI, 512 * KI, MI):
            inputs = Inputs(tokens)
            ours[tokens] = interleaved({"": lambda: inputs.moba((128, 8))})[""]
            del inputs
        for tokens in (512 * KI, MI):
            yield row(
                f"(128, 8) h16 d128: time at {length(tokens)} over time at half of it",
                ours[tokens]["ms"] / ours[tokens // 2]["ms"],
                "x",
                detail=timing(ours[tokens]),
            )

    def routings(self):
        for routing in ("independent", "clustered", "sink-heavy"):
            inputs = Inputs(128 * KI, routing=routing)
            for choice in ((512, 3), (128, 8)):
                inputs.verify(choice)
                found = interleaved({"": lambda: inputs.moba(choice)})[""]
                speed = 16 * useful(inputs.tokens, choice, 4) / found["ms"] / 1e9
                yield row(
                    f"forward, 128K h16 d128, {choice}, {routing} routing",
                    speed,
                    "TFLOP/s",
                    detail=timing(found),
                )

    def paper_figures(self):
        peer = next(self.takers(Inputs(1024, heads=4, kv_heads=1)), None)
        if peer is None:
            raise RuntimeError(f"expected a peer with GQA, got {', '.join(self.peers)} without")
        for entry in self.against_dense(
            "1M, 32 query heads on 8 kv heads, d128",
            Inputs(MI, heads=32, kv_heads=8),
            [(4096, 12)],
            seconds=12,
            peer=peer,
        ):
            yield entry | {"detail": "6.5x in the paper; " + entry["detail"]}
        one_million = Inputs(MI, heads=1)
        dense = interleaved({"": lambda: self.dense(one_million)}, seconds=4)[""]
        del one_million
        tokens = 10 * MI
        inputs, choice = Inputs(tokens, heads=1), (tokens // 64, 3)
        inputs.verify(choice, rows=4)
        found = interleaved({"": lambda: inputs.moba(choice)}, seconds=8)[""]
        yield row(
            f"10M, 64 blocks, top-k 3, 1 head: against {self.peer}, its time at 1M times 100",
            100 * dense["ms"] / found["ms"],
            "x",
            detail=f"16x in the paper, 13.0 the ceiling; {timing(found)}",
        )


# Maximum seconds of a part, at the speeds of stage 1 in benchmarks/targets.py.
PARTS = {
    "ceilings": 4,
    "forward": 12,
    "backward": 15,
    "batch_of_two": 8,
    "decode": 8,
    "million": 50,
    "memory": 15,
    "routings": 12,
    "linearity": 12,
    "paper_figures": 60,
}


def torch_with_device(program):
    """Return torch; exit with a sentence of `program` if it, moba or a CUDA device is missing."""
    try:
        import moba  # noqa: F401
        import torch
    except ImportError as error:
        sys.exit(
            f"{program}: expected the module {error.name}, which cannot be imported (`make gpu-check` builds it)"
        )
    if not torch.cuda.is_available():
        sys.exit(f"{program}: expected a CUDA device that this torch can use, got none")
    return torch


def machine():
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--seconds",
        type=float,
        default=240,
        help="time limit; parts that do not fit are skipped and named",
    )
    parser.add_argument("--only", help=f"comma-separated parts, of {', '.join(PARTS)}")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        parser.error(
            f"--only: expected parts of {','.join(PARTS)}, got {','.join(sorted(unknown))}"
        )
    deadline = time.monotonic() + options.seconds
    torch = torch_with_device("cuda")

    report = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python3", *sys.argv]),
        "rows": [],
        "skipped": [],
        "failed": [],
    }
    bench = Bench()
    for part in wanted:
        if deadline - time.monotonic() < PARTS[part]:
            report["skipped"].append(
                f"{part}: takes up to {PARTS[part]} s, {max(deadline - time.monotonic(), 0):.0f} s were left"
            )
            continue
        begin = time.monotonic()
        try:
            for entry in getattr(bench, part)():
                report["rows"].append({"part": part, **entry})
                print(f"{entry['what']}: {measured(entry)}", flush=True)
        except torch.OutOfMemoryError:
            report["skipped"].append(f"{part}: the device has too little memory")
        except (AssertionError, RuntimeError, ValueError) as error:
            report["failed"].append(
                f"{part}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            )
            print(f"FAILED {report['failed'][-1]}", flush=True)
        torch.cuda.empty_cache()
        print(f"  {part}: {time.monotonic() - begin:.0f} s", flush=True)
        path = write(report, options.results)
    for entry in report["skipped"]:
        print(f"skipped {entry}")
    if report["rows"]:
        print(f"written: {path}")
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.path.pop(0)  # hides this file, which has the name of NVIDIA's package `cuda`
    sys.exit(main())
