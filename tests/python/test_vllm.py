"""The plugin for vLLM against `moba generate` with the same settings and against vLLM's own attention, in vLLM's environment."""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import moba as package
import pytest
import torch
from builds import BUILD, ROOT, SMOLLM2, existing
from moba.vllm import settings_of
from moba.vllm.batch import parts_of, runs_of

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

    def run(jobs, **environment):
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


def config_with(**attributes):
    """Return what settings_of reads of vLLM's configuration."""
    model = SimpleNamespace(hf_text_config=SimpleNamespace(**attributes))
    return SimpleNamespace(model_config=model, additional_config={})


def test_the_strongest_settings_count(monkeypatch):
    monkeypatch.delenv("MOBA_VLLM", raising=False)
    assert settings_of(config_with(hidden_size=64)) is None
    config = config_with(moba_chunk_size=128, moba_topk=3, moba_sink=1, moba_full_layers=[-1])
    assert settings_of(config) == package.MoBAConfig(128, 3, full_layers=(-1,), sink_blocks=1)
    config.additional_config = {"moba": {"moba_chunk_size": 64, "moba_topk": 5}}
    assert settings_of(config) == package.MoBAConfig(64, 5)
    monkeypatch.setenv(
        "MOBA_VLLM", '{"moba_chunk_size": 32, "moba_topk": 7, "moba_decode": "moba"}'
    )
    assert settings_of(config) == package.MoBAConfig(32, 7, decode="moba")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "MOBA_VLLM: expected a JSON object, got '{'"),
        ("[1]", r"MOBA_VLLM: expected an object of settings, got \[1\]"),
        ('{"topk": 3}', "MOBA_VLLM: expected settings among moba_chunk_size, .*, got 'topk'"),
        ('{"moba_topk": 3}', "MOBA_VLLM.moba_chunk_size: expected an int, got None"),
        (
            '{"moba_chunk_size": 64, "moba_topk": 0}',
            "MOBA_VLLM.moba_topk: expected at least 1, got 0",
        ),
    ],
)
def test_invalid_settings_are_named(monkeypatch, text, message):
    monkeypatch.setenv("MOBA_VLLM", text)
    with pytest.raises((TypeError, ValueError), match=f"^moba.vllm: {message}"):
        settings_of(config_with())


def kinds_of(config, before, length, prompt):
    """Return the attention of every token that one step reads, "m" or "f"."""
    parts = parts_of(config, [0, length - before], [length], [prompt])
    assert [part.first for part in parts] == [0, *(part.last for part in parts[:-1])]
    assert parts[-1].last == length - before and parts[-1].length == length
    return "".join(("f" if part.is_full else "m") * (part.last - part.first) for part in parts)


@pytest.mark.parametrize("decode, after", [("full", "f"), ("moba", "m")])
def test_the_position_of_a_token_decides(decode, after):
    """A prompt of 10 tokens with a full tail of 3, and 4 tokens after it, in any steps."""
    config = package.MoBAConfig(4, 2, full_tail=3, decode=decode)
    kinds = "m" * 7 + "f" * 3 + after * 4
    assert kinds_of(config, 0, 14, 10) == kinds
    for first in range(14):
        for last in range(first + 1, 15):
            assert kinds_of(config, first, last, 10) == kinds[first:last]
    assert kinds_of(package.MoBAConfig(4, 2, full_tail=30), 0, 10, 10) == "f" * 10


def test_adjacent_parts_with_one_attention_are_one_run():
    """Two decoded tokens, a chunk, a prompt with its tail, another chunk."""
    config = package.MoBAConfig(4, 2, full_tail=3)
    parts = parts_of(config, [0, 1, 2, 7, 17, 20], [31, 12, 9, 10, 23], [20, 12, 40, 10, 40])
    table = torch.arange(10, dtype=torch.int32).view(5, 2)
    runs = runs_of(parts, table)
    assert [(run.first, run.last, run.is_full, run.decodes) for run in runs] == [
        (0, 2, True, True),
        (2, 14, False, False),
        (14, 17, True, False),
        (17, 20, False, False),
    ]
    assert runs[1].page_table.tolist() == table[2:4].tolist()
    assert runs[1].lengths.tolist() == [9, 7] and runs[1].cu_seqlens_q.tolist() == [0, 5, 12]
    assert runs[2].lengths.tolist() == [10] and runs[2].cu_seqlens_q.tolist() == [0, 3]


