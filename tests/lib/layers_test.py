"""A folder is a layer: checks that every include is allowed (docs/architecture.md)."""

import re
import sys
from pathlib import Path

FOLDERS = ["include/moba", "src/reference", "src/cpu", "src/cuda", "src", "python", "llm", "app"]
TORCH = re.compile(r"(torch|ATen|c10)/")

# Includes that each folder must not have, by the path that #include names.
FORBIDDEN = {
    "include/moba": ["llm/", "app/", "python/", "reference/", "cpu/", "cuda/"],
    "src": ["llm/", "app/", "python/", "reference/", "cpu/", "cuda/"],
    "src/reference": ["llm/", "app/", "python/", "cpu/", "cuda/"],
    "src/cpu": ["llm/", "app/", "python/", "reference/", "cuda/"],
    "src/cuda": ["llm/", "app/", "python/", "reference/", "cpu/"],
    "python": ["llm/", "app/", "reference/", "cpu/", "cuda/", "backend.h", "call.h"],
    "llm": ["app/", "python/", "reference/", "cpu/", "cuda/", "backend.h", "call.h"],
    "app": ["python/", "reference/", "cpu/", "cuda/", "backend.h", "call.h"],
}
WITHOUT_TORCH = ["include/moba", "src", "src/reference", "src/cpu", "src/cuda"]


def folder_of(path: str) -> str | None:
    """Return the most specific layer of a file."""
    return next((folder for folder in FOLDERS if path.startswith(folder + "/")), None)


def wrong(path: str, include: str) -> bool:
    folder = folder_of(path)
    if folder is None:
        return False
    if folder in WITHOUT_TORCH and TORCH.match(include):
        return True
    return any(include.removeprefix("src/").startswith(prefix) for prefix in FORBIDDEN[folder])


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)


def test_rule_finds_forbidden_includes():
    assert wrong("src/api.cpp", "torch/torch.h")
    assert wrong("include/moba/cache.h", "ATen/core/Tensor.h")
    assert wrong("src/cpu/attend.cpp", "reference/stages.h")
    assert wrong("llm/model/model.cpp", "python/ops.h")
    assert wrong("llm/model/model.cpp", "src/cpu/topk.h")
    assert not wrong("llm/model/model.cpp", "src/stopwatch.h")
    assert not wrong("llm/model/model.cpp", "moba/attention.h")
    assert not wrong("src/cpu/attend.cpp", "cpu/stages.h")
    assert includes('#include "a/b.h"\n  # include <c.h>\n// #include "no.h"') == ["a/b.h", "c.h"]


def main(root: Path) -> int:
    test_rule_finds_forbidden_includes()
    seen, broken = 0, []
    for folder in FOLDERS:
        for file in sorted((root / folder).rglob("*")):
            if file.suffix not in {".h", ".hpp", ".cpp", ".cc", ".cu", ".cuh"}:
                continue
            seen += 1
            path = file.relative_to(root).as_posix()
            for include in includes(file.read_text(encoding="utf-8", errors="replace")):
                if wrong(path, include):
                    broken.append(f"{path}: may not include {include}")
    print("\n".join(broken) if broken else f"{seen} files, every include points the right way")
    return 1 if broken or seen == 0 else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
