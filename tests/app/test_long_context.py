"""Memory of long contexts: the prompt is read in chunks, and the KV cache grows with it."""

import json
import os

import pytest
from byte_model import save_byte_model

# `make test-long` reads a million tokens.
TOKENS = int(os.environ.get("MOBA_TEST_TOKENS", 1 << 17))
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random model whose tokens are bytes."""
    return save_byte_model(
        tmp_path_factory.mktemp("model"),
        hidden_size=HEADS * HEAD_DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2 * TOKENS,
    )


def read(moba, model, tokens, folder, *flags):
    file = folder / f"{tokens}.txt"
    text = "".join(f"Line {i}: {i * i}.\n" for i in range(tokens // 10))
    file.write_text(text[: tokens - 1] + "?")  # a line's end would not be a part of the prompt
    flags = ["--attn", "moba", "--decode", "moba", "-n", 4, "--ignore-eos", "--json", *flags]
    done = moba("generate", "-m", model, "--no-chat", "-f", file, "-t", 2, *flags)
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    assert len(report["prompt_ids"]) == tokens and len(report["generated_ids"]) == 4
    return report


@pytest.mark.parametrize("dtype, size", [("f32", 4), ("bf16", 2)])
def test_memory_is_that_of_weights_and_cache(moba, model, tmp_path, dtype, size):
    report = read(moba, model, TOKENS, tmp_path, "--dtype", dtype)
    means = KV_HEADS * HEAD_DIM * 4 // report["settings"]["moba_chunk_size"]
    cache = TOKENS * LAYERS * (2 * KV_HEADS * HEAD_DIM * size + means)
    weights = (model / "model.safetensors").stat().st_size
    assert report["peak_rss_bytes"] < weights + cache + (512 << 20)


def test_cache_grows_with_the_text(moba, model, tmp_path):
    short, long = (read(moba, model, n, tmp_path, "--dtype", "f32") for n in (4096, TOKENS // 2))
    cache = TOKENS // 2 * LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
    assert long["peak_rss_bytes"] - short["peak_rss_bytes"] < 2 * cache + (64 << 20)