def job(model, rounds, **options):
    return {
        "options": {"model": str(model), "dtype": "float32", "max_model_len": 8192} | options,
        "tokens": TOKENS,
        "rounds": rounds,
    }


SETTINGS = dict(
    moba_chunk_size=[128] * 30,
    moba_topk=3,
    moba_sink=1,
    moba_full_tail=50,
    moba_full_layers=[0, -1],
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
    # All prompts fit, all answers do not: a page fills up within an answer. The null page is vLLM's own.
    pages = sum(-(-len(ids) // 32) for ids in prompts)
    assert any(len(ids) % 32 > 32 - TOKENS + 1 for ids in prompts)
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
                max_model_len=1500,
                block_size=32,
                num_gpu_blocks_override=pages + 1,
            )
            | {"preempts": True},
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


TINY = dict(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    moba_chunk_size=128,
    moba_topk=2,
)
REFUSED = {  # the config.json of a model, and the sentence
    "mistral": (
        dict(TINY, architectures=["MistralForCausalLM"], sliding_window=64),
        "sliding_window: expected none in model.layers.0.self_attn.attn (or the layer in moba_full_layers), got 64",
    ),
    "bloom": (
        dict(
            vocab_size=256,
            hidden_size=128,
            n_layer=2,
            n_head=2,
            seq_length=512,
            moba_chunk_size=128,
            moba_topk=2,
            architectures=["BloomForCausalLM"],
        ),
        "alibi_slopes: expected none in transformer.h.0.self_attention.attn (or the layer in moba_full_layers), got ALiBi",
    ),
    "gemma2": (
        dict(
            TINY,
            architectures=["Gemma2ForCausalLM"],
            attn_logit_softcapping=50.0,
            layer_types=["full_attention"] * 2,
        ),
        "logits_soft_cap: expected none in model.layers.0.self_attn.attn (or the layer in moba_full_layers), got 50.0",
    ),
    "deepseek_v2": (
        dict(
            TINY,
            architectures=["DeepseekV2ForCausalLM"],
            kv_lora_rank=512,
            q_lora_rank=None,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=4,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            first_k_dense_replace=2,
        ),
        "model: expected keys and values for every head, got multi-head latent attention (MLA)",
    ),
    "bert": (
        dict(TINY, architectures=["BertModel"], position_embedding_type="absolute"),
        "attn_type: expected decoder layers in model.encoder.layer.0.attention.output.attn (or the layer in moba_full_layers), got encoder_only",
    ),
}


def test_what_moba_cannot_compute_is_refused(vllm, tmp_path):
    jobs, sentences = [], []
    for name, (config, sentence) in REFUSED.items():
        folder = tmp_path / name
        folder.mkdir()
        folder.joinpath("config.json").write_text(json.dumps(config | {"model_type": name}))
        jobs.append(job(folder, [], load_format="dummy", max_model_len=512))
        sentences.append(sentence)
    for options, sentence in (
        (
            dict(block_size=96),
            "block_size: expected a divisor or a multiple of moba_chunk_size 128, got 96 (--block-size sets it)",
        ),
        (
            dict(kv_cache_dtype="fp8", dtype="bfloat16"),
            "kv_cache_dtype: expected auto in model.layers.0.self_attn.attn (or the layer in moba_full_layers), got fp8",
        ),
        (dict(hf_overrides={"moba_topk": 0}), "config.moba_topk: expected at least 1, got 0"),
    ):
        jobs.append(job(NEEDLE_MODEL, [], **(dict(max_model_len=512) | options)))
        sentences.append(sentence)
    for found, sentence in zip(vllm(jobs), sentences):
        assert f"moba.vllm: {sentence}" in str(found)


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
        VLLM_CPU_OMP_THREADS_BIND="0|1",
        MOBA_VLLM=json.dumps(settings),
    )
    assert 3_000 < len(ids) < 9_000
    assert ids_of(alone[0]) == ids_of(two[0]) == [expected]
