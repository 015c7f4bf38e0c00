"""`moba serve`: OpenAI's API through its Python client, and HTTP that no client would send."""

import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
from builds import SMOLLM2
from serving import Server

NAME = SMOLLM2.stem
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
LONG = {"prompt": "Once upon a time", "max_tokens": 4000, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(build_folder):
    running = Server(
        build_folder, "--parallel", 4, "--queue", 4, "--timeout", 3, "--max-body", "2m"
    )
    yield running
    assert running.stop() == (0, "")


@pytest.fixture
def start(build_folder):
    """start(flags...) returns a server, which the end of the test stops."""
    started = []

    def run(*flags, **model):
        started.append(Server(build_folder, *flags, **model))
        return started[-1]

    yield run
    for one in started:
        one.process.kill()
        one.process.wait()


@pytest.fixture
def client(server):
    yield server.client()
    server.wait_until_idle()


def chat(client, messages=QUESTION, **settings):
    settings = {"temperature": 0, "max_tokens": 24, **settings}
    return client.chat.completions.create(model=NAME, messages=messages, **settings)


def complete(client, **settings):
    settings = {"temperature": 0, "max_tokens": 8, **settings}
    return client.completions.create(model=NAME, **settings)


@pytest.fixture(scope="module")
def generated(moba, smollm2):
    """Return what `moba generate` answers."""
    flags = ["-n", 24, "-t", 2, "--dtype", "f32", "--json", "-p", QUESTION[0]["content"]]
    return json.loads(moba("generate", "-m", smollm2, *flags).stdout)


def test_chat_is_the_answer_of_generate(client, generated):
    answer = chat(client)
    assert answer.object == "chat.completion" and answer.model == NAME
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == generated["text"]
    assert choice.finish_reason == "stop" and choice.logprobs is None
    assert answer.usage.prompt_tokens == len(generated["prompt_ids"])
    assert answer.usage.completion_tokens == len(generated["generated_ids"])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.timings["predicted_n"] == answer.usage.completion_tokens
    assert answer.timings["prompt_ms"] > 0


def test_chat_stream_is_the_answer_in_parts(client, generated):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == generated["text"] and len([text for text in texts if text]) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (
        len(chunks) - 2
    ) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(generated["generated_ids"])
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].timings["predicted_per_second"] > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_unknown_members_are_ignored_and_null_is_none(client, generated):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    extra = {
        "stop": None,
        "seed": None,
        "max_completion_tokens": 24,
        "max_tokens": None,
        "new": [1],
    }
    answer = chat(client, tools=[tool], user="me", extra_body=extra)
    assert answer.choices[0].message.content == generated["text"]


def test_messages_have_parts_and_system_turns(client):
    parts = [
        {"type": "text", "text": "What is the capital"},
        {"type": "text", "text": " of France?"},
    ]
    whole = chat(client).usage
    assert (
        chat(client, [{"role": "user", "content": parts}]).usage.prompt_tokens
        == whole.prompt_tokens
    )
    system = [{"role": "developer", "content": "Be brief."}, *QUESTION]
    assert chat(client, system).usage.prompt_tokens != whole.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_stop_ends_the_text_before_it(client, generated, stream):
    expected = generated["text"].partition(" is Par")[0]
    answer = chat(client, stop=["nowhere", " is Par"], stream=stream)
    if stream:
        chunks = list(answer)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "stop"


