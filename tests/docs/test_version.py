"""The version stands in CMakeLists.txt; what must repeat it agrees."""

import re
import subprocess

import moba
import pytest
from builds import ROOT

VERSION = re.search(r"project\(moba VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())[1]


def found(path, pattern):
    return re.findall(pattern, (ROOT / path).read_text(), re.MULTILINE)


def test_program_and_package_have_the_version_of_the_project(build_folder):
    command = [build_folder / "moba", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == f"moba {VERSION}"
    assert moba.__version__ == VERSION


def test_changelog_begins_with_the_version():
    assert found("CHANGELOG.md", r"^## ([\d.]+)")[0] == VERSION


def test_citation_names_the_version():
    assert found("CITATION.cff", r"^version: (.*)$") == [VERSION]


@pytest.mark.parametrize("page", ["README.md", "docs/building.md"])
def test_pages_request_a_compatible_package(page):
    requested = found(page, r"find_package\(moba ([\d.]+)")
    assert requested and set(requested) == {".".join(VERSION.split(".")[:2])}
