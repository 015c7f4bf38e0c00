"""The operators on packed tensors; `ops.pyi` documents their signatures."""

import torch

from . import _operator as _operator

attention = torch.ops.moba.attention.default
attention_backward = torch.ops.moba.attention_backward.default
decode = torch.ops.moba.decode.default
paged_attention = torch.ops.moba.paged_attention.default
paged_decode = torch.ops.moba.paged_decode.default
select = torch.ops.moba.select.default
select_by_gate = torch.ops.moba.select_by_gate.default
block_features = torch.ops.moba.block_features.default
update_means = torch.ops.moba.update_means.default
