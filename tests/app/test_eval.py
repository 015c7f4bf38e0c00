"""`moba eval`: losses against `transformers`, the JSON of each evaluation, and refusals."""

import contextlib
import json
import math
import re
import struct

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SEQ_LEN = 96
BLOCKS = ["--moba-chunk-size", 16, "--moba-topk", 3, "--moba-sink", 0]


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    """A small random model whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=264,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.1,
        )
    )
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(byte_characters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def byte_characters():
    """Return the character of byte i in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


@pytest.fixture(scope="module")
def text():
    random = np.random.default_rng(0)
    lines = [
        " ".join("".join(map(chr, random.integers(97, 123, 5))) for _ in range(8))
        for _ in range(400)
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text(text[: 3 * SEQ_LEN + 20])
    (folder / "b.txt").write_text(text[5000 : 5000 + SEQ_LEN // 2])
    (folder / "binary").write_bytes(b"\0\1")
    (folder / ".hidden").write_text(text)
    return folder


def evaluate(moba, *arguments, dtype="f32"):
    done = moba("eval", *arguments, "--dtype", dtype, "-o", "json", "-t", 2)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:])


def wilson(found, tried):
    p, z = found / tried, 1.959963984540054
    centre, half = (
        p + z * z / (2 * tried),
        z * math.sqrt(p * (1 - p) / tried + z * z / (4 * tried * tried)),
    )
    return [(centre - half) / (1 + z * z / tried), (centre + half) / (1 + z * z / tried)]


# ---------------------------------------------------------------- loss


def sequences_of(data):
    """Return the bytes of the files, cut into sequences."""
    for name in ("a.txt", "b.txt"):
        ids = list((data / name).read_bytes())
        yield from (ids[i : i + SEQ_LEN] for i in range(0, len(ids), SEQ_LEN))


def losses_of(logits, ids):
    return torch.nn.functional.cross_entropy(
        torch.as_tensor(logits)[:-1], torch.as_tensor(ids)[1:], reduction="none"
    )


@pytest.fixture(scope="module")
def loss_report(moba, byte_model, data, tmp_path_factory):
    png = tmp_path_factory.mktemp("png") / "loss.png"
    report = evaluate(
        moba,
        "loss",
        "-m",
        byte_model,
        "--data",
        data,
        "--seq-len",
        SEQ_LEN,
        "--trailing",
        24,
        "--buckets",
        4,
        "--png",
        png,
        *BLOCKS,
    )
    width, height = png_size(png)
    assert width > height > 400
    return report


def check_losses(report, losses):
    everything = torch.cat(losses).double()
    assert report["loss"] == pytest.approx(everything.mean().item(), rel=1e-5)
    assert report["perplexity"] == pytest.approx(math.exp(everything.mean()), rel=1e-4)
    assert report["tokens"] == len(everything)
    assert report["low"] <= report["loss"] <= report["high"]
    tails = torch.cat([sequence[-24:] for sequence in losses if len(sequence) == SEQ_LEN - 1])
    assert report["trailing"]["loss"] == pytest.approx(tails.double().mean().item(), rel=1e-5)
    assert report["trailing"]["tokens"] == 72
    for part, of_sequences in ((report, losses), (report["trailing"], tails.split(24))):
        reported = sorted(
            (sequence["loss"], sequence["tokens"]) for sequence in part["by_sequence"]
        )
        expected = sorted((s.double().mean().item(), len(s)) for s in of_sequences)
        assert reported == [(pytest.approx(loss, rel=1e-5), tokens) for loss, tokens in expected]
    for i, bucket in enumerate(report["positions"]):
        assert [bucket["from"], bucket["to"]] == [24 * i, 24 * i + 24]
        inside = torch.cat([sequence[max(24 * i - 1, 0) : 24 * i + 23] for sequence in losses])
        assert bucket["tokens"] == len(inside)
        assert bucket["loss"] == pytest.approx(inside.double().mean().item(), rel=1e-5)


def test_full_losses_equal_transformers(loss_report, byte_model, data):
    model = transformers.AutoModelForCausalLM.from_pretrained(byte_model)
    with torch.no_grad():
        losses = [
            losses_of(model(torch.tensor([ids])).logits[0], ids) for ids in sequences_of(data)
        ]
    assert loss_report["sequences"] == 5 and loss_report["full_sequences"] == 3
    full, sparse = loss_report["by_attn"]
    assert [full["attn"], sparse["attn"]] == ["full", "moba"]
    check_losses(full, losses)


def test_moba_losses_equal_those_of_its_logits(loss_report, byte_model, data, logits_of):
    flags = dict(attn="moba", block_size=16, top_k=3, sink=0, full_tail=0)
    losses = [losses_of(logits_of(byte_model, ids, **flags), ids) for ids in sequences_of(data)]
    check_losses(loss_report["by_attn"][1], losses)


def test_divergence_and_agreement_equal_those_of_the_logits(
    loss_report, byte_model, data, logits_of
):
    flags = dict(block_size=16, top_k=3, sink=0, full_tail=0)
    divergences, agreements = [], []
    for ids in sequences_of(data):
        full, sparse = (
            torch.as_tensor(logits_of(byte_model, ids, attn=attn, **flags))[:-1]
            .double()
            .log_softmax(-1)
            for attn in ("full", "moba")
        )
        divergence = torch.nn.functional.kl_div(sparse, full, reduction="none", log_target=True)
        divergences.append(divergence.sum(-1))
        agreements.append((full.argmax(-1) == sparse.argmax(-1)).double())
    full, sparse = loss_report["by_attn"]
    assert full["kl"]["kl"] == 0 and full["top1_agreement"]["agreement"] == 1
    assert sparse["kl"]["kl"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-3)
    assert sparse["kl"]["kl"] > 1e-4
    agreement = torch.cat(agreements).mean().item()
    assert sparse["top1_agreement"]["agreement"] == pytest.approx(agreement, abs=1e-9)


def test_oracle_selects_the_blocks_of_the_most_mass(moba, byte_model, data, loss_report):
    flags = [
        "-m",
        byte_model,
        "--data",
        data,
        "--seq-len",
        SEQ_LEN,
        "--attn",
        "full,oracle",
        *BLOCKS,
    ]
    report = evaluate(moba, "loss", *flags)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        byte_model, attn_implementation="eager"
    )
    losses = []
    for ids in sequences_of(data):
        with torch.no_grad(), oracle_attention(block=16, top_k=3):
            losses.append(losses_of(model(torch.tensor([ids])).logits[0], ids))
    oracle = report["by_attn"][1]
    assert oracle["loss"] == pytest.approx(torch.cat(losses).double().mean().item(), rel=1e-5)
    assert oracle["kl"]["kl"] < loss_report["by_attn"][1]["kl"]["kl"]


