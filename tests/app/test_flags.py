"""The tables of flags in docs/command-line.md are those that the program prints."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "flag_tables.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("flag_tables", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.MOBA.exists(), f"{module.MOBA} is missing: `make build` makes it"
    return module


def help_of(program, *command):
    command_line = [program, *command, "--help"]
    return subprocess.run(command_line, capture_output=True, text=True, check=True).stdout


def subcommands(program, *command):
    """Return every subcommand without subcommands of its own, as "eval loss"."""
    listed = re.search(r"^Subcommands:\n((?:  .*\n)*)", help_of(program, *command), re.MULTILINE)
    names = re.findall(r"^  ([a-z]+) ", listed[1], re.MULTILINE) if listed else []
    if not names:
        return [" ".join(command)]
    return [leaf for name in names for leaf in subcommands(program, *command, name)]


def tables_of(tool):
    """Return the commands of the page's tables: "generate", or "bench -m MODEL" if a flag changes the others."""
    return [table[1] for table in tool.TABLE.findall(tool.PAGE.read_text())]


def test_page_has_a_table_for_each_subcommand(tool):
    tables = tables_of(tool)
    assert len(set(tables)) == len(tables)
    assert {table.partition(" -")[0] for table in tables} == set(subcommands(tool.MOBA))


def test_tables_are_those_that_the_program_prints(tool):
    page = tool.PAGE.read_text()
    assert page == tool.updated(page), "docs/command-line.md: `make docs` updates it"


def test_tables_have_each_flag_of_help(tool):
    """A flag that is added to CLI11 past the table would be in --help alone."""
    for command in tables_of(tool):
        text = help_of(tool.MOBA, *command.split())
        flags = re.findall(r"^  ((?:-\w,)?--[a-z0-9,-]+)", text, flags=re.MULTILINE)
        rows = re.findall(r"^\| (`-.*?`) \|", tool.tables(command), flags=re.MULTILINE)
        assert [row.replace("`", "").replace(", ", ",") for row in rows] == [
            flag for flag in flags if flag != "-h,--help"
        ]
