#!/usr/bin/env python3
"""Write a corpus of broken weights files, one kind of damage each, and a manifest of the errors that they must cause.

    tools/make_bad_files.py FOLDER

FOLDER/manifest.json lists [{"kind", "path", "names", "message"}]: a program that is given `path` as a model must refuse it
with one line that contains the file name `names` and the text `message`. Needs only Python.
"""

import json
import struct
import sys
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
PACK = {
    U8: "<B",
    I8: "<b",
    U16: "<H",
    I16: "<h",
    U32: "<I",
    I32: "<i",
    F32: "<f",
    BOOL: "<?",
    U64: "<Q",
    I64: "<q",
    F64: "<d",
}
ALIGNMENT = 32
HIDDEN, FORWARD, VOCAB, HEADS = 8, 16, 10, 2


# ---- GGUF


def u32(number):
    return struct.pack("<I", number)


def u64(number):
    return struct.pack("<Q", number)


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return u64(len(value)) + value


def entry(key, kind, value):
    return (
        text(key) + u32(kind) + (text(value) if kind == STRING else struct.pack(PACK[kind], value))
    )


def array_entry(key, kind, count, elements):
    return text(key) + u32(ARRAY) + u32(kind) + u64(count) + elements


METADATA = {
    "general.architecture": (STRING, "llama"),
    "llama.block_count": (U32, 1),
    "llama.embedding_length": (U32, HIDDEN),
    "llama.feed_forward_length": (U32, FORWARD),
    "llama.attention.head_count": (U32, HEADS),
    "llama.context_length": (U32, 64),
}
SHAPES = {
    "token_embd.weight": [VOCAB, HIDDEN],
    "blk.0.attn_norm.weight": [HIDDEN],
    "blk.0.attn_q.weight": [HIDDEN, HIDDEN],
    "blk.0.attn_k.weight": [HIDDEN, HIDDEN],
    "blk.0.attn_v.weight": [HIDDEN, HIDDEN],
    "blk.0.attn_output.weight": [HIDDEN, HIDDEN],
    "blk.0.ffn_norm.weight": [HIDDEN],
    "blk.0.ffn_gate.weight": [FORWARD, HIDDEN],
    "blk.0.ffn_up.weight": [FORWARD, HIDDEN],
    "blk.0.ffn_down.weight": [HIDDEN, FORWARD],
    "output_norm.weight": [HIDDEN],
}


def product(shape):
    count = 1
    for size in shape:
        count *= size
    return count


def tensor_info(name, shape, kind, offset):
    return (
        text(name)
        + u32(len(shape))
        + b"".join(u64(size) for size in reversed(shape))
        + u32(kind)
        + u64(offset)
    )


