#!/usr/bin/env python3
"""Writes the man page and the completions of bash and zsh, of the flags that `moba COMMAND --help-json` describes.

tools/help_pages.py FOLDER      writes FOLDER/man/man1/moba.1, FOLDER/bash-completion/completions/moba and
                                FOLDER/zsh/site-functions/_moba, as they lie in /usr/share
"""

import re
import sys
from pathlib import Path

from flag_tables import MOBA, ROOT, described, grouped

# Commands whose flags depend on another flag; its value is a placeholder.
VARIANTS = {"bench": "bench -m MODEL"}
FILES = {"PATH", "FILE", "DIR", "FOLDER"}


def leaves(command="", program=MOBA):
    """Yield (command, its JSON) for every command without subcommands, such as "eval loss"."""
    described_command = described(command, program)
    if "subcommands" not in described_command:
        yield command, described_command
        if command in VARIANTS:
            yield VARIANTS[command], described(VARIANTS[command], program)
        return
    for subcommand in described_command["subcommands"]:
        yield from leaves(f"{command} {subcommand['name']}".strip(), program)


def version():
    return re.search(r"project\(moba VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())[1]


# The man page.


def roff(text):
    """Escape what roff would read as a request or a special character."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "")
    return "".join(
        f"\\&{line}" if line[:1] in (".", "'") else line for line in text.splitlines(True)
    )


def man_flag(flag):
    names = ", ".join(f"\\fB{roff(name)}\\fR" for name in flag["names"])
    values = ("," if flag["list"] else "|").join(flag["words"]) or flag["type"]
    text = roff(flag["help"])
    if flag["required"]:
        text += ". Required."
    elif flag["default"]:
        text += f". Default: {roff(flag['default'])}."
    return f".TP\n{names}{f' {roff(values)}' if values else ''}\n{text}\n"


def man_command(command, about):
    text = f'.SS "moba {roff(command)}"\n{roff(about["description"])}.\n'
    for group, flags in grouped(about["flags"]).items():
        if group != "Options":
            text += f".PP\n{roff(group)}:\n"
        text += "".join(map(man_flag, flags))
    if about["examples"]:
        text += f".PP\n.nf\n{roff(about['examples'].strip())}\n.fi\n"
    return text


def man_environment():
    """Return the variables that the program and the library read, from the table of docs/building.md."""
    page = (ROOT / "docs" / "building.md").read_text()
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \| (.*?) \| ([^|]*) \| (.*?) \|$", page, re.MULTILINE)
    return "".join(
        f".TP\n\\fB{name}\\fR ({roff(values)})\n{roff(effect)}\n"
        for name, values, reader, effect in rows
        if {"library", "program"} & set(reader.split(", "))
    )


def man_page(commands):
    about = described("")
    return (
        f'.TH MOBA 1 "" "moba {version()}" "User Commands"\n'
        f".SH NAME\nmoba \\- {roff(about['description'])}\n"
        ".SH SYNOPSIS\n.B moba\n.I SUBCOMMAND\n[\\fIFLAGS\\fR]\n"
        ".SH DESCRIPTION\nMixture of Block Attention (arXiv 2502.13189) for models of the Llama family: each query attends to its own\n"
        "block of keys and to the best others. Models are GGUF files or Hugging Face folders.\n"
        ".PP\n\\fB\\-\\-help\\fR after a subcommand prints its flags, \\fB\\-\\-version\\fR the version and the build.\n"
        ".SH SUBCOMMANDS\n"
        + "".join(man_command(command, json) for command, json in commands)
        + ".SH EXIT STATUS\n0, 1 for a data error (an invalid file), 2 for a usage error (a flag), 130 after Ctrl\\-C.\n"
        ".SH ENVIRONMENT\n" + man_environment()
    )


# The completions. Commands and flags are tables in both, so that the shells' code is short.


def merged(commands):
    """Return {command: {first name: flag}} with the variants of a command merged."""
    table = {}
    for command, about in commands:
        flags = table.setdefault(command.partition(" -")[0], {})
        for flag in about["flags"]:
            flags.setdefault(flag["names"][-1], flag)
    return table


def children(table):
    """Return {"": ["generate", ...], "eval": ["loss", ...]}."""
    names = {}
    for command in table:
        words = command.split()
        for depth, word in enumerate(words):
            listed = names.setdefault(" ".join(words[:depth]), [])
            if word not in listed:
                listed.append(word)
    return names


BASH = """# Completion of moba for bash; written by tools/help_pages.py.
_moba() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} command= i
  for ((i = 1; i < COMP_CWORD; ++i)); do
    case "$command ${{COMP_WORDS[i]}}" in
{commands}        command+=" ${{COMP_WORDS[i]}}" ;;
    esac
  done
  local subcommands= flags= words= files=
  case "$command" in
{tables}  esac
  COMPREPLY=()
  if [[ -n $words ]]; then
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
  elif [[ -n $subcommands && $word != -* ]]; then
    mapfile -t COMPREPLY < <(compgen -W "$subcommands" -- "$word")
  elif [[ -z $files && $word == -* ]]; then
    mapfile -t COMPREPLY < <(compgen -W "$flags --help" -- "$word")
  elif [[ -n $files ]]; then
    mapfile -t COMPREPLY < <(compgen -f -- "$word")
    compopt -o filenames 2>/dev/null
  fi
}}
complete -F _moba moba
"""


def bash_words(flag):
    """Return the case of the word after a flag."""
    names = "|".join(flag["names"])
    if flag["words"]:
        return f"        {names}) words='{' '.join(flag['words'])}' ;;\n"
    return f"        {names}) files=1 ;;\n" if flag["type"] in FILES else ""


def bash_completion(table):
    names = children(table)
    tables = ""
    for parent, subcommands in names.items():
        pattern = f'" {parent}"' if parent else '""'
        flags = "" if parent else " flags=--version"
        tables += f"    {pattern}) subcommands='{' '.join(subcommands)}'{flags} ;;\n"
    for command, flags in table.items():
        listed = " ".join(name for flag in flags.values() for name in flag["names"])
        cases = "".join(map(bash_words, flags.values()))
        tables += f"    \" {command}\")\n      flags='{listed}'\n      case $before in\n{cases}      esac\n      ;;\n"
    paths = [f"{parent} {name}".strip() for parent, listed in names.items() for name in listed]
    commands = "      " + " | ".join(f'" {path}"' for path in paths) + ")\n"
    return BASH.format(commands=commands, tables=tables)


def zsh_quoted(text):
    return text.replace("'", "'\\''").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")


def zsh_flag(flag):
    names, value = flag["names"], ""
    if flag["words"]:
        words = " ".join(flag["words"])
        value = f":value:_values -s , value {words}" if flag["list"] else f":value:({words})"
    elif flag["type"]:
        value = f":{flag['type'].lower()}:{'_files' if flag['type'] in FILES else ' '}"
    form = "{" + ",".join(names) + "}" if len(names) > 1 else names[0]
    exclusive = f"({' '.join(names)})"
    return f"    '{exclusive}'{form}'[{zsh_quoted(flag['help'])}]{value}'"


def zsh_function(path):
    return "_".join(["_moba", *path.split()])


def zsh_parent(parent, listed):
    names = " ".join(listed)
    cases = "".join(f"      {name}) {zsh_function(f'{parent} {name}')} ;;\n" for name in listed)
    return (
        f"{zsh_function(parent)}() {{\n  local state line\n"
        f"  _arguments -C '(- *)--help[Print the help and exit]' '1:subcommand:({names})' '*::arguments:->rest'\n"
        f"  if [[ $state == rest ]]; then\n    case $line[1] in\n{cases}    esac\n  fi\n}}\n\n"
    )


def zsh_completion(table):
    text = "#compdef moba\n# Completion of moba for zsh; written by tools/help_pages.py.\n\n"
    for parent, listed in children(table).items():
        text += zsh_parent(parent, listed)
    for command, flags in table.items():
        rows = " \\\n".join(map(zsh_flag, flags.values()))
        text += f"{zsh_function(command)}() {{\n  _arguments '--help[Print the help and exit]' \\\n{rows}\n}}\n\n"
    return text + '_moba "$@"\n'


def write(folder):
    commands = list(leaves())
    table = merged(commands)
    for path, text in (
        ("man/man1/moba.1", man_page(commands)),
        ("bash-completion/completions/moba", bash_completion(table)),
        ("zsh/site-functions/_moba", zsh_completion(table)),
    ):
        file = Path(folder) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    write(sys.argv[1])
