"""`transformers` models with "moba" as their attention."""

import gc
import weakref

import moba
import pytest
import torch
from moba import MobaCache, MoBAConfig
from random_models import build, generated, logits, random_ids

SPARSE = MoBAConfig(8, 3)
EVERYTHING = MoBAConfig(8, 1000, decode="moba")
IMPLEMENTATIONS = ("moba", "moba_naive")


def close(a, b, tolerance=2e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ("llama", "qwen3", "mistral"))
def test_model_over_every_block_matches_sdpa(family, implementation):
    model, ids = build(family), random_ids(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    moba.register_moba(EVERYTHING)
    close(logits(model, implementation, ids), logits(model, "sdpa", ids))
    found = logits(model, implementation, ids, attention_mask=mask)
    close(found[mask.bool()], logits(model, "sdpa", ids, attention_mask=mask)[mask.bool()])
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        options["attention_mask"] = mask
        assert generated(model, implementation, ids, **options) == generated(
            model, "sdpa", ids, **options
        )


@pytest.mark.parametrize(
    "config", (SPARSE, MoBAConfig(8, 3, full_tail=6, sink_blocks=1, full_layers=(-1,)))
)
def test_efficient_matches_naive(config):
    model, ids = build("llama"), random_ids(2, 70)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    mask[1, 60:] = 0
    moba.register_moba(config)
    for options in ({}, {"attention_mask": mask}):
        close(logits(model, "moba", ids, **options), logits(model, "moba_naive", ids, **options))
    assert (logits(model, "moba", ids) - logits(model, "sdpa", ids)).abs().max() > 0.01


@pytest.mark.parametrize("config", (SPARSE, MoBAConfig(8, 3, full_tail=6)))
def test_padded_batch_matches_each_sample_alone(config):
    model, ids = build("llama"), random_ids(3, 60)
    moba.register_moba(config)
    mask = torch.ones_like(ids)
    mask[0, :11] = mask[1, 40:] = mask[2, :2] = mask[2, 55:] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = logits(model, "moba", ids, attention_mask=mask, position_ids=positions)
    for row in range(3):
        kept = mask[row].bool()
        close(together[row, kept], logits(model, "moba", ids[row, kept][None])[0])


@pytest.mark.parametrize("cache", (None, MobaCache, "static"))
@pytest.mark.parametrize("decode", ("full", "moba"))
def test_caches_match_the_naive_implementation(cache, decode):
    model, ids = build("llama"), random_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    moba.register_moba(MoBAConfig(8, 3, sink_blocks=1, decode=decode))
    expected = generated(model, "moba_naive", ids, attention_mask=mask)
    for beams in (1, 3):
        options = {"attention_mask": mask, "num_beams": beams}
        expected = generated(model, "moba_naive", ids, **options)
        if cache == "static":
            options["cache_implementation"] = "static"
        elif cache is not None:
            options["past_key_values"] = cache()
        assert generated(model, "moba", ids, **options) == expected


@pytest.mark.parametrize("make_cache", (lambda: None, MobaCache))
def test_prefill_and_decode_match_one_prefill(make_cache):
    model, ids = build("llama"), random_ids(2, 64)
    moba.register_moba(MoBAConfig(8, 3, decode="moba"))
    whole = logits(model, "moba", ids)
    with torch.no_grad():
        step = model(ids[:, :33], use_cache=True, past_key_values=make_cache())
        pieces = [step.logits]
        for first, last in (
            (33, 34),
            (34, 40),
            (40, 41),
            (41, 42),
            *((i, i + 1) for i in range(42, 64)),
        ):
            step = model(ids[:, first:last], past_key_values=step.past_key_values)
            pieces.append(step.logits)
    close(torch.cat(pieces, 1), whole)


def test_cropped_cache_continues():
    model, ids = build("llama"), random_ids(1, 64)
    moba.register_moba(MoBAConfig(8, 3, decode="moba"))
    whole = logits(model, "moba", ids)
    cache = MobaCache()
    with torch.no_grad():
        for first, last in ((0, 40), *((i, i + 1) for i in range(40, 60))):
            model(
                random_ids(1, 64, seed=1)[:, first:last] if first >= 40 else ids[:, :40],
                past_key_values=cache,
            )
        for layer in cache.layers:
            layer.crop(-20)
        found = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 64)]
    close(torch.cat(found, 1), whole[:, 40:])


def test_a_dropped_cache_is_freed_without_the_garbage_collector():
    model, ids = build("llama"), random_ids(1, 40)
    moba.register_moba(MoBAConfig(8, 3, decode="moba"))
    model.set_attn_implementation("moba")
    cache = MobaCache()
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            for part in (ids, ids[:, :1]):
                model(part, past_key_values=cache)
        layers = [weakref.ref(layer) for layer in cache.layers]
        del cache
        assert not any(layer() for layer in layers)
    finally:
        gc.enable()