def gguf(
    metadata=None,
    shapes=None,
    extra_entries=(),
    extra_tensors=(),
    change_tensor=None,
    version=3,
    magic=b"GGUF",
    entries=None,
    tensors=None,
):
    """Return a GGUF file of a one-layer Llama, all zeros, with one kind of damage.

    metadata, shapes: replace, add or (None) omit single entries. extra_entries, extra_tensors: bytes appended to the others.
    change_tensor: {name: (shape, type, offset)} written instead of the true ones. entries, tensors: counts written instead of
    the true ones.
    """
    metadata = {k: v for k, v in (METADATA | (metadata or {})).items() if v is not None}
    shapes = {k: v for k, v in (SHAPES | (shapes or {})).items() if v is not None}
    head = b"".join(entry(key, *value) for key, value in metadata.items()) + b"".join(extra_entries)
    infos, offset = b"", 0
    for name, shape in shapes.items():
        infos += tensor_info(name, *(change_tensor or {}).get(name, (shape, 0, offset)))
        offset += -(-4 * product(shape) // ALIGNMENT) * ALIGNMENT
    infos += b"".join(extra_tensors)
    entries = len(metadata) + len(extra_entries) if entries is None else entries
    tensors = len(shapes) + len(extra_tensors) if tensors is None else tensors
    file = magic + u32(version) + u64(tensors) + u64(entries) + head + infos
    return file + bytes(-len(file) % ALIGNMENT) + bytes(offset)


def changed(name, shape=None, kind=0, offset=0):
    return gguf(change_tensor={name: (shape or SHAPES[name], kind, offset)})


def bad_ggufs():
    """Return {kind: (bytes, text that the message must contain)}."""
    good = gguf()
    q = "blk.0.attn_q.weight"
    return {
        "empty": (b"", "expected a GGUF file, got no bytes"),
        "two_bytes": (b"GG", "expected a GGUF file"),
        "other_magic": (gguf(magic=b"GGML"), "expected a GGUF file, got bytes 'GGML'"),
        "zip": (b"PK\x03\x04" + bytes(100), "expected a GGUF file"),
        "magic_only": (b"GGUF", "the version"),
        "version_1": (gguf(version=1), "expected GGUF version 2 or 3, got version 1"),
        "version_4": (gguf(version=4), "got version 4"),
        "big_endian": (gguf(version=3 << 24), "got a big-endian file"),
        "cut_in_counts": (good[:20], "before the end of the file"),
        "cut_in_metadata": (good[:200], "expected at most 5 tensors in 176 bytes, got 11"),
        "cut_in_tensor_list": (good[:420], "before the end of the file"),
        "cut_in_data": (good[:-64], "bytes of data"),
        "cut_before_data": (good[: len(good) - 4096], ""),
        "entries_2_63": (gguf(entries=1 << 63), "metadata entries"),
        "entries_all_ones": (gguf(entries=(1 << 64) - 1), "metadata entries"),
        "entries_too_many": (gguf(entries=len(METADATA) + 1), ""),
        "tensors_2_63": (gguf(tensors=1 << 63), "tensors in"),
        "tensors_too_many": (gguf(tensors=len(SHAPES) + 1), ""),
        "key_length_all_ones": (
            gguf(extra_entries=[u64((1 << 64) - 1) + b"key"]),
            "a metadata key",
        ),
        "key_length_2_40": (
            gguf(extra_entries=[u64(1 << 40) + b"key" + bytes(16)]),
            "a metadata key",
        ),
        "string_length_2_62": (
            gguf(extra_entries=[text("k") + u32(STRING) + u64(1 << 62) + b"abc"]),
            "metadata 'k'",
        ),
        "metadata_type_13": (gguf(extra_entries=[text("k") + u32(13) + u64(0)]), "got 13"),
        "array_of_arrays": (
            gguf(extra_entries=[array_entry("k", ARRAY, 1, u32(U8) + u64(1) + b"\0")]),
            "without nested arrays",
        ),
        "array_of_unknown": (gguf(extra_entries=[array_entry("k", 99, 1, b"\0")]), "got 99"),
        "array_count_2_61": (
            gguf(extra_entries=[array_entry("k", F64, 1 << 61, b"")]),
            "elements of metadata 'k'",
        ),
        "array_strings_2_61": (
            gguf(extra_entries=[array_entry("k", STRING, 1 << 61, b"")]),
            "elements of metadata",
        ),
        "array_string_too_long": (
            gguf(extra_entries=[array_entry("k", STRING, 2, text("a") + u64(1 << 50))]),
            "metadata 'k'",
        ),
        "key_twice": (
            gguf(extra_entries=[entry("llama.block_count", U32, 1)]),
            "'llama.block_count' twice",
        ),
        "key_with_newline": (gguf(extra_entries=[entry("a\nb", U32, 1)] * 2), "'a\\x0ab' twice"),
        "alignment_0": (gguf({"general.alignment": (U32, 0)}), "expected a power of two"),
        "alignment_48": (gguf({"general.alignment": (U32, 48)}), "got 48"),
        "alignment_2_31": (
            gguf({"general.alignment": (U32, 1 << 31)}),
            "expected a power of two up to",
        ),
        "alignment_string": (
            gguf({"general.alignment": (STRING, "32")}),
            "expected an integer, got string",
        ),
        "part_of_three": (gguf({"split.count": (U16, 3)}), "got one part of 3"),
        "tensor_twice": (gguf(extra_tensors=[tensor_info(q, [8, 8], 0, 0)]), f"'{q}' twice"),
        "tensor_name_2_63": (gguf(extra_tensors=[u64(1 << 63) + bytes(32)]), "a tensor's name"),
        "rank_0": (
            gguf(extra_tensors=[text("t") + u32(0) + u32(0) + u64(0) * 2]),
            "1 to 4 dimensions in tensor 't', got 0",
        ),
        "rank_5": (gguf(extra_tensors=[tensor_info("t", [1] * 5, 0, 0)]), "got 5"),
        "rank_2_32": (
            gguf(extra_tensors=[text("t") + u32((1 << 32) - 1) + bytes(32)]),
            "1 to 4 dimensions",
        ),
        "size_0": (changed(q, shape=[8, 0]), "sizes from 1"),
        "size_2_63": (changed(q, shape=[1, 1 << 63]), "sizes from 1 to 2^63 - 1"),
        "sizes_overflow": (changed(q, shape=[1 << 33, 1 << 33]), "a size of 63 bits"),
        "bytes_overflow": (changed(q, shape=[1 << 62, 1]), "a size of 63 bits"),
        "too_big_for_file": (changed(q, shape=[1 << 20, 8]), "bytes of data"),
        "unknown_type": (changed(q, kind=77), "got type 77"),
        "type_iq4_xs": (changed(q, kind=23), "got IQ4_XS"),
        "type_f64": (changed(q, kind=28), "got F64"),
        "partial_block": (changed(q, kind=2), "rows of whole blocks"),
        "offset_beyond_end": (changed(q, offset=1 << 30), f"'{q}'"),
        "offset_all_ones": (changed(q, offset=(1 << 64) - 32), f"'{q}'"),
        "offset_unaligned": (changed(q, offset=33), "at a multiple of 32, got offset 33"),
        "tensors_overlap": (changed(q, offset=0), "sharing bytes"),
        "no_architecture": (
            gguf({"general.architecture": None}),
            "metadata 'general.architecture', got none",
        ),
        "other_architecture": (gguf({"general.architecture": (STRING, "mamba")}), "got 'mamba'"),
        "architecture_number": (
            gguf({"general.architecture": (U32, 3)}),
            "expected a string, got u32",
        ),
        "no_layers": (gguf({"llama.block_count": None}), "'llama.block_count'"),
        "layers_0": (gguf({"llama.block_count": (U32, 0)}), "got 0"),
        "layers_4_billion": (gguf({"llama.block_count": (U32, 4_000_000_000)}), "got 4000000000"),
        "layers_2_billion": (gguf({"llama.block_count": (U32, 2_000_000_000)}), "'model.layers.1."),
        "layers_negative": (gguf({"llama.block_count": (I32, -1)}), "got -1"),
        "layers_float": (gguf({"llama.block_count": (F32, 1.0)}), "expected an integer, got f32"),
        "heads_by_layer": (
            gguf(
                extra_entries=[
                    array_entry("llama.attention.head_count_kv", I32, 2, struct.pack("<ii", 1, 2))
                ]
            ),
            "the same in every layer",
        ),
        "kv_heads_3": (
            gguf({"llama.attention.head_count_kv": (U32, 3)}),
            "divisor of 2 heads, got 3",
        ),
        "odd_head": (
            gguf(
                {"llama.attention.key_length": (U32, 3), "llama.attention.value_length": (U32, 3)}
            ),
            "even",
        ),
        "value_head": (gguf({"llama.attention.value_length": (U32, 16)}), "expected 4, got 16"),
        "partial_rotary": (gguf({"llama.rope.dimension_count": (U32, 2)}), "rope.dimension_count"),
        "experts": (gguf({"llama.expert_count": (U32, 8)}), "without experts"),
        "sliding_window": (
            gguf({"llama.attention.sliding_window": (U32, 16)}),
            "no sliding window",
        ),
        "rope_longrope": (
            gguf({"llama.rope.scaling.type": (STRING, "longrope")}),
            "got 'longrope'",
        ),
        "rope_factor_nan": (
            gguf(
                {
                    "llama.rope.scaling.type": (STRING, "linear"),
                    "llama.rope.scaling.factor": (F32, float("nan")),
                }
            ),
            "a number above 0",
        ),
        "rope_base_negative": (gguf({"llama.rope.freq_base": (F32, -1.0)}), "got -1"),
        "rope_divisors_zero": (
            gguf(shapes={"rope_freqs.weight": [2]}),
            "'rope_freqs.weight' to hold numbers above 0",
        ),
        "rope_divisors_short": (gguf(shapes={"rope_freqs.weight": [1]}), "F32 [2], got F32 [1]"),
        "norm_eps_infinite": (
            gguf({"llama.attention.layer_norm_rms_epsilon": (F32, float("inf"))}),
            "epsilon",
        ),
        "no_embeddings": (
            gguf(shapes={"token_embd.weight": None}),
            "'token_embd.weight', got none",
        ),
        "no_norm": (gguf(shapes={"output_norm.weight": None}), "'model.norm.weight' of shape [8]"),
        "wrong_shape": (
            gguf(shapes={q: [HIDDEN, 2 * HIDDEN]}),
            f"'{q}' of shape [8, 8], got [8, 16]",
        ),
        "wrong_rank": (gguf(shapes={"output_norm.weight": [1, HIDDEN]}), "shape [8], got [1, 8]"),
    }


# ---- Hugging Face folders


CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": HIDDEN,
    "intermediate_size": FORWARD,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
LAYER = "model.layers.0."
HF_SHAPES = {
    "model.embed_tokens.weight": [VOCAB, HIDDEN],
    **{f"{LAYER}{name}layernorm.weight": [HIDDEN] for name in ("input_", "post_attention_")},
    **{f"{LAYER}self_attn.{name}_proj.weight": [HIDDEN, HIDDEN] for name in "qkvo"},
    f"{LAYER}mlp.gate_proj.weight": [FORWARD, HIDDEN],
    f"{LAYER}mlp.up_proj.weight": [FORWARD, HIDDEN],
    f"{LAYER}mlp.down_proj.weight": [HIDDEN, FORWARD],
    "model.norm.weight": [HIDDEN],
}
NORM = "model.norm.weight"
NORM_BYTES = 4 * HIDDEN


def header_of(shapes):
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * product(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return header, offset


def safetensors(shapes=None, changes=None, header=None, length=None, data=None):
    """Return a safetensors file of the small model. changes: {tensor: {member: value}}; header, length: written instead of
    the true ones; data: its number of bytes."""
    shapes = {k: v for k, v in (HF_SHAPES | (shapes or {})).items() if v is not None}
    entries, size = header_of(shapes)
    for name, members in (changes or {}).items():
        entries[name] = {
            k: v for k, v in (entries.get(name, {}) | members).items() if v is not None
        }
    header = json.dumps(entries).encode() if header is None else header
    return (
        u64(len(header) if length is None else length)
        + header
        + bytes(size if data is None else data)
    )


def data_range(name):
    begin, end = header_of(HF_SHAPES)[0][name]["data_offsets"]
    return begin, end


def bad_safetensors():
    """Return {kind: (bytes, text that the message must contain)}."""
    begin, end = data_range(NORM)
    good = safetensors()
    norm = lambda **members: safetensors(changes={NORM: members})
    return {
        "empty": (b"", "got 0 bytes"),
        "seven_bytes": (good[:7], "got 7 bytes"),
        "length_all_ones": (
            safetensors(length=(1 << 64) - 1),
            "got a length of 18446744073709551615",
        ),
        "length_beyond_end": (safetensors(length=len(good)), "header of at most"),
        "length_too_short": (safetensors(length=20), "expected JSON"),
        "cut_in_header": (good[:200], "header of at most"),
        "cut_in_data": (good[:-4], "data"),
        "data_too_long": (good + b"\0", "all that the header names"),
        "header_no_json": (safetensors(header=b"hello world, this is no JSON"), "expected JSON"),
        "header_bad_utf8": (safetensors(header=b'{"\xff\xfe": 1}'), "expected JSON"),
        "header_is_array": (safetensors(header=b"[1, 2]"), "expected an object"),
        "header_nested": (safetensors(header=b'{"a":' + b"[" * 200_000), "nested at most 64 deep"),
        "header_big_number": (safetensors(header=b'{"a": 1e999}'), "out of range"),
        "header_nothing": (safetensors(header=b"{}", data=0), "no such tensor"),
        "tensor_twice": (safetensors(header=b'{"a": 1, "a": 2}'), "got 'a' twice"),
        "tensor_is_number": (
            safetensors(changes={}, header=b'{"a": 1}'),
            "expected an object, got 1",
        ),
        "name_with_newline": (safetensors(header=b'{"a\\nb": 1}'), "a\\x0ab: expected an object"),
        "no_dtype": (norm(dtype=None), "a member 'dtype', got none"),
        "no_shape": (norm(shape=None), "a member 'shape'"),
        "no_offsets": (norm(data_offsets=None), "a member 'data_offsets'"),
        "dtype_number": (norm(dtype=7), "expected a string, got 7"),
        "dtype_i64": (norm(dtype="I64"), "expected F32, F16 or BF16, got 'I64'"),
        "dtype_of_other_size": (norm(dtype="F16"), "expected 16 bytes for F16 [8], got 32"),
        "shape_string": (norm(shape="8"), "expected an array"),
        "shape_float": (norm(shape=[8.0]), "expected an integer"),
        "shape_negative": (norm(shape=[-8]), "got -8"),
        "shape_2_64": (norm(shape=[(1 << 64) - 1]), "an integer of 64 bits"),
        "shape_overflow": (norm(shape=[1 << 32, 1 << 32]), "a size of 63 bits"),
        "shape_too_big": (norm(shape=[9]), "expected 36 bytes for F32 [9], got 32"),
        "offsets_one": (norm(data_offsets=[begin]), "expected [begin, end], got 1 numbers"),
        "offsets_reversed": (norm(data_offsets=[end, begin]), "expected a range"),
        "offsets_negative": (norm(data_offsets=[-32, 0]), "got -32"),
        "offsets_beyond_end": (
            norm(data_offsets=[1 << 50, (1 << 50) + 32]),
            "expected a range in the",
        ),
        "offsets_overlap": (norm(data_offsets=[0, NORM_BYTES]), "overlapping another"),
        "gap": (norm(data_offsets=[begin + 4, end + 4]) + bytes(4), "after a gap"),
        "missing_tensor": (
            safetensors(shapes={NORM: None}),
            f"tensor '{NORM}' of shape [8], got no such tensor",
        ),
        "wrong_shape": (safetensors(shapes={NORM: [4, 2]}), "of shape [8], got [4, 2]"),
    }


def bad_configs():
    """Return {kind: (bytes of config.json, text that the message must contain)}."""
    config = lambda **members: json.dumps(
        {k: v for k, v in (CONFIG | members).items() if v != "absent"}
    ).encode()
    rope = lambda **members: config(rope_parameters=members)
    return {
        "empty": (b"", "expected JSON"),
        "no_json": (b"model_type: llama\n", "expected JSON"),
        "array": (b"[]", "expected an object"),
        "nested": (b"[" * 1_000_000, "nested at most 64 deep"),
        "binary": (bytes(range(256)), "expected JSON"),
        "member_twice": (b'{"model_type": "llama", "model_type": "mamba"}', "twice"),
        "no_model_type": (config(model_type="absent"), "'model_type'"),
        "other_model_type": (config(model_type="gemma3"), "got 'gemma3'"),
        "model_type_newline": (config(model_type="a\nb"), "got 'a\\x0ab'"),
        "no_hidden_size": (config(hidden_size="absent"), "'hidden_size'"),
        "hidden_size_string": (config(hidden_size="8"), "expected an integer"),
        "layers_0": (config(num_hidden_layers=0), "got 0"),
        "layers_negative": (config(num_hidden_layers=-1), "got -1"),
        "layers_2_40": (config(num_hidden_layers=1 << 40), "num_hidden_layers"),
        "layers_2_billion": (config(num_hidden_layers=2_000_000_000), "'model.layers.1."),
        "layers_2_64": (config(num_hidden_layers=1 << 64), "num_hidden_layers"),
        "heads_3": (config(num_attention_heads=3), "a divisor of hidden_size 8"),
        "kv_heads_3": (config(num_key_value_heads=3), "divisor of 2 heads"),
        "odd_head_dim": (config(head_dim=3), "even"),
        "other_activation": (config(hidden_act="gelu"), "got 'gelu'"),
        "quantised": (config(quantization_config={"quant_method": "awq"}), "'awq'"),
        "sliding_mistral": (
            config(model_type="mistral", sliding_window=32),
            "a sliding window of 32 tokens",
        ),
        "sliding_qwen2": (
            config(
                model_type="qwen2", use_sliding_window=True, max_window_layers=0, sliding_window=32
            ),
            "a sliding window",
        ),
        "sliding_layers": (
            config(model_type="qwen3", layer_types=["sliding_attention"], sliding_window=32),
            "a sliding window",
        ),
        "rope_dynamic": (rope(rope_type="dynamic", factor=2.0), "got 'dynamic'"),
        "rope_longrope": (rope(rope_type="longrope", factor=2.0), "got 'longrope'"),
        "rope_no_factor": (rope(rope_type="linear"), "'factor'"),
        "rope_factor_0": (rope(rope_type="linear", factor=0), "above 0"),
        "rope_factor_string": (rope(rope_type="linear", factor="2"), "expected a number"),
        "rope_theta_0": (rope(rope_type="default", rope_theta=0), "rope_theta"),
        "rope_no_frequencies": (rope(rope_type="llama3", factor=8.0), "'low_freq_factor'"),
        "rope_equal_frequencies": (
            rope(rope_type="llama3", factor=8.0, low_freq_factor=2, high_freq_factor=2),
            "above",
        ),
        "rope_original_0": (
            rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=0),
            "original",
        ),
        "rope_by_layer": (
            rope(full_attention={"rope_type": "default"}),
            "same RoPE in every layer",
        ),
        "rope_partial": (
            rope(rope_type="default", partial_rotary_factor=0.5),
            "partial_rotary_factor",
        ),
        "bias_missing": (
            config(attention_bias=True),
            "q_proj.bias' of shape [8], got no such tensor",
        ),
        "head_missing": (config(tie_word_embeddings=False), "'lm_head.weight'"),
        "tie_number": (config(tie_word_embeddings=1), "expected true or false"),
    }


def bad_indexes():
    """Return {kind: (bytes of model.safetensors.index.json, file that the message names, text that it must contain)}. All
    tensors are in model-1.safetensors."""
    shard, index = "model-1.safetensors", "model.safetensors.index.json"
    true_map = {name: shard for name in HF_SHAPES}
    index_of = lambda **changes: json.dumps({"weight_map": true_map | changes}).encode()
    fewer = {name: file for name, file in true_map.items() if name != NORM}
    return {
        "no_json": (b"weights", index, "expected JSON"),
        "no_map": (b"{}", index, "'weight_map'"),
        "map_is_array": (b'{"weight_map": []}', index, "expected an object"),
        "file_is_number": (index_of(**{NORM: 3}), index, "expected a string"),
        "file_elsewhere": (
            index_of(**{NORM: "../../etc/passwd"}),
            index,
            "a file in the same folder",
        ),
        "file_absolute": (index_of(**{NORM: "/etc/passwd"}), index, "a file in the same folder"),
        "file_missing": (
            index_of(**{NORM: "model-0.safetensors"}),
            "model-0.safetensors",
            "No such file",
        ),
        "file_is_folder": (index_of(**{NORM: ".."}), index, "a file in the same folder"),
        "file_is_config": (index_of(**{NORM: "config.json"}), "config.json", "safetensors header"),
        "tensor_not_there": (index_of(other=shard), shard, "tensors as"),
        "tensor_not_named": (
            json.dumps({"weight_map": fewer}).encode(),
            shard,
            f"got '{NORM}' too",
        ),
    }


# ---- the corpus


class Corpus:
    def __init__(self, folder):
        self.folder = folder
        self.manifest = []

    def add(self, kind, path, names, message):
        self.manifest.append({"kind": kind, "path": str(path), "names": names, "message": message})

    def add_file(self, kind, content, message):
        path = self.folder / f"{kind}.gguf"
        path.write_bytes(content)
        self.add(kind, path, path.name, message)

    def add_folder(self, kind, files, names, message):
        path = self.folder / kind
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
        self.add(kind, path, names, message)


def write_corpus(folder):
    corpus = Corpus(folder)
    config = json.dumps(CONFIG).encode()
    for kind, (content, message) in bad_ggufs().items():
        corpus.add_file(f"gguf_{kind}", content, message)
    for kind, (content, message) in bad_safetensors().items():
        # errors of the whole model name the folder, errors of one file name the file
        names = f"safetensors_{kind}"
        corpus.add_folder(
            names, {"config.json": config, "model.safetensors": content}, names, message
        )
    for kind, (content, message) in bad_configs().items():
        names = f"config_{kind}"
        corpus.add_folder(
            names, {"config.json": content, "model.safetensors": safetensors()}, names, message
        )
    for kind, (content, names, message) in bad_indexes().items():
        files = {
            "config.json": config,
            "model-1.safetensors": safetensors(),
            "model.safetensors.index.json": content,
        }
        corpus.add_folder(f"index_{kind}", files, names, message)
    corpus.add_folder(
        "no_config", {"model.safetensors": safetensors()}, "config.json", "No such file"
    )
    corpus.add_folder("no_weights", {"config.json": config}, "no_weights", "model.safetensors")
    corpus.add("missing", folder / "missing.gguf", "missing.gguf", "No such file")
    (folder / "manifest.json").write_text(json.dumps(corpus.manifest, indent=1))
    # two valid models, which must load
    (folder / "good.gguf").write_bytes(gguf())
    (folder / "good").mkdir()
    (folder / "good" / "config.json").write_bytes(config)
    (folder / "good" / "model.safetensors").write_bytes(safetensors())


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: make_bad_files.py FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder)


if __name__ == "__main__":
    main()
