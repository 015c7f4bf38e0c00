#!/usr/bin/env python3
"""Load `moba serve` on this machine, beside llama.cpp's server and vLLM: throughput, time to first token, time between tokens.

Clients ask questions about one document, each in a closed loop on a connection of its own. The results are in
benchmarks/results/serve-<machine>-<date>.json and .md after every row; a call without --again skips rows that are there.
benchmarks/peers/install.sh installs llama.cpp and vLLM; an engine that is missing is left out.

    .venv/bin/python benchmarks/serve.py                     # all sections
    .venv/bin/python benchmarks/serve.py --only load,decode
    .venv/bin/python benchmarks/serve.py --quick             # short documents, few clients

Sections: decode (8 clients against one, short prompts), load (1, 8, 32 and 128 clients on a document of 2K tokens and on one of
100K), restart (the next question on a long document: in the same process, after a restart, another one), stall (the tokens
of one answer while a long document is read), memory (resident memory over 10,000 requests).
"""

import argparse
import contextlib
import dataclasses
import datetime
import http.client
import itertools
import json
import math
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from machine import cpu_name, machine_name
from run import replace, say, table

from models import LICENSES, llama_server

ROOT = Path(__file__).resolve().parents[1]
NEEDLE = ROOT / "models/needle-2m"
GIB, KI = 1 << 30, 1 << 10
ANSWER = 32  # tokens
MAX_STEP_MS = 250


class Failure(Exception):
    """A row without a result."""


# ---- servers ----


@dataclasses.dataclass(frozen=True)
class Engine:
    """A server in one setting, which is a row of a table."""

    program: str
    attention: str = "full"

    @property
    def name(self):
        return f"{self.program}, {self.attention}"


MOBA_FULL, MOBA = Engine("moba"), Engine("moba", "moba")
LLAMA_CPP, VLLM = Engine("llama.cpp"), Engine("vllm")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running server. `context`: tokens of the longest request; `clients`: requests that it should run at a time."""

    def __init__(self, options, engine, model, context, clients, flags=(), cache_size=None):
        self.port = free_port()
        self.cache_size = cache_size or options.cache_size
        command = {"moba": self.moba, "llama.cpp": self.llama_cpp, "vllm": self.vllm}[
            engine.program
        ](options, engine, model, context, clients)
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [*map(str, command), *map(str, flags)],
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        try:
            self.wait(options.timeout)
        except BaseException:
            self.stop()
            raise

    def moba(self, options, engine, model, context, clients):
        attention = ["--attn", engine.attention, "--decode", engine.attention]
        limits = [
            "--parallel",
            min(clients, 32),
            "--queue",
            4 * clients,
            "--max-step-ms",
            MAX_STEP_MS,
        ]
        return [options.moba, "serve", "-m", model, "--port", self.port, "-t", options.threads, *attention, *limits,
                "-c", context, "--cache-size", self.cache_size]  # fmt: skip

    def llama_cpp(self, options, engine, model, context, clients):
        slots = min(clients, 32)
        return [llama_server(options.llama_cpp), "-m", model, "--port", self.port, "-t", options.threads, "-fa", "on",
                "-np", slots, "-c", min(slots, 8) * context, "--kv-unified", "--no-webui"]  # fmt: skip

    def vllm(self, options, engine, model, context, clients):
        from model_files import hugging_face_folder

        folder = hugging_face_folder(options.cache_dir, model)
        return [options.vllm / "bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", folder,
                "--port", self.port, "--max-model-len", context, "--dtype", "bfloat16"]  # fmt: skip

    def wait(self, timeout):
        end = time.monotonic() + timeout
        while True:
            if self.process.poll() is not None:
                self.log.seek(0)
                lines = self.log.read().decode(errors="replace").strip().splitlines()
                raise Failure(lines[-1] if lines else f"exit code {self.process.returncode}")
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            if time.monotonic() > end:
                raise Failure(f"no server within {timeout} s")
            time.sleep(0.05)

    def memory(self, field="VmHWM"):
        """Return resident bytes of the server and the processes that it has started; VmHWM: the peaks."""
        session = self.process.pid
        total = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                if os.getsid(int(status.parent.name)) == session:
                    total += int(status.read_text().split(f"{field}:")[1].split()[0]) * 1024
        return total

    def cpu_seconds(self):
        """Return the seconds that the server's process has computed."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def missing(options, engine):
    """Return why an engine cannot run, or an empty string."""
    program = {
        "moba": options.moba,
        "llama.cpp": llama_server(options.llama_cpp),
        "vllm": options.vllm / "bin/vllm",
    }[engine.program]
    if program is not None and program.exists():
        return ""
    return f"not installed (benchmarks/peers/install.sh {engine.program})"


