"""`moba generate`: flags, streams, exit codes and error messages."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

NEEDLE = Path(__file__).resolve().parents[2] / "models" / "needle-2m"

DOCUMENT = (
    "The warehouse is closed on Mondays.\n" * 20 + "The secret code of the blue door is 7349.\n"
)


def generate(moba, smollm2, *flags, tokens=20, dtype="f32", stdin=b""):
    flags = ["-n", tokens, "-t", 2, "--dtype", dtype, "--json", *flags]
    done = moba("generate", "-m", smollm2, *flags, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    return json.loads(done.stdout)


def refused(done, code, *words):
    """Check for one line on standard error that holds `words`, and nothing on standard output."""
    error = done.stderr.decode()
    assert done.returncode == code, error
    assert done.stdout == b""
    assert error.startswith("moba") and error.endswith("\n") and error.count("\n") == 1, error
    for word in words:
        assert str(word) in error
    return error


@pytest.fixture(scope="module")
def answer(moba, smollm2):
    return generate(moba, smollm2, "-p", "What is the capital of France?")


def test_json_has_every_field(answer, smollm2):
    assert "Paris" in answer["text"]
    assert answer["finish"] in ("end_token", "length")
    assert 0 < len(answer["generated_ids"]) <= 20 and all(
        isinstance(i, int) for i in answer["prompt_ids"]
    )
    assert 0 < answer["attention_seconds"] < answer["prefill_seconds"]
    assert answer["decode_seconds"] > 0
    assert answer["peak_rss_bytes"] > 100_000_000
    settings = answer["settings"]
    assert (
        settings["model"] == str(smollm2)
        and settings["attn"] == "full"
        and settings["decode"] == "full"
    )
    assert settings["dtype"] == "f32" and settings["threads"] == 2 and settings["ctx_size"] == 8192
    assert not any(name.startswith("moba") for name in settings)


@pytest.mark.parametrize("bf16", ["none", "amx"])
def test_auto_takes_bf16_where_the_cpu_has_it(moba, smollm2, monkeypatch, bf16):
    monkeypatch.setenv("MOBA_CPU_BF16", bf16)
    settings = generate(moba, smollm2, "-p", "Hi", tokens=1, dtype="auto")["settings"]
    has_bf16 = bf16 == "amx" and "amx_bf16" in Path("/proc/cpuinfo").read_text()
    assert settings["dtype"] == ("bf16" if has_bf16 else "f32") and settings["int8_decode"]
    assert settings["kv_dtype"] == ("bf16" if has_bf16 else "f16")
    auto = dict.fromkeys(("dtype", "kv_dtype", "attn", "decode"), "auto")
    assert settings["requested"] == auto


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("kv_dtype", ["auto", "f32", "bf16", "f16", "i8"])
def test_kv_dtype_stores_the_cache(moba, smollm2, dtype, kv_dtype):
    flags = ["--no-chat", "-p", "The capital of France is", "--kv-dtype", kv_dtype]
    found = generate(moba, smollm2, *flags, tokens=3, dtype=dtype)
    assert "Paris" in found["text"]
    settings = found["settings"]
    assert settings["dtype"] == dtype and not settings["int8_decode"]
    assert settings["kv_dtype"] == (dtype if kv_dtype == "auto" else kv_dtype)
    assert settings["requested"]["kv_dtype"] == kv_dtype


def test_peak_memory_is_at_most_1_gib_above_the_weights(answer):
    weights = 134_515_008 * 4
    assert answer["peak_rss_bytes"] < weights + (1 << 30)


def test_logprobs_are_those_of_transformers(moba, smollm2, answer):
    found = generate(
        moba, smollm2, "-p", "What is the capital of France?", "--logprobs", 49152, tokens=3
    )
    assert "logprobs" not in answer
    network = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    ids = found["prompt_ids"] + found["generated_ids"]
    with torch.inference_mode():
        logits = network(torch.tensor([ids])).logits[0, len(found["prompt_ids"]) - 1 : -1]
    expected = torch.log_softmax(logits.double(), -1)
    assert [entry["id"] for entry in found["logprobs"]] == found["generated_ids"]
    for entry, row in zip(found["logprobs"], expected, strict=True):
        top = entry["top_logprobs"]
        assert sorted(other["id"] for other in top) == list(range(49152))
        values = [other["logprob"] for other in top]
        assert values == sorted(values, reverse=True)
        own = torch.empty_like(row)
        own[[other["id"] for other in top]] = torch.tensor(values, dtype=torch.double)
        torch.testing.assert_close(own, row, rtol=0, atol=2e-3)
        assert entry["logprob"] == top[0]["logprob"] and entry["token"] == top[0]["token"]
    assert "".join(entry["token"] for entry in found["logprobs"]) == found["text"]


def test_logprobs_hold_the_generated_token_beside_the_likeliest(moba, smollm2):
    flags = ["-p", "Tell me a story.", "--temp", 5, "--top-k", 0, "--min-p", 0, "--top-p", 1]
    found = generate(moba, smollm2, *flags, "-s", 1, "--logprobs", 2, "--ignore-eos", tokens=4)
    for entry, token in zip(found["logprobs"], found["generated_ids"], strict=True):
        first, second = entry["top_logprobs"]
        assert entry["id"] == token and second["logprob"] <= first["logprob"] < 0
        assert entry["logprob"] <= first["logprob"]
    assert any(
        entry["logprob"] < entry["top_logprobs"][1]["logprob"] for entry in found["logprobs"]
    )


def test_text_is_the_same_without_json(moba, smollm2, answer):
    flags = ["-n", 20, "--dtype", "f32"]
    done = moba("generate", "-m", smollm2, "-p", "What is the capital of France?", *flags)
    assert done.returncode == 0
    assert done.stdout.decode() == answer["text"] + "\n"
    summary = done.stderr.decode()
    assert summary.count("\n") == 1 and "\r" not in summary
    assert f"prompt {len(answer['prompt_ids'])} tokens" in summary


def test_no_chat_omits_the_template(moba, smollm2, answer):
    bare = generate(moba, smollm2, "--no-chat", "-p", "What is the capital of France?")
    assert len(bare["prompt_ids"]) < len(answer["prompt_ids"])
    assert not bare["settings"]["chat"]
    start = next(
        i
        for i in range(100)
        if answer["prompt_ids"][i : i + len(bare["prompt_ids"])] == bare["prompt_ids"]
    )
    assert start > 0


def test_file_alone_is_the_prompt(moba, smollm2, answer, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("What is the capital of France?\n")
    assert generate(moba, smollm2, "-f", file)["prompt_ids"] == answer["prompt_ids"]
    assert (
        generate(moba, smollm2, "-f", "-", stdin=file.read_bytes())["generated_ids"]
        == answer["generated_ids"]
    )


def test_document_comes_before_the_question(moba, smollm2, tmp_path):
    file = tmp_path / "document.txt"
    file.write_text(DOCUMENT)
    question = "What is the secret code of the blue door?"
    found = generate(moba, smollm2, "-f", file, "-p", question)
    assert "7349" in found["text"]
    joined = generate(moba, smollm2, "-p", DOCUMENT.rstrip("\n") + "\n\n" + question)
    assert found["prompt_ids"] == joined["prompt_ids"]


@pytest.mark.parametrize("attention", ["moba", "moba-naive"])
def test_moba_finds_the_fact(moba, smollm2, attention, tmp_path):
    file = tmp_path / "document.txt"
    file.write_text(DOCUMENT)
    flags = [
        "--attn",
        attention,
        "--moba-chunk-size",
        32,
        "--moba-topk",
        4,
        "--moba-full-tail",
        48,
        "--moba-full-layers",
        "0,27-29",
    ]
    found = generate(
        moba, smollm2, "-f", file, "-p", "What is the secret code of the blue door?", *flags
    )
    assert "7349" in found["text"]
    settings = found["settings"]
    assert (
        settings["attn"] == attention
        and settings["moba_chunk_size"] == 32
        and settings["moba_topk"] == 4
    )
    assert settings["moba_sink"] == 1 and settings["moba_full_tail"] == 48
    assert settings["moba_full_layers"] == [0, 27, 28, 29]


def test_moba_flags_are_idle_with_full_attention(moba, smollm2, answer):
    flags = [
        "--attn",
        "full",
        "--moba-chunk-size",
        8,
        "--moba-topk",
        2,
        "--moba-sink",
        0,
        "--moba-full-tail",
        3,
        "--moba-full-layers",
        "0",
    ]
    full = generate(moba, smollm2, "-p", "What is the capital of France?", *flags)
    assert full["generated_ids"] == answer["generated_ids"]
    assert not any(name.startswith("moba") for name in full["settings"])


LONG_TEXT = "The warehouse is closed on Mondays, as it always was.\n" * 400


def notes(done):
    assert done.returncode == 0, done.stderr.decode()
    return [line for line in done.stderr.decode().splitlines() if line.startswith("note: ")]


def test_long_prompt_of_an_untrained_model_gets_advice(moba, smollm2):
    def read(text, *flags):
        return moba("generate", "-m", smollm2, "-p", text, "-n", 0, "--json", *flags)

    done = read(LONG_TEXT)
    (note,) = notes(done)
    assert "--attn moba" in note and "moba eval" in note
    settings = json.loads(done.stdout)["settings"]
    assert settings["attn"] == settings["decode"] == "full"
    assert settings["attn_reason"] == "not trained with MoBA"
    assert notes(read(LONG_TEXT[:4096])) == notes(read(LONG_TEXT, "--attn", "full")) == []
    done = read(LONG_TEXT, "--attn", "moba")
    assert notes(done) == []
    settings = json.loads(done.stdout)["settings"]
    assert settings["attn_reason"] == "requested" and settings["requested"]["attn"] == "moba"
    assert settings["decode"] == "full"


def test_trained_model_reads_long_prompts_with_moba(moba):
    def read(text, *flags):
        done = moba("generate", "-m", NEEDLE, "--no-chat", "-p", text, "-n", 1, "--json", *flags)
        assert notes(done) == []
        return json.loads(done.stdout)["settings"]

    long = read(LONG_TEXT)
    assert long["attn"] == "moba" and long["decode"] == "full"
    assert long["attn_reason"] == "trained with MoBA"
    assert long["moba_chunk_size"] == 128 and long["moba_topk"] == 16
    short = read("Hi", "-c", 100)
    assert short["attn"] == short["decode"] == "full" and "moba_topk" not in short
    full = read(LONG_TEXT, "--attn", "full")
    assert full["attn"] == full["decode"] == "full"


def test_summary_names_the_choices(moba, smollm2):
    def summary(*flags):
        done = moba("generate", "-m", smollm2, "-p", "Hi", "-n", 1, *flags)
        assert done.returncode == 0
        return done.stderr.decode()

    flags = ["--dtype", "f32", "--kv-dtype", "i8"]
    assert "; f32, KV cache i8, full attention; peak" in summary(*flags)
    assert "; f32, KV cache i8, moba attention, full in decode; peak" in summary(
        *flags, "--attn", "moba"
    )


def test_decode_moba_changes_the_text(moba, smollm2):
    flags = ["--decode", "moba", "--moba-chunk-size", 8, "--moba-topk", 1]
    sparse = generate(moba, smollm2, "-p", "Count from one to twenty, please.", *flags)
    assert sparse["settings"]["moba_sink"] == 0  # the default fits below top-k
    assert (
        sparse["generated_ids"]
        != generate(moba, smollm2, "-p", "Count from one to twenty, please.")["generated_ids"]
    )


def test_seeds_are_reproducible(moba, smollm2):
    def draw(seed):
        return generate(
            moba, smollm2, "-p", "Tell me a story.", "--temp", 1.5, "--top-k", 0, "--seed", seed
        )

    first, again, other = draw(1), draw(1), draw(2)
    assert first["generated_ids"] == again["generated_ids"] != other["generated_ids"]
    assert (
        first["settings"]["seed"] == 1
        and first["settings"]["top_k"] == 0
        and first["settings"]["top_p"] == 0.95
    )


def test_top_k_of_one_is_greedy(moba, smollm2, answer):
    drawn = generate(
        moba, smollm2, "-p", "What is the capital of France?", "--temp", 2, "--top-k", 1
    )
    assert drawn["generated_ids"] == answer["generated_ids"]


def test_threads_do_not_change_the_answer(moba, smollm2):
    def ids(threads):
        done = moba(
            "generate", "-m", smollm2, "-n", 20, "-t", threads, "--json", "-p", "Name three rivers."
        )
        return json.loads(done.stdout)["generated_ids"]

    assert ids(1) == ids(2) == ids(2)


@pytest.mark.parametrize("dtype", ["auto", "f32", "bf16", "f16"])
def test_weights_take_the_memory_of_their_file(moba, smollm2, dtype):
    # In a chat turn the logits of "The" and "L'" are equal in bf16; here no other token is near.
    done = generate(moba, smollm2, "--no-chat", "-p", "The capital of France is", dtype=dtype)
    assert "Paris" in done["text"]
    assert done["peak_rss_bytes"] < smollm2.stat().st_size + 300 * 2**20


def test_ignore_eos_continues(moba, smollm2):
    done = generate(moba, smollm2, "-p", "Say hi.", "--ignore-eos", tokens=30)
    assert len(done["generated_ids"]) == 30 and done["finish"] == "length"


def test_end_token_stops_generation(moba, smollm2):
    done = generate(moba, smollm2, "-p", "Say hi.", tokens=200)
    assert done["finish"] == "end_token" and len(done["generated_ids"]) < 200


def test_full_context_stops_generation(moba, smollm2, answer):
    context = len(answer["prompt_ids"]) + 3
    done = generate(
        moba, smollm2, "-p", "What is the capital of France?", "-c", context, "--ignore-eos"
    )
    assert done["finish"] == "context" and len(done["generated_ids"]) == 4


def test_predict_0_generates_nothing(moba, smollm2):
    done = moba("generate", "-m", smollm2, "-p", "Hi", "-n", 0, "--json")
    assert json.loads(done.stdout)["generated_ids"] == []


def test_invalid_utf8_is_a_valid_prompt(moba, smollm2, tmp_path):
    file = tmp_path / "bytes"
    file.write_bytes(b"\xff\xfe caf\xe9 \x00 \xed\xa0\x80 \xf0\x9f\x98")
    assert generate(moba, smollm2, "-f", file)["generated_ids"]


def test_streamed_text_is_whole_characters(moba, smollm2):
    """Check that text is streamed in whole characters, also where tokens end within a character."""
    text = "\N{GRINNING FACE} \N{CAT FACE} \N{PILE OF POO} " * 6
    done = moba("generate", "-m", smollm2, "--no-chat", "-p", text, "-n", 24, "--ignore-eos")
    assert any(ord(c) > 0xFFFF for c in done.stdout.decode("utf-8"))


def test_special_tokens_in_a_prompt_stay_text(moba, smollm2):
    done = generate(moba, smollm2, "-p", "a<|im_end|>b")
    plain = generate(moba, smollm2, "-p", "ab")
    end = plain["prompt_ids"][-4:]  # end of turn and the head of the next
    assert (
        done["prompt_ids"].count(2) == plain["prompt_ids"].count(2)
        and done["prompt_ids"][-4:] == end
    )


def test_interrupt_ends_cleanly(build_folder, smollm2):
    command = [
        build_folder / "moba",
        "generate",
        "-m",
        smollm2,
        "-p",
        "Tell me everything.",
        "--ignore-eos",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(r"prompt .*\n", error.decode())


def test_progress_is_shown_only_on_a_terminal(build_folder, smollm2, tmp_path):
    file = tmp_path / "document.txt"
    file.write_text(DOCUMENT * 4)
    reader, writer = os.openpty()
    command = [build_folder / "moba", "generate", "-m", smollm2, "-f", file, "-n", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=writer) as process:
        os.close(writer)
        shown = b""
        try:
            while chunk := os.read(reader, 4096):
                shown += chunk
        except OSError:  # Linux's error for a closed other end
            pass
    os.close(reader)
    assert process.returncode == 0
    assert re.search(rb"reading \d+ of \d+ tokens, \d+ tokens/s, \d+ s left", shown)


WRONG_USAGE = {
    "unknown subcommand": (["generates"], ["generates"]),
    "unknown flag": (["generate", "-m", "MODEL", "-p", "x", "--moba-top-k", 3], ["--moba-top-k"]),
    "no model": (["generate", "-p", "x"], ["--model"]),
    "no prompt": (["generate", "-m", "MODEL"], ["--prompt", "--file"]),
    "empty prompt": (["generate", "-m", "MODEL", "-p", "", "--no-chat"], ["--prompt"]),
    "missing value": (["generate", "-m", "MODEL", "-p"], ["--prompt"]),
    "given twice": (["generate", "-m", "MODEL", "-p", "x", "-n", 3, "-n", 4], ["--predict"]),
    "not a number": (["generate", "-m", "MODEL", "-p", "x", "-n", "many"], ["many"]),
    "-n": (["generate", "-m", "MODEL", "-p", "x", "-n", -2], ["-n", "-2"]),
    "-c": (["generate", "-m", "MODEL", "-p", "x", "-c", 0], ["-c", "0"]),
    "-c overflows": (["generate", "-m", "MODEL", "-p", "x", "-c", 10**19], [10**19]),
    "-t": (["generate", "-m", "MODEL", "-p", "x", "-t", 0], ["-t", "0"]),
    "--temp": (["generate", "-m", "MODEL", "-p", "x", "--temp", "nan"], ["--temp", "nan"]),
    "--top-p": (
        ["generate", "-m", "MODEL", "-p", "x", "--temp", 1, "--top-p", 1.5],
        ["--top-p", "1.5"],
    ),
    "--min-p": (
        ["generate", "-m", "MODEL", "-p", "x", "--temp", 1, "--min-p", -1],
        ["--min-p", "-1"],
    ),
    "--top-k": (
        ["generate", "-m", "MODEL", "-p", "x", "--temp", 1, "--top-k", -1],
        ["--top-k", "-1"],
    ),
    "greedy --top-k": (["generate", "-m", "MODEL", "-p", "x", "--top-k", 4], ["--top-k", "--temp"]),
    "--seed": (["generate", "-m", "MODEL", "-p", "x", "--seed", -1], ["--seed", "-1"]),
    "--attn": (
        ["generate", "-m", "MODEL", "-p", "x", "--attn", "sparse"],
        ["--attn", "moba-naive", "sparse"],
    ),
    "--decode": (
        ["generate", "-m", "MODEL", "-p", "x", "--decode", "moba-naive"],
        ["--decode", "moba-naive"],
    ),
    "--dtype": (["generate", "-m", "MODEL", "-p", "x", "--dtype", "f8"], ["--dtype", "f8", "bf16"]),
    "--kv-dtype": (
        ["generate", "-m", "MODEL", "-p", "x", "--kv-dtype", "q8_0"],
        ["--kv-dtype", "q8_0", "auto|f32|bf16|f16|i8"],
    ),
    "topk with full": (
        ["generate", "-m", "MODEL", "-p", "x", "--attn", "full", "--moba-topk", 0],
        ["--moba-topk", "0"],
    ),
    "tail with full": (
        ["generate", "-m", "MODEL", "-p", "x", "--attn", "full", "--moba-full-tail", -1],
        ["--moba-full-tail", "-1"],
    ),
    "chunk size": (
        ["generate", "-m", "MODEL", "-p", "x", "--attn", "moba", "--moba-chunk-size", 0],
        ["--moba-chunk-size", "0"],
    ),
    "topk": (
        ["generate", "-m", "MODEL", "-p", "x", "--attn", "moba", "--moba-topk", 0],
        ["--moba-topk", "0"],
    ),
    "sink": (
        ["generate", "-m", "MODEL", "-p", "x", "--attn", "moba", "--moba-sink", 4],
        ["--moba-sink", "--moba-topk 4", "0 to 3"],
    ),
    "tail": (
        ["generate", "-m", "MODEL", "-p", "x", "--attn", "moba", "--moba-full-tail", -1],
        ["--moba-full-tail", "-1"],
    ),
    "layers": (
        ["generate", "-m", "MODEL", "-p", "x", "--attn", "moba", "--moba-full-layers", "3-x"],
        ["--moba-full-layers", "3-x"],
    ),
    "layers backwards": (
        ["generate", "-m", "MODEL", "-p", "x", "--attn", "moba", "--moba-full-layers", "9-3"],
        ["--moba-full-layers", "9-3"],
    ),
    "layers beyond": (
        [
            "generate",
            "-m",
            "MODEL",
            "-p",
            "x",
            "--attn",
            "moba",
            "--moba-full-layers",
            "0-9223372036854775807",
        ],
        ["--moba-full-layers", "0 to 29"],
    ),
    "logprobs without JSON": (
        ["generate", "-m", "MODEL", "-p", "x", "--logprobs", 3],
        ["--logprobs: has no effect without --json"],
    ),
    "logprobs of no token": (
        ["generate", "-m", "MODEL", "-p", "x", "--json", "--logprobs", 0],
        ["--logprobs: expected 1 to"],
    ),
    "logprobs beyond the vocabulary": (
        ["generate", "-m", "MODEL", "-p", "x", "--json", "--logprobs", 49153],
        ["--logprobs: expected at most 49152 (the vocabulary), got 49153"],
    ),
    "prompt too long": (
        ["generate", "-m", "MODEL", "-p", "x " * 50, "-c", 40],
        ["--prompt", "40", "-c"],
    ),
}


@pytest.mark.parametrize("case", WRONG_USAGE)
def test_wrong_usage_is_one_line(moba, smollm2, case):
    arguments, words = WRONG_USAGE[case]
    arguments = [smollm2 if argument == "MODEL" else argument for argument in arguments]
    refused(moba(*arguments), 2, *words)


def test_prompt_too_long_names_both_numbers(moba, smollm2, answer):
    tokens = len(answer["prompt_ids"])
    done = moba("generate", "-m", smollm2, "-p", "What is the capital of France?", "-c", tokens - 1)
    error = refused(done, 2, "-c")
    assert {str(tokens), str(tokens - 1)} <= set(re.findall(r"\d+", error))


def test_more_tokens_than_memory_are_refused(moba, smollm2):
    flags = ["-p", "x", "-n", 2_000_000_000, "-c", 2_000_000_000]
    error = refused(moba("generate", "-m", smollm2, *flags), 1, smollm2, "got 2000000000 tokens")
    fits, gib = re.search(
        r"at most (\d+) tokens of prompt and answer in ([\d.]+) GiB", error
    ).groups()
    cache = 30 * 2 * 3 * 64  # numbers of a token
    assert 0 < int(fits) * cache < float(gib) * 2**30


@pytest.mark.parametrize("document", ["nowhere.txt", "folder", "/proc/self/mem"])
def test_unreadable_document_is_refused(moba, smollm2, tmp_path, document):
    (tmp_path / "folder").mkdir()
    path = tmp_path / document
    refused(moba("generate", "-m", smollm2, "-f", path, "-p", "x"), 1, "--file", path)


@pytest.mark.parametrize("kind", ["missing", "empty file", "empty folder", "text"])
def test_missing_or_invalid_model_is_refused(moba, tmp_path, kind):
    path = tmp_path / "model"
    if kind == "empty folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text("" if kind == "empty file" else "hello")
    refused(moba("generate", "-m", path, "-p", "x"), 1, path)


def test_unwritable_output_is_an_error(build_folder, smollm2):
    command = [build_folder / "moba", "generate", "-m", smollm2, "-p", "x", "-n", "2"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert (
        done.returncode == 1 and b"standard output" in done.stderr and done.stderr.count(b"\n") == 1
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["generate", "--help"], ["--version"]])
def test_help_exits_with_0(moba, arguments):
    done = moba(*arguments)
    assert done.returncode == 0 and done.stdout and done.stderr == b""


def test_help_has_an_example(moba):
    assert b"moba generate -m" in moba("generate", "--help").stdout


def test_cache_dir_keeps_a_document_for_the_next_run(moba, tmp_path):
    file = tmp_path / "document.txt"
    file.write_text(DOCUMENT * 8)
    flags = ["--no-chat", "-f", file, "--cache-dir", tmp_path / "cache"]
    first = generate(moba, NEEDLE, *flags, "-p", "What is the code?")
    again = generate(moba, NEEDLE, *flags, "-p", "What is the code?")
    other = generate(moba, NEEDLE, *flags, "-p", "When is it closed?")
    moba_attention = generate(moba, NEEDLE, *flags, "-p", "?", "--attn", "moba")
    assert again["text"] == first["text"]
    assert first["cached_tokens"] == moba_attention["cached_tokens"] == 0
    size = len(first["prompt_ids"])
    assert size - 256 < again["cached_tokens"] < size and other["cached_tokens"] > size - 512