@contextlib.contextmanager
def oracle_attention(block, top_k):
    """Make eager attention of transformers attend to the own block and the best others, by their share of the softmax."""
    softmax = torch.nn.functional.softmax

    def softmax_over_best(scores, dim=-1, dtype=None):
        probabilities = softmax(scores, dim=dim, dtype=torch.float64)
        tokens = scores.shape[-1]
        blocks = -(-tokens // block)
        mass = torch.nn.functional.pad(probabilities, (0, blocks * block - tokens))
        mass = mass.unflatten(-1, (blocks, block)).sum(-1)
        own = torch.arange(tokens) // block
        mass[..., torch.arange(tokens), own] = 2
        best = mass.topk(min(top_k, blocks), -1).indices
        selected = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, best, True)
        selected = selected.repeat_interleave(block, -1)[..., :tokens]
        return softmax(scores.masked_fill(~selected, float("-inf")), dim=dim, dtype=dtype)

    torch.nn.functional.softmax = softmax_over_best
    try:
        yield
    finally:
        torch.nn.functional.softmax = softmax


def test_lm_eval_results_have_its_layout(moba, byte_model, data, loss_report):
    done = moba("eval", "loss", "-m", byte_model, "--data", data, "--seq-len", SEQ_LEN, "--trailing", 24,
                "--dtype", "f32", "-o", "lm-eval", *BLOCKS)  # fmt: skip
    found = json.loads(done.stdout)
    tasks = ["moba_loss_full", "moba_loss_moba"]
    for member in ("results", "versions", "n-shot", "higher_is_better", "n-samples"):
        assert list(found[member]) == tasks
    assert found["config"]["model"] == str(byte_model) == found["model_name"]
    for task, variant in zip(tasks, loss_report["by_attn"]):
        result = found["results"][task]
        assert result["alias"] == task
        assert result["loss,none"] == pytest.approx(variant["loss"], rel=1e-5)
        means = [s["loss"] for s in variant["by_sequence"]]
        error = np.sqrt(sum((m - variant["loss"]) ** 2 for m in means) / 4 / 5)
        assert result["loss_stderr,none"] == pytest.approx(error, rel=1e-4)
        assert result["top1_agreement,none"] == variant["top1_agreement"]["agreement"]
        assert found["higher_is_better"][task]["top1_agreement"] is True
        assert found["n-samples"][task] == {"original": 5, "effective": 5}


