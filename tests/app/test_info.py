"""`moba info`: its JSON, its table and its output flags."""

import json

from gguf import GGUFReader


def test_info_describes_smollm2(smollm2, info):
    smollm2_there = GGUFReader(smollm2).tensors
    found = info(smollm2, "--tensors")
    assert len(found["tensors"]) == len(smollm2_there)
    assert found["parameters"] == sum(int(tensor.n_elements) for tensor in smollm2_there)
    assert {share["type"]: share["tensors"] for share in found["storage"]} == {
        "F32": 61,
        "Q4_1": 210,
        "Q8_0": 1,
    }
    shape = (
        "architecture",
        "layers",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "vocab",
        "context",
    )
    assert [found[key] for key in shape] == ["llama", 30, 576, 9, 3, 64, 49152, 8192]
    assert found["tied_embeddings"] and found["rope"] == {"theta": 100000.0, "scaling": "none"}
    assert found["tokenizer"] == "byte-level BPE (smollm)" and found["chat_template"] == "ChatML"


def test_info_prints_a_table(smollm2, moba):
    table = moba("info", "-m", smollm2, "--tensors").stdout.decode()
    for words in (
        "architecture   llama",
        "134.5 M",
        "9, key/value heads 3, head size 64",
        "Q4_1    210 tensors",
        "ChatML",
    ):
        assert words in table
    assert len([line for line in table.splitlines() if line.startswith("blk.")]) == 270


def test_info_output_flags_are_equivalent_or_refused(smollm2, moba):
    as_json = moba("info", "-m", smollm2, "-o", "json").stdout
    assert json.loads(as_json) and as_json == moba("info", "-m", smollm2, "--json").stdout
    assert moba("info", "-m", smollm2, "-o", "table").stdout == moba("info", "-m", smollm2).stdout
    for wrong in (["-o", "xml"], ["-o", "json", "--json"], []):
        done = moba("info", *(["-m", smollm2] if wrong else []), *wrong)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1
