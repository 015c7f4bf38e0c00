"""The weight formats against PyPI's gguf, safetensors and transformers, and a corpus of invalid files."""

import importlib.util
import json
import os
import resource
import subprocess
import sys

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from builds import ROOT, existing
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

FLOATS = [Type.F32, Type.F16, Type.BF16]
QUANTISED = [
    Type.Q4_0,
    Type.Q4_1,
    Type.Q5_0,
    Type.Q5_1,
    Type.Q8_0,
    Type.Q2_K,
    Type.Q3_K,
    Type.Q4_K,
    Type.Q5_K,
    Type.Q6_K,
]


@pytest.fixture
def dump(build_folder):
    """dump(path) returns every number of a weights file in f32, in file order; dump(path, "--list") its lines."""
    tool = existing(build_folder / "tests" / "dump_tensors", "`make build` makes it")

    def run(path, *flags):
        done = subprocess.run([tool, path, *flags], capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr.decode()
        return (
            done.stdout.decode().splitlines()
            if flags
            else np.frombuffer(done.stdout, dtype=np.float32)
        )

    return run


def assert_same_bits(ours, theirs):
    """Check for equal bits, except in the payload of NaNs, which no arithmetic defines."""
    theirs = np.ascontiguousarray(theirs, dtype=np.float32).ravel()
    assert ours.shape == theirs.shape
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all(), f"{(~same).sum()} of {same.size} differ, the first at {np.argmin(same)}"


def write_gguf(path, tensors, version=3):
    """Write tensors [(name, bytes [..., row bytes] u8, type)]."""
    writer = GGUFWriter(path, "llama")
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open(path, "r+b") as file:
        file.seek(4)
        file.write(version.to_bytes(4, "little"))


def random_bytes(kind, shape, seed):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(seed).integers(
        0, 256, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8
    )


def load_maker():
    spec = importlib.util.spec_from_file_location(
        "make_bad_files", ROOT / "tools" / "make_bad_files.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- GGUF


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("kind", FLOATS + QUANTISED, ids=lambda kind: kind.name)
def test_every_type_equals_gguf(kind, version, tmp_path, dump):
    """Use random bytes: scales of every size, infinite, NaN and subnormal, in tensors of several rows and ranks."""
    shapes = [(256,), (7, 512), (3, 2, 768), (1, 256)]
    tensors = [(f"t{i}", random_bytes(kind, shape, seed=i), kind) for i, shape in enumerate(shapes)]
    write_gguf(tmp_path / "m.gguf", tensors, version)
    with np.errstate(all="ignore"):
        theirs = [dequantize(data, kind).ravel() for _, data, _ in tensors]
    assert_same_bits(dump(tmp_path / "m.gguf"), np.concatenate(theirs))


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16], ids=lambda kind: kind.name)
def test_every_half_equals_gguf(kind, tmp_path, dump):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(256, 512)
    write_gguf(tmp_path / "m.gguf", [("t", halves, kind)])
    assert_same_bits(dump(tmp_path / "m.gguf"), dequantize(halves, kind))


@pytest.mark.parametrize("kind", QUANTISED[:5], ids=lambda kind: kind.name)
def test_quantised_weights_equal_gguf(kind, tmp_path, dump):
    weights = np.random.default_rng(5).normal(size=(33, 320)).astype(np.float32)
    data = quantize(weights, kind)
    write_gguf(tmp_path / "m.gguf", [("t", data, kind)])
    ours = dump(tmp_path / "m.gguf")
    assert_same_bits(ours, dequantize(data, kind))
    assert (
        np.abs(ours - weights.ravel()).max() < np.abs(weights).max() / 8
    )  # the coarsest step, of Q4_0


@pytest.fixture(scope="module")
def smollm2_there(smollm2):
    return GGUFReader(smollm2).tensors


def test_shapes_and_types_equal_gguf(smollm2, smollm2_there, dump):
    theirs = [
        f"{tensor.name} {tensor.tensor_type.name} {'x'.join(str(size) for size in reversed(tensor.shape.tolist()))}"
        for tensor in smollm2_there
    ]
    assert dump(smollm2, "--list") == theirs