def test_seed_repeats_an_answer_and_n_gives_different_ones(client):
    settings = {"prompt": "Once upon", "temperature": 1.5, "n": 3, "seed": 5, "max_tokens": 12}
    first, second = complete(client, **settings), complete(client, **settings)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices] and len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.completion_tokens == 36 and first.usage.prompt_tokens < 6
    alone = complete(client, **{**settings, "n": 1, "seed": 6})
    assert alone.choices[0].text == texts[1]
    streamed = ["", "", ""]
    for chunk in complete(client, **settings, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_sampling_settings_have_their_effect(client):
    greedy = complete(client, prompt="The capital of France is", max_tokens=1).choices[0].text
    for filters in ({"top_k": 1}, {"top_p": 0}, {"min_p": 1}):
        settings = {"temperature": 50, "max_tokens": 1, "seed": 3, "extra_body": filters}
        if "top_p" in filters:
            settings["top_p"] = filters["top_p"]
        assert (
            complete(client, prompt="The capital of France is", **settings).choices[0].text
            == greedy
        )
    (paris,) = server_tokens(client, greedy)
    biased = complete(
        client, prompt="The capital of France is", max_tokens=1, logit_bias={paris: -100}
    )
    assert biased.choices[0].text != greedy


def server_tokens(client, text):
    url = str(client.base_url).replace("/v1/", "/tokenize")
    request = urllib.request.Request(url, json.dumps({"content": text}).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["tokens"]


def test_token_ids_are_a_prompt_and_several_prompts_have_several_answers(client):
    text = "The capital of France is"
    ids = server_tokens(client, text)
    of_text = complete(client, prompt=text)
    assert complete(client, prompt=ids).choices[0].text == of_text.choices[0].text
    both = complete(client, prompt=[ids, server_tokens(client, "One, two, three,")])
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == of_text.choices[0].text
    assert " four" in both.choices[1].text
    assert both.usage.completion_tokens == 16
    texts = complete(client, prompt=[text, "One, two, three,"])
    assert [c.text for c in texts.choices] == [c.text for c in both.choices]


def test_echo_and_logprobs_are_those_of_the_model(client, logits_of):
    text = "The capital of France is Paris, a city"
    ids = server_tokens(client, text)
    answer = complete(client, prompt=ids, echo=True, logprobs=3, max_tokens=1)
    (choice,) = answer.choices
    assert choice.text.startswith(text) and "".join(choice.logprobs.tokens) == choice.text
    logits = logits_of(SMOLLM2, ids, dtype="f32").astype(np.float64)
    expected = logits - np.log(
        np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)
    )
    expected -= logits.max(-1, keepdims=True)
    found = choice.logprobs.token_logprobs
    assert (
        found[0] is None and choice.logprobs.top_logprobs[0] is None and len(found) == len(ids) + 1
    )
    rows = expected[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(found[1:-1], rows, atol=2e-3)
    np.testing.assert_allclose(found[-1], expected[-1].max(), atol=2e-3)
    for top, row in zip(choice.logprobs.top_logprobs[1:], expected, strict=True):
        np.testing.assert_allclose(list(top.values()), np.sort(row)[::-1][:3], atol=2e-3)
    offsets = choice.logprobs.text_offset
    assert [
        choice.text[offset:][: len(token)]
        for offset, token in zip(offsets, choice.logprobs.tokens, strict=True)
    ] == choice.logprobs.tokens
    prompt_only = complete(client, prompt=text, echo=True, logprobs=1, max_tokens=0)
    assert prompt_only.choices[0].text == text and prompt_only.usage.completion_tokens == 0
    assert len(prompt_only.choices[0].logprobs.tokens) == len(ids)


def test_chat_logprobs(client, generated):
    answer = chat(client, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content) == generated["text"]
    for token in content:
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        assert bytes(token.bytes).decode() == token.token
    streamed = []
    for chunk in chat(client, logprobs=True, top_logprobs=0, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [token.token for token in streamed] == [token.token for token in content]
    assert streamed[0].top_logprobs == []


def test_characters_of_several_tokens_are_never_split(client, server):
    prompt = "🦙🐫🦒 🦙🐫🦒 🦙🐫🦒 🦙🐫"
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "stream": True, "logprobs": 1}
    _, _, events = server.send("/v1/completions", body)  # .decode() is strict
    texts = [json.loads(event[6:])["choices"][0]["text"] for event in events.split("\n\n")[:-2]]
    whole = complete(client, prompt=prompt, max_tokens=12).choices[0].text
    assert "".join(texts) == whole and "🐫" in whole
    assert "bytes:\\\\x" in events


def test_attention_is_chosen_per_request(client):
    document = (
        "The grass is green. " * 30
        + "The code of the blue door is 7349. "
        + "The sky is blue. " * 30
    )
    messages = [{"role": "user", "content": document + "What is the code of the blue door?"}]
    for moba in (
        {},
        {"attn": "full"},
        {"attn": "moba", "topk": 3, "sink": 1, "full_tail": 64},
        {"decode": "moba"},
    ):
        answer = chat(client, messages, extra_body={"moba": moba})
        assert "7349" in answer.choices[0].message.content, moba


def test_second_question_reads_the_document_from_the_cache(client):
    document = "Bears sleep in winter. " * 120
    questions = [
        [{"role": "user", "content": document + question}] for question in ("Who?", "When do they?")
    ]
    first, second = (chat(client, question, max_tokens=2).usage for question in questions)
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens >= second.prompt_tokens // 256 * 256 - 256 > 0


def test_two_streams_advance_together(client):
    order, texts = [], {}

    def run(name, prompt):
        texts[name] = ""
        for chunk in complete(
            client, prompt=prompt, stream=True, max_tokens=24, extra_body={"ignore_eos": True}
        ):
            order.append(name)
            texts[name] += chunk.choices[0].text

    prompts = {"a": "One, two, three,", "b": "The capital of France is"}
    alone = {
        name: complete(client, prompt=prompt, max_tokens=24, extra_body={"ignore_eos": True})
        .choices[0]
        .text
        for name, prompt in prompts.items()
    }
    threads = [threading.Thread(target=run, args=item) for item in prompts.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == alone
    assert sum(one != other for one, other in zip(order, order[1:], strict=False)) > 4


def test_closed_stream_frees_its_pages(client, server):
    finished = server.metric("requests_finished_total")
    stream = complete(client, stream=True, **LONG)
    next(iter(stream))
    assert server.metric("num_requests_running") == 1
    stream.close()
    server.wait_until_idle()
    assert server.metric("requests_finished_total") == finished + 1
    assert server.metric("generation_tokens_total") < 4000


def test_client_that_leaves_before_the_answer_frees_its_pages(server):
    body = json.dumps({"prompt": "Once", "max_tokens": 4000, "ignore_eos": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        while server.metric("num_requests_running") == 0:
            time.sleep(0.02)
    server.wait_until_idle()


def test_full_queue_gives_429_with_retry_after(client, server):
    stream = complete(client, stream=True, n=8, **LONG)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as refused:
        chat(client)
    assert refused.value.response.headers["Retry-After"] == "1"
    assert refused.value.code == "queue_full"
    assert server.send("/health")[0] == 200
    stream.close()
    server.wait_until_idle()
    assert chat(client).choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("endpoint", "member", "value", "words"),
    [
        ("completions", "temperature", -1, "0 to 100, got -1"),
        ("completions", "temperature", "hot", "a number, got 'hot'"),
        ("completions", "temperature", 1e300, "0 to 100"),
        ("completions", "top_p", 1.5, "0 to 1"),
        ("completions", "min_p", -0.1, "0 to 1"),
        ("completions", "top_k", 2**40, "-1 to"),
        ("completions", "n", 0, "1 to 8, got 0"),
        ("completions", "n", 9, "1 to 8, got 9"),
        ("completions", "max_tokens", -1, "0 to"),
        ("completions", "max_tokens", 2**80, "integer"),
        ("completions", "seed", 1.5, "integer"),
        ("completions", "stop", 3, "a string or up to 64 strings"),
        ("completions", "stream", 1, "true or false"),
        ("completions", "logprobs", 21, "0 to 20"),
        ("completions", "logit_bias", {"x": 1}, "token ids below 49152"),
        ("completions", "logit_bias", {"49152": 1}, "token ids below 49152"),
        ("completions", "prompt", [], "an empty array"),
        ("completions", "prompt", [49152], "0 to 49151"),
        ("completions", "prompt", [[1], 2], "token ids"),
        ("completions", "prompt", None, "a member 'prompt'"),
        ("completions", "prompt", ["x"] * 9, "at most 8"),
        ("completions", "prompt", "x " * 9000, "at most 8192 tokens"),
        ("completions", "max_tokens", 8192, "at most 8192 tokens"),
        ("completions", "evidence", 1, "true or false, got 1"),
        ("completions", "evidence", {"block_size": 15}, "16 to"),
        ("completions", "evidence", {"size": 16}, "got 'size'"),
        ("completions", "return_progress", "yes", "true or false"),
        ("completions", "moba", {"attn": "best"}, "auto, full, moba"),
        ("completions", "moba", {"topk": 2, "sink": 2}, "0 to 1"),
        ("completions", "moba", {"top_k": 2}, "got 'top_k'"),
        ("completions", "model", "gpt-4", f"expected {NAME}"),
        ("chat/completions", "messages", [], "at least one message"),
        (
            "chat/completions",
            "messages",
            [{"role": "pope"}],
            "system, developer, user or assistant",
        ),
        (
            "chat/completions",
            "messages",
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "text",
        ),
        ("chat/completions", "top_logprobs", 99, "0 to 20"),
    ],
)
def test_wrong_member_is_a_400_that_names_it(server, endpoint, member, value, words):
    body = {"prompt": "x", "messages": QUESTION, member: value}
    status, _, text = server.send(f"/v1/{endpoint}", body)
    error = json.loads(text)["error"]
    assert status == 400 and words in error["message"], error
    assert error["type"] == "invalid_request_error"
    assert member in error["message"].split(",")[0].replace(
        "prompt: expected at most 8192", "max_tokens prompt"
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b'{"prompt": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x"} trailing',
        b'{"prompt": "x", "prompt": "y"}',
        b"[" * 100_000,
        b'{"prompt":' * 100_000,
        b"\x00" * 1000,
    ],
)
def test_invalid_json_is_a_400(server, body):
    status, _, text = server.send("/v1/completions", body)
    assert status == 400 and json.loads(text)["error"]["message"].startswith("request: expected")


def test_error_of_the_client_is_the_one_of_openai(client):
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert wrong.value.code == "model_not_found" and wrong.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        complete(client, prompt="x", max_tokens=8192)
    assert long.value.code == "context_length_exceeded"


def test_models_and_tokens(client, server):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).max_model_len == 8192
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    text = "Grüße, 世界 🦙<|im_end|>"
    ids = server_tokens(client, text)
    assert json.loads(server.send("/detokenize", {"tokens": ids})[2])["content"] == text
    plain = json.loads(server.send("/tokenize", {"content": text, "parse_special": False})[2])[
        "tokens"
    ]
    assert len(plain) > len(ids)


def test_paths_and_methods(server):
    assert server.send("/v2/completions", {})[0] == 404
    status, fields, text = server.send("/v1/completions")
    assert (status, fields["Allow"]) == (405, "POST") and "expected POST, got GET" in text
    assert server.send("/health?x=1")[0] == 200
    status, fields, text = server.send("/metrics")
    assert fields["Content-Type"].startswith("text/plain; version=0.0.4")
    assert re.search(r'^moba_http_responses_total\{code="200"\} \d+$', text, re.MULTILINE)


def test_web_pages_of_others_are_refused(server):
    body = {"prompt": "x", "max_tokens": 1}
    assert server.send("/v1/completions", body, Origin="http://evil.example")[0] == 403
    assert server.send("/v1/completions", body, Host="evil.example")[0] == 403
    status, fields, _ = server.send("/v1/completions", body, Origin=server.url)
    assert status == 200 and "Access-Control-Allow-Origin" not in fields
    assert server.send("/v1/models", Host=f"localhost:{server.port}")[0] == 200


def test_cors_origin_may_ask(start):
    page = "http://localhost:3000"
    server = start("--cors-origin", page)
    status, fields, _ = server.send("/v1/models", Origin=page)
    assert status == 200 and fields["Access-Control-Allow-Origin"] == page
    request = f"OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: {page}\r\n\r\n"
    answer = server.raw(request.encode())
    assert answer.startswith(b"HTTP/1.1 204") and b"Access-Control-Allow-Headers" in answer


MALFORMED = [
    b"\x00\x01\x02\x03\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET /health HTTP/1.1\r\n: empty\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff0\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\r\n" * 5_000,
]


@pytest.mark.parametrize("data", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_http_is_refused(server, data):
    answer = server.raw(data)
    assert answer == b"" or re.match(rb"HTTP/1\.1 4(00|13|31) ", answer), answer[:200]
    if answer:
        assert b"Connection: close" in answer
        assert "error" in json.loads(answer.partition(b"\r\n\r\n")[2])
    assert server.send("/health")[0] == 200


def test_incomplete_requests_end_quietly(server):
    whole = b'POST /v1/completions HTTP/1.1\r\nContent-Length: 12\r\n\r\n{"prompt": 1'
    for size in range(0, len(whole), 5):
        assert server.raw(whole[:size]) == b""
    assert server.send("/health")[0] == 200


def test_requests_share_a_connection(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
        answer = b""
        while answer.count(b'{"status":"ok"}') < 3:
            part = connection.recv(1 << 16)
            assert part, answer
            answer += part


def test_http_1_0_stream_ends_with_the_connection(server):
    body = json.dumps(
        {"prompt": "One, two,", "max_tokens": 4, "temperature": 0, "stream": True}
    ).encode()
    head = b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head + body)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    assert b"chunked" not in answer and answer.endswith(b"data: [DONE]\n\n")


def test_body_of_100_mb_is_a_413(server):
    status, _, text = server.send("/v1/completions", b"x" * 100_000_000)
    assert status == 413 and "2097152 bytes" in text
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    answer = server.raw(
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 40
    )
    assert answer.startswith(b"HTTP/1.1 413")


def test_expectation_is_met_before_the_body(server):
    body = b'{"content": "Hi"}'
    head = b"POST /tokenize HTTP/1.1\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(
        body
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_slow_sender_is_cut_off(server):
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        with pytest.raises(OSError):
            for byte in b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" * 10:
                connection.sendall(bytes([byte]))
                time.sleep(0.1)
            pytest.fail("the connection is still open")
    assert 2 < time.monotonic() - begin < 10
    assert server.send("/health")[0] == 200


def test_too_many_connections_are_refused(start):
    server = start("--max-connections", 2)
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
    time.sleep(0.2)
    assert server.raw(b"GET /health HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 503")
    for connection in held:
        connection.close()
    time.sleep(0.2)
    assert server.send("/health")[0] == 200


def test_api_key_is_required_where_there_is_one(start, tmp_path):
    file = tmp_path / "keys"
    file.write_text("first-key\n\n second-key \n")
    server = start("--api-key-file", file, "--host", "0.0.0.0")
    assert server.line.startswith(NAME)
    server.url = f"http://127.0.0.1:{server.port}"
    for key in ("first-key", "second-key"):
        assert [model.id for model in server.client(api_key=key).models.list()] == [NAME]
    for key in ("wrong", "first-ke", "first-keyy", "first-key second-key"):
        with pytest.raises(openai.AuthenticationError) as refused:
            server.client(api_key=key).models.list()
        assert refused.value.code == "invalid_api_key"
    assert server.send("/metrics")[0] == server.send("/v1/models")[0] == 401
    assert server.send("/health")[0] == 200
    huge = b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1000\r\n\r\n"
    assert server.raw(huge).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host: expected a loopback address without --api-key-file, got 0.0.0.0",
        ),
        (["--host", "example.org"], "--host: expected a loopback address"),
        (["--port", "70000"], "--port"),
        (["--parallel", "0"], "--parallel"),
        (["--cache-size", "1"], "cache_bytes: expected at least"),
        (["--cache-size", "900000g"], "--cache-size: expected at most"),
        (["--api-key-file", os.devnull], f"{os.devnull}: expected a key a line, got none"),
    ],
)
def test_wrong_flag_is_one_line(moba, smollm2, flags, words):
    done = moba("serve", "-m", smollm2, *flags)
    assert done.returncode in (1, 2) and done.stdout == b""
    error = done.stderr.decode()
    assert error.startswith("moba serve: ") and error.count("\n") == 1 and words in error


