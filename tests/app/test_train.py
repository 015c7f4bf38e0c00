"""`moba train` against PyTorch and `transformers`: losses, schedules, checkpoints, resumed and killed runs, refusals."""

import contextlib
import json
import math
import os
import pty
import random
import resource
import signal
import subprocess
import time
import xml.etree.ElementTree

import numpy as np
import pytest
import torch
import transformers
from losses import losses_there
from moba.config import MoBAConfig, config_of
from safetensors.numpy import load_file

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dict(
    model_type="llama",
    vocab_size=264,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
END = 256
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def write_config(path, **changes):
    path.write_text(json.dumps(TINY | changes))
    return path


def text(size, seed=0):
    """Return text with a pattern to learn."""
    draw = random.Random(seed)
    words = ["block", "mean", "score", "query", "key", "value", "sink", "route", "of", "the"]
    out = ""
    while len(out) < size:
        out += draw.choice(words) + " "
    return out[:size]


@pytest.fixture
def place(tmp_path):
    """A folder with tiny.json, and in data/ seven documents of different lengths."""
    write_config(tmp_path / "tiny.json")
    (tmp_path / "data").mkdir()
    for i, size in enumerate([40, 100, 300, 64, 7, 150, 90]):
        (tmp_path / "data" / f"{i}.txt").write_text(text(size, i))
    return tmp_path


def arguments(place, out="run", steps=12, **flags):
    flags = {
        "config": place / "tiny.json",
        "data": place / "data",
        "out": place / out,
        "steps": steps,
        "seq_len": 128,
        "batch_tokens": 256,
        "lr": 1e-2,
        "moba_chunk_size": 16,
        "threads": 2,
    } | flags
    line = ["train"]
    for name, value in flags.items():
        if value is not None:
            line += [("-m" if name == "model" else "--" + name.replace("_", "-"))] + (
                [] if value is True else [value]
            )
    return [str(word) for word in line]


@pytest.fixture
def train(moba, place):
    """train("out", flag=value, ...) trains and returns the lines of its log."""

    def run(out="run", **flags):
        done = moba(*arguments(place, out, **flags))
        assert done.returncode == 0, done.stderr.decode()
        return log_of(place / out)

    return run


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def exact(log):
    """Return the fields that must be bit-identical."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in log]


def byte_documents(place, seq_len=128):
    """Return inputs and targets of all sequences of the documents."""
    sequences = []
    for path in sorted((place / "data").iterdir()):
        ids = list(path.read_bytes()) + [END]
        for begin in range(0, len(ids) - 1, seq_len):
            sequence = ids[begin : begin + seq_len + 1]
            sequences.append((sequence[:-1], sequence[1:]))
    return sequences


def loss_there(model, sequences):
    """Return the mean loss of all tokens."""
    ids, targets = (np.concatenate([sequence[i] for sequence in sequences]) for i in range(2))
    return losses_there(model, ids, targets, [len(sequence[0]) for sequence in sequences]).mean()


def learning_rate(kind, step, steps, warmup, decay=0, floor=0.1):
    if step < warmup:
        return (step + 1) / warmup
    if kind == "cosine":
        return floor + (1 - floor) * 0.5 * (
            1 + math.cos(math.pi * (step - warmup) / (steps - warmup))
        )
    return 1 - (1 - floor) * max(0, step - (steps - decay)) / decay


def test_fifty_steps_equal_pytorch(place, train):
    config = transformers.LlamaConfig(
        **{name: value for name, value in TINY.items() if name != "model_type"}
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(place / "start")
    ours = train(
        config=None,
        model=place / "start",
        tokenizer=train_tokenizer_folder(train, place),
        steps=50,
        batch_tokens=2048,
        warmup=5,
        attn="full",
        moba_chunk_size=None,
    )

    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    sequences = byte_documents(place)
    for step, line in enumerate(ours):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * learning_rate("cosine", step, 50, 5)
        loss = loss_there(model, sequences)
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4), step
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-2), step
    assert ours[-1]["loss"] < 0.7 * ours[0]["loss"]


def train_tokenizer_folder(train, place):
    """Return a folder with the byte tokenizer, written by a run."""
    train("bytes", steps=1)
    return place / "bytes"


@pytest.mark.parametrize("schedule, flags", [("cosine", {}), ("wsd", {"decay": 8})])
def test_learning_rates_follow_the_schedule(schedule, flags, train):
    log = train(steps=20, lr_schedule=schedule, warmup=4, min_lr=0.1, **flags)
    expected = [1e-2 * learning_rate(schedule, step, 20, 4, **flags) for step in range(20)]
    assert [line["lr"] for line in log] == pytest.approx(expected, rel=1e-6)


def test_attention_follows_the_schedule(train):
    log = train(steps=10, attn_schedule="moba:0.5,full:0.3,moba:0.2", moba_full_layers="1")
    assert [line["attention"] for line in log] == ["moba"] * 5 + ["full"] * 3 + ["moba"] * 2


def test_moba_flags_are_idle_with_full_attention(train):
    alone = train("alone", steps=2, attn="full", moba_chunk_size=None)
    assert exact(
        train("idle", steps=2, attn="full", moba_chunk_size=32, moba_topk=2, moba_sink=1)
    ) == exact(alone)


def test_every_token_is_predicted_once_an_epoch(place, train):
    log = train(steps=40)
    per_epoch = sum(len(path.read_bytes()) for path in (place / "data").iterdir())
    for epoch in range(log[-1]["epoch"]):
        assert sum(line["tokens"] for line in log if line["epoch"] == epoch) == per_epoch
    assert log[-1]["epoch"] > 2


def test_accumulation_does_not_change_losses(place, train):
    for path in (place / "data").iterdir():
        path.unlink()
    for i in range(4):
        (place / "data" / f"{i}.txt").write_text(text(128, i))
    at_once, in_parts = (
        train(f"run{parts}", batch_tokens=512, accumulate=parts, steps=5) for parts in (1, 2)
    )
    assert [line["tokens"] for line in in_parts] == [512] * 5
    for one, other in zip(at_once, in_parts):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_activation_checkpointing_does_not_change_losses(train):
    assert exact(train("kept")) == exact(train("recomputed", activation_checkpointing=True))


def test_one_document_is_overfitted(place, train):
    for path in (place / "data").iterdir():
        path.unlink()
    (place / "data" / "one.txt").write_text(text(120))
    assert train(steps=150, attn_schedule="moba:0.9,full:0.1")[-1]["loss"] < 0.02


def test_repeated_and_resumed_runs_are_bit_identical(place, train):
    whole = train(save_every=5)
    assert exact(train("again", save_every=5)) == exact(whole)
    resumed = train(
        "parts", steps=12, save_every=5, resume=True
    )  # without a checkpoint: from the start
    assert exact(resumed) == exact(whole)
    for gone in ("step-00000012", "last"):
        subprocess.run(["rm", "-r", place / "parts" / gone], check=True)
    resumed = train("parts", save_every=5, resume=True)
    assert exact(resumed) == exact(whole)
    assert [line["step"] for line in resumed] == list(range(1, 13))
    assert sorted(path.name for path in (place / "parts").glob("step-*")) == [
        "step-00000010",
        "step-00000012",
    ]


def test_lora_resumes_bit_identically_and_saves_the_sum(place, train):
    train("base", steps=3)
    flags = dict(
        config=None,
        model=place / "base",
        lora_rank=2,
        lora_targets="q_proj,down_proj",
        save_every=3,
    )
    whole = train("lora", steps=6, **flags)
    train("parts", steps=6, **flags)
    subprocess.run(["rm", "-r", place / "parts" / "step-00000006"], check=True)
    assert exact(train("parts", steps=6, resume=True, **flags)) == exact(whole)
    before, after = (load_file(place / run / "model.safetensors") for run in ("base", "lora"))
    for name, weight in after.items():
        change = weight - before[name]
        if "q_proj" in name or "down_proj" in name:
            sizes = np.linalg.svd(change, compute_uv=False)
            assert sizes[0] > 1e-4 and sizes[2] < 1e-3 * sizes[0], name
        else:
            assert not change.any(), name


def kill_and_resume(moba, place, command, kills, draw, seconds):
    """Kill runs at random moments and resume them; return the number of runs hit."""
    hits = 0
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(draw.uniform(0.1, seconds))
            assert process.returncode == 0, process.stderr.read().decode()
            return hits
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            hits += 1
    return hits


def test_killed_runs_resume_bit_identically(place, train, build_folder, moba):
    """Kill four runs, or MOBA_TEST_KILLS, in training and in saving: a checkpoint follows each step."""
    flags = dict(steps=30, save_every=1, attn_schedule="moba:0.5,full:0.5")
    begin = time.monotonic()
    whole = train("whole", **flags)
    seconds = time.monotonic() - begin
    kills, draw = int(os.environ.get("MOBA_TEST_KILLS", 4)), random.Random(7)
    for attempt in range(100):
        out = f"killed{attempt}"
        command = [build_folder / "moba", *arguments(place, out, resume=True, **flags)]
        kills -= kill_and_resume(moba, place, command, min(kills, 6), draw, seconds)
        assert exact(train(out, resume=True, **flags)) == exact(whole)
        assert not list((place / out).glob("*.part"))
        if kills <= 0:
            return
    pytest.fail("the runs ended before they could be killed")


def test_interrupted_run_saves_and_resumes(place, train, build_folder, moba):
    flags = dict(lr_schedule="constant", warmup=0)
    command = [build_folder / "moba", *arguments(place, "stopped", steps=10**6, **flags)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(b"step:")
    process.send_signal(signal.SIGSTOP)
    refuse(
        moba,
        place,
        1,
        "--out",
        "expected a folder that no other run writes to",
        out="stopped",
        resume=True,
    )
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"--resume goes on" in errors
    last = log_of(place / "stopped")[-1]["step"]
    assert (place / "stopped" / "last").resolve().name == f"step-{last:08}"
    resumed = train("stopped", steps=last + 5, resume=True, **flags)
    assert exact(resumed) == exact(train("whole", steps=last + 5, **flags))


def test_checkpoint_loads_in_transformers(place, train, moba):
    """Check that the next step's loss is that of transformers on the checkpoint."""
    flags = dict(
        steps=6, batch_tokens=2048, save_every=5, keep=3, attn="full", moba_chunk_size=None
    )
    log = train(**flags)
    for folder in (place / "run" / "step-00000005", place / "run"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if folder.name != "run":
            assert loss_there(model, byte_documents(place)).item() == pytest.approx(
                log[5]["loss"], rel=1e-5
            )
        assert tokenizer.eos_token_id == END == model.config.eos_token_id
        written = "Größe 日本\n\ttab"
        assert tokenizer(written).input_ids == list(written.encode())
        assert tokenizer.decode(list(written.encode())) == written
    done = moba("tokenize", "-m", place / "run", "-p", "Größe<|endoftext|>", "--json")
    assert json.loads(done.stdout) == [*"Größe".encode(), END]
    done = moba(
        "generate",
        "-m",
        place / "run",
        "-p",
        "the block",
        "--no-chat",
        "-n",
        "4",
        "--ignore-eos",
        "--json",
    )
    assert len(json.loads(done.stdout)["generated_ids"]) == 4


def test_trained_attention_is_the_default(place, train, moba):
    train(steps=2, seq_len=64, moba_topk=3, moba_sink=1, moba_full_layers="1")
    said = ("moba_chunk_size", "moba_topk", "moba_sink", "moba_full_tail", "moba_full_layers")
    config = json.loads((place / "run" / "config.json").read_text())
    assert [config[name] for name in said] == [16, 3, 1, 0, [1]]
    there = transformers.AutoModelForCausalLM.from_pretrained(place / "run").config
    assert config_of(there) == MoBAConfig(16, 3, sink_blocks=1, full_layers=(1,))

    def settings(*flags, model=place / "run"):
        command = (
            "generate",
            "-m",
            model,
            "-p",
            "the block",
            "--no-chat",
            "-n",
            "1",
            "--attn",
            "moba",
            "--json",
            *flags,
        )
        done = moba(*map(str, command))
        assert done.returncode == 0, done.stderr.decode()
        return [json.loads(done.stdout)["settings"][name] for name in said]

    assert settings() == [16, 3, 1, 0, [1]]
    assert settings("--moba-chunk-size", 32, "--moba-sink", 0, "--moba-full-tail", 8) == [
        32,
        3,
        0,
        8,
        [1],
    ]
    train("full", steps=1, seq_len=64, attn="full", moba_chunk_size=None)
    assert settings(model=place / "full") == [256, 4, 1, 128, []]


def test_longer_context_interpolates_positions(place, train):
    train("short", steps=2, seq_len=64)
    config = json.loads((place / "short" / "config.json").read_text())
    config["max_position_embeddings"] = 64
    (place / "short" / "last" / "config.json").write_text(json.dumps(config))
    flags = dict(
        config=None,
        model=place / "short",
        lr=0,
        weight_decay=0,
        batch_tokens=2048,
        steps=1,
        attn="full",
        moba_chunk_size=None,
    )
    grown, given = train("grown", **flags), train("given", rope_scaling="linear:4", **flags)
    for run, log, factor in (("grown", grown, 2), ("given", given, 4)):
        model = transformers.AutoModelForCausalLM.from_pretrained(place / run)
        assert model.config.max_position_embeddings == 128
        assert model.config.rope_parameters["factor"] == factor
        assert loss_there(model, byte_documents(place)).item() == pytest.approx(
            log[0]["loss"], rel=1e-5
        )
    assert grown[0]["loss"] != given[0]["loss"]


def test_only_completions_have_a_loss(place, train):
    lines = [
        {"prompt": "two and two is ", "completion": "four"},
        {"prompt": "x" * 200, "completion": "y" * 90},
        {"text": "all of this"},
    ]
    data = place / "lines.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = dict(
        data=data,
        lr=0,
        weight_decay=0,
        steps=1,
        batch_tokens=1024,
        attn="full",
        moba_chunk_size=None,
    )
    log = train(loss="completion", **flags)
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "run")
    total = count = 0
    for line in lines:
        prompt = list(line.get("prompt", "").encode())
        ids = prompt + list(line.get("completion", line.get("text", "")).encode()) + [END]
        targets = np.array(
            [-1 if i + 1 < len(prompt) else token for i, token in enumerate(ids[1:])]
        )
        for begin in range(0, len(targets), 128):
            part = slice(begin, begin + 128)
            losses = losses_there(
                model, np.array(ids[:-1])[part], targets[part], [len(targets[part])]
            )
            total, count = total + losses.sum().item(), count + (targets[part] >= 0).sum()
    assert log[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    everything = train("everything", **flags)
    assert everything[0]["loss"] != log[0]["loss"]


def test_tokenizer_from_gguf_is_saved(place, train, moba, smollm2):
    write_config(place / "tiny.json", vocab_size=49152, hidden_size=16)
    train(tokenizer=smollm2, steps=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "run")
    for written in ("Hello world  123 don't\n\n x", "Größe 日本", "\tf(x)=1;  "):
        ids = json.loads(moba("tokenize", "-m", smollm2, "-p", written, "--json").stdout)
        assert tokenizer(written).input_ids == ids
        assert (
            json.loads(moba("tokenize", "-m", place / "run", "-p", written, "--json").stdout) == ids
        )
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template


def test_progress_bar_is_shown_on_a_terminal(place, build_folder):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [build_folder / "moba", *arguments(place)], stdout=theirs, stderr=subprocess.PIPE
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 4096):
            shown += part
    process.communicate()
    assert shown.count(b" left") == 12 and b"6/12, 0:00:" in shown
    assert shown.endswith(b"\r\x1b[K")