@pytest.mark.parametrize("held", (300, 20_000))
def test_a_cache_grows_by_a_bounded_step(held):
    layer = moba.cache.MobaLayer()
    for tokens in (held, 1):
        layer.update(*(torch.full((1, 2, tokens, 4), float(tokens)) for _ in range(2)))
    capacity = layer._stored[0].shape[1]
    assert held + 1 <= capacity <= held + min(held // 2, 4096)
    assert layer.keys.shape[2] == held + 1
    assert layer.keys[0, 0, :, 0].tolist() == [held] * held + [1]


def test_decoding_with_the_cache_computes_each_mean_once(monkeypatch):
    model, ids = build("llama"), random_ids(1, 40)
    moba.register_moba(MoBAConfig(8, 3, decode="moba"))
    computed = []
    original = torch.Tensor.mean

    def counted(self, *args, **options):
        if self.dim() == 4:
            computed.append(self.shape[0])
        return original(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "mean", counted)
    generated(model, "moba", ids, tokens=24, past_key_values=MobaCache())
    assert sum(computed) == 3 * ((40 + 23) // 8)  # layers, complete blocks


def test_assisted_generation_gives_the_same_text():
    model, assistant, ids = build("llama"), build("llama", num_hidden_layers=1), random_ids(1, 30)
    moba.register_moba(EVERYTHING)
    assistant.set_attn_implementation("moba")
    expected = generated(model, "sdpa", ids)
    assert generated(model, "moba", ids, assistant_model=assistant) == expected
    moba.register_moba(MoBAConfig(8, 3, decode="moba"))
    assert generated(model, "moba", ids, assistant_model=assistant) == generated(model, "moba", ids)


@pytest.mark.parametrize("make_cache", (lambda: None, MobaCache))
def test_autocast_and_half_precision_match_sdpa(make_cache):
    model, ids = build("llama"), random_ids(1, 40)
    moba.register_moba(EVERYTHING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(logits(model, "moba", ids), logits(model, "sdpa", ids), 0.3)
        generated(model, "moba", ids, past_key_values=make_cache())
    model.bfloat16()
    close(logits(model, "moba", ids), logits(model, "sdpa", ids), 0.3)
    generated(model, "moba", ids, past_key_values=make_cache())


def test_full_layers_attend_fully():
    model, ids = build("llama"), random_ids(1, 60)
    for layers in ((0, 1, 2), (-3, -2, -1)):
        moba.register_moba(MoBAConfig(8, 2, full_layers=layers))
        close(logits(model, "moba", ids), logits(model, "sdpa", ids))
    moba.register_moba(MoBAConfig(8, 2, full_layers=(-1,)))
    with moba.routing(model) as record:
        logits(model, "moba", ids)
    assert record.layers() == [0, 1]


def test_mode_overrides_the_configuration():
    model, ids = build("llama"), random_ids(1, 60)
    moba.register_moba(MoBAConfig(8, 2, full_layers=(0,)))
    before = logits(model, "moba", ids)
    with moba.mode("full"):
        close(logits(model, "moba", ids), logits(model, "sdpa", ids))
        with moba.mode("moba"):
            assert (logits(model, "moba", ids) - before).abs().max() > 1e-3
    assert torch.equal(logits(model, "moba", ids), before)
    with pytest.raises(ValueError, match="name: expected .*, got 'sparse'"):
        with moba.mode("sparse"):
            pass


def test_routing_is_recorded():
    model, other, ids = build("llama"), build("llama"), random_ids(2, 60)
    moba.register_moba(MoBAConfig(8, 3, sink_blocks=1, full_layers=(1,)))
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    with moba.routing(model) as record:
        logits(model, "moba", ids, attention_mask=mask)
        logits(model, "moba", ids[:1])
        logits(other, "moba", ids)
    logits(model, "moba", ids)
    assert record.layers() == [0, 2] and len(record) == 2 and len(record[0]) == 2
    first = record[0][0]
    assert first.shape == (2, 4, 60, 3)
    assert (first[0, :, :10] == -1).all()
    # Blocks are counted from the row's first token.
    assert (first[0, :, 10:18] == torch.tensor([0, -1, -1])).all()
    assert (first[1, :, 40] == torch.tensor([0, 5, 5])).any(-1).all()


@pytest.mark.parametrize("checkpointing", (False, True))
def test_gradients_of_a_model_match_naive(checkpointing):
    ids = random_ids(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    moba.register_moba(MoBAConfig(8, 3, full_tail=5))
    gradients = []
    for implementation in IMPLEMENTATIONS:
        model = build("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.set_attn_implementation(implementation)
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients):
        close(a, b)


def test_checkpointing_across_a_mode_switch_is_caught():
    model = build("llama").train()
    model.gradient_checkpointing_enable()
    moba.register_moba(MoBAConfig(8, 2))
    model.set_attn_implementation("moba")
    ids = random_ids(1, 50)
    with moba.mode("full"):
        loss = model(ids, labels=ids).loss
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_compiled_model_matches_eager():
    torch._dynamo.reset()
    model = build("llama", num_hidden_layers=1)
    moba.register_moba(SPARSE)
    model.set_attn_implementation("moba")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        found = compiled(ids, attention_mask=mask, use_cache=False).logits
        close(
            found[mask.bool()], model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("told_by", ("cu_seq_lens", "position_ids", "position_ids without a cache"))
@pytest.mark.parametrize("config", (SPARSE, MoBAConfig(8, 3, full_tail=6, sink_blocks=1)))
def test_packed_documents_attend_to_themselves_alone(config, told_by, implementation):
    model, ids = build("llama"), random_ids(1, 120)
    moba.register_moba(config)
    lengths = [1, 50, 2, 67]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = {"position_ids": positions, "use_cache": told_by != "position_ids without a cache"}
    if told_by == "cu_seq_lens":
        packed |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
        packed |= {"max_length_q": 67, "max_length_k": 67}
    found = logits(model, implementation, ids, **packed)
    alone = [logits(model, implementation, part) for part in ids.split(lengths, dim=1)]
    close(found, torch.cat(alone, dim=1))


@pytest.mark.parametrize("config", (EVERYTHING, SPARSE, MoBAConfig(8, 3, full_tail=6)))
def test_the_naive_implementation_returns_attention_weights(config):
    model, ids = build("llama"), random_ids(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    moba.register_moba(config)
    model.set_attn_implementation("moba_naive")
    with torch.no_grad():
        found = model(ids, attention_mask=mask, output_attentions=True).attentions
        model.set_attn_implementation("eager")
        dense = model(ids, attention_mask=mask, output_attentions=True).attentions
    sums = mask[:, None].float().expand(-1, 4, -1)
    for layer in found:
        close(layer.sum(-1), sums)
    if config is EVERYTHING:
        for ours, theirs in zip(found, dense):
            close(ours, theirs * mask[:, None, :, None])
    model.set_attn_implementation("moba")
    with pytest.raises(NotImplementedError, match="output_attentions: .*moba_naive"):
        model(ids, output_attentions=True)


def test_packed_documents_in_several_rows_match_each_alone():
    model, ids = build("llama"), random_ids(2, 60)
    moba.register_moba(SPARSE)
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in lengths]) for lengths in ([40, 20], [7, 53])]
    )
    found = logits(model, "moba", ids, position_ids=positions, use_cache=False)
    for row, cut in ((0, 40), (1, 7)):
        parts = [
            logits(model, "moba", ids[row : row + 1, part])
            for part in (slice(cut), slice(cut, None))
        ]
        close(found[row : row + 1], torch.cat(parts, dim=1))


def test_unsupported_layers_and_masks_are_refused():
    moba.register_moba(SPARSE)
    ids = random_ids(1, 40)
    model = build("llama")
    causal = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    with pytest.raises(ValueError, match="attention_mask: expected .*, got torch.bool"):
        logits(model, "moba", ids, attention_mask=causal)
    holes = torch.ones_like(ids)
    holes[0, 7] = 0
    with pytest.raises(ValueError, match="padding between tokens"):
        logits(model, "moba", ids, attention_mask=holes)
    with pytest.raises(NotImplementedError, match="sliding window"):
        logits(build("mistral", sliding_window=16), "moba", ids)
    positions = torch.arange(20).repeat(2)[None]
    with torch.no_grad(), pytest.raises(NotImplementedError, match="packed documents"):
        cache = model(ids, use_cache=True).past_key_values
        model(ids, position_ids=positions, past_key_values=cache)
    offsets = torch.tensor([0, 20, 40], dtype=torch.int32)
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q: expected one row"):
        logits(model, "moba", ids, attention_mask=padded, cu_seq_lens_q=offsets)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q: expected one row"):
        logits(model, "moba", ids.repeat(2, 1), cu_seq_lens_q=offsets)
    with pytest.raises(
        NotImplementedError, match="dropout: expected an attention_dropout of 0, got 0.1"
    ):
        logits(build("llama", attention_dropout=0.1).train(), "moba", ids)
    with pytest.raises(NotImplementedError, match="causal"):
        logits(build("llama", is_causal=False), "moba", ids)
    with pytest.raises(TypeError, match="cfg: expected a MoBAConfig, got dict"):
        moba.register_moba({"moba_chunk_size": 8})
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        with moba.routing("llama"):
            pass
