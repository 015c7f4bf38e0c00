"""`"evidence": true` of `moba serve`: attention weights against those of the same model in Python, in float64, and the texts."""

import json
import re

import numpy as np
import pytest
import torch
import transformers
from byte_model import save_byte_model
from serving import Server
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LAYERS, HEADS, KV_HEADS, BLOCK, TOP_K = 3, 4, 2, 16, 4
PROMPT = "".join(f"Line {i}: caf\N{LATIN SMALL LETTER E WITH ACUTE} {i * i}. " for i in range(16))
MOBA = {"attn": "moba", "decode": "moba", "topk": TOP_K, "sink": 1, "full_tail": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_byte_model(
        tmp_path_factory.mktemp("model"),
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4096,
        initializer_range=0.2,
    )


@pytest.fixture(scope="module")
def bytes_server(build_folder, model):
    flags = [
        "--moba-chunk-size",
        BLOCK,
        "--moba-sink",
        1,
        "--kv-dtype",
        "f32",
        "--cache-size",
        "64m",
    ]
    running = Server(build_folder, *flags, model=model)
    yield running
    assert running.stop() == (0, "")


@pytest.fixture(scope="module")
def chat_server(build_folder):
    running = Server(build_folder, "--cache-size", "600m", "--moba-chunk-size", "64")
    yield running
    assert running.stop() == (0, "")


def ask(server, endpoint="completions", **body):
    status, _, text = server.send(f"/v1/{endpoint}", {"temperature": 0, **body})
    assert status == 200, text
    return json.loads(text)


def events_of(text):
    """Return the JSON of the events of a stream, without comments and its end."""
    return [json.loads(event[6:]) for event in text.split("\n\n") if event.startswith("data: {")]


def byte_of(token):
    """Return the byte of a token in `logprobs`: a character, or "bytes:\\xNN"."""
    found = re.fullmatch(r"bytes:\\x(..)", token)
    return int(found[1], 16) if found else ord(token)


def moba_weights(query, key):
    """Return the weights [head, query, key] of MoBA with one sink block, and the least margin of the gate."""
    tokens = query.shape[1]
    key = key.repeat_interleave(HEADS // KV_HEADS, 0)
    complete = tokens // BLOCK
    means = key[:, : complete * BLOCK].unflatten(1, (complete, BLOCK)).mean(2)
    own = torch.arange(tokens) // BLOCK
    gate = (query @ means.mT).masked_fill(torch.arange(complete) >= own[:, None], -torch.inf)
    gate[:, own > 0, 0] = torch.inf
    best = gate.sort(-1, descending=True)
    selected = torch.zeros(HEADS, tokens, complete + 1, dtype=torch.bool)
    selected.scatter_(2, best.indices[..., : TOP_K - 1], best.values[..., : TOP_K - 1] > -torch.inf)
    selected |= torch.arange(complete + 1) == own[:, None]
    margins = best.values[..., TOP_K - 2] - best.values[..., TOP_K - 1]
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril() & selected[:, :, own]
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1), margins[margins.isfinite()].min().item()


def expected_weights(folder, ids, moba):
    """Return the weights [query, key], averaged over layers and heads, in float64."""
    attentions, margins = [], []

    def attend_moba(module, query, key, value, mask, **options):
        weights, margin = moba_weights(query[0], key[0])
        attentions.append(weights)
        margins.append(margin)
        out = weights @ value[0].repeat_interleave(HEADS // KV_HEADS, 0)
        return out.transpose(0, 1)[None].contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("moba_in_double", attend_moba)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="moba_in_double" if moba else "eager", dtype=torch.float64
    )
    with torch.no_grad():
        output = network(torch.tensor([ids]), output_attentions=not moba)
    if moba:
        assert min(margins) > 1e-6  # else rounding could select another block
    else:
        attentions = [attention[0] for attention in output.attentions]
    return torch.stack(attentions).mean((0, 1)).numpy()


def by_block(weights, prompt, size):
    """Sum the columns of the prompt in blocks."""
    return np.add.reduceat(weights[:, :prompt], np.arange(0, prompt, size), axis=1)


@pytest.mark.parametrize("moba", [None, MOBA], ids=["full", "moba"])
@pytest.mark.parametrize("size", [16, 40])
def test_weights_are_those_of_the_model_in_double(bytes_server, model, moba, size):
    settings = {
        "prompt": PROMPT,
        "max_tokens": 40,
        "ignore_eos": True,
        "logprobs": 0,
        "evidence": {"block_size": size},
    }
    if moba:
        settings["moba"] = moba
    first, second = ask(bytes_server, **settings), ask(bytes_server, **settings)
    choice = first["choices"][0]
    prompt = list(PROMPT.encode())
    answer = [byte_of(token) for token in choice["logprobs"]["tokens"]]
    weights = expected_weights(model, prompt + answer, moba)
    rows = by_block(weights[len(prompt) - 1 : -1], len(prompt), size)

    evidence = choice["evidence"]
    assert evidence["block_size"] == size
    found = np.zeros(rows.shape[1])
    for block in evidence["blocks"]:
        found[block["block"]] = block["weight"]
    np.testing.assert_allclose(
        found, np.where(rows.mean(0) >= 1e-3, rows.mean(0), found), atol=2e-5
    )
    assert evidence["prompt_weight"] == pytest.approx(rows.sum(1).mean(), abs=2e-5)
    assert (
        evidence["sentences"][0]["tokens"][0] == 0 and evidence["sentences"][-1]["tokens"][1] == 40
    )
    for sentence in evidence["sentences"]:
        begin, end = sentence["tokens"]
        expected = rows[begin:end].mean(0)
        listed = dict(zip(sentence["blocks"], sentence["weights"], strict=True))
        for block, weight in enumerate(expected):
            assert listed.get(block, weight if weight < 1.1e-3 else None) == pytest.approx(
                weight, abs=2e-5
            )
    if moba:
        assert (rows == 0).any()

    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 200
    repeated = second["choices"][0]["evidence"]
    assert [block["block"] for block in repeated["blocks"]] == [
        block["block"] for block in evidence["blocks"]
    ]
    for one, other in zip(evidence["blocks"], repeated["blocks"], strict=True):
        assert (
            one["weight"] == pytest.approx(other["weight"], abs=2e-5)
            and one["bytes"] == other["bytes"]
        )


def test_answers_are_the_same_with_evidence_and_in_a_batch(bytes_server):
    settings = {"prompt": [PROMPT, PROMPT[:100], PROMPT[50:]], "max_tokens": 20, "ignore_eos": True}
    plain, weighed = ask(bytes_server, **settings), ask(bytes_server, evidence=True, **settings)
    assert [c["text"] for c in plain["choices"]] == [c["text"] for c in weighed["choices"]]
    assert all("evidence" not in choice for choice in plain["choices"])
    for prompt, choice in zip(settings["prompt"], weighed["choices"], strict=True):
        alone = ask(bytes_server, **{**settings, "prompt": prompt, "evidence": True})["choices"][0][
            "evidence"
        ]
        for one, other in zip(alone["blocks"], choice["evidence"]["blocks"], strict=True):
            assert one["weight"] == pytest.approx(other["weight"], abs=2e-5)


def test_blocks_have_the_bytes_of_their_tokens(bytes_server):
    evidence = ask(bytes_server, prompt=PROMPT, max_tokens=2, ignore_eos=True, evidence=True)[
        "choices"
    ][0]["evidence"]
    text = PROMPT.encode()
    for block in evidence["blocks"]:
        (begin, end), (first, last) = block["tokens"], block["bytes"]
        assert begin == BLOCK * block["block"] and end == min(begin + BLOCK, len(text))
        # One byte a token; a range begins and ends with a character.
        assert 0 <= begin - first <= 1 and 0 <= end - last <= 1
        text[first:last].decode()
        assert block["messages"] == []


DOCUMENT = (
    "  The grass is green. " * 20
    + "The code of the blue door in Köln is 7349. "
    + "The sky is wide \N{LLAMA}. " * 20
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": DOCUMENT},
            {"type": "text", "text": "What is the code of the door?"},
        ],
    },
]


