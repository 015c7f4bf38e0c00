"""`moba train` against PyTorch and `transformers`: gradients, losses, checkpoints; and against the kill signal."""

import subprocess

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import moba

from conftest import existing

SHAPE = dict(
    vocab_size=203, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)
LENGTHS = [70, 1, 129]
MOBA = dict(block_size=16, top_k=3)


def build_model(kind="Llama", seed=0, **changes):
    """A model whose every parameter matters."""
    settings = SHAPE | {"tie_word_embeddings": False} | changes
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
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


def losses_there(model, ids, targets, lengths):
    """The loss of every token, each sequence in a pass of its own."""
    losses, begin = [], 0
    for length in lengths:
        part = slice(begin, begin + length)
        logits = model(torch.as_tensor(ids[part])[None]).logits[0]
        goal = torch.as_tensor(targets[part])
        losses.append(torch.nn.functional.cross_entropy(logits, goal, ignore_index=-1, reduction="none"))
        begin += length
    return torch.cat(losses)


def gradients_there(model, ids, targets, lengths):
    losses = losses_there(model, ids, targets, lengths)
    (losses.sum() / (targets >= 0).sum()).backward()
    return losses.detach().numpy(), {name: p.grad.numpy() for name, p in model.named_parameters()}


def worst_relative(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def assert_same_gradients(ours, theirs, bound):
    assert set(ours) == set(theirs)
    errors = {name: worst_relative(ours[name], theirs[name]) for name in theirs}
    assert max(errors.values()) <= bound, {name: error for name, error in errors.items() if error > bound}


@pytest.fixture
def gradients_of(build_folder, tmp_path):
    """gradients_of(folder, ids, targets, lengths, block_size=16) gives our losses and gradients."""
    tool = existing(build_folder / "tests" / "gradients", "`make build` makes it")

    def run(model, ids, targets, lengths, **flags):
        for name, values in (("ids", ids), ("targets", targets)):
            np.asarray(values, dtype=np.int32).tofile(tmp_path / name)
        files = [f"--model={model}", f"--ids={tmp_path / 'ids'}", f"--targets={tmp_path / 'targets'}"]
        options = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in flags.items()]
        out = tmp_path / "gradients.safetensors"
        command = [tool, *files, f"--out={out}", f"--lengths={','.join(map(str, lengths))}", *options]
        done = subprocess.run(command, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()
        tensors = load_file(out)
        return tensors.pop("losses"), tensors

    return run


MODELS = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama one kv head, own head_dim": ("Llama", {"num_key_value_heads": 1, "head_dim": 24}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama yarn": ("Llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0,
                                                 "original_max_position_embeddings": 64}}),
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
    moba.register_moba(moba.MoBAConfig(moba_chunk_size=MOBA["block_size"], moba_topk=MOBA["top_k"]))
    model.set_attn_implementation("moba")
    losses, gradients = gradients_there(model, ids, targets, LENGTHS)
    flags = {"recompute": True} if recompute else {}
    our_losses, ours = gradients_of(tmp_path / "model", ids, targets, LENGTHS, **MOBA, **flags)
    assert worst_relative(our_losses, losses) <= 1e-5
    assert_same_gradients(ours, gradients, 1e-5)