def test_smollm2_equals_gguf(smollm2, smollm2_there, dump):
    ours, at = dump(smollm2), 0
    for tensor in smollm2_there:
        theirs = dequantize(tensor.data, tensor.tensor_type)
        assert_same_bits(ours[at : at + theirs.size], theirs)
        at += theirs.size
    assert at == ours.size


# ---- safetensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_equal_safetensors(dtype, tmp_path, dump):
    bits = torch.from_numpy(
        np.random.default_rng(0).integers(-(1 << 15), 1 << 15, 4096, dtype=np.int16)
    )
    numbers = bits.view(dtype) if dtype != torch.float32 else bits.view(torch.float32)
    tensors = {
        "b.matrix": numbers[:600].reshape(20, 30).clone(),
        "a": numbers[600:1111].clone(),
        "cube": numbers[1200:1260].reshape(3, 4, 5).clone(),
        "scalar": numbers[7].clone(),
        "nothing": torch.empty(0, 3, dtype=dtype),
    }
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    loaded = safetensors.torch.load_file(tmp_path / "m.safetensors")
    names = [line.split(" ")[0] for line in dump(tmp_path / "m.safetensors", "--list")]
    assert sorted(names) == sorted(tensors)
    theirs = np.concatenate([loaded[name].float().numpy().ravel() for name in names])
    assert_same_bits(dump(tmp_path / "m.safetensors"), theirs)


# ---- models that `transformers` saves


SHAPE = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
CONFIGS = {
    "llama": ("Llama", {}),
    "llama tied biases": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama own head": ("Llama", {"head_dim": 24, "rms_norm_eps": 1e-3}),
    "llama linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
    ),
    "llama llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("Llama", {"rope_parameters": YARN}),
    "qwen2 yarn": (
        "Qwen2",
        {
            "rope_parameters": YARN
            | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5, "truncate": False}
        },
    ),
    "qwen3 yarn": (
        "Qwen3",
        {"head_dim": 16, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    ),
    "qwen3 biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral wide window": ("Mistral", {"sliding_window": 512}),
}


def saved_model(case, folder, **flags):
    kind, settings = CONFIGS[case]
    config = getattr(transformers, f"{kind}Config")(**(SHAPE | settings))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(folder, **flags)
    return model


