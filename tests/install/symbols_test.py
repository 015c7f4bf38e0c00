"""The shared library exports the public API and nothing else."""

import argparse
import re
import subprocess
from pathlib import Path


def names_in(headers):
    """Return the functions and classes that the public headers mark with MOBA_EXPORT."""
    text = "\n".join(header.read_text() for header in sorted(headers.glob("*.h")))
    functions = re.findall(r"^MOBA_EXPORT [^(;]*?\b(\w+)\(", text, re.MULTILINE)
    classes = re.findall(r"^class MOBA_EXPORT (\w+)", text, re.MULTILINE)
    return set(functions), set(classes)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nm", required=True)
    for name in ("library", "headers"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    functions, classes = names_in(options.headers)
    command = [options.nm, "--dynamic", "--defined-only", "--demangle", options.library]
    listing = subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout

    exported, foreign = set(), []
    for line in listing.splitlines():
        symbol = line.split(maxsplit=2)[2]
        if "moba" not in symbol and re.search(r"\b(std|__gnu_cxx)::", symbol):
            continue  # a template of the standard library, which gives its namespaces default visibility
        plain = re.sub(r"^(typeinfo name|typeinfo|vtable|guard variable) for ", "", symbol)
        match = re.match(r"moba::(\w+)(\[abi:\w+\])?", plain)
        name = match.group(1) if match else None
        exported.add(name)
        if name not in functions | classes:
            foreign.append(symbol)
    assert not foreign, "exported, but not of the public API:\n" + "\n".join(foreign)
    missing = (functions | {"KvCache"}) - exported
    assert not missing, f"of the public API, but not exported: {sorted(missing)}"


if __name__ == "__main__":
    main()
