"""`moba inspect`: its page, opened in a browser, against the selection of the same model in Python; and its refusals."""

import html
import json
import re
import shutil
import struct
import subprocess

import moba as moba_package
import numpy as np
import pytest
import torch
import transformers
from builds import BUILD
from byte_model import save_byte_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MOBA = BUILD / "moba"
LAYERS, HEADS, KV_HEADS, BLOCK, TOP_K = 2, 4, 2, 16, 4
# Text that would end the script that embeds it, and characters of more than one byte.
TEXT = "".join(
    f"Line {i}: </script><b>&amp; caf\N{LATIN SMALL LETTER E WITH ACUTE} {i * i}\n"
    for i in range(11)
)


def run(*arguments):
    if not MOBA.exists():
        pytest.fail(f"{MOBA} is missing: `make build` makes it, MOBA_BUILD_DIR names another")
    return subprocess.run(
        [MOBA, "inspect", *map(str, arguments)], capture_output=True, text=True, timeout=100
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random model whose tokens are bytes."""
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
def page(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    inspect(model, f"{folder}/page.html,{folder}/page.png", "f32")
    return folder / "page.html"


def inspect(model, output, dtype):
    done = run(
        "-m",
        model,
        "-p",
        TEXT,
        "-o",
        output,
        "--dtype",
        dtype,
        "--moba-chunk-size",
        BLOCK,
        "--moba-topk",
        TOP_K,
        "--moba-sink",
        0,
    )
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr


def script(page, name):
    return re.search(
        rf'<script type="[^"]+" id="{name}">(.*?)</script>', page.read_text(encoding="utf-8"), re.S
    )[1]


@pytest.fixture(scope="module")
def data(page):
    return json.loads(script(page, "data"))


def shares(page, data):
    """Return the shares [layer, head, row, column]."""
    characters = np.frombuffer(script(page, "maps").encode(), dtype=np.uint8)
    return (characters - 48).reshape(LAYERS, HEADS, data["rows"], data["columns"]) / 63


@pytest.fixture(scope="module")
def chosen(page, data):
    return shares(page, data)


@pytest.fixture(scope="module")
def there(model):
    """Return the selection of the package, [layer, head, query, block], and the gate's margins [layer, head, query]."""
    moba_package.register_moba(moba_package.MoBAConfig(moba_chunk_size=BLOCK, moba_topk=TOP_K))
    attend, seen = ALL_ATTENTION_FUNCTIONS["moba"], []

    def probe(module, query, key, *rest, **options):
        seen.append((query[0], key[0]))
        return attend(module, query, key, *rest, **options)

    ALL_ATTENTION_FUNCTIONS.register("moba", probe)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model, attn_implementation="moba", dtype=torch.float32
    )
    ids = torch.tensor([list(TEXT.encode())])
    with torch.no_grad(), moba_package.routing(network) as record:
        network(ids)
    ALL_ATTENTION_FUNCTIONS.register("moba", attend)

    tokens = ids.shape[1]
    blocks = -(-tokens // BLOCK)
    selected = np.zeros((LAYERS, HEADS, tokens, blocks), dtype=bool)
    margins = np.full((LAYERS, HEADS, tokens), np.nan)
    for layer, (query, key) in enumerate(seen):
        (selection,) = record[layer]
        for head in range(HEADS):
            means = (
                key[head * KV_HEADS // HEADS][: tokens // BLOCK * BLOCK]
                .unflatten(0, (-1, BLOCK))
                .mean(1)
            )
            for i in range(tokens):
                row = selection[0, head, i]
                selected[layer, head, i, row[row >= 0]] = True
                scores = (means[: i // BLOCK] @ query[head, i]).sort(descending=True).values
                if len(scores) >= TOP_K:
                    margins[layer, head, i] = scores[TOP_K - 2] - scores[TOP_K - 1]
    return selected, margins


def test_selection_equals_that_of_the_package(data, chosen, there):
    selected, margins = there
    assert (
        data["tokens"] == selected.shape[2] == data["rows"]
        and data["queries_in_row"] == data["blocks_in_column"] == 1
    )
    differs = (chosen != selected).any(axis=3)
    assert not (differs & ~(margins < 1e-5)).any()  # except where two scores are nearly equal
    assert differs.mean() < 0.01


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_sixteen_bits_select_nearly_the_same(model, data, chosen, tmp_path, dtype):
    inspect(model, tmp_path / "page.html", dtype)
    rounded = json.loads(script(tmp_path / "page.html", "data"))
    assert 0 < (shares(tmp_path / "page.html", data) != chosen).mean() < 0.05
    for exact, ours in zip(data["layers"], rounded["layers"], strict=True):
        for head, other in zip(exact["heads"], ours["heads"], strict=True):
            assert other["margin"] == pytest.approx(head["margin"], rel=0.05)


def test_shares_equal_those_of_the_selection(data, there):
    selected, _ = there
    tokens, blocks = selected.shape[2:]
    own, block = np.arange(tokens)[:, None] // BLOCK, np.arange(blocks)[None]
    places = np.select([block == own, block == 0, block == own - 1], [0, 1, 2], 3)
    for layer in range(LAYERS):
        for head in range(HEADS):
            counts = [(selected[layer, head] & (places == place)).sum() for place in range(4)]
            shares = data["layers"][layer]["heads"][head]["shares"]
            assert shares == pytest.approx(np.array(counts) / sum(counts), abs=2 / sum(counts))
            assert sum(shares) == pytest.approx(1)


def test_margins_equal_those_of_the_gate(data, there):
    _, margins = there
    for layer in range(LAYERS):
        for head in range(HEADS):
            expected, found = margins[layer, head], data["layers"][layer]["heads"][head]
            rows = np.array([np.nan if value is None else value for value in found["margins"]])
            assert (np.isnan(rows) == np.isnan(expected)).all()
            np.testing.assert_allclose(rows, expected, rtol=2e-3, atol=1e-5)
            assert found["margin"] == pytest.approx(np.nanmean(expected), rel=2e-3)


def test_blocks_have_their_texts(data):
    assert all(len(text) <= BLOCK for text in data["texts"])
    whole = TEXT.encode()
    assert data["texts"] == [
        whole[i : i + BLOCK].decode(errors="replace") for i in range(0, len(whole), BLOCK)
    ]


# ---------------------------------------------------------------- in the browser


def element(dom, name):
    return html.unescape(
        re.search(rf'id="{name}"[^>]*>(.*?)</(?:span|p|h2|pre|div)>', dom, re.S)[1]
    )


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.fail("chromium is missing: `tools/setup.sh browser` installs it")
    profile = tmp_path_factory.mktemp("profile")

    def dom(page, place):
        done = subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={profile}",
                "--virtual-time-budget=2000",
                "--dump-dom",
                f"{page.as_uri()}#{place}",
            ],
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return dom


def test_browser_shows_the_values(page, data, chosen, browse):
    layer, head, row, column = 1, 2, 140, 3
    dom = browse(page, f"layer={layer}&head={head}&row={row}&column={column}")
    one = data["layers"][layer]["heads"][head]
    for name, share in zip(("current", "sink", "recent", "far"), one["shares"]):
        assert element(dom, f"share-{name}") == f"{100 * share:.1f}%"
    assert (
        element(dom, "cell")
        == f"block 3, tokens 48 to 63: selected by {100 * chosen[layer, head, row, column]:.1f}% of the queries"
    )
    assert element(dom, "block") == data["texts"][column]
    assert element(dom, "query") == data["texts"][row // BLOCK]
    assert float(re.search(r"gate margin (\S+)", element(dom, "row"))[1]) == pytest.approx(
        one["margins"][row], rel=1e-3
    )
    assert float(re.search(r"Gate margin: (\S+)", element(dom, "margin"))[1]) == pytest.approx(
        one["margin"], rel=1e-3
    )
    assert f"{data['tokens']} tokens in {len(data['texts'])} blocks of {BLOCK}" in element(
        dom, "about"
    )
    overview = re.findall(r"<td [^>]*>(\d+)</td>", dom)
    assert [int(share) for share in overview] == pytest.approx(
        [100 * one["shares"][3] for layer in data["layers"] for one in layer["heads"]], abs=0.51
    )
    assert "<b>" not in element(dom, "about") and not re.search(
        r'(?:src|href)="', dom
    )  # nothing is loaded


def test_invalid_address_is_ignored(page, data, browse):
    dom = browse(page, "layer=99&head=x&row=-1&column=1e9")
    assert (
        element(dom, "share-current") == f"{100 * data['layers'][0]['heads'][0]['shares'][0]:.1f}%"
    )


# ---------------------------------------------------------------- other ways to call it


def test_picture_is_a_png(page):
    header = page.with_suffix(".png").read_bytes()[:24]
    width, height = struct.unpack(">II", header[16:])
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and width > 1000 and height > 500


def test_long_texts_are_aggregated(model, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text(TEXT * 12, encoding="utf-8")
    done = run(
        "-m",
        model,
        "-f",
        file,
        "-o",
        tmp_path / "page.html",
        "--attn",
        "full",
        "--moba-chunk-size",
        2,
        "--moba-topk",
        3,
        "--moba-sink",
        1,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").stat().st_size < 6_000_000
    data = json.loads(script(tmp_path / "page.html", "data"))
    assert data["tokens"] == len(file.read_bytes()) - 1 and data["sink_blocks"] == 1
    assert (
        data["rows"] * data["queries_in_row"]
        >= data["tokens"]
        > (data["rows"] - 1) * data["queries_in_row"]
    )
    assert data["columns"] * data["blocks_in_column"] >= len(data["texts"])
    assert data["blocks_in_column"] > 1 and data["queries_in_row"] > 1
    assert all(layer["full"] for layer in data["layers"])
    for one in (one for layer in data["layers"] for one in layer["heads"]):
        assert one["shares"][0] == pytest.approx(1 / 3, abs=0.01) and one["shares"][
            1
        ] == pytest.approx(1 / 3, abs=0.01)


def test_one_token_selects_its_own_block(model, tmp_path):
    done = run("-m", model, "-p", "x", "-o", f"{tmp_path}/page.html,{tmp_path}/page.png")
    assert done.returncode == 0, done.stderr
    data = json.loads(script(tmp_path / "page.html", "data"))
    assert data["texts"] == ["x"] and data["layers"][0]["heads"][0] == {
        "shares": [1, 0, 0, 0],
        "margin": None,
        "margins": [None],
    }


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        ([], 2, ["--prompt", "--file"]),
        (["-p", ""], 2, ["--prompt", "empty"]),
        (["-p", "x", "-o", "page.svg"], 2, ["--output", "page.svg"]),
        (["-p", "x", "-o", "/nowhere/page.html"], 1, ["/nowhere/page.html"]),
        (["-f", "nowhere.txt"], 1, ["--file", "nowhere.txt"]),
        (["-p", "x", "--attn", "moba-naive"], 2, ["--attn", "moba-naive"]),
        (["-p", "x", "--moba-topk", "0"], 2, ["--moba-topk"]),
        (["-p", "x", "--moba-full-layers", "7"], 2, ["--moba-full-layers"]),
    ],
)
def test_invalid_arguments_are_refused(model, tmp_path, arguments, code, words):
    done = subprocess.run(
        [MOBA, "inspect", "-m", model, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("moba inspect: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert not list(tmp_path.glob("*.html"))