def test_port_in_use_is_an_error(moba, smollm2, server):
    done = moba("serve", "-m", smollm2, "--port", server.port, "--cache-size", "100m")
    assert done.returncode == 2 and b"--port: expected a free port" in done.stderr


def test_sigterm_lets_answers_end(start):
    server = start("--grace", 20)
    client = server.client()
    stream = complete(
        client, prompt="One, two,", stream=True, max_tokens=40, extra_body={"ignore_eos": True}
    )
    texts = [next(iter(stream)).choices[0].text]
    with socket.create_connection(("127.0.0.1", server.port)):
        server.process.send_signal(signal.SIGTERM)
        for _ in range(100):
            if server.send("/health")[0] == 503:
                break
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError) as refused:
            complete(client, prompt="x")
        assert refused.value.status_code == 503
        texts += [chunk.choices[0].text for chunk in stream]
        assert len([text for text in texts if text]) > 30
        assert server.stop() == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_grace_ends_and_streams_end_with_an_error(start, number):
    server = start("--grace", 0.2)
    stream = complete(server.client(), stream=True, **LONG)
    next(iter(stream))
    server.process.send_signal(number)
    with pytest.raises(openai.APIError, match="the server is stopping"):
        list(stream)
    assert server.stop(number) == (0, "")


