"""Memory of long contexts: the prompt is read in chunks, and the KV cache grows with it."""

import json
import os

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# `make test-long` reads a million tokens.
TOKENS = int(os.environ.get("MOBA_TEST_TOKENS", 1 << 17))
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random model whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=HEADS * HEAD_DIM,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=2 * TOKENS,
        )
    ).save_pretrained(folder)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    characters = [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


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
