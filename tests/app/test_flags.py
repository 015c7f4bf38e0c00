"""The tables of flags in docs/command-line.md against the program's own --help."""

import re
import subprocess

import pytest
from builds import BUILD, ROOT

MOBA = BUILD / "moba"
PAGE = (ROOT / "docs" / "command-line.md").read_text()
COMMANDS = {
    "generate": ["generate"],
    "bench": ["bench"],
    "info": ["info"],
    "tokenize": ["tokenize"],
    "train": ["train"],
    "eval": ["eval loss", "eval needle", "eval ruler"],
    "inspect": ["inspect"],
}
NAME = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")


def default_in(text):
    """Return the default that a line of --help shows, `=40`, `[40]` or `[the same, else 40]`, or None."""
    found = re.search(r"\[(?:[^\]]*\belse )?([^\[\]]+)\]\s*$", text) or re.search(
        r"^\S+ [A-Z]+=(\S+)", text
    )
    return found.group(1) if found else None


def options_of(command):
    """Return the options in `moba COMMAND --help`: the set of names of each, and its default."""
    assert MOBA.exists(), f"{MOBA} is missing: `make build` makes it, MOBA_BUILD_DIR names another"
    text = subprocess.run(
        [MOBA, *command.split(), "--help"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    options = []
    for line in text.split("\n\nExample")[0].splitlines():
        if re.match(r"  -", line):
            options.append(line.strip())
        elif line.startswith("    ") and options:
            options[-1] += " " + line.strip()
    named = [(set(NAME.findall(text.split(" ")[0])), default_in(text)) for text in options]
    return [(names, default) for names, default in named if "--help" not in names]


def section(command):
    return re.search(rf"^## moba {command}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S).group(1)


def documented(command):
    """Return the names of the flags in the first column of a section's tables, or in its prose where it has no table."""
    text = section(command)
    rows = re.findall(r"^\|([^|]*)\|", text, re.M)
    return set(NAME.findall(" ".join(re.findall(r"`([^`]*)`", " ".join(rows) if rows else text))))


@pytest.mark.parametrize("command", COMMANDS)
def test_docs_and_help_name_the_same_flags(command):
    options = [names for name in COMMANDS[command] for names, _ in options_of(name)]
    assert documented(command) <= set().union(*options)
    assert [sorted(names) for names in options if not names & documented(command)] == []


@pytest.mark.parametrize("command", ["generate", "bench", "train", "inspect"])
def test_docs_and_help_give_the_same_defaults(command):
    defaults = {name: default for names, default in options_of(command) for name in names}
    compared = 0
    for flags, cell in re.findall(r"^\|([^|]*)\|([^|]*)\|", section(command), re.M):
        names = re.findall(r"--[a-z][\w-]*", flags)
        values = [value.strip(" `") for value in cell.split(", ")]
        if len(names) != len(values):
            continue
        for name, value in zip(names, values):
            shown = defaults.get(name)
            if shown and re.fullmatch(r"[\w.]+", shown) and re.fullmatch(r"[\w.-]+", value):
                compared += 1
                assert value == shown or float(value) == float(shown), name
    assert compared >= {"inspect": 1}.get(command, 5)