@pytest.fixture(scope="module")
def answered(chat_server):
    return ask(
        chat_server,
        "chat/completions",
        messages=MESSAGES,
        max_tokens=40,
        evidence={"block_size": 16},
    )["choices"][0]


def test_blocks_of_a_chat_have_the_bytes_of_its_messages(chat_server, answered):
    contents = [b"Be brief.", (DOCUMENT + "What is the code of the door?").encode()]
    system, user = (
        json.loads(chat_server.send("/tokenize", {"content": content.decode()})[2])["tokens"]
        for content in contents
    )
    blocks = answered["evidence"]["blocks"]
    seen = [part["message"] for block in blocks for part in block["messages"]]
    assert seen == sorted(seen) and set(seen) == {0, 1}
    for block in blocks:
        size = block["bytes"][1] - block["bytes"][0]
        assert sum(part["bytes"][1] - part["bytes"][0] for part in block["messages"]) <= size
        for part in block["messages"]:
            contents[part["message"]][slice(*part["bytes"])].decode()  # whole characters
    # Inside the document a block has as many tokens as its text, up to those that merge with their neighbours.
    inner = [block for block in blocks if 3 < block["block"] < (len(system) + len(user)) // 16 - 1]
    for block in inner:
        (part,) = block["messages"]
        text = contents[1][slice(*part["bytes"])].decode()
        tokens = json.loads(chat_server.send("/tokenize", {"content": text})[2])["tokens"]
        assert abs(len(tokens) - 16) <= 2
    assert len(inner) > 5


def test_the_sentence_was_read_where_the_document_says_it(answered):
    assert "7349" in answered["message"]["content"]
    content = (DOCUMENT + "What is the code of the door?").encode()
    evidence = answered["evidence"]
    blocks = {block["block"]: block for block in evidence["blocks"]}
    (sentence,) = (
        sentence
        for sentence in evidence["sentences"]
        if "7349" in answered["message"]["content"].encode()[slice(*sentence["bytes"])].decode()
    )
    needle = content.index(b"7349")
    weights = {}
    for block, weight in zip(sentence["blocks"], sentence["weights"], strict=True):
        for part in blocks[block]["messages"]:
            if (
                part["message"] == 1
                and part["bytes"][1] < len(DOCUMENT.encode()) - 100
                and block > 2
            ):
                weights[tuple(part["bytes"])] = weight
    strongest = max(weights, key=weights.get)
    assert abs(strongest[0] - needle) < 150, (
        needle,
        sorted(weights.items(), key=lambda item: -item[1])[:5],
    )


def test_stream_ends_with_the_evidence_of_the_whole(chat_server, answered):
    _, _, events = chat_server.send(
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "max_tokens": 40,
            "temperature": 0,
            "stream": True,
            "evidence": {"block_size": 16},
        },
    )
    chunks = events_of(events)
    found = [chunk["choices"][0].get("evidence") for chunk in chunks]
    assert found[:-1] == [None] * (len(chunks) - 1)
    for one, other in zip(found[-1]["sentences"], answered["evidence"]["sentences"], strict=True):
        assert one["bytes"] == other["bytes"] and one["blocks"] == other["blocks"]
        assert one["weights"] == pytest.approx(other["weights"], abs=1e-4)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    sentences = found[-1]["sentences"]
    assert text == answered["message"]["content"]
    assert [sentences[0]["bytes"][0], sentences[-1]["bytes"][1]] == [0, len(text.encode())]
    assert all(
        a["bytes"][1] == b["bytes"][0] for a, b in zip(sentences, sentences[1:], strict=False)
    )


