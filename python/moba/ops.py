"""The operators on packed tensors; `ops.pyi` documents their signatures."""

import torch

from . import _operator as _operator

attention = torch.ops.moba.attention.default
attention_backward = torch.ops.moba.attention_backward.default
decode = torch.ops.moba.decode.default
select = torch.ops.moba.select.default
select_by_gate = torch.ops.moba.select_by_gate.default
block_features = torch.ops.moba.block_features.default
