#!/usr/bin/env python3
"""Writes the tables of flags in docs/command-line.md, of the flags that `moba COMMAND --help-json` describes."""

import json
import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOBA = Path(os.environ.get("MOBA_BUILD_DIR", ROOT / "build" / "release")) / "moba"
PAGE = ROOT / "docs" / "command-line.md"
TABLE = re.compile(r"(<!-- flags of moba ([A-Za-z -]+), .*? -->\n).*?(<!-- end -->\n)", re.DOTALL)


def described(command, program=MOBA):
    """Return the JSON of a command such as "generate", "eval" or "bench -m MODEL"; "" is the program itself."""
    command_line = [program, *command.split(), "--help-json"]
    return json.loads(subprocess.run(command_line, capture_output=True, check=True).stdout)


def meaning(flag):
    """Return the help of a flag with the words that it takes."""
    words = ", ".join(f"`{word}`" for word in flag["words"])
    return (
        f"{flag['help']}. {'Any' if flag['list'] else 'One'} of {words}" if words else flag["help"]
    )


def row(flag):
    names = ", ".join(f"`{name}`" for name in flag["names"])
    default = "required" if flag["required"] else flag["default"]
    cells = (names, *(cell.replace("|", "\\|") for cell in (default, meaning(flag))))
    return f"| {' | '.join(cells)} |\n"


def grouped(flags):
    """Return the flags of each group, in the order of --help."""
    groups = {}
    for flag in flags:
        groups.setdefault(flag["group"], []).append(flag)
    return groups


def tables(command):
    """Return a table of the flags for each group, under its name except for the first."""
    texts = [
        (group, "| flag | default | meaning |\n|---|---|---|\n" + "".join(map(row, flags)))
        for group, flags in grouped(described(command)["flags"]).items()
    ]
    return "\n".join(
        text if i == 0 else f"{group}:\n\n{text}" for i, (group, text) in enumerate(texts)
    )


def updated(page):
    return TABLE.sub(lambda table: table[1] + tables(table[2]) + table[3], page)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