def test_differences_equal_those_of_the_losses(loss_report):
    full, sparse = loss_report["by_attn"]
    (difference,) = loss_report["differences"]
    assert [difference["attn"], difference["against"]] == ["moba", "full"]
    assert difference["loss"] == pytest.approx(sparse["loss"] - full["loss"], abs=1e-9)
    assert difference["relative"] == pytest.approx(difference["loss"] / full["loss"])
    assert difference["low"] <= difference["loss"] <= difference["high"]
    trailing = sparse["trailing"]["loss"] - full["trailing"]["loss"]
    assert difference["trailing"]["loss"] == pytest.approx(trailing, abs=1e-9)


def test_selecting_every_block_equals_full_attention(moba, byte_model, data):
    report = evaluate(
        moba,
        "loss",
        "-m",
        byte_model,
        "--data",
        data,
        "--seq-len",
        SEQ_LEN,
        "--moba-chunk-size",
        16,
        "--moba-topk",
        6,
    )
    assert abs(report["differences"][0]["loss"]) < 1e-5


def test_rounded_caches_change_the_loss_little(moba, byte_model, data, loss_report):
    flags = ["--data", data, "--seq-len", SEQ_LEN, "--attn", "full"]
    exact = loss_report["by_attn"][0]["loss"]
    assert [loss_report[key] for key in ("dtype", "kv_dtype")] == ["f32", "f32"]
    for dtype, kv_dtype in [("f32", "i8"), ("f16", "bf16"), ("auto", "f16")]:
        report = evaluate(
            moba, "loss", "-m", byte_model, *flags, "--kv-dtype", kv_dtype, dtype=dtype
        )
        assert report["kv_dtype"] == kv_dtype and report["dtype"] in ("f32", "bf16", "f16")
        assert report["requested"] == {"dtype": dtype, "kv_dtype": kv_dtype}
        assert 0 < abs(report["by_attn"][0]["loss"] - exact) < 0.02 * exact


def test_one_sequence_has_no_interval(moba, byte_model, data):
    report = evaluate(
        moba,
        "loss",
        "-m",
        byte_model,
        "--data",
        data / "b.txt",
        "--seq-len",
        SEQ_LEN,
        "--attn",
        "full",
    )
    (full,) = report["by_attn"]
    assert full["low"] is None and full["trailing"] is None and report["differences"] == []


