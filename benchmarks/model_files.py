"""Model files that benchmarks/models.py makes: a GGUF file with random weights, and a GGUF file as a Hugging Face folder."""

import dataclasses
import math
from pathlib import Path

import gguf
import numpy


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a Llama model with tied embeddings and the frequency scaling of Llama 3."""

    layers: int = 16
    hidden: int = 2048
    intermediate: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    context: int = 131072
    rope_theta: float = 500000
    rope_factor: float = 32
    original_context: int = 8192

    @property
    def head_dim(self):
        return self.hidden // self.heads


LLAMA_3_2_1B = Shape()
DEVIATION = 0.02


def rope_divisors(shape, low=1, high=4):
    """Return what each rotary frequency is divided by: short wavelengths by 1, long ones by the factor, those between
    original_context / high and original_context / low by an interpolation."""
    frequencies = shape.rope_theta ** -(numpy.arange(0, shape.head_dim, 2) / shape.head_dim)
    turns = shape.original_context * frequencies / (2 * math.pi)
    share = numpy.clip((turns - low) / (high - low), 0, 1)
    return (1 / (share + (1 - share) / shape.rope_factor)).astype(numpy.float32)


def tensor_shapes(shape):
    """Yield name and [rows, columns] of every matrix, or [size] of every norm."""
    kv = shape.kv_heads * shape.head_dim
    yield "token_embd.weight", [shape.vocabulary, shape.hidden]
    for layer in range(shape.layers):
        for name, size in {
            "attn_norm": [shape.hidden],
            "attn_q": [shape.hidden, shape.hidden],
            "attn_k": [kv, shape.hidden],
            "attn_v": [kv, shape.hidden],
            "attn_output": [shape.hidden, shape.hidden],
            "ffn_norm": [shape.hidden],
            "ffn_gate": [shape.intermediate, shape.hidden],
            "ffn_up": [shape.intermediate, shape.hidden],
            "ffn_down": [shape.hidden, shape.intermediate],
        }.items():
            yield f"blk.{layer}.{name}.weight", size
    yield "output_norm.weight", [shape.hidden]


def copy_tokenizer(writer, source, vocabulary):
    """Copy the tokenizer of a GGUF file, with unused tokens up to `vocabulary`."""
    for name, field in gguf.GGUFReader(source).fields.items():
        if not name.startswith("tokenizer."):
            continue
        value, types = field.contents(), field.types
        if name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
            missing = range(len(value), vocabulary)
            filler = {
                "tokenizer.ggml.tokens": [f"<|unused_{number}|>" for number in missing],
                "tokenizer.ggml.token_type": [int(gguf.TokenType.UNUSED)] * len(missing),
                "tokenizer.ggml.scores": [0.0] * len(missing),
            }
            value = value + filler[name]
        writer.add_key_value(name, value, types[0], types[-1] if len(types) > 1 else None)


def write_random_llama(path, kind, tokenizer, shape=LLAMA_3_2_1B, seed=0):
    """Write a GGUF file with weights from N(0, 0.02), quantised to `kind` ("Q4_0", ...), and the tokenizer of the GGUF file
    `tokenizer`. The same arguments give the same bytes."""
    storage = gguf.GGMLQuantizationType[kind]
    unfinished = Path(f"{path}.new")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_name(f"random llama, seed {seed}")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    copy_tokenizer(writer, tokenizer, shape.vocabulary)
    writer.add_tensor("rope_freqs.weight", rope_divisors(shape))
    for number, (name, size) in enumerate(tensor_shapes(shape)):
        if len(size) == 1:
            writer.add_tensor(name, numpy.ones(size, numpy.float32))
            continue
        random = numpy.random.default_rng([seed, number])
        weights = random.standard_normal(size, numpy.float32) * numpy.float32(DEVIATION)
        writer.add_tensor(name, gguf.quants.quantize(weights, storage), raw_dtype=storage)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(path)


def random_llama(folder, kind, tokenizer):
    """Return the file of the shape of Llama 3.2 1B in `folder`, writing it the first time."""
    path = Path(folder) / f"random-llama-1B.{kind}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_random_llama(path, kind, tokenizer)
    return path


def hugging_face_folder(folder, model):
    """Return a folder in `folder` with the weights of a GGUF file in bf16 and its tokenizer, writing it the first time."""
    import torch
    import transformers

    place = Path(folder) / f"{model.stem}-bf16"
    if not (place / "model.safetensors").exists():
        network = transformers.AutoModelForCausalLM.from_pretrained(
            model.parent, gguf_file=model.name, dtype=torch.bfloat16
        )
        # A model that was read from GGUF refuses to be saved; a plain one with its weights does not.
        del network.config.quantization_config
        with torch.device("meta"):
            plain = type(network)(network.config)
        plain.load_state_dict(network.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(place)
    if not (place / "tokenizer.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
        tokenizer.save_pretrained(place)
    return place
