"""The table of environment variables in docs/building.md lists exactly what the code reads."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (
    "src",
    "app",
    "llm",
    "python",
    "include",
    "tests",
    "tools",
    "benchmarks",
    "examples",
    "cmake",
)
SUFFIXES = {".cpp", ".h", ".cu", ".py", ".cmake", ".txt"}
NAME = "([A-Z][A-Z0-9_]+)"
READS = [
    rf'getenv\("{NAME}"',
    rf'environ(?:\.get\(|\[)"{NAME}"',
    rf'"{NAME}" (?:not )?in os\.environ',
    rf'"{NAME}"\) if os\.environ',
    rf"ENV {NAME}",
    r'"(MOBA_[A-Z0-9_]+)"',  # named by a constant, or handed to a function that reads it
]


def names_in(text):
    return {name for pattern in READS for name in re.findall(pattern, text)}


def files():
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SUFFIXES and path != Path(__file__).resolve():
                yield path
    yield ROOT / "CMakeLists.txt"


def documented():
    page = (ROOT / "docs" / "building.md").read_text()
    section = page.split("## Environment variables\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| ((?:`[A-Z0-9_]+`(?:, )?)+) \|", section, flags=re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def read_by_the_code():
    names = set(re.findall(rf'env = "{NAME}"', (ROOT / "pyproject.toml").read_text()))
    for path in files():
        text = path.read_text()
        names |= names_in(text)
        # `[... os.environ[name] ... for name in ("A", "B")]`
        for listed in re.findall(r"os\.environ\[name\][^\]]*?\sfor name in \(([^)]*)\)", text):
            names |= set(re.findall(f'"{NAME}"', listed))
    return names


def test_table_lists_each_variable_once():
    names = documented()
    assert len(names) == len(set(names))


def test_table_equals_what_the_code_reads():
    names = read_by_the_code()
    assert {"MOBA_BACKEND", "MOBA_CPU_TARGET", "MOBA_CPU_BF16", "CUDA_HOME", "NO_COLOR"} <= names
    assert set(documented()) == names
