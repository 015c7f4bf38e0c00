"""models/needle-2m, which was trained with MoBA, finds a fact in real text: with `moba generate` and with transformers."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = Path(__file__).resolve().parents[2] / "models/needle-2m"
FACT = "The magic number of velvet-harbor is 40718."
QUESTION = "What is the magic number of velvet-harbor?\nThe magic number of velvet-harbor is"


@pytest.fixture(scope="module")
def prompt():
    text = Path(argparse.__file__).read_text(encoding="utf-8")[:18_000]
    place = text.rindex("\n", 0, 7_000) + 1
    return f"{text[:place]}{FACT}\n{text[place:]}\n{QUESTION}"


@pytest.mark.parametrize("flags", [["--attn", "full"], ["--attn", "moba", "--moba-topk", "8"]])
def test_generate_finds_the_fact(moba, prompt, tmp_path, flags):
    file = tmp_path / "prompt.txt"
    file.write_text(prompt, encoding="utf-8")
    done = moba("generate", "-m", MODEL, "-f", file, "-n", 8, "--no-chat", "--json", *flags)
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    assert 3_000 < len(report["prompt_ids"]) < 9_000
    assert report["text"].startswith(" 40718.")


def test_transformers_finds_the_fact(prompt):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=8, do_sample=False)[
        0, ids["input_ids"].shape[1] :
    ]
    assert tokenizer.decode(written).startswith(" 40718.")


def test_grid_is_complete_and_files_are_small():
    grid = json.loads((MODEL / "grid.json").read_text())
    assert grid["complete"] and len(grid["by_attn"]) == 2
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 12_000_000