def test_finished_run_does_nothing(place, train, moba):
    whole = train(steps=3)
    done = moba(*arguments(place, steps=3, resume=True))
    assert done.returncode == 0 and b"nothing to do: all 3 steps are done" in done.stderr
    assert log_of(place / "run") == whole


def test_plot_has_a_line_per_attention(place, train):
    train(steps=20, attn_schedule="moba:0.5,full:0.5")
    picture = xml.etree.ElementTree.parse(place / "run" / "loss.svg")
    lines = picture.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.get("points").split()) for line in lines] == [20, 20]


def refuse(moba, place, code, *parts, **flags):
    done = moba(*arguments(place, **flags))
    assert done.returncode == code, done.stderr.decode()
    message = done.stderr.decode().splitlines()[-1]
    assert message.startswith("moba train: ")
    for part in parts:
        assert part in message, message


def empty_file(place):
    (place / "data" / "0.txt").write_text("")
    return {"data": place / "data" / "0.txt"}


def binary_file(place):
    (place / "data" / "0.txt").write_bytes(b"text \0 and more")
    return {"data": place / "data" / "0.txt"}


def folder_of_nothing(place):
    for path in (place / "data").iterdir():
        path.write_bytes(b"")
    return {}


def config_with(**changes):
    return lambda place: {"config": write_config(place / "bad.json", **changes)}