# ---- clients ----


@dataclasses.dataclass
class Answer:
    """When the parts of an answer came, in seconds since the request."""

    times: list
    text: str = ""
    cached: int = 0


class Client:
    """A client that asks one request after the other, each on a connection of its own: servers differ in when they close
    one."""

    def __init__(self, port, timeout):
        self.port, self.timeout = port, timeout
        self.connection = None

    def connect(self):
        self.close()
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout)
        self.connection.connect()
        self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, prompt, tokens=ANSWER, on_part=None, **extra):
        """Continue a prompt of token ids by `tokens` tokens."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                "stream_options": {"include_usage": True}, **extra}  # fmt: skip
        self.connect()
        begin = time.perf_counter()
        self.connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = self.connection.getresponse()
        if response.status != 200:
            raise Failure(
                f"status {response.status}: {response.read()[:200].decode(errors='replace')}"
            )
        answer = Answer([])
        while line := response.readline():
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter() - begin
            event = json.loads(line[6:])
            if "error" in event:
                raise Failure(event["error"]["message"])
            if event.get("usage"):
                details = event["usage"].get("prompt_tokens_details") or {}
                answer.cached = details.get("cached_tokens") or 0
            if event["choices"] and (
                event["choices"][0].get("text") or not event["choices"][0].get("finish_reason")
            ):
                answer.times.append(now)
                answer.text += event["choices"][0].get("text") or ""
                if on_part:
                    on_part(answer)
        return answer

    def close(self):
        if self.connection:
            self.connection.close()


def percentile(values, share):
    """Return a percentile by the nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def gaps_of(answers):
    return [b - a for answer in answers for a, b in itertools.pairwise(answer.times)]


def closed_loop(server, options, prompts, clients, tokens=ANSWER):
    """Ask every prompt once, `clients` at a time. Return the row of the run."""
    waiting, answers, failures = iter(prompts), [], []
    lock = threading.Lock()

    def run():
        client = Client(server.port, options.timeout)
        while True:
            with lock:
                prompt = next(waiting, None)
            if prompt is None or failures:
                return client.close()
            try:
                answers.append(client.ask(prompt, tokens))
            except (Failure, OSError, http.client.HTTPException) as failure:
                failures.append(str(failure) or type(failure).__name__)

    begin, computed = time.perf_counter(), server.cpu_seconds()
    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    if failures:
        raise Failure(failures[0])
    first, gaps = [answer.times[0] for answer in answers], gaps_of(answers)
    return {
        "requests": len(answers),
        "seconds": seconds,
        "tokens_per_second": tokens * len(answers) / seconds,
        "cpu_seconds_per_token": (server.cpu_seconds() - computed) / (tokens * len(answers)),
        "first_token_p50": percentile(first, 0.5),
        "first_token_p99": percentile(first, 0.99),
        "between_p50": percentile(gaps, 0.5),
        "between_p99": percentile(gaps, 0.99),
        "cached_tokens": percentile([answer.cached for answer in answers], 0.5),
        "peak_rss_bytes": server.memory(),
    }


# ---- documents ----


