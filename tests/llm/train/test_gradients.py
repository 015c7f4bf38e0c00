"""Losses and gradients of llm/train against PyTorch, `transformers` and the Python package, by gradients_tool.cpp."""

import os
import subprocess

import moba as moba_package
import numpy as np
import pytest
import torch
import transformers
from builds import existing
from losses import losses_there
from safetensors.numpy import load_file

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = dict(
    vocab_size=203,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LENGTHS = [70, 1, 129]
MOBA = dict(block_size=16, top_k=3)


def build_model(kind="Llama", seed=0, **changes):
    """Return a model whose every parameter matters."""
    settings = SHAPE | {"tie_word_embeddings": False} | changes
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**settings)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1, 0.2)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


def packed_batch(lengths=LENGTHS, ignored=0.2, seed=1):
    random = np.random.default_rng(seed)
    ids, targets = (random.integers(0, SHAPE["vocab_size"], sum(lengths)) for _ in range(2))
    return ids, np.where(random.random(len(ids)) < ignored, -1, targets)


def gradients_there(model, ids, targets, lengths):
    losses = losses_there(model, ids, targets, lengths)
    (losses.sum() / (targets >= 0).sum()).backward()
    return losses.detach().numpy(), {name: p.grad.numpy() for name, p in model.named_parameters()}


def worst_relative(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def assert_same_gradients(ours, theirs, bound):
    assert set(ours) == set(theirs)
    errors = {name: worst_relative(ours[name], theirs[name]) for name in theirs}
    assert max(errors.values()) <= bound, {
        name: error for name, error in errors.items() if error > bound
    }


@pytest.fixture
def gradients_of(build_folder, tmp_path):
    """gradients_of(folder, ids, targets, lengths, block_size=16) returns the losses and gradients of llm/train."""
    tool = existing(build_folder / "tests" / "gradients", "`make build` makes it")

    def run(model, ids, targets, lengths, **flags):
        for name, values in (("ids", ids), ("targets", targets)):
            np.asarray(values, dtype=np.int32).tofile(tmp_path / name)
        files = [
            f"--model={model}",
            f"--ids={tmp_path / 'ids'}",
            f"--targets={tmp_path / 'targets'}",
        ]
        options = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in flags.items()
        ]
        out = tmp_path / "gradients.safetensors"
        command = [
            tool,
            *files,
            f"--out={out}",
            f"--lengths={','.join(map(str, lengths))}",
            *options,
        ]
        quiet = os.environ | {"GOMP_SPINCOUNT": "1000"}  # as `moba` sets it
        done = subprocess.run(command, capture_output=True, timeout=300, env=quiet)
        assert done.returncode == 0, done.stderr.decode()
        tensors = load_file(out)
        return tensors.pop("losses"), tensors

    return run


MODELS = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama one kv head, own head_dim": ("Llama", {"num_key_value_heads": 1, "head_dim": 24}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama yarn": ("Llama", {"rope_parameters": YARN | {"rope_theta": 1e4}}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", MODELS)
def test_gradients_equal_pytorch(case, recompute, tmp_path, gradients_of):
    kind, changes = MODELS[case]
    model = build_model(kind, **changes)
    model.save_pretrained(tmp_path / "model")
    ids, targets = packed_batch()
    losses, gradients = gradients_there(model, ids, targets, LENGTHS)
    flags = {"recompute": True} if recompute else {}
    our_losses, ours = gradients_of(tmp_path / "model", ids, targets, LENGTHS, **flags)
    assert worst_relative(our_losses, losses) <= 1e-5
    assert_same_gradients(ours, gradients, 1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_moba_gradients_equal_the_python_package(recompute, tmp_path, gradients_of):
    model = build_model()
    model.save_pretrained(tmp_path / "model")
    ids, targets = packed_batch()
    moba_package.register_moba(
        moba_package.MoBAConfig(moba_chunk_size=MOBA["block_size"], moba_topk=MOBA["top_k"])
    )
    model.set_attn_implementation("moba")
    losses, gradients = gradients_there(model, ids, targets, LENGTHS)
    flags = {"recompute": True} if recompute else {}
    our_losses, ours = gradients_of(tmp_path / "model", ids, targets, LENGTHS, **MOBA, **flags)
    assert worst_relative(our_losses, losses) <= 1e-5
    assert_same_gradients(ours, gradients, 1e-5)


def test_full_layers_attend_fully(tmp_path, gradients_of):
    build_model().save_pretrained(tmp_path / "model")
    ids, targets = packed_batch()
    full, _ = gradients_of(tmp_path / "model", ids, targets, LENGTHS)
    sparse, _ = gradients_of(tmp_path / "model", ids, targets, LENGTHS, **MOBA)
    some, _ = gradients_of(tmp_path / "model", ids, targets, LENGTHS, full_layers="0,1", **MOBA)
    every, _ = gradients_of(tmp_path / "model", ids, targets, LENGTHS, full_layers="0,1,2", **MOBA)
    assert np.array_equal(every, full)
    assert worst_relative(sparse, full) > 1e-3 < worst_relative(some, full)


def test_bf16_gradients_are_close_to_f32(tmp_path, gradients_of):
    model = build_model("Qwen3", head_dim=32)
    model.save_pretrained(tmp_path / "model")
    ids, targets = packed_batch()
    exact_losses, exact = gradients_of(tmp_path / "model", ids, targets, LENGTHS)
    losses, gradients = gradients_of(tmp_path / "model", ids, targets, LENGTHS, bf16=True)
    with torch.autocast("cpu", torch.bfloat16):
        their_losses, theirs = gradients_there(model, ids, targets, LENGTHS)
    assert worst_relative(losses, exact_losses) <= 1.5 * worst_relative(their_losses, exact_losses)
    for name in exact:
        assert (
            worst_relative(gradients[name], exact[name])
            <= 2 * worst_relative(theirs[name], exact[name]) + 1e-3
        ), name


@pytest.mark.parametrize("recompute", [False, True])
def test_lora_gradients_equal_pytorch(recompute, tmp_path, gradients_of):
    model = build_model()
    model.save_pretrained(tmp_path / "model")
    ids, targets = packed_batch()
    flags = {"recompute": True} if recompute else {}
    our_losses, ours = gradients_of(tmp_path / "model", ids, targets, LENGTHS, lora_rank=4, **flags)
    values = {
        name.removeprefix("value/"): ours.pop(name)
        for name in list(ours)
        if name.startswith("value/")
    }
    values = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}

    def hook(name):
        a, b = (values[f"{name}.lora_{which}.weight"] for which in "AB")
        return lambda module, inputs, output: output + 2.0 / 4 * inputs[0] @ a.T @ b.T

    for name, module in model.named_modules():
        if f"{name}.lora_A.weight" in values:
            module.register_forward_hook(hook(name))
    losses, _ = gradients_there(model, ids, targets, LENGTHS)
    assert len(values) == 2 * 7 * SHAPE["num_hidden_layers"]
    assert worst_relative(our_losses, losses) <= 1e-5
    assert_same_gradients(ours, {name: value.grad.numpy() for name, value in values.items()}, 1e-5)
