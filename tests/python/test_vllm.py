"""The plugin for vLLM against `moba generate` with the same settings and against vLLM's own attention, in vLLM's environment."""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import moba as package
import pytest
import torch
from builds import BUILD, ROOT, SMOLLM2, existing

ENGINE = Path(__file__).with_name("vllm_engine.py")
NEEDLE_MODEL = ROOT / "models/needle-2m"
FACT = "The magic number of velvet-harbor is 40718."
QUESTION = "What is the magic number of velvet-harbor?\nThe magic number of velvet-harbor is"
TOKENS = 12
TEXT = Path(argparse.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """Run vllm_engine.py: vllm(jobs, **environment) returns its results; the plugin is this package."""
    python = Path(os.environ.get("MOBA_VLLM_PYTHON", ROOT / "build/peers/vllm/bin/python"))
    if not python.exists():
        pytest.skip(
            f"expected an environment with vLLM, which `benchmarks/peers/install.sh vllm` makes and MOBA_VLLM_PYTHON names, got none at {python}"
        )
    plugin = tmp_path_factory.mktemp("plugin")
    metadata = Path(importlib.metadata.distribution("moba")._path)
    for part in (Path(package.__file__).parent, metadata):
        (plugin / part.name).symlink_to(part)

    def run(jobs, succeeds=True, **environment):
        out = plugin / "out.json"
        done = subprocess.run(
            [python, ENGINE, out],
            input=json.dumps(jobs),
            capture_output=True,
            text=True,
            timeout=600,
            env=os.environ
            | {
                "PYTHONPATH": str(plugin),
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            }
            | environment,
        )
        if not succeeds:
            assert done.returncode != 0
            return done.stderr
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(out.read_text())

    return run


@pytest.fixture(scope="module")
def smollm2_folder(tmp_path_factory):
    """Return SmolLM2 as a Hugging Face folder."""
    model = existing(SMOLLM2, "`make setup` fetches it, MOBA_SMOLLM2 names another place")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from model_files import hugging_face_folder

    return hugging_face_folder(tmp_path_factory.mktemp("models"), model)


@pytest.fixture(scope="module")
def generate(tmp_path_factory):
    """Return prompt and generated ids of `moba generate` in f32: generate(model, text, "--moba-topk", 3, ...)."""
    program = existing(BUILD / "moba", "`make build` makes it")
    file = tmp_path_factory.mktemp("prompts") / "prompt.txt"

    def run(model, text, *flags):
        file.write_text(text, encoding="utf-8")
        fixed = "--no-chat --ignore-eos --json --dtype f32 --kv-dtype f32".split()
        done = subprocess.run(
            [program, "generate", "-m", model, "-f", file, "-n", str(TOKENS)]
            + [*fixed, *map(str, flags)],
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr.decode()
        report = json.loads(done.stdout)
        return report["prompt_ids"], report["generated_ids"]

    return run


def job(model, rounds, **options):
    return {
        "options": {"model": str(model), "dtype": "float32", "max_model_len": 8192} | options,
        "tokens": TOKENS,
        "rounds": rounds,
    }


SETTINGS = dict(
    moba_chunk_size=128, moba_topk=3, moba_sink=1, moba_full_tail=50, moba_full_layers=[0, -1]
)
FLAGS = "--attn moba --moba-chunk-size 128 --moba-topk 3 --moba-sink 1 --moba-full-tail 50 --moba-full-layers 0,29"
SPARSE = dict(moba_chunk_size=64, moba_topk=5, moba_sink=1, moba_full_tail=0, moba_decode="moba")
SPARSE_FLAGS = (
    "--attn moba --decode moba --moba-chunk-size 64 --moba-topk 5 --moba-sink 1 --moba-full-tail 0"
)


def ids_of(answers):
    return [answer["ids"] for answer in answers]


def test_answers_are_those_of_the_program(vllm, generate, smollm2_folder):
    """Whole prompts and prompts in chunks beside decoded tokens, pages smaller and larger than blocks, a hit of the prefix
    cache, requests that are set back and read again."""
    texts = TEXT[:5000], TEXT[9000:11000], TEXT[20000:24000]
    expected = [generate(smollm2_folder, text, *FLAGS.split()) for text in texts]
    sparse = [generate(smollm2_folder, text, *SPARSE_FLAGS.split()) for text in texts]
    prompts = [ids for ids, _ in expected]
    whole, chunked, preempted = vllm(
        [
            job(
                smollm2_folder,
                [prompts, prompts[:1]],
                hf_overrides=SETTINGS,
                max_num_batched_tokens=8192,
            ),
            job(
                smollm2_folder,
                [prompts],
                additional_config={"moba": SPARSE},
                max_num_batched_tokens=300,
                block_size=32,
            ),
            job(
                smollm2_folder,
                [prompts],
                hf_overrides=SETTINGS,
                max_num_batched_tokens=512,
                num_gpu_blocks_override=sum(map(len, prompts)) // 128,
            ),
        ]
    )
    assert ids_of(whole[0]) == [ids for _, ids in expected]
    assert whole[1][0]["cached"] >= 1024 and whole[1][0]["ids"] == expected[0][1]
    assert ids_of(chunked[0]) == [ids for _, ids in sparse]
    assert ids_of(preempted[0]) == [ids for _, ids in expected]


def test_selecting_everything_is_vllms_own_attention(vllm, smollm2_folder):
    prompts = [torch.arange(700).mul(37).remainder(40000).tolist()]
    everything = dict(moba_chunk_size=64, moba_topk=1000)
    own, ours = vllm(
        [job(smollm2_folder, [prompts]), job(smollm2_folder, [prompts], hf_overrides=everything)]
    )
    assert ids_of(own[0]) == ids_of(ours[0])


def needle_prompt():
    place = TEXT.rindex("\n", 0, 7_000) + 1
    return f"{TEXT[:place]}{FACT}\n{TEXT[place:18_000]}\n{QUESTION}"


def test_two_processes_find_the_needle(vllm, generate):
    """Settings come from config.json, its top-k from the environment."""
    settings = dict(moba_chunk_size=128, moba_topk=8)
    ids, expected = generate(NEEDLE_MODEL, needle_prompt(), "--attn", "moba", "--moba-topk", 8)
    (alone,) = vllm([job(NEEDLE_MODEL, [[ids]])], MOBA_VLLM=json.dumps(settings))
    (two,) = vllm(
        [job(NEEDLE_MODEL, [[ids]], tensor_parallel_size=2)],
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        MOBA_VLLM=json.dumps(settings),
    )
    assert 3_000 < len(ids) < 9_000
    assert ids_of(alone[0]) == ids_of(two[0]) == [expected]
