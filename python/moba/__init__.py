"""Mixture of Block Attention (arXiv 2502.13189) for PyTorch, on the kernels of libmoba."""

from typing import TYPE_CHECKING, Any

from . import ops
from .config import MoBAConfig
from .functional import attention, block_features, select
from .moba_efficient import moba_attn_varlen
from .moba_naive import moba_attn_varlen_naive
from .modes import Routing, mode, routing
from .wrapper import register_moba

if TYPE_CHECKING:
    from .cache import MobaCache

__all__ = [
    "MoBAConfig",
    "MobaCache",
    "Routing",
    "attention",
    "block_features",
    "moba_attn_varlen",
    "moba_attn_varlen_naive",
    "mode",
    "ops",
    "register_moba",
    "routing",
    "select",
]


def __getattr__(name: str) -> Any:
    if name == "MobaCache":  # the only name that needs transformers
        from .cache import MobaCache

        return MobaCache
    if name == "__version__":
        from importlib.metadata import version

        return version("moba")
    raise AttributeError(f"module 'moba' has no attribute {name!r}")