def tokens_of(options, model, text):
    done = subprocess.run(
        [options.moba, "tokenize", "-m", model, "--json", "--no-special"],
        input=text, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise Failure(done.stderr.strip())
    return json.loads(done.stdout)


def document(options, model, tokens):
    """Return exactly `tokens` token ids of licenses, again and again."""
    names = ["GPL-3", "GPL-2", "LGPL-2.1", "GFDL-1.3", "Apache-2.0"]
    ids = tokens_of(
        options, model, "\n".join((LICENSES / name).read_text(errors="replace") for name in names)
    )
    repeated = itertools.chain.from_iterable(itertools.repeat(ids))
    return list(itertools.islice(repeated, tokens))


def questions(options, model, count, seed=0):
    """Return token ids of questions that differ from their first token on."""
    ids = tokens_of(
        options,
        model,
        "What does section 4 of this text say about the duties of those who convey it?",
    )
    draw = random.Random(seed)
    return [[draw.choice(ids) for _ in range(4)] + ids for _ in range(count)]


def long_model(options):
    """Return a model of SmolLM2's shape that takes 128K tokens, of random weights: made the first time."""
    from model_files import Shape, write_random_llama

    shape = Shape(layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, vocabulary=49152)
    path = options.cache_dir / "random-smollm2-135M-128K.Q8_0.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_random_llama(path, "Q8_0", options.model, shape)
    return path


# ---- sections: each yields (key of a row, function that measures it) ----


def decode_rows(options):
    """Measure one client's and several clients' decode after short prompts."""
    tokens = 64 if options.quick else 256
    for engine in (MOBA_FULL, LLAMA_CPP, VLLM):
        for clients in (1, 8):

            def measure(engine=engine, clients=clients):
                prompts = questions(options, options.model, 2 * clients)
                with Server(options, engine, options.model, 4 * KI, clients) as server:
                    closed_loop(server, options, prompts[:clients], clients, 8)  # warm
                    return closed_loop(server, options, prompts, clients, tokens)

            yield (
                {"engine": engine.program, "attention": engine.attention, "clients": clients},
                measure,
            )


def load_rows(options):
    """Measure clients that ask about one document, which is read before."""
    sizes = [(512, options.model)] if options.quick else [(2 * KI, options.model), (100_000, None)]
    counts = (1, 8) if options.quick else (1, 8, 32, 128)
    for tokens, model in sizes:
        for engine in (MOBA_FULL, MOBA, LLAMA_CPP, VLLM):
            if tokens > 8 * KI and engine == MOBA_FULL:
                continue  # its prefill alone takes most of an hour on two cores
            for clients in counts:

                def measure(tokens=tokens, model=model, engine=engine, clients=clients):
                    file = model or long_model(options)
                    text = document(options, file, tokens)
                    asked = questions(options, file, 2 * clients + 6)
                    prompts = [text + question for question in asked]
                    with Server(options, engine, file, tokens + 256, clients) as server:
                        client = Client(server.port, options.timeout)
                        first = client.ask(prompts[0]).times[0]
                        client.close()
                        return {"read_seconds": first} | closed_loop(
                            server, options, prompts[1:], clients
                        )

                key = {"document": tokens, "engine": engine.program, "attention": engine.attention}
                yield key | {"clients": clients}, measure


def restart_rows(options):
    """Measure the second question on a document: in the same process, again after a restart, and another one."""
    tokens = 8 * KI if options.quick else 100_000
    models = [NEEDLE] if options.quick else [NEEDLE, None]
    for model in models:

        def measure(model=model):
            file = model or long_model(options)
            text = document(options, file, tokens)
            asked = [text + question for question in questions(options, file, 4)]
            row = {}
            folder = tempfile.mkdtemp(dir=options.scratch)
            flags = ["--cache-dir", folder]
            try:
                with Server(options, MOBA, file, tokens + 256, 1, flags) as server:
                    client = Client(server.port, options.timeout)
                    row["first_seconds"] = client.ask(asked[0]).times[0]
                    row["same_process_seconds"] = client.ask(asked[1]).times[0]
                row["stored_bytes"] = sum(file.stat().st_size for file in Path(folder).iterdir())
                with Server(options, MOBA, file, tokens + 256, 1, flags) as server:
                    client = Client(server.port, options.timeout)
                    row["after_restart_seconds"] = client.ask(asked[0]).times[0]
                    row["other_question_seconds"] = client.ask(asked[2]).times[0]
                with Server(options, MOBA, file, tokens + 256, 1, flags) as server:
                    client = Client(server.port, options.timeout)
                    row["other_question_after_restart_seconds"] = client.ask(asked[3]).times[0]
            finally:
                shutil.rmtree(folder)
            return row

        yield {"model": (model or Path("random-smollm2-135M")).name, "document": tokens}, measure


def stall_rows(options):
    """Measure the times between tokens of one answer while another client's document is read."""
    tokens = 8 * KI if options.quick else 100_000
    for engine in (MOBA, LLAMA_CPP):
        if options.quick and engine != MOBA:
            continue

        def measure(engine=engine):
            file = long_model(options)
            text = document(options, file, tokens)
            asked = questions(options, file, 2)
            with Server(options, engine, file, tokens + 256, 2) as server:
                read = threading.Event()

                def prefill():
                    with contextlib.suppress(Failure, OSError):
                        Client(server.port, options.timeout).ask(text + asked[0], 1)
                    read.set()

                reader = threading.Thread(target=prefill)
                parts = []

                def watch(answer):
                    if len(answer.times) == 8:
                        reader.start()
                    if read.is_set():
                        raise StopIteration
                    parts.append(answer.times[-1])

                client = Client(server.port, options.timeout)
                with contextlib.suppress(StopIteration):
                    client.ask(asked[1], tokens, watch)
                client.close()
                reader.join()
            gaps = [b - a for a, b in itertools.pairwise(parts[8:])]
            alone = [b - a for a, b in itertools.pairwise(parts[:8])]
            return {
                "tokens_meanwhile": len(gaps),
                "between_p50": percentile(gaps, 0.5),
                "between_p99": percentile(gaps, 0.99),
                "between_max": max(gaps),
                "alone_p50": percentile(alone, 0.5),
                "max_step_seconds": MAX_STEP_MS / 1000,
            }

        yield {"engine": engine.program, "attention": engine.attention, "document": tokens}, measure


def memory_rows(options):
    """Measure resident memory over many requests of several clients, most of them on new prompts."""
    requests = 400 if options.quick else 10_000

    def measure():
        draw = random.Random(0)
        samples = []
        with Server(options, MOBA_FULL, NEEDLE, 4 * KI, 8, [], "64m") as server:
            step = requests // 10
            for _ in range(10):
                prompts = [
                    [draw.randrange(1, 2000) for _ in range(draw.randrange(1, 700))]
                    for _ in range(step)
                ]
                closed_loop(server, options, prompts, 8, 8)
                samples.append(server.memory("VmRSS"))
        return {"requests": requests, "rss_bytes": samples}

    yield {"model": NEEDLE.name}, measure


SECTIONS = {
    "decode": decode_rows,
    "load": load_rows,
    "restart": restart_rows,
    "stall": stall_rows,
    "memory": memory_rows,
}


# ---- results ----


def milliseconds(seconds):
    return "" if seconds is None else f"{1000 * seconds:.0f}"


def load_table(rows):
    head = ["document", "engine", "attention", "clients", "tokens/s", "first token p50 (ms)", "p99", "between p50 (ms)",
            "p99", "peak memory (GiB)", "reading the document (s)"]  # fmt: skip
    cells = [
        [
            str(row.get("document", "")),
            row["engine"],
            row["attention"],
            str(row["clients"]),
            f"{row['tokens_per_second']:.1f}",
            *(
                milliseconds(row[key])
                for key in ("first_token_p50", "first_token_p99", "between_p50", "between_p99")
            ),
            f"{row['peak_rss_bytes'] / GIB:.2f}",
            f"{row['read_seconds']:.1f}" if "read_seconds" in row else "",
        ]
        for row in rows
    ]
    return table(head, cells)


def decode_lines(rows):
    yield from load_table(rows)
    for engine in dict.fromkeys(row["engine"] for row in rows):
        speeds = {
            row["clients"]: row["tokens_per_second"] for row in rows if row["engine"] == engine
        }
        if {1, 8} <= speeds.keys():
            yield f"{engine}: 8 clients decode {speeds[8] / speeds[1]:.2f}x as fast as one."
            yield ""


def restart_lines(rows):
    head = ["model", "document", "first question (s)", "second", "after a restart", "another one then",
            "another one after a restart", "the slowest of these against the first"]  # fmt: skip
    names = ["same_process_seconds", "after_restart_seconds", "other_question_seconds",
             "other_question_after_restart_seconds"]  # fmt: skip
    cells = [
        [
            row["model"],
            str(row["document"]),
            f"{row['first_seconds']:.2f}",
            *(f"{row[name]:.3f}" for name in names),
            f"{100 * max(row[name] for name in names) / row['first_seconds']:.2f}%",
        ]
        for row in rows
    ]
    return table(head, cells)


def stall_lines(rows):
    head = [
        "engine",
        "attention",
        "document",
        "alone p50 (ms)",
        "meanwhile p50 (ms)",
        "p99",
        "longest",
        "tokens",
    ]
    keys = ["alone_p50", "between_p50", "between_p99", "between_max"]
    cells = [
        [row["engine"], row["attention"], str(row["document"]), *(milliseconds(row[key]) for key in keys),
         str(row["tokens_meanwhile"])]
        for row in rows
    ]  # fmt: skip
    return [*table(head, cells), f"`--max-step-ms` is {MAX_STEP_MS}.", ""]


def memory_lines(rows):
    for row in rows:
        sizes = ", ".join(f"{size / (1 << 20):.0f}" for size in row["rss_bytes"])
        yield f"{row['model']}: resident memory after each tenth of {row['requests']} requests, MiB: {sizes}."
        yield ""


LINES = {
    "decode": decode_lines,
    "load": load_table,
    "restart": restart_lines,
    "stall": stall_lines,
    "memory": memory_lines,
}


def markdown(report):
    lines = [
        f"# Serving, {report['date']}",
        "",
        f"{report['machine']}, {report['threads']} threads; answers of {ANSWER} tokens.",
        "",
    ]
    for name, make in LINES.items():
        rows = [row for row in report["rows"] if row["section"] == name]
        if not rows:
            continue
        lines += [f"## {name}", "", f"Made with `{rows[0]['command']}`.", ""]
        lines += make([row for row in rows if "message" not in row])
        for row in rows:
            if "message" in row:
                what = ", ".join(str(value) for value in row["key"].values())
                lines += [f"{what}: {row['message']}", ""]
    return "\n".join(lines)


def write(report, stem):
    stem.parent.mkdir(parents=True, exist_ok=True)
    replace(Path(f"{stem}.json"), json.dumps(report, indent=1) + "\n")
    replace(Path(f"{stem}.md"), markdown(report))


# ---- the program ----


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"sections, of {','.join(SECTIONS)}")
    parser.add_argument("--engines", help="engines, of moba,llama.cpp,vllm [all]")
    parser.add_argument("--quick", action="store_true", help="short documents, few clients")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cache-size", default="6g", help="KV cache of moba")
    parser.add_argument(
        "--model", type=Path, default=ROOT / "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    parser.add_argument("--moba", type=Path, default=ROOT / "build/release/moba")
    parser.add_argument("--llama-cpp", type=Path, default=ROOT / "build/peers/llama.cpp")
    parser.add_argument("--vllm", type=Path, default=ROOT / "build/peers/vllm")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=Path("~/.cache/moba").expanduser(),
        help="folder for models that are made",
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder for the pages of the section restart [the system's]"
    )
    parser.add_argument(
        "--timeout",
        type=int,
        default=7200,
        help="seconds for one request, and for a server to start",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--name", help="stem of the result files [serve, the machine and date]")
    options = parser.parse_args(arguments)
    options.sections = options.only.split(",") if options.only else list(SECTIONS)
    for section in options.sections:
        if section not in SECTIONS:
            parser.error(f"--only: expected sections of {','.join(SECTIONS)}, got {section}")
    options.engines = (
        options.engines.split(",") if options.engines else ["moba", "llama.cpp", "vllm"]
    )
    for flag, path in {"--moba": options.moba, "--model": options.model}.items():
        if not path.exists():
            parser.error(f"{flag}: expected a file, got {path}, which does not exist")
    return options


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    date = datetime.date.today().isoformat()
    stem = options.out / (
        options.name or f"serve-{machine_name()}-{date}{'-quick' if options.quick else ''}"
    )
    report = {
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "date": date,
        "threads": options.threads,
        "rows": [],
    }
    if Path(f"{stem}.json").exists():
        report["rows"] = json.loads(Path(f"{stem}.json").read_text())["rows"]
    failed = False
    for section in options.sections:
        for key, measure in SECTIONS[section](options):
            if key.get("engine", "moba") not in options.engines:
                continue
            place = {"section": section, "key": key}
            old = [row for row in report["rows"] if {name: row[name] for name in place} == place]
            if old and "message" not in old[0] and not options.again:
                continue
            label = ", ".join(f"{value}" for value in key.values())
            begin = time.time()
            engine = Engine(key.get("engine", "moba"))
            try:
                why = missing(options, engine)
                row = {"message": f"left out: {why}"} if why else measure()
            except (
                Failure,
                OSError,
                http.client.HTTPException,
                subprocess.SubprocessError,
            ) as failure:
                row, failed = {"message": f"failed: {failure or type(failure).__name__}"}, True
            row = place | key | row | {"minutes": (time.time() - begin) / 60}
            row["command"] = shlex.join(["python", "benchmarks/serve.py", *arguments])
            report["rows"] = [one for one in report["rows"] if one not in old] + [row]
            say(f"{section}, {label}: {row.get('message') or brief(row)}")
            write(report, stem)
    print(f"{stem}.md")
    return 1 if failed else 0


def brief(row):
    shown = {name: value for name, value in row.items() if isinstance(value, float)}
    return ", ".join(f"{name} {value:.3g}" for name, value in shown.items())


if __name__ == "__main__":
    sys.exit(main())
