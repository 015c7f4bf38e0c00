"""The page of `moba serve`, used in a browser."""

import io
import os
import struct
from pathlib import Path

import pytest
from browser import Browser
from serving import Server

LINES = [f"Room {i} has {i % 7 + 2} windows and a green carpet." for i in range(30)]
LINES[17] = "The code of the archive in Köln is 7349."
DOCUMENT = "\n".join(LINES)
QUESTION = "What is the code of the archive?"


@pytest.fixture(scope="module")
def server(build_folder):
    running = Server(build_folder, "--cache-size", "600m")
    yield running
    assert running.stop() == (0, "")


@pytest.fixture
def browser(tmp_path):
    running = Browser(tmp_path)
    yield running
    running.close()


def keep(picture, name):
    if folder := os.environ.get("MOBA_TEST_PICTURES"):
        from PIL import Image  # not needed otherwise

        few_colours = Image.open(io.BytesIO(picture)).convert("RGB").quantize(64)
        few_colours.save(Path(folder) / name, optimize=True)


def text_of(browser, name):
    return browser.run(f"document.getElementById('{name}').textContent")


def focused(browser):
    return browser.run("document.activeElement.id || document.activeElement.className")


def paste(browser, text):
    browser.run("document.getElementById('document').focus()")
    browser.type(text)


def ask(browser, question):
    """Ask with the keyboard and wait for the end of the answer."""
    browser.run(
        "document.getElementById('question').focus(), document.getElementById('question').select()"
    )
    browser.type(question)
    browser.press("Enter", modifiers=2)
    browser.wait("!document.getElementById('stop').hidden")
    browser.wait("document.getElementById('stop').hidden")


CONTRAST = """(() => {
  const linear = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => linear(c / 255)).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    const layers = [];
    for (let opaque = false; element && !opaque; element = element.parentElement) {
      const [r, g, b, alpha = 1] = parse(getComputedStyle(element).backgroundColor);
      layers.push([r, g, b, alpha]);
      opaque = alpha === 1;
    }
    return layers.reverse().reduce((under, [r, g, b, alpha]) => [r, g, b].map((c, i) => alpha * c + (1 - alpha) * under[i]), [255, 255, 255]);
  };
  return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && e.innerText?.trim() && !e.disabled).map(e => {
    const a = light(parse(getComputedStyle(e).color)), b = light(behind(e));
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + "#" + e.id + "." + e.className];
  });
})()"""


def check_contrast(browser, name):
    """Check the contrast of every text in both colour schemes, and keep pictures of them."""
    backgrounds = set()
    for scheme in ("light", "dark"):
        browser.emulate(scheme)
        backgrounds.add(browser.run("getComputedStyle(document.body).backgroundColor"))
        assert [found for found in browser.run(CONTRAST) if found[0] < 4.5] == []
        keep(browser.picture(), f"serve-page-{name}-{scheme}.png")
    assert len(backgrounds) == 2
    browser.emulate("light")


def test_answer_streams_and_its_sentences_show_their_passages(server, browser):
    browser.open(server.url)
    browser.wait("document.getElementById('model').textContent !== ''")
    assert server.line.split()[0] in text_of(browser, "model")
    paste(browser, DOCUMENT)
    assert text_of(browser, "size") == f"{len(DOCUMENT):,} characters"
    browser.run(
        """window.readings = new Set(), new MutationObserver(() => readings.add(document.getElementById('progress-text').textContent))
           .observe(document.getElementById('progress-text'), { childList: true })"""
    )
    ask(browser, QUESTION)
    answer = browser.run("document.querySelector('.answer').textContent")
    assert "7349" in answer, text_of(browser, "error")
    assert any("of" in text and "tokens" in text for text in browser.run("[...readings]"))
    assert text_of(browser, "status") == f"Answer: {answer}"

    # The sentence is operable without a mouse: it follows the answers' place in the order of focus.
    index = browser.run(
        "[...document.querySelectorAll('.sentence')].findIndex(s => s.textContent.includes('7349'))"
    )
    browser.run(f"document.querySelectorAll('.sentence')[{index}].focus()")
    browser.press("Enter")
    assert browser.run(f"document.querySelectorAll('.sentence')[{index}].ariaPressed") == "true"
    marked = browser.run("[...document.querySelectorAll('mark')].map(mark => mark.textContent)")
    assert any("7349" in text or "archive" in text for text in marked), marked
    assert browser.run("document.getElementById('view').textContent") == DOCUMENT
    assert "highlighted" in text_of(browser, "status")
    passages = browser.run(
        "[...document.querySelectorAll('.passages button')].map(b => b.textContent)"
    )
    assert len(passages) == len(marked) and passages[0][0].isdigit()
    shares = [float(text.split("%")[0]) for text in passages]
    assert shares == sorted(shares, reverse=True)
    browser.run("document.querySelectorAll('.passages button')[0].click()")
    assert browser.run("document.querySelectorAll('mark.current').length") == 1

    picture = browser.picture()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", picture[16:24]) == (
        1280,
        800,
    )
    keep(picture, "serve-page.png")
    check_contrast(browser, "answer")

    # Another question about the document, which the server has.
    ask(browser, "How many windows has room 3?")
    about = browser.run(
        "[...document.querySelectorAll('#answers > li')].map(li => li.lastChild.textContent)"
    )
    assert len(about) == 2 and ", 0 of them from the cache" in about[0]
    assert int(about[1].split("prompt, ")[1].split()[0].replace(",", "")) > 200
    assert browser.problems == []
    assert {
        url.split("/v1/")[0].rstrip("/") for url in browser.requests if not url.startswith("data:")
    } == {server.url}


