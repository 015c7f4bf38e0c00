"""Logits of the model runner against those of `transformers`, on the same weights."""

import json

import numpy as np
import pytest
import torch
import transformers

SHAPE = dict(
    vocab_size=211,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
ORIGINAL_CONTEXT = 64
LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL_CONTEXT}

CASES = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama ungrouped": ("Llama", {"num_key_value_heads": 6}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama own head_dim": ("Llama", {"head_dim": 24, "rms_norm_eps": 1e-3}),
    "llama linear": ("Llama", {"rope": LINEAR}),
    "llama llama3": ("Llama", {"rope": LLAMA3 | {"rope_theta": 500000.0}}),
    "llama yarn": ("Llama", {"rope": YARN}),
    "llama yarn factor": (
        "Llama",
        {"rope": YARN | {"attention_factor": 1.4, "beta_fast": 16, "beta_slow": 2}},
    ),
    "llama yarn mscale": (
        "Llama",
        {"rope": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied yarn": ("Qwen2", {"tie_word_embeddings": True, "rope": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3 tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "rope": LINEAR}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral yarn": ("Mistral", {"sliding_window": None, "head_dim": 16, "rope": YARN}),
}


def random_model(kind, settings, seed=0):
    """Return a model whose every parameter matters: norms away from 1, biases away from 0, activations of order 1."""
    settings = SHAPE | settings
    rope = {"rope_theta": 10000.0, "rope_type": "default"} | settings.pop("rope", {})
    config = getattr(transformers, f"{kind}Config")(**settings, rope_parameters=rope)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1, 0.2)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


def tokens(count, vocab=SHAPE["vocab_size"], seed=1):
    return np.random.default_rng(seed).integers(0, vocab, count)


def logits_there(model, ids):
    with torch.no_grad():
        return model(torch.as_tensor(ids)[None]).logits[0].float().numpy()


def loaded_there(folder, dtype):
    """Unlike `.to(dtype)`, this leaves the rotary frequencies in f32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def worst_error(ours, theirs):
    """Return the largest difference as a share of the range of the logits."""
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / (theirs.max() - theirs.min())


def spell_rope_scaling(folder):
    """Rewrite config.json in the form that older versions of transformers wrote."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, spelling, tmp_path, logits_of):
    kind, settings = CASES[case]
    model = random_model(kind, settings)
    model.save_pretrained(tmp_path / "model")
    assert "rope_parameters" in json.loads((tmp_path / "model" / "config.json").read_text())
    if spelling == "rope_scaling":
        spell_rope_scaling(tmp_path / "model")
    ids = tokens(200)
    assert worst_error(logits_of(tmp_path / "model", ids), logits_there(model, ids)) <= 1e-4


def test_sharded_weights_equal_transformers(tmp_path, logits_of):
    model = random_model("Llama", {})
    model.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    ids = tokens(64)
    assert worst_error(logits_of(tmp_path / "model", ids), logits_there(model, ids)) <= 1e-4


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_compute_in_f32(stored, tmp_path, logits_of):
    random_model("Qwen2", {}).to(stored).save_pretrained(tmp_path / "model")
    ids = tokens(64)
    theirs = logits_there(loaded_there(tmp_path / "model", torch.float32), ids)
    assert worst_error(logits_of(tmp_path / "model", ids), theirs) <= 1e-4


@pytest.mark.parametrize("dtype, torch_dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_sixteen_bit_arithmetic_is_as_close_as_that_of_transformers(
    dtype, torch_dtype, tmp_path, logits_of
):
    model = random_model("Qwen3", {"head_dim": 32})
    model.save_pretrained(tmp_path / "model")
    ids = tokens(100)
    exact = logits_there(model, ids)
    theirs = worst_error(logits_there(loaded_there(tmp_path / "model", torch_dtype), ids), exact)
    assert worst_error(logits_of(tmp_path / "model", ids, dtype=dtype), exact) <= 1.5 * theirs


@pytest.fixture
def small(tmp_path):
    folder = tmp_path / "small"
    random_model("Llama", {}, seed=3).save_pretrained(folder)
    return folder


CACHES = [("f32", 1e-3), ("f16", 2e-3), ("bf16", 2e-2), ("i8", 3e-2)]


