"""The build and the model that the tests use."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = Path(os.environ.get("MOBA_BUILD_DIR", ROOT / "build" / "release")).absolute()
SMOLLM2 = Path(
    os.environ.get("MOBA_SMOLLM2", ROOT / "build" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")
)


def existing(path, how):
    if not path.exists():
        pytest.fail(f"{path} is missing: {how}")
    return path