def test_wrong_use_and_errors_are_told(server, browser):
    browser.open(server.url)
    browser.run(
        "document.getElementById('question').value = 'x', document.getElementById('ask').requestSubmit()"
    )
    assert "document first" in text_of(browser, "error")
    paste(browser, "word " * 9000)
    ask(browser, QUESTION)
    assert "expected at most 8192 tokens" in text_of(browser, "error")
    assert browser.run("document.querySelectorAll('#answers > li').length") == 0

    drop = """{ const data = new DataTransfer();
              data.items.add(new File([%s], 'a.txt'));
              window.dispatchEvent(new DragEvent('drop', { dataTransfer: data, cancelable: true })) }"""
    browser.run(drop % "new Uint8Array([255, 254, 0])")
    browser.wait("document.getElementById('error').textContent.includes('UTF-8')")
    browser.run(drop % "'Grüße'")
    browser.wait("document.getElementById('document').value === 'Grüße'")
    assert text_of(browser, "error") == "" and focused(browser) == "question"


def test_answer_can_be_stopped(server, browser):
    browser.open(server.url)
    text = "One, two, three, <script>document.title = 'run'</script><b>four</b>, five, six."
    paste(browser, text)
    browser.run("document.getElementById('tokens').value = 5000")
    browser.run("document.getElementById('question').focus()")
    browser.type("Continue this list up to one thousand, every number in words.")
    browser.press("Enter", modifiers=2)
    browser.wait("document.querySelector('.answer')?.textContent.length > 10")
    browser.run("document.getElementById('stop').click()")
    browser.wait("document.getElementById('stop').hidden")
    assert (
        browser.run("document.querySelector('#answers > li').lastChild.textContent") == "Stopped."
    )
    server.wait_until_idle()


def test_key_is_asked_for_where_the_server_needs_one(build_folder, browser, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("right\n")
    server = Server(build_folder, "--api-key-file", keys, "--cache-size", "200m")
    try:
        browser.open(server.url)
        browser.wait("!document.getElementById('access').hidden")
        assert "needs an API key" in text_of(browser, "error") and focused(browser) == "key"
        browser.type("wrong")
        browser.press("Enter")
        browser.wait("document.getElementById('error').textContent.includes('does not accept')")
        browser.run("document.getElementById('key').select()")
        browser.type("right")
        browser.press("Enter")
        browser.wait(
            "document.getElementById('access').hidden && document.getElementById('model').textContent !== ''"
        )
        assert text_of(browser, "error") == ""
        paste(browser, "The sky is blue.")
        ask(browser, "Which colour has the sky?")
        assert "blue" in browser.run("document.querySelector('.answer').textContent")
    finally:
        server.stop()
    ask_again = "document.getElementById('ask').requestSubmit()"
    browser.run(ask_again)
    browser.wait("document.getElementById('error').textContent.includes('does not answer')")


def test_page_loads_nothing_and_runs_its_own_script_only(server):
    status, fields, text = server.send("/")
    assert status == 200 and fields["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in fields["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["script-src"].startswith("'sha256-") and policy["style-src"].startswith(
        "'sha256-"
    )
    assert fields["X-Content-Type-Options"] == "nosniff"
    assert (
        "http" not in text.split("<body>")[1] and "<script src" not in text and "style=" not in text
    )


def test_page_is_usable_by_keyboard_and_screen_reader_in_light_and_dark(server, browser):
    browser.open(server.url)
    browser.wait("document.getElementById('model').textContent !== ''")
    order = []
    for _ in range(6):
        browser.press("Tab")
        order.append(focused(browser))
    assert order == ["open", "document", "question", "send", "tokens", "attention"]
    tree = browser.accessible()
    for node in [
        ("heading", "Ask a document"),
        ("region", "Document"),
        ("textbox", "Document"),
        ("button", "Open a file"),
        ("region", "Answers"),
        ("textbox", "Question"),
        ("button", "Ask"),
        ("spinbutton", "Longest answer tokens"),
        ("combobox", "Attention"),
    ]:
        assert node in tree, (node, tree)
    roles = {role for role, _ in tree}
    assert {"alert", "status", "main", "banner"} <= roles
    assert browser.run("document.documentElement.lang") == "en"
    browser.run("document.getElementById('ask').requestSubmit()")
    check_contrast(browser, "empty")
