"""lm-eval, PEFT and TRL with MoBA, on a small random model: docs/evaluation.md and docs/finetuning.md."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import moba
import pytest
import torch
from byte_model import save_byte_model

ROOT = Path(__file__).resolve().parents[2]


def needs(package):
    """Skip without a package of requirements.txt."""
    return pytest.importorskip(package, reason=f"{package} is missing: `make setup` installs it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    folder = save_byte_model(
        tmp_path_factory.mktemp("model"),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="~", pad_token="~"
    ).save_pretrained(folder)
    return folder


# ---- lm-eval ----

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: %s}
test_split: train
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["one", "two"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""
TEXTS = [f"Letter {n} was long, and its words were written on paper {n * 7}: " for n in range(4)]


def log_likelihood(model, text, choice):
    ids = torch.tensor([list(f"{text} {choice}".encode())])
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].log_softmax(-1)
    start = len(text.encode()) - 1
    return scores[start:].gather(1, ids[0, start + 1 :, None]).sum().item()


def test_lm_eval_scores_are_those_of_moba(folder, tmp_path):
    needs("lm_eval")
    from transformers import AutoModelForCausalLM

    (tmp_path / "letters.jsonl").write_text(
        "".join(json.dumps({"text": text.strip()}) + "\n" for text in TEXTS)
    )
    (tmp_path / "letters.yaml").write_text(TASK % (tmp_path / "letters.jsonl"))
    routing = ["--moba-chunk-size", "8", "--moba-topk", "2", "--moba-full-layers=-1"]
    model = f"pretrained={folder},attn_implementation=moba,dtype=float32,max_length=2048"
    has_ruler = importlib.util.find_spec("wonderwords") is not None  # of lm-eval[ruler]
    names = ["letters", "ruler_fwe"] if has_ruler else ["letters"]
    tasks = ["--tasks", ",".join(names), "--include_path", tmp_path, "--limit", "4"]
    command = ["moba", *routing, "-m", "lm_eval", "--model", "hf", "--model_args", model, *tasks]
    command += ["--metadata", '{"max_seq_lengths": [1024]}', "--device", "cpu", "--log_samples"]
    command += ["--gen_kwargs", "max_gen_toks=4"]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command), "--output_path", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert set(names) <= set(json.loads(results.read_text())["results"])

    (samples,) = (tmp_path / "out").rglob("samples_letters_*.jsonl")
    moba.register_moba(moba.MoBAConfig(8, 2, full_layers=(-1,)))
    moba_model, full_model = (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)
        for name in ("moba_naive", "sdpa")
    )
    for line in samples.open():
        sample = json.loads(line)
        for choice, response in zip(("one", "two"), sample["filtered_resps"]):
            text, found = sample["doc"]["text"], float(response[0])
            assert abs(found - log_likelihood(moba_model, text, choice)) < 1e-3
            assert abs(found - log_likelihood(full_model, text, choice)) > 1e-2


@pytest.mark.parametrize(
    "words, message",
    [
        (["script.py", "--moba-topk", "3"], "No such file"),
        (["--moba-topk", "3", "script.py"], "expected both or neither, got one"),
        (
            ["--moba-topk", "0", "--moba-chunk-size", "4", "x.py"],
            "moba_topk: expected at least 1, got 0",
        ),
        ([], "expected -m MODULE or a script, got neither"),
    ],
)
def test_invalid_arguments_of_the_runner(words, message):
    done = subprocess.run([sys.executable, "-m", "moba", *words], capture_output=True, text=True)
    assert done.returncode and message in done.stderr


# ---- PEFT and TRL ----


def recipes():
    text = (ROOT / "docs" / "finetuning.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_lora_and_sft_recipes(folder, tmp_path, monkeypatch):
    needs("peft")
    needs("trl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lora, sft = recipes()
    names = {
        "folder": folder,
        "adapters": tmp_path / "adapters",
        "checkpoints": tmp_path / "checkpoints",
        "rows": torch.tensor([list(text.encode()[:56]) for text in TEXTS]),
        "texts": [text * n for n in (1, 2) for text in TEXTS * 4],
    }
    exec(compile(lora, "LoRA", "exec"), names)
    assert names["losses"][-1] < names["losses"][0] - 0.1
    merged, adapted = names["again"].eval(), names["model"].eval()
    with torch.no_grad():
        expected = adapted(names["rows"]).logits
        assert merged.config._attn_implementation == "moba"
        torch.testing.assert_close(merged(names["rows"]).logits, expected, atol=1e-4, rtol=1e-4)

    exec(compile(sft, "SFT", "exec"), names)
    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.1
    config = json.loads((tmp_path / "checkpoints" / "config.json").read_text())
    assert (config["moba_chunk_size"], config["moba_topk"]) == (16, 3)
