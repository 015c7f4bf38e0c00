#!/usr/bin/env python3
"""Run clang-tidy on the sources of a build, and remember those that are clean.

Covers what the compilation database holds: the library, the program, its tests and, compiled for the emulated device, the CUDA
sources. A source is looked at again when it, a header, the settings or its command has changed.

    tools/tidy.py build/release -j2 [PATH ...]
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def sources(build: Path, paths: list[str]) -> dict[Path, str]:
    """The compile commands of the repository's own sources, by path; under `paths` where some are given."""
    wanted = [(ROOT / path).resolve() for path in paths] or [ROOT]
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    ours = {ROOT / line for line in tracked.stdout.splitlines()}
    commands = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        file = (Path(entry["directory"]) / entry["file"]).resolve()
        if file in ours and any(file.is_relative_to(path) for path in wanted):
            commands.setdefault(file, entry["command"])
    return commands


def digest_of_headers() -> bytes:
    listed = subprocess.run(
        ["git", "ls-files", "*.h", ".clang-tidy"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    digest = hashlib.sha256()
    for line in listed.stdout.splitlines():
        digest.update((ROOT / line).read_bytes())
    return digest.digest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="a folder with compile_commands.json")
    parser.add_argument(
        "paths", nargs="*", help="files or folders; the whole repository by default"
    )
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count())
    options = parser.parse_intermixed_args()

    clean_folder = options.build / "tidy"
    clean_folder.mkdir(exist_ok=True)
    headers = digest_of_headers()
    pending = {}
    for file, command in sources(options.build, options.paths).items():
        key = hashlib.sha256(headers + command.encode() + file.read_bytes()).hexdigest()
        if not (clean_folder / key).exists():
            pending[file] = key

    def tidy(file: Path) -> tuple[Path, subprocess.CompletedProcess]:
        command = ["clang-tidy", "-p", options.build, "--quiet", file]
        return file, subprocess.run(command, capture_output=True, text=True)

    unclean = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for done, (file, result) in enumerate(pool.map(tidy, pending), 1):
            print(f"[{done}/{len(pending)}] {file.relative_to(ROOT)}", flush=True)
            if result.returncode == 0:
                (clean_folder / pending[file]).touch()
            else:
                unclean += 1
                print(result.stdout + result.stderr, flush=True)
    print(f"clang-tidy: {unclean} of {len(pending)} sources have findings")
    return 1 if unclean else 0


if __name__ == "__main__":
    sys.exit(main())
