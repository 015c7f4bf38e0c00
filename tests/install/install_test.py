"""The library in a separate project: installed, found by find_package, and as a subdirectory."""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SUBDIRECTORY = """
cmake_minimum_required(VERSION 3.25)
project(consumer LANGUAGES CXX)
add_subdirectory({source} moba)
foreach(target moba_program moba_lib_tests)
  if(TARGET ${{target}})
    message(FATAL_ERROR "${{target}} is a target of a subdirectory build")
  endif()
endforeach()
file(WRITE ${{CMAKE_BINARY_DIR}}/main.cpp "#include <moba/cache.h>\\nint main() {{}}\\n")
add_executable(consumer ${{CMAKE_BINARY_DIR}}/main.cpp)
target_link_libraries(consumer PRIVATE moba::moba)
"""


def run(*command):
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def check_installed_example(cmake, source, build, folder):
    prefix, example = folder / "prefix", folder / "example"
    run(cmake, "--install", build, "--prefix", prefix)
    for header in (source / "include" / "moba").glob("*.h"):
        assert (prefix / "include" / "moba" / header.name).exists(), header.name

    # A copy, so that the example cannot use the source tree.
    (folder / "copy").mkdir()
    for file in (source / "examples" / "cpp").iterdir():
        (folder / "copy" / file.name).write_text(file.read_text())
    run(
        cmake,
        "-S",
        folder / "copy",
        "-B",
        example,
        f"-DCMAKE_PREFIX_PATH={prefix}",
        "-DCMAKE_CXX_FLAGS=-Wall -Wextra",
    )
    run(cmake, "--build", example)

    lines = run(example / "example").splitlines()
    pattern = r"top-k +(\d+): +[\d.]+ ms, largest difference from full ([\d.]+), the last token selects blocks ([\d ]+)"
    (every, same, _), (few, other, blocks) = (
        re.fullmatch(pattern, line).groups() for line in lines
    )
    assert (every, same, few) == ("16", "0.000", "3"), lines
    assert float(other) > 0, lines
    chosen = [int(block) for block in blocks.split()]
    assert len(set(chosen)) == 3 and chosen == sorted(chosen) and chosen[-1] == 15, lines


def check_version_is_honoured(cmake, folder):
    project = folder / "newer"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(newer LANGUAGES CXX)\nfind_package(moba 99 QUIET)\n"
        'if(moba_FOUND)\n  message(FATAL_ERROR "version 99 was found")\nendif()\n'
    )
    run(cmake, "-S", project, "-B", project / "build", f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}")


def check_subdirectory(cmake, source, folder):
    """Configure without building: the build has compiled the same sources."""
    project = folder / "consumer"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(SUBDIRECTORY.format(source=source))
    run(cmake, "-S", project, "-B", project / "build")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("cmake", "source", "build"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        check_installed_example(options.cmake, options.source, options.build, folder)
        check_version_is_honoured(options.cmake, folder)
        check_subdirectory(options.cmake, options.source, folder)


if __name__ == "__main__":
    main()
