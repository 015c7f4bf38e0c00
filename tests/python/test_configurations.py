"""Models of one process with configurations of their own: in `model.config`, or by the name of the implementation."""

import copy
import json
import re

import moba
import pytest
import torch
from moba import MobaCache, MoBAConfig
from random_models import build, generated, logits, random_ids
from transformers import AutoModelForCausalLM

FIRST = MoBAConfig(16, 3, full_layers=(-1,), decode="moba")
SECOND = MoBAConfig(8, 2, sink_blocks=1, full_tail=4, decode="moba")
OTHER = MoBAConfig(32, 1)
IN_MODEL = {
    FIRST: dict(moba_chunk_size=16, moba_topk=3, moba_full_layers=[-1], moba_decode="moba"),
    SECOND: dict(moba_chunk_size=8, moba_topk=2, moba_sink=1, moba_full_tail=4, moba_decode="moba"),
}
NAMES = {FIRST: "moba-16x3", SECOND: "moba-8x2"}


@pytest.fixture(autouse=True)
def names():
    for config, name in NAMES.items():
        moba.register_moba(config, name=name)
    moba.register_moba(OTHER)


def build_with(config, by):
    """Return a model, and the name of its implementation."""
    if by == "name":
        return build("llama"), NAMES[config]
    return build("llama", **IN_MODEL[config]), "moba"


def alone(config, run):
    """Return run(model, "moba") of a model of the default configuration."""
    moba.register_moba(config)
    result = run(build("llama"), "moba")
    moba.register_moba(OTHER)
    return result


@pytest.mark.parametrize("by", ("config", "name"))
@pytest.mark.parametrize("order", ((FIRST, SECOND), (SECOND, FIRST)))
def test_two_models_keep_their_configurations(order, by):
    ids = random_ids(2, 120)
    built = [build_with(config, by) for config in order]
    moba.register_moba(MoBAConfig(4, 1))
    for model, implementation in (built[0], built[1], built[0]):
        config = order[0] if model is built[0][0] else order[1]
        for suffix in ("", "_naive"):
            found = logits(model, implementation + suffix, ids)
            expected = alone(config, lambda m, name: logits(m, name + suffix, ids))
            assert torch.equal(found, expected)
    assert not torch.equal(*(logits(model, name, ids) for model, name in built))


def test_the_default_is_of_models_without_their_own():
    plain, own, ids = build("llama"), build("llama", **IN_MODEL[FIRST]), random_ids(1, 120)
    before = logits(plain, "moba", ids), logits(own, "moba", ids)
    moba.register_moba(SECOND)
    after = logits(plain, "moba", ids), logits(own, "moba", ids)
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert torch.equal(after[0], logits(plain, "moba-8x2", ids))


def test_a_name_overrides_the_config_and_attributes_change_it():
    model, ids = build("llama", **IN_MODEL[FIRST]), random_ids(1, 120)
    second = alone(SECOND, lambda m, name: logits(m, name, ids))
    assert torch.equal(logits(model, "moba-8x2", ids), second)
    first = logits(model, "moba", ids)
    assert torch.equal(first, logits(model, "moba-16x3", ids))
    for name, value in (IN_MODEL[SECOND] | {"moba_full_layers": None}).items():
        setattr(model.config, name, value)
    assert torch.equal(logits(model, "moba", ids), second)
    model.config.moba_chunk_size = model.config.moba_topk = None
    assert torch.equal(
        logits(model, "moba", ids), alone(OTHER, lambda m, name: logits(m, name, ids))
    )


@pytest.mark.parametrize("by", ("config", "name"))
def test_generation_with_caches_of_two_models(by):
    ids = random_ids(2, 60)
    built = {config: build_with(config, by) for config in (FIRST, SECOND)}
    for _ in range(2):
        for config, (model, implementation) in built.items():
            found = generated(model, implementation, ids, past_key_values=MobaCache())
            assert found == generated(model, implementation + "_naive", ids)
            assert found == alone(config, lambda m, name: generated(m, name, ids))


def test_an_assistant_has_a_configuration_of_its_own():
    model = build("llama", **IN_MODEL[FIRST])
    assistant = build("llama", num_hidden_layers=1, **IN_MODEL[SECOND])
    ids = random_ids(1, 60)
    assistant.set_attn_implementation("moba")
    with moba.routing(model) as record, moba.routing(assistant) as of_assistant:
        found = generated(model, "moba", ids, assistant_model=assistant)
    assert found == generated(model, "moba", ids)
    assert record.layers() == [0, 1] and record[0][0].shape[-1] == 3
    assert of_assistant.layers() == [0] and of_assistant[0][0].shape[-1] == 2


