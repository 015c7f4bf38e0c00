"""`moba bench`: its report and its refusals; benchmarks/run.py, and its peers against each other. No time is tested."""

import csv
import importlib.util
import io
import json
import math
import re
import statistics
import subprocess
import sys

import pytest
import torch
from builds import BUILD, ROOT

# For modules that the benchmarks share; last, because benchmarks/cuda.py has the name of a package.
sys.path.append(str(ROOT / "benchmarks"))
MOBA = BUILD / "moba"

# Keys of the JSON, a public interface.
NUMBERS = [
    "tokens",
    "chunk_size",
    "topk",
    "heads",
    "kv_heads",
    "head_dim",
    "threads",
    "seconds_median",
    "seconds_min",
    "seconds_max",
    "gflops",
    "fraction_of_peak",
    "workspace_bytes",
    "centroids_seconds",
    "gate_seconds",
    "plan_seconds",
    "attend_seconds",
]
WORDS = ["pass", "dtype", "routing", "ceiling"]


def bench(*flags, code=0):
    if not MOBA.exists():
        pytest.fail(f"{MOBA} is missing: `make build` makes it, MOBA_BUILD_DIR names another")
    done = subprocess.run([MOBA, "bench", *flags], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def rows(*flags):
    return json.loads(bench("-o", "json", "-t", "2", *flags).stdout)


def module(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def pairs(tokens, block_size, top_k):
    """Count the (query, key) pairs that causal MoBA computes."""
    own = [p // block_size for p in range(tokens)]
    return sum(min(top_k - 1, c) * block_size + p + 1 - c * block_size for p, c in enumerate(own))


@pytest.mark.parametrize("name", ["forward", "backward", "gate", "decode"])
def test_rows_of_every_pass(name):
    (row,) = rows(
        "--pass",
        name,
        "--tokens",
        "1k",
        "--chunk-size",
        "64",
        "--topk",
        "3",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--head-dim",
        "64",
    )
    assert all(math.isfinite(row[n]) and row[n] >= 0 for n in NUMBERS), row
    assert all(isinstance(row[w], str) for w in WORDS)
    assert [
        row[n]
        for n in [
            "pass",
            "tokens",
            "chunk_size",
            "topk",
            "heads",
            "kv_heads",
            "head_dim",
            "dtype",
            "threads",
        ]
    ] == [name, 1024, 64, 3, 4, 2, 64, "f32", 2]
    assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
    assert row["seconds"] == sorted(row["seconds"]) and len(row["seconds"]) == 5
    assert row["checked_rows"] > 0
    assert row["fraction_of_peak"] > 0
    assert row["ceiling"] == ("read_bandwidth" if name == "decode" else "fma_f32")


def test_useful_work_is_counted_exactly():
    forward, backward = rows(
        "--pass",
        "forward,backward",
        "--tokens",
        "1000",
        "--chunk-size",
        "96",
        "--topk",
        "3",
        "--heads",
        "2",
        "--head-dim",
        "32",
    )
    work = 2 * 32 * pairs(1000, 96, 3)
    assert forward["attention_flops"] == 4 * work and backward["attention_flops"] == 10 * work
    scored = sum(p // 96 for p in range(1000) if p // 96 >= 3)
    assert forward["gate_flops"] == 2 * 32 * 2 * scored and backward["gate_flops"] == 0


def test_full_attention_counts_every_pair():
    full, many = rows(
        "--tokens", "500", "--chunk-size", "64,64", "--topk", "0,1000", "--head-dim", "16"
    )
    assert full["topk"] == 0
    assert full["attention_flops"] == many["attention_flops"] == 4 * 16 * 500 * 501 // 2


def test_decode_counts_the_fewest_bytes_to_read():
    full, f32, _, i8 = rows(
        "--pass",
        "decode",
        "--tokens",
        "1k",
        "--topk",
        "0,2",
        "--chunk-size",
        "128",
        "--dtype",
        "f32,i8",
    )
    assert full["read_bytes"] == 2 * 1024 * 128 * 4
    means = 7 * 128 * 4
    assert f32["read_bytes"] == 2 * 2 * 128 * 128 * 4 + means
    assert i8["read_bytes"] == 2 * 2 * 128 * (128 + 4) + means


def test_lists_of_equal_length_are_paired():
    def choices(*flags):
        return [
            (r["chunk_size"], r["topk"])
            for r in rows("--tokens", "512", "--head-dim", "16", *flags)
        ]

    assert choices("--chunk-size", "64,32", "--topk", "0,3") == [(64, 0), (32, 3)]
    assert choices("--chunk-size", "64,32", "--topk", "2,3,4") == [
        (64, 2),
        (64, 3),
        (64, 4),
        (32, 2),
        (32, 3),
        (32, 4),
    ]


def test_other_lists_give_every_combination():
    found = rows(
        "--tokens",
        "256,1k",
        "--dtype",
        "f32,bf16",
        "--routing",
        "independent,clustered,sink",
        "--topk",
        "2",
        "--chunk-size",
        "32",
        "--head-dim",
        "24",
    )
    assert len(found) == len({(r["tokens"], r["dtype"], r["routing"]) for r in found}) == 2 * 2 * 3


@pytest.mark.parametrize("name", ["forward", "backward", "gate"])
def test_f16_is_measured(name):
    (row,) = rows(
        "--pass",
        name,
        "--dtype",
        "f16",
        "--tokens",
        "512",
        "--chunk-size",
        "32",
        "--routing",
        "clustered",
    )
    assert row["dtype"] == "f16"


@pytest.mark.parametrize(
    "flags",
    [
        ["--tokens", "1", "--pass", "forward,backward"],
        [
            "--tokens",
            "100",
            "--chunk-size",
            "7",
            "--topk",
            "2",
            "--head-dim",
            "5",
            "--pass",
            "forward,backward,gate,decode",
        ],
        ["--tokens", "333", "--chunk-size", "1", "--topk", "4", "--head-dim", "33"],
        [
            "--tokens",
            "300",
            "--chunk-size",
            "1000",
            "--topk",
            "3",
            "--heads",
            "9",
            "--kv-heads",
            "3",
        ],
    ],
)
def test_odd_sizes_are_checked(flags):
    assert all(r["checked_rows"] > 0 for r in rows(*flags))


def test_sampled_work_is_scaled_to_the_whole():
    (part,), (whole,) = (
        rows("--tokens", "4k", "--head-dim", "16", "--sample", s) for s in ["0.1", "1"]
    )
    assert part["share"] == 0.1 and part["attention_flops"] == whole["attention_flops"]
    assert part["gate_flops"] == whole["gate_flops"] > 0


def test_budget_leaves_at_least_the_checked_run():
    (row,) = rows("--tokens", "1k", "--budget", "1e-9")
    assert len(row["seconds"]) == 1 and row["checked_rows"] > 0 and row["attend_seconds"] > 0
    assert ", 1 run" in bench("--tokens", "1k", "--budget", "1e-9").stdout
    assert len(rows("--tokens", "1k", "--budget", "1000")[0]["seconds"]) == 5


def test_csv_and_table_have_a_line_per_row():
    flags = ["--tokens", "256", "--head-dim", "16", "--chunk-size", "32", "--topk", "0,2"]
    found = list(csv.DictReader(io.StringIO(bench("-o", "csv", *flags).stdout)))
    assert [r["topk"] for r in found] == ["0", "2"]
    assert set(NUMBERS + WORDS) <= set(found[0])
    table = bench(*flags).stdout.splitlines()
    assert len(table) == 3 and re.search(r"forward +256 +\(32, 2\)", table[2])


def test_nothing_but_the_report_is_printed():
    assert bench("--tokens", "64", "--head-dim", "16").stderr == ""


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--tokens", "0"], "--tokens"),
        (["--tokens", "8x"], "--tokens"),
        (["--tokens", "99999999999999g"], "--tokens"),
        (["--chunk-size", "-1"], "--chunk-size"),
        (["--topk", "-3"], "--topk"),
        (["--topk", "three"], "--topk"),
        (["--pass", "fast"], "--pass"),
        (["--pass", "gate", "--topk", "0"], "--pass gate"),
        (["--dtype", "i8"], "--dtype"),
        (["--dtype", "f64"], "--dtype"),
        (["--routing", "none"], "--routing"),
        (["--runs", "4"], "--runs"),
        (["--heads", "3", "--kv-heads", "2"], "--kv-heads"),
        (["--head-dim", "300"], "--head-dim"),
        (["-t", "-1"], "--threads"),
        (["-o", "xml"], "--output"),
        (["--sample", "0"], "--sample"),
        (["--sample", "nan"], "--sample"),
        (["--sample", "0.5", "--pass", "gate"], "--sample"),
        (["--budget", "-1"], "--budget"),
        (["--budget", "nan"], "--budget"),
        (["--tokens", "1g", "--heads", "64"], "GiB"),
        (["--workspace", "1"], "workspace"),
        (["--nope"], "--nope"),
    ],
)
def test_invalid_flags_are_refused(flags, named):
    done = bench(*flags, code=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and named in done.stderr, done.stderr


MODEL_COLUMNS = ["model", "size", "params", "backend", "threads", "attn", "test", "t/s"]


def model_bench(smollm2, *flags, code=0):
    return bench("-m", str(smollm2), "-t", "2", *flags, code=code)


def test_model_rows_are_those_of_llama_bench(smollm2):
    flags = ["-p", "16,32", "-n", "4", "-d", "0,24", "-r", "3", "-o", "json"]
    found = json.loads(model_bench(smollm2, *flags).stdout)
    assert [(r["attn"], r["n_depth"], r["n_prompt"], r["n_gen"]) for r in found] == [
        *((a, d, p, 0) for a in ["full", "moba"] for d in [0, 24] for p in [16, 32]),
        *((a, d, 0, 4) for a in ["full", "moba"] for d in [0, 24]),
    ]
    for row in found:
        assert row["model_n_params"] == 134_515_008 and row["model_filename"] == str(smollm2)
        assert row["model_type"] == "llama 135M Q4_1" and row["model_size"] == 96_576_768
        assert row["n_threads"] == 2 and row["backends"] == "CPU" and row["moba_topk"] == 4
        tokens = row["n_prompt"] + row["n_gen"]
        rates = [tokens / ns * 1e9 for ns in row["samples_ns"]]
        assert row["samples_ts"] == pytest.approx(rates, rel=1e-6) and len(rates) == 3
        assert row["avg_ts"] == pytest.approx(statistics.mean(rates), rel=1e-6)
        assert row["stddev_ts"] == pytest.approx(statistics.stdev(rates), rel=1e-4)
        assert row["avg_ns"] == pytest.approx(statistics.mean(row["samples_ns"]), rel=1e-6)


def test_model_table_is_markdown_and_csv_has_the_same_rows(smollm2):
    flags = ["-p", "16", "-n", "2", "-d", "8", "-r", "1", "--attn", "moba", "--decode", "full"]
    head, rule, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in model_bench(smollm2, *flags).stdout.splitlines()
    ]
    assert head == MODEL_COLUMNS and set("".join(rule)) <= set(" -:")
    assert [line[:7] for line in lines] == [
        ["llama 135M Q4_1", "92.1 MiB", "134.5 M", "CPU", "2", *end]
        for end in [["moba", "pp16 @ d8"], ["full", "tg2 @ d8"]]
    ]
    assert all(re.fullmatch(r"\d+\.\d\d ± 0\.00", line[7]) for line in lines)
    printed = model_bench(smollm2, *flags, "--moba-full-layers", "0,3-4", "-o", "csv").stdout
    found = list(csv.DictReader(io.StringIO(printed)))
    assert [(r["attn"], r["n_prompt"], r["n_gen"]) for r in found] == [
        ("moba", "16", "0"),
        ("full", "0", "2"),
    ]
    assert found[0]["moba_full_layers"] == "[0,3,4]" and None not in found[0]


def test_default_rows_beyond_the_context_are_left_out_with_a_note(smollm2):
    done = model_bench(smollm2, "-p", "0", "-n", "1", "-r", "1", "--attn", "moba", "-o", "json")
    assert [r["n_depth"] for r in json.loads(done.stdout)] == [0, 8192]
    assert done.stderr == (
        "note: beyond the model's context of 8192 tokens, left out: tg1 @ d32768\n"
    )


@pytest.mark.parametrize(
    "flags, named",
    [
        (["-p", "0", "-n", "0"], "-p/--n-prompt, -n/--n-gen: expected"),
        (["-p", "-1"], "-p/--n-prompt: expected"),
        (["-p", "8,8"], "-p/--n-prompt: expected each once, got 8"),
        (["-n", "many"], "-n/--n-gen: expected"),
        (["-d", "1.5"], "-d/--n-depth: expected"),
        (["-r", "0"], "-r/--repetitions: expected 1 to 1000, got 0"),
        (["-o", "xml"], "-o/--output: expected table|csv|json, got xml"),
        (["--attn", "full,full"], "--attn: expected each once"),
        (["--decode", "dense"], "--decode: expected"),
        (["--dtype", "i8"], "--dtype: expected"),
        (["--moba-topk", "0"], "--moba-topk: expected"),
        (["--moba-full-layers", "30"], "--moba-full-layers: expected layers from 0 to 29"),
        (["--tokens", "8k"], "--tokens"),
    ],
)
def test_invalid_flags_of_the_model_bench_are_refused(smollm2, flags, named):
    done = model_bench(smollm2, *flags, code=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and named in done.stderr, done.stderr


def test_missing_model_is_a_data_error(tmp_path):
    done = bench("--model", str(tmp_path / "none.gguf"), code=1)
    assert done.stderr.count("\n") == 1 and "none.gguf" in done.stderr


def test_each_form_of_bench_shows_its_flags():
    attention, model = bench("--help").stdout, bench("-m", "none", "--help").stdout
    assert "--chunk-size" in attention and "moba bench -m MODEL --help" in attention
    assert "--n-prompt" in model and "--chunk-size" not in model.replace("--moba-chunk-size", "")


def test_peer_naive_computes_moba():
    naive = module("naive", ROOT / "benchmarks" / "peers" / "naive.py")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 150, 16)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(naive.attention(q, k, v, 32, 5), dense)
    own = torch.arange(150) // 32
    alone = (own[:, None] == own) & torch.ones(150, 150, dtype=torch.bool).tril()
    torch.testing.assert_close(
        naive.attention(q, k, v, 32, 1),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=alone),
    )
    picked = naive.select_blocks(q, k, 32, 3)
    assert picked.sum(1).tolist() == [min(3, p // 32 + 1) for p in range(150)]
    equal = naive.select_blocks(torch.zeros(150, 16), k, 32, 3)
    assert equal[-1].tolist() == [False, False, True, True, True]  # the more recent of equal scores


def test_growth_extrapolates_quadratic_time():
    run = module("run", ROOT / "benchmarks" / "run.py")
    seconds = run.growth([(n, 3e-9 * n**2 + 1e-6 * n) for n in [1000, 2000, 4000]])
    assert seconds(100_000) == pytest.approx(30.1)


@pytest.fixture(scope="module")
def tiny_row():
    return rows("--tokens", "256", "--head-dim", "16")[0]


@pytest.fixture
def bench_run(tmp_path, monkeypatch, tiny_row):
    """The full benchmark over two groups of one call each, with a program that prints a row and logs its calls."""
    run = module("run", ROOT / "benchmarks" / "run.py")
    monkeypatch.setattr(
        run,
        "GROUPS",
        {
            "forward": lambda: [run.ours("forward", 1, [256], [(512, 3)])],
            "heads": lambda: [run.ours("heads", 1, [256], [(512, 3)], heads=2)],
        },
    )
    monkeypatch.setattr(run, "plot_time", lambda *_: None)
    monkeypatch.setattr(run, "plot_peak", lambda *_: None)

    class BenchRun:
        path, log, refused = tmp_path / "day.json", tmp_path / "log", tmp_path / "refused"

        def __call__(self, *flags):
            return run.main(
                [
                    "--moba",
                    str(tmp_path / "moba"),
                    "--out",
                    str(tmp_path),
                    "--name",
                    "day",
                    "--threads",
                    "2",
                    *flags,
                ]
            )

        def calls(self):
            """Return whether each logged call was for two heads, and clear the log."""
            found = (
                [json.loads(line) for line in self.log.read_text().splitlines()]
                if self.log.exists()
                else []
            )
            self.log.unlink(missing_ok=True)
            return ["--heads" in call for call in found]

        def report(self):
            return json.loads(self.path.read_text())

    result = BenchRun()
    (tmp_path / "moba").write_text(f"""#!{sys.executable}
import json, os, sys
with open({str(result.log)!r}, "a") as log:
    print(json.dumps(sys.argv), file=log)
if os.path.exists({str(result.refused)!r}):
    sys.exit("out of memory")
if "--heads" in sys.argv:  # what came before is on the disk by now
    assert json.load(open({str(result.path)!r}))["rows"]
print(json.dumps([{tiny_row!r}]))
""")
    (tmp_path / "moba").chmod(0o755)
    return result


def test_results_are_written_after_every_call(bench_run):
    assert bench_run() == 0 and bench_run.calls() == [False, True]
    report = bench_run.report()
    assert [row["group"] for row in report["rows"]] == ["forward", "heads"]
    assert not report["failures"] and "| 256 |" in bench_run.path.with_suffix(".md").read_text()
    goals = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "targets.py", bench_run.path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert goals.count("\n") > 40 and "not measured" in goals


def test_repeated_calls_replace_their_rows(bench_run):
    assert bench_run() == bench_run("--only", "heads") == 0
    assert bench_run.calls() == [False, True, True]
    assert [row["group"] for row in bench_run.report()["rows"]] == ["forward", "heads"]


def test_continue_runs_only_missing_calls(bench_run):
    assert bench_run("--only", "forward") == 0 and bench_run.calls() == [False]
    assert bench_run("--continue") == 0 and bench_run.calls() == [True]
    assert bench_run("--continue") == 0 and bench_run.calls() == []
    assert bench_run("--threads", "1", "--continue") == 0 and bench_run.calls() == [
        False,
        True,
    ]  # other rows than those of two
    assert len(bench_run.report()["rows"]) == 2


def test_failed_calls_are_reported_and_repeated(bench_run):
    bench_run.refused.touch()
    assert bench_run() == 1 and bench_run.calls() == [False, True]
    assert [f["message"] for f in bench_run.report()["failures"]] == ["out of memory"] * 2
    assert "out of memory" in bench_run.path.with_suffix(".md").read_text()
    bench_run.refused.unlink()
    assert bench_run("--continue") == 0 and bench_run.calls() == [False, True]
    assert not bench_run.report()["failures"]


def test_a_slow_peer_is_extrapolated_from_its_own_shorter_runs(tmp_path):
    run = module("run", ROOT / "benchmarks" / "run.py")
    options = type(
        "Options",
        (),
        {"moba": "none", "threads": 2, "timeout": 60, "quick": False, "out": tmp_path},
    )
    short, middle, long = run.theirs("forward", "sdpa", {1000: 1, 2000: 1, 1_000_000: 0})
    bench = run.Bench(options, [short, middle, long])
    bench.run = lambda call, *_: (
        json.dumps({"seconds": [1e-9 * call.tokens**2], "peak_rss_bytes": 1}),
        None,
    )
    for call in [short, middle, long]:
        bench.make(call)
    assert [p["extrapolated"] for p in bench.peers] == [False, False, True]
    assert bench.peers[-1]["seconds_median"] == pytest.approx(1000)
    run.write(bench, tmp_path / "report")
    assert (
        "| sdpa | 1000000 | full | float32 | 1e+03 s | extrapolated |"
        in (tmp_path / "report.md").read_text()
    )


def test_calls_of_the_full_benchmark_are_distinct():
    run = module("run", ROOT / "benchmarks" / "run.py")
    plan = [call for group in run.GROUPS.values() for call in group()]
    assert len({call.key(2) for call in plan}) == len(plan) > 50
    assert sum(call.expected for call in plan) < 30 * 60
