"""The code of docs/pytorch.md, and the example."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from random_models import build

ROOT = Path(__file__).parents[2]


def test_every_recipe_runs(capsys):
    sections = re.split(r"^## ", (ROOT / "docs" / "pytorch.md").read_text(), flags=re.MULTILINE)
    names, run = {}, []
    for section in sections:
        for code in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
            exec(compile(code, section.splitlines()[0], "exec"), names)
            run.append(section.splitlines()[0])
    assert set(run) == {
        "Use",
        "Several models",
        "Train",
        "Hybrid layers",
        "Sparse decode",
        "Inspect routing",
        "Any gate",
    }
    assert "layer 3: the last token's heads select blocks" in capsys.readouterr().out


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = {word: i for i, word in enumerate("<unk> <s> How long is the letter ?".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<s>"
    ).save_pretrained(folder)
    build("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("implementation", ("sdpa", "moba", "moba_naive"))
def test_example_generates(model_folder, implementation):
    command = [
        sys.executable,
        ROOT / "examples" / "llama.py",
        "--model",
        model_folder,
        "--attn",
        implementation,
        "--moba-chunk-size",
        "4",
        "--moba-topk",
        "2",
        "--prompt",
        "How long is the letter ?",
        "--tokens",
        "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "x", "--moba-topk", "0"], "moba_topk: expected at least 1, got 0"),
        (["--model", "./no/such"], "--model ./no/such: "),
    ],
)
def test_example_names_invalid_arguments(arguments, message):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "llama.py", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