@pytest.mark.parametrize("kv_dtype, bound", CACHES)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_cache_of_another_dtype_costs_its_rounding(dtype, kv_dtype, bound, small, logits_of):
    ids = tokens(100)
    exact = logits_of(small, ids, prefilled=80)
    own = logits_of(small, ids, dtype=dtype, prefilled=80)
    rounded = logits_of(small, ids, dtype=dtype, kv_dtype=kv_dtype, prefilled=80)
    assert worst_error(rounded, exact) <= 1.5 * worst_error(own, exact) + bound
    assert np.array_equal(rounded, own) == (kv_dtype == dtype)


MOBA = dict(block_size=16, top_k=3, sink=1)


@pytest.mark.parametrize("chunk", [1, 7, 16, 100, 199])
@pytest.mark.parametrize("attn", ["full", "moba"])
def test_chunk_size_does_not_change_logits(attn, chunk, small, logits_of):
    ids = tokens(200)
    whole = logits_of(small, ids, attn=attn, **MOBA)
    assert worst_error(logits_of(small, ids, attn=attn, chunk=chunk, **MOBA), whole) <= 1e-4


@pytest.mark.parametrize("prefilled", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("mode", ["full", "moba"])
def test_decode_equals_prefill(mode, prefilled, small, logits_of):
    ids = tokens(150)
    whole = logits_of(small, ids, attn=mode, **MOBA)
    stepwise = logits_of(small, ids, attn=mode, decode=mode, prefilled=prefilled, **MOBA)
    assert worst_error(stepwise, whole) <= 1e-4


def test_moba_is_sparse_and_naive_agrees(small, logits_of):
    ids = tokens(200)
    sparse = logits_of(small, ids, attn="moba", **MOBA)
    assert worst_error(logits_of(small, ids, attn="moba-naive", **MOBA), sparse) <= 1e-4
    assert worst_error(sparse, logits_of(small, ids)) > 1e-2


def test_moba_over_every_block_is_full(small, logits_of):
    ids = tokens(200)
    everything = logits_of(
        small, ids, attn="moba", decode="moba", block_size=16, top_k=13, prefilled=150
    )
    assert worst_error(everything, logits_of(small, ids)) <= 1e-4


def test_full_layers_attend_fully(small, logits_of):
    ids = tokens(200)
    full = logits_of(small, ids)
    one_full = [logits_of(small, ids, attn="moba", full_layers=layer, **MOBA) for layer in range(3)]
    assert min(worst_error(some, full) for some in one_full) > 1e-3
    assert worst_error(one_full[0], one_full[1]) > 1e-3
    all_full = logits_of(small, ids, attn="moba", full_layers="0,1,2", **MOBA)
    assert worst_error(all_full, full) <= 1e-4


def test_full_tail_changes_the_tail_alone(small, logits_of):
    ids = tokens(200)
    sparse, tailed = (
        logits_of(small, ids, attn="moba", full_tail=tail, **MOBA) for tail in (0, 50)
    )
    assert worst_error(tailed[:150], sparse[:150]) <= 1e-4
    assert worst_error(tailed[150:], sparse[150:]) > 1e-2


def test_threads_do_not_change_logits(small, logits_of):
    ids = tokens(200)
    one, two = (logits_of(small, ids, attn="moba", threads=threads, **MOBA) for threads in (1, 2))
    assert worst_error(two, one) <= 1e-5


@pytest.fixture(scope="module")
def smollm2_there(smollm2):
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()


QUESTIONS = ["What is the capital of France?", "Write a short poem about the sea, please."]


def ask(moba, smollm2, question, *flags):
    done = moba(
        "generate",
        "-m",
        smollm2,
        "-p",
        question,
        "-n",
        24,
        "--dtype",
        "f32",
        "--ignore-eos",
        "--json",
        *flags,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_smollm2_logits_equal_transformers(smollm2, smollm2_there, logits_of):
    ids = tokens(300, vocab=49152)
    assert worst_error(logits_of(smollm2, ids), logits_there(smollm2_there, ids)) <= 1e-4


@pytest.mark.parametrize("question", QUESTIONS)
def test_smollm2_generates_the_text_of_transformers(question, moba, smollm2, smollm2_there):
    ours = ask(moba, smollm2, question)
    prompt = torch.tensor([ours["prompt_ids"]])
    theirs = smollm2_there.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=-1,
        pad_token_id=2,
    )
    assert ours["generated_ids"] == theirs[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("question", QUESTIONS)
def test_smollm2_moba_over_every_block_generates_the_same_text(question, moba, smollm2):
    moba_flags = ["--attn", "moba", "--decode", "moba", "--moba-chunk-size", 16, "--moba-topk", 64]
    assert (
        ask(moba, smollm2, question, *moba_flags)["generated_ids"]
        == ask(moba, smollm2, question)["generated_ids"]
    )
