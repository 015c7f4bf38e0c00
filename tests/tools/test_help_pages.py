"""The man page and the completions list every subcommand and flag of the program."""

import importlib
import re
import shlex
import shutil
import subprocess

import pytest
from builds import ROOT


@pytest.fixture(scope="module")
def pages():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        yield importlib.import_module("help_pages")


@pytest.fixture(scope="module")
def commands(pages, build_folder):
    return list(pages.leaves(program=build_folder / "moba"))


@pytest.fixture(scope="module")
def share(pages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("share")
    pages.write(folder)
    return folder


@pytest.fixture
def completed(share):
    """completed("info", "--mo") returns the words that bash offers for the last one."""
    script = share / "bash-completion" / "completions" / "moba"

    def run(*words):
        listed = " ".join(map(shlex.quote, ("moba", *words)))
        code = f'. {script}; COMP_WORDS=({listed}); COMP_CWORD={len(words)}; _moba; printf "%s\\n" "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    return run


def test_man_page_has_each_flag_of_each_subcommand(share, commands):
    page = (share / "man" / "man1" / "moba.1").read_text()
    sections = dict(re.findall(r'^\.SS "moba (.*?)"\n(.*?)(?=^\.S[SH] )', page, re.M | re.S))
    sections = {name.replace("\\-", "-"): text for name, text in sections.items()}
    assert list(sections) == [command for command, _ in commands]
    for command, about in commands:
        for flag in about["flags"]:
            for name in flag["names"]:
                assert f"\\fB{name}\\fR".replace("-", "\\-") in sections[command], (command, name)
    assert "\\fBMOBA_CPU_TARGET\\fR" in page and "MOBA_TEST_CASES" not in page


def test_man_page_has_no_errors(share):
    if not shutil.which("mandoc"):
        pytest.skip("mandoc is not installed")
    command = ["mandoc", "-T", "lint", "-W", "warning", share / "man" / "man1" / "moba.1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "ERROR" not in done.stdout and "UNSUPP" not in done.stdout, done.stdout


def test_bash_completes_subcommands(completed):
    assert completed("gen") == ["generate"]
    assert {"train", "eval", "info", "bench"} <= set(completed(""))
    assert completed("eval", "n") == ["needle"]
    assert completed("--v") == ["--version"]


def test_bash_completes_the_flags_of_the_subcommand(completed, commands):
    for command, about in commands:
        listed = completed(*command.partition(" -")[0].split(), "-")
        names = {name for flag in about["flags"] for name in flag["names"]}
        assert names | {"--help"} <= set(listed), command
    assert completed("info", "--te") == ["--tensors"]


def test_bash_completes_words_and_files(completed, tmp_path, monkeypatch):
    assert completed("generate", "--attn", "moba") == ["moba", "moba-naive"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    assert completed("generate", "-m", "mo") == ["model.gguf"]
    assert completed("generate", "--model", "") == ["model.gguf"]


def test_zsh_completion_has_each_flag_and_parses(share, commands):
    file = share / "zsh" / "site-functions" / "_moba"
    functions = dict(re.findall(r"^_moba_(\w+)\(\) \{\n(.*?)^\}", file.read_text(), re.M | re.S))
    for command, about in commands:
        function = functions[command.partition(" -")[0].replace(" ", "_")]
        for flag in about["flags"]:
            assert all(
                re.search(rf"[{{,']{name}[}},']|\){name}'", function) for name in flag["names"]
            )
    if shutil.which("zsh"):
        subprocess.run(["zsh", "-n", file], check=True)