NEEDLE = Path(__file__).resolve().parents[2] / "models" / "needle-2m"
DOCUMENT = [i * i % 1999 + 1 for i in range(3000)]


def ask(server, question):
    """Return the continuation of a document and a question, both of token ids, and its cached tokens."""
    settings = {"prompt": DOCUMENT + question, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    answer = server.client().completions.create(model=NEEDLE.name, temperature=0, **settings)
    return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens


def test_cache_dir_keeps_documents_over_a_restart(start, tmp_path):
    folder = tmp_path / "cache"
    flags = ["--cache-dir", folder, "--attn", "moba"]
    server = start(*flags, model=NEEDLE)
    page = server.metric("kv_cache_page_tokens")
    text, cached = ask(server, [5] * 200)
    assert cached == 0
    assert server.stop() == (0, "")
    files = sorted(folder.iterdir())
    whole = len(DOCUMENT) // page
    assert len(files) >= whole and {file.suffix for file in files} == {".page"}

    server = start(*flags, model=NEEDLE)
    assert server.metric("stored_pages") == len(files)
    assert ask(server, [6] * 200)[1] == whole * page
    assert ask(server, [5] * 200)[0] == text
    assert server.metric("restored_pages_total") >= whole
    assert server.stop() == (0, "")

    for file in folder.iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    (folder / "foreign.page").write_bytes(b"foreign")
    server = start(*flags, model=NEEDLE)
    assert ask(server, [5] * 200) == (text, 0)
    assert ask(server, [5] * 200)[0] == text
    code, errors = server.stop()
    lines = errors.splitlines()
    assert code == 0 and len(set(lines)) == len(lines) > 0
    assert all("expected a page of this cache, got another content; ignored" in x for x in lines)


def test_killed_while_it_writes_the_cache(start, tmp_path):
    texts = set()
    for kill in range(int(os.environ.get("MOBA_TEST_KILLS", "4"))):
        server = start("--cache-dir", tmp_path / "cache", model=NEEDLE)
        texts.add(ask(server, [5] * 200)[0])
        ask(server, [kill] * 500)
        server.process.kill()
        assert server.process.wait() == -signal.SIGKILL
        assert server.process.stderr.read() == b""
    assert len(texts) == 1


def test_folder_that_is_gone_is_noted_once_and_answers_go_on(start, tmp_path):
    server = start("--cache-dir", tmp_path / "cache", model=NEEDLE)
    (tmp_path / "cache").rmdir()
    assert ask(server, [5] * 200)[0]
    code, errors = server.stop()
    assert code == 0 and errors.count("\n") == 1
    assert "pages are not stored while this lasts" in errors


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a disk of its own needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def check_full(start, flags, limit=None):
    """Ask a server whose pages do not all fit; return its cached tokens after a restart."""
    expected = ask(start(model=NEEDLE), [5] * 200)[0]
    server = start(*flags, model=NEEDLE, preexec=limit)
    assert ask(server, [5] * 200) == (expected, 0)
    assert ask(server, [6] * 200)[1] > 2000  # from memory
    code, errors = server.stop()
    assert code == 0 and errors.count("\n") == 1
    assert "pages are not stored while this lasts" in errors
    server = start(*flags, model=NEEDLE)
    text, cached = ask(server, [5] * 200)
    assert text == expected
    return cached


def test_full_disk_is_noted_once_and_answers_go_on(start, small_disk):
    cached = check_full(start, ["--cache-dir", small_disk])
    assert 0 < cached < len(DOCUMENT) // 2
    assert {file.suffix for file in small_disk.iterdir()} == {".page"}


def test_limit_of_a_file_is_noted_once_and_answers_go_on(start, tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    assert check_full(start, ["--cache-dir", tmp_path / "cache"], limit) == 0


def test_cache_dir_size_is_kept_by_two_servers(start, tmp_path):
    folder, size = tmp_path / "cache", 6 << 20
    flags = ["--cache-dir", folder, "--cache-dir-size", "6m", "--attn", "moba"]
    servers = [start(*flags, model=NEEDLE) for _ in range(2)]
    text = ask(servers[0], [5] * 200)[0]
    for document in range(4):
        for server in servers:
            prompt = [(document + 3) * i % 1999 + 1 for i in range(1500)]
            server.client().completions.create(model=NEEDLE.name, prompt=prompt, max_tokens=1)
    for server in servers:
        assert server.stop() == (0, "")
    files = list(folder.iterdir())
    page = files[0].stat().st_size
    assert size / 2 < sum(file.stat().st_size for file in files) <= size + 2 * (size // 16 + page)
    server = start(*flags, model=NEEDLE)
    prompt = [6 * i % 1999 + 1 for i in range(1500)]  # the last one
    usage = server.client().completions.create(model=NEEDLE.name, prompt=prompt, max_tokens=1).usage
    assert usage.prompt_tokens_details.cached_tokens > 0
    assert ask(server, [5] * 200)[0] == text  # of which there is no room for all


def resident(server):
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) << 10


def test_memory_stays_flat_over_many_requests(start):
    """Send 400 requests, or MOBA_TEST_REQUESTS, of every kind: streams, evidence, cancelled ones, errors."""
    server = start("--cache-size", "16m", "--dtype", "auto", model=NEEDLE)
    client = server.client()

    def send(seed):
        draw = random.Random(seed)
        prompt = [draw.randrange(1, 2000) for _ in range(draw.randrange(1, 400))]
        settings = {"model": NEEDLE.name, "prompt": prompt, "max_tokens": 4}
        extra = {"ignore_eos": True, "evidence": seed % 3 == 0, "return_progress": seed % 2 == 0}
        if seed % 10 == 0:
            with pytest.raises(openai.BadRequestError):
                client.completions.create(**settings, temperature=-1)
        elif seed % 10 == 1:
            stream = client.completions.create(
                **{**settings, "max_tokens": 2000}, stream=True, extra_body=extra
            )
            next(iter(stream))
            stream.close()
        else:
            answer = client.completions.create(**settings, stream=seed % 2 == 0, extra_body=extra)
            assert seed % 2 or list(answer)

    total = int(os.environ.get("MOBA_TEST_REQUESTS", "400"))
    sizes = []
    with ThreadPoolExecutor(4) as threads:
        for part in range(4):
            list(threads.map(send, range(total * part // 4, total * (part + 1) // 4)))
            server.wait_until_idle()
            sizes.append(resident(server))
    # After the first part the cache is full and every path has been used.
    assert sizes[3] - sizes[0] < 8 << 20, [size >> 20 for size in sizes]