def test_evidence_ends_with_the_text_at_a_stop(chat_server):
    settings = {"prompt": "One, two, three, four, five,", "max_tokens": 30, "evidence": True}
    whole = ask(chat_server, **settings)["choices"][0]["text"]
    stop = ask(chat_server, stop=[whole[9:14]], **settings)["choices"][0]
    assert stop["text"] == whole[:9]
    assert stop["evidence"]["sentences"][-1]["bytes"][1] == 9


def test_progress_of_a_prompt_comes_before_the_answer(chat_server):
    body = {
        "messages": [{"role": "user", "content": "Bears sleep in winter. " * 300}],
        "max_tokens": 3,
        "stream": True,
    }
    for cached in (False, True):
        _, _, events = chat_server.send("/v1/chat/completions", {**body, "return_progress": True})
        chunks = events_of(events)
        progress = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
        total = progress[0]["total"]
        assert progress[-1]["processed"] == total and all(
            step["total"] == total for step in progress
        )
        steps = [step["processed"] for step in progress]
        assert steps == sorted(steps) and len(steps) >= 2
        assert (
            progress[0]["processed"] == progress[0]["cache"]
            and (progress[0]["cache"] > 1000) == cached
        )
        assert [step["time_ms"] for step in progress] == sorted(
            step["time_ms"] for step in progress
        )
        first_text = next(
            i for i, chunk in enumerate(chunks) if chunk["choices"][0]["delta"].get("content")
        )
        assert all("prompt_progress" not in chunk for chunk in chunks[first_text:])
    assert '"prompt_progress"' not in chat_server.send("/v1/chat/completions", body)[2]