def test_joined_documents_fill_the_sequences(moba, byte_model, data):
    report = evaluate(
        moba,
        "loss",
        "-m",
        byte_model,
        "--data",
        data,
        "--seq-len",
        SEQ_LEN,
        "--join",
        "--attn",
        "full",
        "--max-tokens",
        2 * SEQ_LEN,
        "--trailing",
        "0.25",
    )
    assert report["sequences"] == report["full_sequences"] == 2 and report["trailing_tokens"] == 24


def test_loss_table_has_differences_and_buckets(moba, byte_model, data):
    done = moba(
        "eval",
        "loss",
        "-m",
        byte_model,
        "--data",
        data,
        "--seq-len",
        SEQ_LEN,
        "--buckets",
        3,
        *BLOCKS,
    )
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0 and done.stderr == b""
    assert lines[0] == "5 sequences of up to 96 tokens, 3 full; 351 tokens predicted"
    assert any(line.startswith("moba against full: loss ") for line in lines)
    assert any(line.startswith("moba against full: KL divergence ") for line in lines)
    assert re.match(r" +64-95 +\d+ +\d\.\d{4} +\d\.\d{4}$", lines[-1])


# ---------------------------------------------------------------- needle


def check_cells(report, key):
    for cell in report["cells"]:
        samples = cell["samples"]
        assert cell["tried"] == len(samples)
        assert cell[key] == pytest.approx(
            np.mean([s["found" if key == "accuracy" else "score"] for s in samples])
        )
    for variant in report["by_attn"]:
        cells = [cell for cell in report["cells"] if cell["attn"] == variant["attn"]]
        tried = sum(cell["tried"] for cell in cells)
        found = sum(cell["tried"] * cell[key] for cell in cells)
        assert variant["tried"] == tried and variant[key] == pytest.approx(found / tried)
        assert [variant["low"], variant["high"]] == pytest.approx(wilson(found, tried), abs=1e-9)
    assert report[key] == pytest.approx(
        np.average(
            [w[key] for w in report["by_attn"]], weights=[w["tried"] for w in report["by_attn"]]
        )
    )


