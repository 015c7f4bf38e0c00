#!/usr/bin/env python3
"""Run clang-tidy on the sources of a build, and record those that are clean.

Covers the compilation database: the library, the program, the PyTorch operator, the tests and, compiled for the
emulated device, the CUDA sources. A source is checked again when it, a header that it includes, the settings or its
command has changed.

    tools/tidy.py build/lint -j2 [PATH ...]
"""

import argparse
import concurrent.futures
import functools
import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def compile_commands(build: Path, paths: list[str]) -> dict[Path, dict]:
    """Return the build's entries for sources of the repository, under `paths` if any are given."""
    wanted = [Path(path).resolve() for path in paths] or [ROOT]
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    ours = {ROOT / line for line in tracked.stdout.splitlines()}
    entries = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        file = (Path(entry["directory"]) / entry["file"]).resolve()
        if file in ours and any(file.is_relative_to(path) for path in wanted):
            entries.setdefault(file, entry)
    return entries


def included_files(entry: dict) -> list[str]:
    """Return the source and the headers that it includes, without system headers."""
    command = shlex.split(entry["command"])
    output = command.index("-o")
    del command[output : output + 2]
    rule = subprocess.run(
        [*command, "-MM"], cwd=entry["directory"], check=True, capture_output=True, text=True
    )
    names = rule.stdout.replace("\\\n", " ").split()[1:]  # after the rule's target
    return sorted({str((Path(entry["directory"]) / name).resolve()) for name in names})


@functools.cache
def digest(file: str) -> bytes:
    return hashlib.sha256(Path(file).read_bytes()).digest() if Path(file).exists() else b""


@functools.cache
def settings() -> bytes:
    version = subprocess.run(["clang-tidy", "--version"], check=True, capture_output=True)
    return version.stdout + digest(str(ROOT / ".clang-tidy"))


def fingerprint(entry: dict, files: list[str]) -> str:
    parts = [settings(), entry["command"].encode(), *map(digest, files)]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="a folder with compile_commands.json")
    parser.add_argument(
        "paths", nargs="*", help="files or folders; the whole repository by default"
    )
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count())
    options = parser.parse_intermixed_args()

    record_folder = options.build / "tidy"
    record_folder.mkdir(exist_ok=True)

    def record_of(file: Path) -> Path:
        return record_folder / (str(file.relative_to(ROOT)).replace("/", "+") + ".json")

    def is_known_clean(file: Path, entry: dict) -> bool:
        if not record_of(file).exists():
            return False
        record = json.loads(record_of(file).read_text())
        return record["fingerprint"] == fingerprint(entry, record["files"])

    def tidy(file: Path, entry: dict) -> subprocess.CompletedProcess:
        command = ["clang-tidy", "-p", options.build, "--quiet", file]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            files = included_files(entry)
            record = {"fingerprint": fingerprint(entry, files), "files": files}
            record_of(file).write_text(json.dumps(record))
        return result

    entries = compile_commands(options.build, options.paths)
    pending = {file: entry for file, entry in entries.items() if not is_known_clean(file, entry)}
    unclean = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(tidy, file, entry): file for file, entry in pending.items()}
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            print(f"[{done}/{len(pending)}] {futures[future].relative_to(ROOT)}", flush=True)
            result = future.result()
            if result.returncode != 0:
                unclean += 1
                print(result.stdout + result.stderr, flush=True)
    known = len(entries) - len(pending)
    print(f"clang-tidy: {unclean} of {len(pending)} sources have findings, {known} are unchanged")
    return 1 if unclean else 0


if __name__ == "__main__":
    sys.exit(main())
