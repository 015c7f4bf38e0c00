"""The library in a separate project: installed, found by find_package, and as a subdirectory."""

import argparse
import os
import re
import shutil
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


VERSIONS = """
cmake_minimum_required(VERSION 3.25)
project(versions LANGUAGES CXX)
foreach(version 0.9 1.99 2 99)
  find_package(moba ${version} QUIET)
  if(moba_FOUND)
    message(FATAL_ERROR "version ${version} was found")
  endif()
endforeach()
find_package(moba 1 REQUIRED)
"""


def run(*command, **options):
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def install(cmake, source, build, folder):
    """Install into one folder and move it to folder/prefix, since a package must not depend on its place."""
    run(cmake, "--install", build, "--prefix", folder / "before")
    prefix = folder / "prefix"
    (folder / "before").rename(prefix)
    for header in (source / "include" / "moba").glob("*.h"):
        assert (prefix / "include" / "moba" / header.name).exists(), header.name


def build_example(cmake, source, folder, kind):
    """Build a copy of the example, which cannot use the source tree, and return its program."""
    copy, build = folder / f"copy-{kind}", folder / f"example-{kind}"
    copy.mkdir()
    for file in (source / "examples" / "cpp").iterdir():
        text = file.read_text()
        if kind == "shared" and file.name == "CMakeLists.txt":
            text = text.replace("1.0 REQUIRED", "1.0 REQUIRED COMPONENTS shared")
            text = text.replace("moba::moba", "moba::shared")
            assert "moba::moba" not in text and "COMPONENTS" in text
        (copy / file.name).write_text(text)
    flags = [f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}", "-DCMAKE_CXX_FLAGS=-Wall -Wextra"]
    if kind == "shared":  # which needs no dependency of the library
        flags.append("-DCMAKE_DISABLE_FIND_PACKAGE_hwy=ON")
    run(cmake, "-S", copy, "-B", build, *flags)
    run(cmake, "--build", build)
    return build / "example"


def build_with_pkg_config(compiler, source, folder, *flags):
    """Build the example as a plain makefile would, and return its program."""
    package = next((folder / "prefix").rglob("pkgconfig"))
    environment = os.environ | {"PKG_CONFIG_PATH": str(package)}
    words = run("pkg-config", "--cflags", "--libs", *flags, "moba", env=environment).split()
    version = run("pkg-config", "--modversion", "moba", env=environment).strip()
    assert re.search(rf"project\(moba VERSION {version} ", (source / "CMakeLists.txt").read_text())
    program = folder / "by-pkg-config"
    if flags:  # --static
        words = [str(package.parent / "libmoba.a") if word == "-lmoba" else word for word in words]
    search = f"-Wl,-rpath,{package.parent}"
    main = source / "examples" / "cpp" / "main.cpp"
    run(compiler, "-std=c++20", main, "-o", program, *words, search)
    return program


def check_example(program):
    lines = run(program).splitlines()
    pattern = r"top-k +(\d+): +[\d.]+ ms, largest difference from full ([\d.]+), the last token selects blocks ([\d ]+)"
    (every, same, _), (few, other, blocks) = (
        re.fullmatch(pattern, line).groups() for line in lines
    )
    assert (every, same, few) == ("16", "0.000", "3"), lines
    assert float(other) > 0, lines
    chosen = [int(block) for block in blocks.split()]
    assert len(set(chosen)) == 3 and chosen == sorted(chosen) and chosen[-1] == 15, lines


def check_version_is_honoured(cmake, folder):
    project = folder / "versions"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(VERSIONS)
    run(cmake, "-S", project, "-B", project / "build", f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}")


def check_subdirectory(cmake, source, folder):
    """Configure without building: the build has compiled the same sources."""
    project = folder / "consumer"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(SUBDIRECTORY.format(source=source))
    run(cmake, "-S", project, "-B", project / "build")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("cmake", "compiler", "source", "build"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        install(options.cmake, options.source, options.build, folder)
        kinds = ["static"]
        if list((folder / "prefix").rglob("moba-shared-targets.cmake")):
            kinds.append("shared")
        for kind in kinds:
            check_example(build_example(options.cmake, options.source, folder, kind))
        if shutil.which("pkg-config"):
            for flags in ([], ["--static"]):
                check_example(
                    build_with_pkg_config(options.compiler, options.source, folder, *flags)
                )
        check_version_is_honoured(options.cmake, folder)
        check_subdirectory(options.cmake, options.source, folder)


if __name__ == "__main__":
    main()