@pytest.mark.parametrize("by", ("config", "name"))
def test_gradient_checkpointing_of_two_models(by):
    ids = random_ids(1, 60)

    def loss_of(model, implementation):
        model.train().gradient_checkpointing_enable()
        model.set_attn_implementation(implementation)
        return model(ids, labels=ids).loss

    def gradients_of(model, implementation):
        loss_of(model, implementation).backward()
        return [parameter.grad for parameter in model.parameters()]

    built = {config: build_with(config, by) for config in (FIRST, SECOND)}
    losses = [loss_of(*made) for made in built.values()]
    for loss in losses:
        loss.backward()
    for config, (model, _) in built.items():
        for a, b in zip(model.parameters(), alone(config, gradients_of)):
            assert torch.equal(a.grad, b)


def test_the_configuration_is_saved_with_the_model(tmp_path):
    model, ids = build("llama", **IN_MODEL[SECOND]), random_ids(1, 120)
    expected = logits(model, "moba", ids)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert IN_MODEL[SECOND].items() <= saved.items()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
    copied = copy.deepcopy(loaded)
    loaded.config.moba_topk = 1
    loaded.config.moba_sink = 0
    with torch.no_grad():
        assert torch.equal(copied(ids).logits, expected)
        assert not torch.equal(loaded(ids).logits, expected)


def test_without_a_default_only_the_config_decides():
    moba.register_moba()
    own, plain, ids = build("llama", **IN_MODEL[FIRST]), build("llama"), random_ids(1, 120)
    assert torch.equal(logits(own, "moba", ids), logits(own, "moba-16x3", ids))
    with pytest.raises(ValueError, match="^moba_layer: config: expected moba_chunk_size and"):
        logits(plain, "moba", ids)


def test_a_compiled_model_follows_its_config():
    torch._dynamo.reset()
    model, ids = build("llama", num_hidden_layers=1, **IN_MODEL[SECOND]), random_ids(2, 40)
    model.set_attn_implementation("moba")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.ones_like(ids)
    for _ in range(2):
        with torch.no_grad():
            found = compiled(ids, attention_mask=mask, use_cache=False).logits
            expected = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
        model.config.moba_topk = 4


