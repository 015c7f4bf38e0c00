#!/usr/bin/env python3
"""Run one engine on one prompt, in a process of its own; print one JSON object on the last line.

The job on standard input has `model`, `ids` (the prompt), `generate` (tokens, greedy, past the end token), `threads` and
what the engine needs: `dtype`, `program`, `flags`, `prompt`. The result has `first_token_seconds` (without loading),
`decode_seconds` (of the tokens after the first), `ids`, `load_seconds` and `peak_rss_bytes`.

    python benchmarks/peers/time_model.py transformers < job.json

moba and llama.cpp run as programs; vLLM runs under the Python of its own environment, so that only the standard library
is imported here.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from machine import peak_rss_bytes  # noqa: E402

WARM_UP_IDS = list(range(100, 116))


# ---- moba ----


def moba_command(job, *flags):
    """Return the command of a generation from the text `job["prompt"]`, which is in a file or on the command line."""
    return [
        *[job["program"], "generate", "-m", job["model"], "-t", str(job["threads"])],
        *["-n", str(job["generate"]), "--json", "--ignore-eos"],
        *job["prompt"],
        *job.get("flags", []),
        *flags,
    ]


def moba(job):
    done = subprocess.run(moba_command(job), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr.strip())
    result = json.loads(done.stdout)
    if job["ids"] and result["prompt_ids"] != job["ids"]:
        sys.exit("moba: expected the prompt of the other engines, got other tokens")
    return {
        "first_token_seconds": result["prefill_seconds"],
        "decode_seconds": result["decode_seconds"],
        "ids": result["generated_ids"],
        "text": result["text"],
        "attention_seconds": result["attention_seconds"],
        "load_seconds": result["load_seconds"],
        "peak_rss_bytes": result["peak_rss_bytes"],
        "settings": {**result["settings"], "model": Path(job["model"]).name},
    }


def start(job):
    """Time the whole process of a command."""
    begin = time.perf_counter()
    subprocess.run(job["command"], check=True, capture_output=True)
    return {"seconds": time.perf_counter() - begin}


# ---- llama.cpp ----


class LlamaServer:
    """llama-server on a free port, ready for requests; `context` tokens in one slot."""

    def __init__(self, program, model, threads, context):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        command = [
            *[program, "-m", model, "-t", str(threads), "-c", str(context), "-np", "1"],
            *["--host", "127.0.0.1", "--port", self.address.rsplit(":", 1)[1], "--no-webui"],
        ]
        libraries = {"LD_LIBRARY_PATH": str(Path(program).parent)}
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env=os.environ | libraries
        )

    def __enter__(self):
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.address + "/health").close()
                return self
            if self.process.poll() is not None:
                self.log.seek(0)
                last = self.log.read().decode(errors="replace").strip().splitlines()[-1]
                sys.exit(f"llama-server ended with {self.process.returncode}: {last}")
            time.sleep(0.05)

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.log.close()

    def post(self, path, **body):
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    def complete(self, ids, tokens, **settings):
        """Generate greedily from token ids, past the end token."""
        return self.post(
            "/completion",
            prompt=ids,
            n_predict=tokens,
            temperature=0,
            ignore_eos=True,
            cache_prompt=False,
            return_tokens=True,
            **settings,
        )


def llama_cpp(job):
    begin = time.perf_counter()
    context = len(job["ids"]) + job["generate"] + 64
    with LlamaServer(job["program"], job["model"], job["threads"], context) as server:
        load_seconds = time.perf_counter() - begin
        if "text" in job:
            own = server.post("/tokenize", content=job["text"])["tokens"]
            if own != job["text_ids"]:
                sys.exit(
                    f"llama.cpp: expected moba's {len(job['text_ids'])} tokens of the text, got {len(own)} others"
                )
        result = server.complete(job["ids"], job["generate"])
        timings = result["timings"]
        if timings["prompt_n"] != len(job["ids"]):
            sys.exit(f"llama.cpp: expected to read {len(job['ids'])} tokens, got {timings}")
        return {
            "first_token_seconds": timings["prompt_ms"] / 1e3,
            "decode_seconds": timings["predicted_ms"] / 1e3,
            "ids": result["tokens"],
            "text": result["content"],
            "load_seconds": load_seconds,
            "peak_rss_bytes": peak_rss_bytes(server.process.pid),
        }


# ---- transformers and vLLM ----


def transformers(job):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    begin = time.perf_counter()
    path = Path(job["model"])
    network = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype={"f32": torch.float32, "bf16": torch.bfloat16}[job["dtype"]],
        attn_implementation="sdpa",
    ).eval()
    load_seconds = time.perf_counter() - begin

    def generate(ids, tokens):
        seconds, found, cache = [], [], None
        step = torch.tensor([ids])
        for _ in range(tokens):
            begin = time.perf_counter()
            result = network(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            seconds.append(time.perf_counter() - begin)
            cache, step = result.past_key_values, result.logits[:, -1:].argmax(-1)
            found.append(int(step))
        return seconds, found

    with torch.inference_mode():
        generate(job["ids"], 2)  # torch prepares its products of a shape at their first call
        seconds, ids = generate(job["ids"], job["generate"])
    return {
        "first_token_seconds": seconds[0],
        "decode_seconds": sum(seconds[1:]),
        "ids": ids,
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def vllm(job):
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{job['threads'] - 1}",
        "OMP_NUM_THREADS": str(job["threads"]),
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    context = len(job["ids"]) + job["generate"] + 64
    engine = LLM(
        job["model"],
        dtype="bfloat16",
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_model_len=context,
        max_num_batched_tokens=context,
        max_num_seqs=1,
    ).llm_engine
    load_seconds = time.perf_counter() - begin

    def generate(name, ids, tokens):
        """Step the engine; a step that yields no token is a part of the prefill."""
        settings = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        engine.add_request(name, {"prompt_token_ids": ids}, settings)
        times, found = [], []
        while engine.has_unfinished_requests():
            for output in engine.step():
                if len(output.outputs[0].token_ids) > len(found):
                    found = list(output.outputs[0].token_ids)
                    times.append(time.perf_counter() - begin)
        return times, found

    generate("warm-up", WARM_UP_IDS, 8)
    times, ids = generate("timed", job["ids"], job["generate"])
    return {
        "first_token_seconds": times[0],
        "decode_seconds": times[-1] - times[0],
        "ids": ids,
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


# ---- next-token distributions ----


def reference_distributions(job):
    """Write the log-probabilities of transformers in f32; return the greedy tokens after each prompt."""
    import numpy
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    path = Path(job["model"])
    network = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    rows, texts = [], []
    with torch.inference_mode():
        for ids in job["prompts"]:
            found, cache, step = [], None, torch.tensor([ids])
            for number in range(job["generate"]):
                result = network(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                logits = result.logits[0, -1].double()
                if number == 0:
                    rows.append(torch.log_softmax(logits, -1).numpy())
                cache, step = result.past_key_values, logits.argmax()[None, None]
                found.append(int(step))
            texts.append(found)
    numpy.save(job["out"], numpy.stack(rows))
    return {"ids": texts}


def by_id(entries, vocabulary):
    """Return the log-probabilities of `entries` in the order of the ids."""
    import numpy

    row = numpy.full(vocabulary, -numpy.inf)
    for entry in entries:
        row[entry["id"]] = entry["logprob"]
    return row


def moba_distributions(job):
    import numpy

    rows, texts = [], []
    for ids, prompt in zip(job["prompts"], job["prompt_flags"], strict=True):
        call = job | {"prompt": prompt, "ids": ids}
        texts.append(moba(call)["ids"])
        command = moba_command(call | {"generate": 1}, "--logprobs", str(job["vocabulary"]))
        result = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        rows.append(by_id(result["logprobs"][0]["top_logprobs"], job["vocabulary"]))
    numpy.save(job["out"], numpy.stack(rows))
    return {"ids": texts}


def llama_cpp_distributions(job):
    import numpy

    context = max(map(len, job["prompts"])) + job["generate"] + 64
    rows, texts = [], []
    with LlamaServer(job["program"], job["model"], job["threads"], context) as server:
        for ids in job["prompts"]:
            texts.append(server.complete(ids, job["generate"])["tokens"])
            first = server.complete(ids, 1, n_probs=job["vocabulary"])
            entries = first["completion_probabilities"][0]["top_logprobs"]
            rows.append(by_id(entries, job["vocabulary"]))
    numpy.save(job["out"], numpy.stack(rows))
    return {"ids": texts}


ENGINES = {
    "moba": moba,
    "start": start,
    "llama.cpp": llama_cpp,
    "transformers": transformers,
    "vllm": vllm,
    "reference-distributions": reference_distributions,
    "moba-distributions": moba_distributions,
    "llama.cpp-distributions": llama_cpp_distributions,
}

if __name__ == "__main__":
    print("\n" + json.dumps(ENGINES[sys.argv[1]](json.load(sys.stdin))))
