"""Tests of benchmarks/fidelity.py: its arithmetic, its data and its report, without the programs that it runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import fidelity  # noqa: E402
import targets  # noqa: E402


def test_relative_difference_has_an_interval():
    difference = fidelity.relative_difference([2.0, 4.0, 6.0], [1.0, 4.0, 5.0])
    assert difference["relative"] == pytest.approx(0.2)
    assert difference["low"] == pytest.approx(0) and difference["high"] == pytest.approx(
        1
    )  # only the second, only the first
    same = fidelity.relative_difference([1.5, 2.5], [1.5, 2.5])
    assert same == {"relative": 0, "low": 0, "high": 0}
    with pytest.raises(
        ValueError, match=r"theirs: expected 1 losses \(those of the same sequences\), got 2"
    ):
        fidelity.relative_difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize("width", (1, 3, 7, 99))
def test_smoothed_averages_the_last_steps(width):
    values = np.arange(12.0) ** 2
    for i, value in enumerate(fidelity.smoothed(values, width)):
        assert value == pytest.approx(values[max(0, i - width + 1) : i + 1].mean())


def test_switch_compares_the_losses_around_it():
    losses = {
        "full": [5.0] * 16 + [5.0, 4.0, 2.0, 2.0],
        "MoBA": [5.0] * 16 + [5.0, 4.4, 2.2, 2.4],
        "hybrid": [5.0] * 16 + [5.0, 4.4, 2.1, 2.0],
    }
    switch = fidelity.switch_of(losses)
    assert switch["before"] == pytest.approx(0.4 / 9)
    assert switch["first"] == pytest.approx(2.1 / 2.2 - 1)
    assert switch["after"] == pytest.approx(0.1 / 4)


def test_blocks_are_equally_sparse():
    assert {fidelity.sparsity(blocks) for blocks in fidelity.EQUAL_SPARSITY} == {0.9375}
    assert fidelity.BLOCKS in fidelity.EQUAL_SPARSITY


def test_last_layers_are_a_range():
    assert fidelity.last_layers(1, 4) == "3-3" and fidelity.last_layers(3, 4) == "1-3"


def test_outline_is_definitions_of_functions_and_classes():
    text = "import a\nclass A(B):\n    def f(self): pass\n\n    async def g(self):\n        define = 1\n# def no\ndef h():\n"
    assert fidelity.outline(text) == [
        "class A(B):",
        "def f(self): pass",
        "async def g(self):",
        "def h():",
    ]


def test_neighbouring_documents_are_joined_without_seen_paragraphs():
    assert fidelity.neighbours(["aa", "b", "ccc", "d"], 3) == ["aa\n\nb", "ccc"]
    assert fidelity.without("one\n\ntwo\n\nthree", {"two"}) == "one\n\nthree"


def test_json_has_lists_of_numbers_on_one_line():
    results = {"a": {"b": [1.5, 2, None, 1 / 3], "c": []}, "d": [{"e": [1]}]}
    text = fidelity.dumped(results)
    assert '"b": [ 1.5, 2, null, 0.333333 ]' in text
    assert json.loads(text) == results | {"a": {"b": [1.5, 2, None, 0.333333], "c": []}}


def evaluation(loss):
    part = {"loss": loss, "low": loss - 0.1, "high": loss + 0.1, "by_sequence": [loss] * 3}
    return part | {"trailing": part, "positions": [loss] * fidelity.BUCKETS}


def run(loss):
    return {
        "losses": [loss] * fidelity.STEPS,
        "evaluation": {"full": evaluation(loss), "moba": evaluation(loss)},
    }


@pytest.fixture
def results():
    of = {"full": 4.0, "MoBA": 4.01, "hybrid": 4.016}
    return {
        "commands": ["python benchmarks/fidelity.py"],
        "machine": "a machine",
        "date": "2026-01-02",
        "threads": 1,
        "sizes": {size: {mode: run(loss) for mode, loss in of.items()} for size in fidelity.SIZES},
        "blocks": {"512x1": run(4.4)},
        "layers": {"before": run(6.0), "0": run(3.3), "3": run(3.0)},
        "longer": {mode: run(loss) for mode, loss in (of | {"512x1": 3.96}).items()},
        "seeds": {"full": run(4.04), "MoBA": run(4.0)},
        "needle": {
            "by_attn": [{"attn": "full", "found": 3, "tried": 4}],
            "cells": [
                {"attn": "full", "length": n, "depth": d, "found": n == 4096 or d, "tried": 1}
                for n in (4096, 8192)
                for d in (0, 1)
            ],
        },
    }


def test_targets_are_judged(results):
    found = {what: rest for what, *rest in targets.fidelity_targets(results)}
    moba, hybrid = (
        "MoBA's loss against full attention's, small",
        "the hybrid's trailing loss against full attention's, small",
    )
    assert found[moba] == ["<= 0.5%", "+0.250%", True]
    assert found[hybrid] == ["<= 0.3%", "+0.400%", False]
    assert len(found) == 2 * len(fidelity.SIZES)


def test_report_has_tables_of_every_stage(results):
    text = fidelity.markdown(results)
    assert "target" not in text.lower()
    assert "own block only: 3.9600, to full attention -1.00%" in text
    assert "| 512, 1: nothing to select | 4.4000 | +10.00% (+10.00% to +10.00%) |" in text
    assert "| 0 | 3.3000 | +10.00%" in text and "| 3 | 3.0000 | +0.00%" in text
    assert "| MoBA | -0.25%" in text and "With this seed MoBA to full attention: -0.99%" in text
    assert "| full | 2 | 1 | 3 of 4 |" in text


def test_report_of_an_unfinished_run_has_no_tables(results):
    begun = {key: results[key] for key in ("commands", "machine", "date", "threads")} | {
        "sizes": {"small": {"full": run(4.0)}}
    }
    assert "##" not in fidelity.markdown(begun)


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--only", "sizes,shapes"], "got shapes"),
        (["--work", "/"], "--work: expected a new folder, or --continue, got the existing /"),
    ),
)
def test_invalid_flags_are_refused(arguments, message):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/fidelity.py", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