def bad_lines(*lines):
    def write(place):
        (place / "bad.jsonl").write_text("\n".join(lines))
        return {"data": place / "bad.jsonl"}

    return write


def file_in_the_way(place):
    (place / "way").write_text("")
    return {"out": "way/run"}


def flags(**given):
    return lambda place: given


BAD = {
    "empty file": (1, empty_file, ["0.txt", "expected a text file, got an empty one"]),
    "binary file": (1, binary_file, ["0.txt", "expected a text file, got a binary one"]),
    "no text at all": (1, folder_of_nothing, ["--data: expected text files, got none"]),
    "no such data": (1, flags(data="nowhere"), ["--data nowhere: expected a file or a folder"]),
    "not JSON": (1, bad_lines('{"text": "a"}', "{"), ["bad.jsonl:2: expected JSON"]),
    "no text member": (
        1,
        bad_lines('{"prompt": "a"}'),
        ["bad.jsonl:1: expected a member", "'completion'"],
    ),
    "heads do not divide": (
        1,
        config_with(num_attention_heads=5),
        ["bad.json", "divisor of hidden_size 48"],
    ),
    "key heads do not divide": (
        1,
        config_with(num_key_value_heads=3),
        ["bad.json", "divisor of 4 heads, got 3"],
    ),
    "odd head size": (1, config_with(head_dim=7), ["bad.json", "an even head size, got 7"]),
    "vocabulary too small": (
        1,
        config_with(vocab_size=200),
        ["bad.json", "at least 257", "got 200"],
    ),
    "too large": (
        1,
        config_with(hidden_size=2**30, num_hidden_layers=2**31 - 1),
        ["bad.json", "GiB"],
    ),
    "too many layers": (1, config_with(num_hidden_layers=2**31 - 1), ["bad.json", "GiB"]),
    "wrong deviation": (1, config_with(initializer_range="x"), ["bad.json", "initializer_range"]),
    "context that cannot grow": (
        2,
        lambda place: config_with(rope_scaling=YARN)(place) | {"seq_len": 512, "batch_tokens": 512},
        ["--seq-len: expected at most 256", "got 512"],
    ),
    "file for a folder": (
        1,
        file_in_the_way,
        ["--out: expected a folder that can be created", "way/run"],
    ),
    "no room": (1, flags(keep=2**31 - 1), ["--out", "expected", "GiB of free space"]),
    "shares": (
        2,
        flags(attn_schedule="moba:0.9,full:0.2"),
        ["--attn-schedule", "add up to 1, not to 1.1"],
    ),
    "share of what": (2, flags(attn_schedule="sparse:1"), ["--attn-schedule", "moba:0.9,full:0.1"]),
    "no share": (2, flags(attn_schedule="moba"), ["--attn-schedule"]),
    "layers": (
        2,
        flags(moba_full_layers="2"),
        ["--moba-full-layers: expected layers from 0 to 1, got 2-2"],
    ),
    "batch below sequence": (2, flags(batch_tokens=100), ["--batch-tokens: expected at least 128"]),
    "steps": (2, flags(steps=0), ["--steps: expected 1 to"]),
    "two models": (2, flags(model="x"), ["either --config or -m/--model, got both"]),
    "topk with full": (2, flags(attn="full", moba_topk=0), ["--moba-topk: expected 1 to"]),
    "rope": (2, flags(rope_scaling="linear:0.5"), ["--rope-scaling: expected linear:FACTOR"]),
    "lora": (
        2,
        flags(lora_rank=2, lora_targets="w_proj"),
        ["--lora-targets: expected some of q_proj"],
    ),
    "lora alone": (2, flags(lora_alpha=2), ["--lora-alpha: has no effect without --lora-rank"]),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_input_is_refused(case, place, moba):
    code, prepare, parts = BAD[case]
    refuse(moba, place, code, *parts, **prepare(place))
    assert not list(place.glob("run/step-*"))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def reshape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))


