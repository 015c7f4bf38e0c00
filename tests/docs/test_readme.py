"""The README's code: runs the Python, compiles and runs the C++ with an installed library, and checks that the
program accepts the command lines."""

import os
import re
import shlex
import shutil
import subprocess

import pytest
from builds import BUILD, ROOT

README = (ROOT / "README.md").read_text()
PLACEHOLDERS = ("model.gguf", "document.txt")
DATA_ERROR = 1


def snippets(language):
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    assert found, f"README.md: expected a {language} snippet"
    return found


def command_lines():
    return [line for snippet in snippets("sh") for line in snippet.splitlines()]


def existing(path):
    if not path.exists():
        pytest.fail(f"{path} is missing: `make test-cpp` builds it, MOBA_BUILD_DIR names another")
    return path


def run(*command, **options):
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_python_snippets_run(one_thread, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    for code in snippets("python"):
        exec(compile(code, "README.md", "exec"), names)
    assert names["out"].shape == names["q"].shape == names["q"].grad.shape
    assert names["model"].config._attn_implementation == "moba"
    assert names["ids"].shape[1] > 4096


def project(folder, name, cmake):
    """A CMake project of the README's C++ program and the snippet that finds the library."""
    folder.mkdir()
    (code,) = snippets("cpp")
    (folder / "main.cpp").write_text(code)
    linked = cmake.index("target_link_libraries")
    (folder / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.25)\nproject({name} LANGUAGES CXX)\n{cmake[:linked]}"
        f"add_executable(app main.cpp)\n{cmake[linked:]}"
    )
    return folder


@pytest.fixture(scope="module")
def cmake():
    program = shutil.which("cmake")
    if program is None:
        pytest.fail("cmake is missing: `make setup` installs it")
    return program


def test_cpp_snippet_builds_against_an_installed_library_and_runs(cmake, tmp_path):
    run(cmake, "--install", existing(BUILD), "--prefix", tmp_path / "prefix")
    installed, _ = snippets("cmake")
    source = project(tmp_path / "app", "installed", installed)
    found = f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}"
    warnings = "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"
    run(cmake, "-S", source, "-B", source / "build", found, warnings)
    run(cmake, "--build", source / "build")
    run(source / "build" / "app", env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_fetch_content_snippet_configures(cmake, tmp_path):
    """Configure with this source tree, without compiling the library a second time."""
    _, fetched = snippets("cmake")
    source = project(tmp_path / "app", "fetched", fetched)
    here = f"-DFETCHCONTENT_SOURCE_DIR_MOBA={ROOT}"
    run(cmake, "-S", source, "-B", source / "build", here)


@pytest.fixture
def folder(tmp_path):
    """A folder with the files that the README's command lines read, in which they may write."""
    for name in ("models", "docs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("line", command_lines())
def test_command_line_is_accepted(folder, line):
    """Lines about files of the repository run; the others end with a data error, not a usage error,
    at their missing file."""
    program, *arguments = shlex.split(line)
    assert program == "moba"
    done = subprocess.run(
        [existing(BUILD / "moba"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    missing = [name for name in PLACEHOLDERS if name in arguments]
    assert done.returncode == (DATA_ERROR if missing else 0), done.stderr
    if missing:
        assert any(name in done.stderr for name in missing), done.stderr
    if "-o" in arguments:
        assert (folder / arguments[arguments.index("-o") + 1]).exists()


def test_every_relative_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
