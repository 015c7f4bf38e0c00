"""Training over several ranks: attention over sequences that are shared out within a process group of torch.distributed.

Runs on Gloo (CPU); NCCL (CUDA) takes the same calls but has not been tested.
"""

from .context_parallel import ContextParallel, context_parallel_attention
from .exchange import Traffic, count_traffic
from .shards import shard, shard_batch, unshard

__all__ = [
    "ContextParallel",
    "Traffic",
    "context_parallel_attention",
    "count_traffic",
    "shard",
    "shard_batch",
    "unshard",
]
