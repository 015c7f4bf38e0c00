"""`moba calibrate`, and the calibration in the subcommands that run a model."""

import json
import signal
import subprocess
import time

import numpy as np
import pytest
from byte_model import save_byte_model

LAYERS = 4
SIZES = dict(
    hidden_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    initializer_range=0.15,
)
FLAGS = ["--seq-len", 256, "--sequences", 2, "--held-out", 1, "--blocks", "8,16", "--keys", "32,64",
         "--tail", 64, "--moba-full-tail", 16, "--dtype", "f32", "-t", 1]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_byte_model(tmp_path_factory.mktemp("model"), **SIZES)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    return save_byte_model(folder, **(SIZES | {"initializer_range": 0.2}))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    random = np.random.default_rng(0)
    text = " ".join("".join(map(chr, random.integers(97, 123, 5))) for _ in range(400))
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def calibration(moba, model, data, tmp_path_factory):
    """A calibration within a generous budget, and what was printed."""
    folder = tmp_path_factory.mktemp("calibration")
    file = folder / "model.moba.json"
    done = moba("calibrate", "-m", model, "--data", data, "--budget", "5%", "-o", file,
                "--png", folder / "frontier.png", *FLAGS)  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in folder.iterdir()) == ["frontier.png", "model.moba.json"]
    return file, done.stdout.decode()


def evaluate(moba, model, data, *flags):
    done = moba("eval", "loss", "-m", model, "--data", data, "--seq-len", 256, "--join", "--dtype", "f32",
                "-t", 1, "-o", "json", *flags)  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def uniform(**layer):
    return {"attention": "moba", "block_size": 16, "top_k": 3, "sink": 1} | layer


def written(path, calibration, **changes):
    path.write_text(json.dumps(json.loads(calibration[0].read_text()) | changes))
    return path


def test_calibration_keeps_the_budget_with_less_work(calibration):
    document = json.loads(calibration[0].read_text())
    assert document["format"] == "moba calibration" and document["version"] == 1
    assert len(document["layers"]) == LAYERS and document["full_tail"] == 16
    measured = document["measured"]
    assert measured["budget"] == 0.05
    frontier = measured["frontier"]
    assert [row["speed_up"] for row in frontier] == sorted(row["speed_up"] for row in frontier)
    kept = [row for row in frontier if row["loss_increase"] <= 0.05]
    full, chosen = measured["held_out"][:2]
    assert full["attention"] == "full" and full["kl"] == 0 and full["top1_agreement"] == 1
    assert chosen["speed_up"] == pytest.approx(kept[-1]["speed_up"])
    assert chosen["loss_increase"] == pytest.approx(chosen["loss"] / full["loss"] - 1)
    assert chosen["kl"] > 0
    for layer in document["layers"]:
        if layer["attention"] == "moba":
            assert layer["block_size"] in (8, 16) and layer["sink"] in (0, 1)
            assert layer["block_size"] * layer["top_k"] in (32, 64)
    assert "held-out texts" in calibration[1] and f"{calibration[0]}: written" in calibration[1]


def test_speed_up_chooses_less_work_whatever_the_loss(moba, model, data, tmp_path):
    file = tmp_path / "fast.moba.json"
    done = moba("calibrate", "-m", model, "--data", data, "--speed-up", "2.5x", "--budget", "0%", "-o", file,
                *FLAGS)  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    chosen = json.loads(file.read_text())["measured"]["held_out"][1]
    assert chosen["speed_up"] >= 2.5
    assert ("more than --budget 0%" in done.stdout.decode()) == (chosen["loss_increase"] > 0)