@pytest.fixture(scope="module")
def haystack(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("haystack") / "text.txt"
    file.write_text(text)
    return file


def needle(moba, model, haystack, *flags):
    return evaluate(moba, "needle", "-m", model, "--data", haystack, *flags)


def test_needle_json_has_every_case(moba, byte_model, haystack, tmp_path):
    png = tmp_path / "needle.png"
    report = needle(
        moba,
        byte_model,
        haystack,
        "--lengths",
        "1k,512",
        "--depths",
        3,
        "--per-cell",
        2,
        "--seed",
        5,
        "--digits",
        5,
        "-n",
        12,
        "--png",
        png,
        *BLOCKS,
        "--moba-full-tail",
        0,
    )
    assert (
        report["task"] == "needle"
        and report["seed"] == 5
        and report["complete"]
        and not report["chat"]
    )
    assert str(haystack) in report["haystack"] and report["digits"] == 5
    assert report["settings"][1] == {
        "attn": "moba",
        "decode": "full",
        "moba_chunk_size": 16,
        "moba_topk": 3,
        "moba_sink": 0,
        "moba_full_tail": 0,
        "moba_full_layers": [],
    }
    places = [(cell["attn"], cell["length"], cell["depth"]) for cell in report["cells"]]
    assert places == [(a, n, d) for a in ("full", "moba") for n in (512, 1024) for d in (0, 0.5, 1)]
    for cell in report["cells"]:
        for sample in cell["samples"]:
            assert cell["length"] - 40 <= sample["tokens"] <= cell["length"] - 12
            assert re.fullmatch(r"[a-z]+-[a-z]+", sample["key"]) and re.fullmatch(
                r"[1-9]\d{4}", sample["value"]
            )
            numbers = re.findall(r"\d+", sample["answer"])
            assert sample["found"] == (numbers[:1] == [sample["value"]])
    check_cells(report, "accuracy")
    # Both attention variants get the same questions.
    half = len(report["cells"]) // 2
    for full, sparse in zip(report["cells"][:half], report["cells"][half:]):
        assert [s["value"] for s in full["samples"]] == [s["value"] for s in sparse["samples"]]
    width, height = png_size(png)
    assert width > 400 and height > 200


def test_needle_is_reproducible(moba, byte_model, haystack):
    def samples(*flags):
        report = needle(
            moba,
            byte_model,
            haystack,
            "--lengths",
            512,
            "--depths",
            4,
            "-n",
            8,
            "--attn",
            "moba",
            *BLOCKS,
            *flags,
        )
        return [
            (s["key"], s["value"], s["answer"]) for cell in report["cells"] for s in cell["samples"]
        ]

    first = samples()
    assert first == samples() and first != samples("--seed", 1)


def test_shared_prefixes_do_not_change_answers(moba, byte_model, haystack):
    """Check that depths that share a prefix give the results of each depth alone."""

    def answers(depths):
        report = needle(
            moba,
            byte_model,
            haystack,
            "--lengths",
            700,
            "--depths",
            depths,
            "-n",
            10,
            "--attn",
            "moba",
            *BLOCKS,
            "--moba-full-tail",
            20,
        )
        return {cell["depth"]: cell["samples"] for cell in report["cells"]}

    assert answers(3)[0.5] == answers(1)[0.5]


def test_smollm2_finds_the_needles(moba, smollm2, tmp_path):
    report = evaluate(
        moba,
        "needle",
        "-m",
        smollm2,
        "--lengths",
        512,
        "--depths",
        2,
        "--attn",
        "moba",
        "--moba-chunk-size",
        64,
    )
    assert (
        report["chat"]
        and report["accuracy"] == 1
        and "Python's standard library" in report["haystack"]
    )
    assert report["question_template"] == "What is the magic number of {key}?"


# ---------------------------------------------------------------- ruler


def test_ruler_json_has_every_case(moba, byte_model, haystack, tmp_path):
    png = tmp_path / "ruler.png"
    report = evaluate(
        moba,
        "ruler",
        "-m",
        byte_model,
        "--data",
        haystack,
        "--tasks",
        "niah_multivalue,vt,fwe",
        "--lengths",
        "2k",
        "--samples",
        2,
        "--png",
        png,
        *BLOCKS,
    )
    assert [(c["attn"], c["task"], c["length"]) for c in report["cells"]] == [
        (a, task, 2048) for task in ("niah_multivalue", "vt", "fwe") for a in ("full", "moba")
    ]
    for cell in report["cells"]:
        assert cell["low"] <= cell["score"] <= cell["high"]
        for sample in cell["samples"]:
            answer = sample["answer"].lower()
            contained = [expected.lower() in answer for expected in sample["expected"]]
            assert sample["score"] == pytest.approx(np.mean(contained))
            assert sample["tokens"] <= 2048
    check_cells(report, "score")
    assert png_size(png)[0] > 300


# ---------------------------------------------------------------- refusals

NEEDLE, LOSS, RULER = ["needle", "-m", "MODEL"], ["loss", "-m", "MODEL"], ["ruler", "-m", "MODEL"]
WRONG = {
    "nothing to do": ([], 2, ["subcommand"]),
    "unknown evaluation": (["needles"], 2, ["needles"]),
    "no model": (["needle"], 2, ["--model"]),
    "missing model": (["needle", "-m", "nowhere"], 1, ["nowhere"]),
    "attn": ([*NEEDLE, "--attn", "full,sparse"], 2, ["--attn", "sparse"]),
    "attn twice": ([*NEEDLE, "--attn", "full,full"], 2, ["--attn", "again"]),
    "topk with full": ([*NEEDLE, "--attn", "full", "--moba-topk", 0], 2, ["--moba-topk", "0"]),
    "lengths": ([*NEEDLE, "--lengths", "8q"], 2, ["--lengths", "8q"]),
    "lengths of nothing": ([*NEEDLE, "--lengths", "0"], 2, ["--lengths", "0"]),
    "lengths twice": ([*NEEDLE, "--lengths", "1k,1024"], 2, ["--lengths", "1024"]),
    "lengths too short": ([*NEEDLE, "--lengths", "64"], 2, ["--lengths", "64"]),
    "depths": ([*NEEDLE, "--depths", 0], 2, ["--depths", "0"]),
    "per cell": ([*NEEDLE, "--per-cell", 0], 2, ["--per-cell"]),
    "digits": ([*NEEDLE, "--digits", 19], 2, ["--digits", "19"]),
    "seed": ([*NEEDLE, "--seed", -1], 2, ["--seed", "-1"]),
    "needle without value": (
        [*NEEDLE, "--needle-template", "{key}"],
        2,
        ["--needle-template", "{value}"],
    ),
    "question without key": (
        [*NEEDLE, "--question-template", "What?"],
        2,
        ["--question-template", "{key}"],
    ),
    "no such data": ([*NEEDLE, "--data", "nowhere"], 1, ["--data nowhere"]),
    "too little data": ([*NEEDLE, "--data", "DATA", "--lengths", "4k"], 1, ["--data", "4096"]),
    "output": ([*NEEDLE, "-o", "xml"], 2, ["xml"]),
    "loss without data": (LOSS, 2, ["--data"]),
    "empty data": ([*LOSS, "--data", "EMPTY"], 1, ["empty"]),
    "binary data": ([*LOSS, "--data", "BINARY"], 1, ["binary"]),
    "seq-len": ([*LOSS, "--data", "DATA", "--seq-len", 1], 2, ["--seq-len", "1"]),
    "trailing": (
        [*LOSS, "--data", "DATA", "--seq-len", 64, "--trailing", 64],
        2,
        ["--trailing", "64"],
    ),
    "trailing share": ([*LOSS, "--data", "DATA", "--trailing", "1.5"], 2, ["--trailing", "1.5"]),
    "buckets": (
        [*LOSS, "--data", "DATA", "--seq-len", 64, "--buckets", 65],
        2,
        ["--buckets", "65"],
    ),
    "tail for losses": ([*LOSS, "--data", "DATA", "--moba-full-tail", 3], 2, ["--moba-full-tail"]),
    "task": ([*RULER, "--tasks", "qa_1"], 2, ["--tasks", "qa_1", "niah_single_1"]),
    "task twice": ([*RULER, "--tasks", "vt,vt"], 2, ["--tasks", "again"]),
    "ruler too short": ([*RULER, "--tasks", "cwe", "--lengths", "1k"], 2, ["--lengths", "cwe"]),
    "samples": ([*RULER, "--samples", 0], 2, ["--samples"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_arguments_are_refused(moba, byte_model, data, tmp_path, case):
    arguments, code, words = WRONG[case]
    (tmp_path / "empty").touch()
    places = {
        "MODEL": byte_model,
        "DATA": data / "a.txt",
        "EMPTY": tmp_path / "empty",
        "BINARY": data / "binary",
    }
    done = moba("eval", *[places.get(a, a) for a in arguments])
    error = [
        line
        for line in done.stderr.decode().splitlines()
        if not line.startswith(("haystack: ", "note: "))
    ]
    assert done.returncode == code and done.stdout == b"", error
    assert len(error) == 1 and error[0].startswith("moba eval"), error
    for word in words:
        assert word in error[0]


def test_unwritable_picture_keeps_the_results(moba, byte_model, haystack, tmp_path):
    done = moba(
        "eval",
        "needle",
        "-m",
        byte_model,
        "--data",
        haystack,
        "--lengths",
        512,
        "--depths",
        1,
        "--png",
        tmp_path / "no" / "such.png",
    )
    assert done.returncode == 1 and b"such.png" in done.stderr
    assert done.stdout  # the results are not lost