def assert_describes(found, model):
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    names = {name for name, _ in model.named_parameters()}
    stated = {
        "architecture": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "vocab": config.vocab_size,
        "context": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "tied_embeddings": config.tie_word_embeddings,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    held = {
        "qkv_bias": "q_proj.bias",
        "output_bias": "o_proj.bias",
        "mlp_bias": "up_proj.bias",
        "qk_norm": "q_norm.weight",
    }
    stated |= {key: any(name.endswith(part) for name in names) for key, part in held.items()}
    assert {key: found[key] for key in stated} == stated


def assert_same_rope(found, rope):
    """Compare under either name; a member that is not given must have its default."""
    assert found["theta"] == rope["rope_theta"]
    kind = rope["rope_type"]
    assert found["scaling"] == ("none" if kind == "default" else kind)
    others = {
        key: value
        for key, value in rope.items()
        if key not in ("rope_theta", "rope_type") and value is not None
    }
    renamed = {"original_max_position_embeddings": "original_context"}
    for key, value in others.items():
        assert found[renamed.get(key, key)] == value, key
    if kind == "yarn":
        assert found["beta_fast"] == rope.get("beta_fast", 32) and found["beta_slow"] == rope.get(
            "beta_slow", 1
        )
        assert found["truncate"] is rope.get("truncate", True)
        assert ("attention_factor" in found) == ("attention_factor" in rope)


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("case", CONFIGS)
def test_configs_equal_transformers(case, spelling, tmp_path, info):
    model = saved_model(case, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config["rope_parameters"]
    if spelling == "rope_scaling":
        older = dict(config.pop("rope_parameters"))
        config["rope_theta"] = older.pop("rope_theta")
        older["type"] = older.pop("rope_type")
        config["rope_scaling"] = None if older["type"] == "default" else older
        path.write_text(json.dumps(config))
    found = info(tmp_path)
    assert_describes(found, model)
    assert_same_rope(found["rope"], rope)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_sharded_model_equals_transformers(dtype, tmp_path, info, dump):
    torch_dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    model = saved_model("qwen2 yarn", tmp_path / "f32").to(torch_dtype)
    folder = tmp_path / "sharded"
    model.save_pretrained(folder, max_shard_size="20KB")
    found = info(folder, "--tensors")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1 and sorted(found["files"]) == [str(file) for file in files]
    assert found["file_bytes"] == sum(file.stat().st_size for file in files)
    state = model.state_dict()
    assert {t["name"]: t["shape"] for t in found["tensors"]} == {
        k: list(v.shape) for k, v in state.items()
    }
    assert found["storage"] == [
        {
            "type": dtype,
            "tensors": len(state),
            "bytes": sum(v.numel() * v.element_size() for v in state.values()),
        }
    ]
    for file in files:
        names = [line.split(" ")[0] for line in dump(file, "--list")]
        assert_same_bits(
            dump(file), np.concatenate([state[name].float().numpy().ravel() for name in names])
        )


def test_tied_model_may_store_its_head(tmp_path, info):
    model = saved_model("llama tied biases", tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "lm_head.weight" in state
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert info(tmp_path)["tied_embeddings"]


# A small parent process, because the peak of a child includes that of the process it was forked from.
PEAK_OF = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def test_info_reads_headers_only(tmp_path, build_folder):
    """Check that hardly any of 8 GiB of weights, a hole in the file, becomes resident."""
    maker = load_maker()
    rows = 1 << 28
    header, size = maker.header_of(
        maker.HF_SHAPES | {"model.embed_tokens.weight": [rows, maker.HIDDEN]}
    )
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    (tmp_path / "config.json").write_text(json.dumps(maker.CONFIG | {"vocab_size": rows}))
    command = [
        sys.executable,
        "-S",
        "-c",
        PEAK_OF,
        build_folder / "moba",
        "info",
        "-m",
        tmp_path,
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0 and json.loads(done.stdout)["file_bytes"] > 1 << 33
    assert int(done.stderr) < 1 << 20  # KiB


# ---- bad files


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    load_maker().write_corpus(folder)
    return folder


LIMIT = 1 << 30


def limit_memory():
    """Limit the memory that a process allocates; mapped files do not count."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


def complaint(program, *arguments):
    done = subprocess.run(
        [program, *arguments], capture_output=True, timeout=60, preexec_fn=limit_memory
    )
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert done.stdout == b""
    text = done.stderr.decode()
    assert text.count("\n") == 1 and text.endswith("\n"), text
    return text


EVERY = 12  # every 12th file is also given to the program, whose start takes most of the time


def test_bad_files_are_refused(bad_files, build_folder):
    """Check that each ends with exit code 1 and one line that names the file and the error."""
    manifest = json.loads((bad_files / "manifest.json").read_text())
    assert len({entry["kind"] for entry in manifest}) >= 40
    tool = existing(build_folder / "tests" / "dump_tensors", "`make build` makes it")
    for i, entry in enumerate(manifest):
        said = complaint(tool, entry["path"], "--open")
        assert entry["names"] in said and entry["message"] in said, (entry, said)
        if i % EVERY == 0:
            assert complaint(build_folder / "moba", "info", "-m", entry["path"]).endswith(said)


def test_template_of_the_bad_files_is_valid(bad_files, info):
    assert info(bad_files / "good.gguf")["layers"] == info(bad_files / "good")["layers"] == 1


def test_pipes_and_folders_are_refused(tmp_path, build_folder):
    os.mkfifo(tmp_path / "pipe")
    assert "got a pipe" in complaint(build_folder / "moba", "info", "-m", tmp_path / "pipe")
    assert "config.json" in complaint(build_folder / "moba", "info", "-m", tmp_path)
    os.mkdir(tmp_path / "config.json")
    assert "got a folder" in complaint(build_folder / "moba", "info", "-m", tmp_path)
