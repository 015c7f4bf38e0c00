"""Mixture of Block Attention (arXiv 2502.13189) for PyTorch, on the kernels of libmoba."""

from . import ops
from .config import MoBAConfig
from .functional import attention
from .moba_efficient import moba_attn_varlen
from .moba_naive import moba_attn_varlen_naive
from .modes import Routing, mode, routing
from .wrapper import register_moba

__all__ = [
    "MoBAConfig",
    "Routing",
    "attention",
    "moba_attn_varlen",
    "moba_attn_varlen_naive",
    "mode",
    "ops",
    "register_moba",
    "routing",
]
