#!/usr/bin/env python3
"""Writes the tables of flags in docs/command-line.md, as `moba COMMAND --help-markdown` prints them."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOBA = Path(os.environ.get("MOBA_BUILD_DIR", ROOT / "build" / "release")) / "moba"
PAGE = ROOT / "docs" / "command-line.md"
TABLE = re.compile(r"(<!-- flags of moba ([A-Za-z -]+), .*? -->\n).*?(<!-- end -->\n)", re.DOTALL)


def printed(command):
    command_line = [MOBA, *command.split(), "--help-markdown"]
    return subprocess.run(command_line, capture_output=True, text=True, check=True).stdout


def updated(page):
    return TABLE.sub(lambda table: table[1] + printed(table[2]) + table[3], page)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