WRONG = {
    "no top-k": (dict(moba_chunk_size=8), TypeError, "moba_topk: expected an int, got None"),
    "no chunk size": (dict(moba_topk=2), TypeError, "moba_chunk_size: expected an int, got None"),
    "a chunk size of 0": (
        dict(moba_chunk_size=0, moba_topk=2),
        ValueError,
        "moba_chunk_size: expected at least 1, got 0",
    ),
    "as many sinks": (
        dict(moba_chunk_size=8, moba_topk=2, moba_sink=2),
        ValueError,
        "moba_sink: expected 0 to 1 for moba_topk 2, got 2",
    ),
    "a layer's name": (
        dict(moba_chunk_size=8, moba_topk=2, moba_full_layers=["a"]),
        TypeError,
        "moba_full_layers: expected layer numbers, got 'a'",
    ),
    "one layer": (
        dict(moba_chunk_size=8, moba_topk=2, moba_full_layers=1),
        TypeError,
        "moba_full_layers: expected layer numbers, got 1",
    ),
    "another decode": (
        dict(moba_chunk_size=8, moba_topk=2, moba_decode="x"),
        ValueError,
        'moba_decode: expected "full" or "moba", got \'x\'',
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_configs_are_named(case):
    attributes, kind, message = WRONG[case]
    model = build("llama", **attributes)
    with pytest.raises(kind, match=f"^moba_layer: config.{re.escape(message)}$"):
        logits(model, "moba", random_ids(1, 20))


@pytest.mark.parametrize(
    "name", ("sdpa", "eager", "", "Moba", "moba/16", "moba 16", "moba_naive", "moba-flash", 3)
)
def test_names_that_transformers_understands_otherwise_are_refused(name):
    kind = ValueError if isinstance(name, str) else TypeError
    with pytest.raises(kind, match="^register_moba: name: expected .*, got "):
        moba.register_moba(FIRST, name=name)


def test_a_name_needs_a_configuration():
    with pytest.raises(TypeError, match="^register_moba: cfg: expected a MoBAConfig, got NoneType"):
        moba.register_moba(name="moba-none")


LISTS = dict(moba_chunk_size=[8, 16, 4], moba_topk=[3, 2, 5], moba_sink=[1, 0, 2])


def test_layers_have_their_own_blocks():
    ids = random_ids(2, 120)
    model = build("llama", moba_full_layers=[1], moba_decode="moba", **LISTS)
    found = logits(model, "moba", ids)
    assert (found - logits(model, "moba_naive", ids)).abs().max() < 1e-4
    with moba.routing(model) as record:
        logits(model, "moba", ids)
    assert record.layers() == [0, 2]
    assert [record[layer][0].shape[-1] for layer in (0, 2)] == [3, 5]
    # Layer 0 selects what it selects with its blocks alone.
    with moba.mode("moba"), moba.routing(model) as alone:
        moba.register_moba(MoBAConfig(8, 3, sink_blocks=1), name="moba-first")
        logits(model, "moba-first", ids)
    assert torch.equal(record[0][0], alone[0][0])
    expected = generated(model, "moba_naive", ids)
    assert generated(model, "moba", ids, past_key_values=MobaCache()) == expected
    assert generated(model, "moba", ids) == expected


@pytest.mark.parametrize(
    "change, error",
    (
        ({"moba_topk": [3, 2]}, "config.moba_topk: expected 3 layers .as moba_chunk_size., got 2"),
        ({"moba_topk": [3, 0, 5]}, r"config.moba_topk\[1\]: expected at least 1, got 0"),
        (
            {"moba_sink": [3, 0, 2]},
            "config.moba_sink: expected 0 to 2 for moba_topk 3 in layer 0, got 3",
        ),
        (
            {name: values * 2 for name, values in LISTS.items()},
            "moba_chunk_size: expected 3 layers, got 6",
        ),
    ),
)
def test_wrong_lists_of_layers_are_refused(change, error):
    model = build("llama", **(LISTS | change))
    with pytest.raises(ValueError, match=f"^moba_layer: {error}$"):
        logits(model, "moba", random_ids(1, 20))


CALIBRATION = {
    "format": "moba calibration",
    "version": 1,
    "model": "small",
    "fingerprint": "0",
    "full_tail": 5,
    "layers": [
        {"attention": "moba", "block_size": 8, "top_k": 3, "sink": 1},
        {"attention": "full"},
        {"attention": "moba", "block_size": 16, "top_k": 2, "sink": 0},
    ],
}


def write(path, document):
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_a_calibration_is_a_configuration(tmp_path):
    config = MoBAConfig.from_file(write(tmp_path / "model.moba.json", CALIBRATION))
    assert config == MoBAConfig(
        (8, 8, 16), (3, 3, 2), full_layers=(1,), full_tail=5, sink_blocks=(1, 1, 0)
    )
    moba.register_moba(config, name="moba-calibrated")
    model, ids = build("llama"), random_ids(1, 120)
    own = build(
        "llama",
        moba_chunk_size=[8, 4, 16],
        moba_topk=[3, 1, 2],
        moba_sink=[1, 0, 0],
        moba_full_layers=[1],
        moba_full_tail=5,
    )
    assert torch.equal(logits(model, "moba-calibrated", ids), logits(own, "moba", ids))


@pytest.mark.parametrize(
    "document, error",
    (
        (json.dumps(CALIBRATION)[:100], "expected JSON, got something else"),
        ("[]", 'format: expected "moba calibration", got another file'),
        (CALIBRATION | {"version": 2}, "version: expected 1, got 2"),
        (CALIBRATION | {"gate": "x"}, "gate: expected none"),
        (CALIBRATION | {"layers": [{"attention": "none"}]}, "expected full or moba, got 'none'"),
        (CALIBRATION | {"layers": [{"attention": "moba"}]}, "expected a calibration"),
        ({k: v for k, v in CALIBRATION.items() if k != "layers"}, "expected a calibration"),
        (
            CALIBRATION
            | {"layers": [{"attention": "moba", "block_size": 8, "top_k": 1, "sink": 1}]},
            "sink_blocks: expected 0 to 0",
        ),
    ),
)
def test_damaged_calibrations_are_refused(tmp_path, document, error):
    path = write(tmp_path / "model.moba.json", document)
    with pytest.raises(ValueError, match=f"^from_file: {re.escape(str(path))}: .*{error}"):
        MoBAConfig.from_file(path)


def test_a_calibration_of_another_number_of_layers_is_refused(tmp_path):
    shorter = CALIBRATION | {"layers": CALIBRATION["layers"][:2]}
    config = MoBAConfig.from_file(write(tmp_path / "model.moba.json", shorter))
    moba.register_moba(config, name="moba-shorter")
    with pytest.raises(ValueError, match="^moba_layer: moba_chunk_size: expected 3 layers, got 2"):
        logits(build("llama"), "moba-shorter", random_ids(1, 20))


def test_attention_takes_the_configuration_of_one_layer():
    config = MoBAConfig((8, 16), (3, 2))
    q = torch.randn(1, 64, 2, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match="^attention: config: expected that of one layer"):
        moba.attention(q, q, q, config=config)
    found = moba.attention(q, q, q, config=config.of_layer(1, 2))
    assert torch.equal(found, moba.attention(q, q, q, block_size=16, top_k=2))