def test_interrupted_run_goes_on(moba, build_folder, model, data, calibration, tmp_path):
    file = tmp_path / "again.moba.json"
    command = ["calibrate", "-m", model, "--data", data, "--budget", "5%", "-o", file, *FLAGS]
    process = subprocess.Popen(
        [build_folder / "moba", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    part = tmp_path / "again.moba.json.part"
    while process.poll() is None and not part.exists():
        time.sleep(0.01)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=100)[1].decode()
    if process.returncode == 130:  # else it was done before
        assert error.count("\n") == 1 and "goes on from" in error and not file.exists()
        assert part.exists()
    done = moba(*command)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(file.read_text()) == json.loads(calibration[0].read_text())
    assert not part.exists()


def test_equal_layers_are_those_of_the_flags(moba, model, data, calibration, tmp_path):
    file = written(tmp_path / "x.json", calibration, layers=[uniform()] * LAYERS)
    flags = ["--moba-chunk-size", 16, "--moba-topk", 3, "--moba-sink", 1]
    expected = evaluate(moba, model, data, *flags)
    found = evaluate(moba, model, data, "--calibration", file)
    assert found["by_attn"][1]["loss"] == expected["by_attn"][1]["loss"]
    full = written(tmp_path / "full.json", calibration, layers=[{"attention": "full"}] * LAYERS)
    assert evaluate(moba, model, data, "--calibration", full)["differences"][0]["loss"] == 0


def test_different_layers_are_those_of_their_layers(moba, model, data, calibration, tmp_path):
    layers = [uniform(), {"attention": "full"}, uniform(), {"attention": "full"}]
    file = written(tmp_path / "x.json", calibration, layers=layers)
    flags = [
        "--moba-chunk-size",
        16,
        "--moba-topk",
        3,
        "--moba-sink",
        1,
        "--moba-full-layers",
        "1,3",
    ]
    expected = evaluate(moba, model, data, *flags)["by_attn"][1]["loss"]
    assert evaluate(moba, model, data, "--calibration", file)["by_attn"][1]["loss"] == expected
    layers[2] = uniform(block_size=8, top_k=4)
    file = written(tmp_path / "y.json", calibration, layers=layers)
    assert evaluate(moba, model, data, "--calibration", file)["by_attn"][1]["loss"] != expected


def generate(moba, model, data, *flags):
    done = moba("generate", "-m", model, "-f", data, "--no-chat", "-n", 4, "--ignore-eos", "--json",
                "--dtype", "f32", "-t", 1, *flags)  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_generate_uses_the_calibration_beside_the_model(moba, data, calibration, tmp_path):
    folder = save_byte_model(tmp_path / "model", **SIZES)
    file = written(
        folder / "model.moba.json", calibration, layers=[uniform(), uniform(block_size=8)] * 2
    )
    found = generate(moba, folder, data)
    settings = found["settings"]
    assert settings["attn"] == "moba" and settings["attn_reason"] == "calibrated for MoBA"
    assert settings["calibration"] == str(file) and "moba_topk" not in settings
    assert settings["moba_full_tail"] == 16
    asked = generate(moba, folder, data, "--attn", "moba", "--calibration", file)
    assert asked["generated_ids"] == found["generated_ids"]
    assert generate(moba, folder, data, "--moba-topk", 3)["settings"]["attn"] == "full"
    assert generate(moba, folder, data, "--attn", "full")["settings"]["attn"] == "full"


def test_other_subcommands_take_a_calibration(moba, model, data, calibration, tmp_path):
    file = written(tmp_path / "x.json", calibration, layers=[uniform(), uniform(block_size=32)] * 2)
    page = tmp_path / "page.html"
    done = moba(
        "inspect", "-m", model, "-f", data, "--calibration", file, "-o", page, "--dtype", "f32"
    )
    assert done.returncode == 0, done.stderr.decode()
    assert '"calibrated":true' in page.read_text()
    done = moba(
        "bench", "-m", model, "-p", 512, "-n", 0, "-r", 1, "--calibration", file, "-o", "json"
    )
    assert done.returncode == 0, done.stderr.decode()
    assert f'"calibration": "{file}"' in done.stdout.decode()


WRONG = {
    "another model": (["OTHER"], "fingerprint: expected that of OTHER, got that of another"),
    "flag beside it": (
        ["MODEL", "--moba-topk", 3],
        "--moba-topk: has no effect with --calibration",
    ),
}


@pytest.mark.parametrize("subcommand", ("generate", "serve", "eval", "inspect", "bench"))
@pytest.mark.parametrize("case", WRONG)
def test_wrong_calibrations_are_refused(moba, model, other, data, calibration, subcommand, case):
    flags, error = WRONG[case]
    places = {"MODEL": model, "OTHER": other}
    command = {
        "generate": ["generate", "-p", "x"],
        "serve": ["serve", "--port", 0],
        "eval": ["eval", "loss", "--data", data],
        "inspect": ["inspect", "-p", "x"],
        "bench": ["bench"],
    }[subcommand]
    done = moba(*command, "-m", *[places.get(f, f) for f in flags], "--calibration", calibration[0])
    message = done.stderr.decode()
    assert done.returncode in (1, 2) and done.stdout == b"" and message.count("\n") == 1, message
    assert error.replace("OTHER", str(other)) in message


REFUSED = {
    "budget": (["--budget", "1"], "--budget: expected 0% to 1000%, got '1'"),
    "speed-up": (["--speed-up", "0.5x"], "--speed-up: expected 1x to 1000000x, got '0.5x'"),
    "tail": (["--tail", 200], "--tail: expected 1 to 128, half of --seq-len, got 200"),
    "blocks": (["--blocks", 64, "--keys", 64], "--blocks: expected a block that goes twice into"),
    "texts too short": (
        ["--held-out", 20],
        "DATA: expected at least 5632 tokens of text (22 sequences",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_arguments_are_refused(moba, model, data, tmp_path, case):
    flags, error = REFUSED[case]
    # The last of two equal flags is not taken, so the changed ones are left out.
    kept = [f for pair in zip(FLAGS[::2], FLAGS[1::2]) if pair[0] not in flags for f in pair]
    done = moba("calibrate", "-m", model, "--data", data, "-o", tmp_path / "x.json", *kept, *flags)
    message = done.stderr.decode()
    assert done.returncode in (1, 2) and done.stdout == b"" and message.count("\n") == 1, message
    assert error.replace("DATA", str(data)) in message and not list(tmp_path.iterdir())