DAMAGE = {
    "weights cut short": (
        lambda folder: cut_short(folder / "model.safetensors"),
        ["model.safetensors"],
    ),
    "optimiser cut short": (
        lambda folder: cut_short(folder / "optimizer.safetensors"),
        ["optimizer.safetensors"],
    ),
    "no state": (lambda folder: (folder / "train_state.json").unlink(), ["train_state.json"]),
    "state without a step": (
        lambda folder: (folder / "train_state.json").write_text('{"run": {}}'),
        ["--seed"],
    ),
    "another shape in its config": (reshape, ["step-00000003", "embed_tokens"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints_are_refused(case, place, train, moba):
    train(steps=3)
    damage, parts = DAMAGE[case]
    damage(place / "run" / "step-00000003")
    done = moba(*arguments(place, steps=6, resume=True))
    assert done.returncode in (1, 2)
    for part in parts:
        assert part in done.stderr.decode()


def test_checkpoints_of_another_run_are_refused(place, train, moba):
    train(steps=3)
    refuse(moba, place, 2, "--out", "or --resume, got step-00000003")
    refuse(moba, place, 2, "--seed: expected 0 (that of", "got 5", resume=True, seed=5)
    refuse(moba, place, 2, "--lora-rank: expected null", "got 2", resume=True, lora_rank=2)
    write_config(place / "tiny.json", hidden_size=64)
    refuse(moba, place, 1, "expected a model of the shape of", "tiny.json", resume=True)
    write_config(place / "tiny.json")
    (place / "data" / "0.txt").write_text("something else")
    refuse(moba, place, 2, "--data: expected", resume=True)


def test_nonfinite_loss_stops_the_run(place, train, moba):
    train(steps=4, save_every=2)
    done = moba(*arguments(place, steps=12, save_every=2, resume=True, lr=1e30, clip=0))
    message = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 1
    assert "step 6: expected a finite loss and gradient" in message
    assert "the last checkpoint is" in message and message.endswith("step-00000004")
    assert log_of(place / "run")[-1]["step"] == 5


@pytest.mark.parametrize(
    "matrix, culprit",
    [
        ("model.layers.1.mlp.down_proj.weight", "the output of layer 1's MLP"),
        ("model.layers.0.self_attn.o_proj.weight", "the output of layer 0's attention"),
        ("model.norm.weight", "the logits"),
    ],
)
def test_first_nonfinite_layer_is_named(matrix, culprit, place, train, moba):
    train("start", steps=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "start")
    with torch.no_grad():
        dict(model.named_parameters())[matrix].fill_(math.inf)
    model.save_pretrained(place / "start" / "last")
    refuse(
        moba,
        place,
        1,
        "step 1: expected a finite loss",
        f"{culprit} is the first that is not finite",
        "no checkpoint was saved",
        config=None,
        model=place / "start",
    )


def test_full_disk_keeps_the_last_checkpoint(place, train, build_folder):
    """Let writes fail beyond a size that the weights of a checkpoint exceed."""
    flags = dict(save_every=4, lr_schedule="constant", warmup=0)
    whole = train("whole", steps=8, **flags)
    train(steps=4, **flags)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))

    command = [build_folder / "moba", *arguments(place, steps=8, resume=True, **flags)]
    done = subprocess.run(command, capture_output=True, preexec_fn=limit)
    assert done.returncode == 1
    assert b"model.safetensors: expected a writable file, got File too large" in done.stderr
    assert sorted(path.name for path in (place / "run").glob("step-*")) == ["step-00000004"]
    assert exact(train(steps=8, resume=True, **flags)) == exact(whole)
