"""vLLM's attention on CPUs with MoBA: prompts are read with MoBA, tokens decoded with full attention or MoBA.

Keys and values lie in vLLM's pages as rows [page, head, token, D], which the kernels read through the block table. The mean key
of a block lies in a tensor beside the pages, at the physical page where the block ends: the page's content determines the
block's, so a mean is valid for every request that has the page, also after a hit of the prefix cache or a preemption.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from .. import ops
from ..config import MoBAConfig
from ..functional import EVERYTHING
from . import settings_of
from .batch import Run, parts_of, runs_of

logger = init_logger(__name__)
_MAX_HEAD_DIM = 256


@dataclass
class MobaMetadata(CPUAttentionMetadata):
    before: Tensor | None = None  # int32 [requests]: tokens in the cache before this step
    completed: frozenset[int] = frozenset()  # the sizes of which a block is completed in this step
    runs: list[Run] = field(default_factory=list)


class MobaMetadataBuilder(CPUAttentionMetadataBuilder):
    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.config = settings_of(vllm_config)
        self.block_sizes: set[int] = set()
        if self.config is None:
            return
        self._begin_layers(self.config)
        # The runners hand the lengths of prompts to the builder where a model has this window; nothing else reads it on CPUs.
        vllm_config.model_config.model_arch_config.rswa_window = 0

    def _begin_layers(self, config: MoBAConfig) -> None:
        layers = self.vllm_config.model_config.hf_text_config.num_hidden_layers
        for name, layer in get_layers_from_vllm_config(
            self.vllm_config, Attention, self.layer_names
        ).items():
            index = extract_layer_index(name)
            if config.is_full_layer(index, layers):
                continue
            try:
                layer.impl.config = config.of_layer(index, layers)
            except ValueError as error:
                raise ValueError(f"moba.vllm: {str(error).split(': ', 1)[1]}") from None
            self._check_layer(layer.impl.config, layer)
            self.block_sizes.add(layer.impl.config.moba_chunk_size)
        if self.vllm_config.kv_transfer_config is not None:
            raise NotImplementedError(
                "moba.vllm: kv_transfer_config: expected none (means of blocks are not transferred), got one"
            )
        logger.info_once(
            "MoBA: blocks of %s tokens, top-k %s, sink %s, full tail %d, full layers %s, decode %s",
            str(config.moba_chunk_size),
            str(config.moba_topk),
            str(config.sink_blocks),
            config.full_tail,
            str(list(config.full_layers)),
            config.decode,
        )

    def _check_layer(self, config: MoBAConfig, layer: Attention) -> None:
        """Raise for a layer that MoBA cannot compute."""
        impl = layer.impl
        for name, is_set, wanted, got in (
            (
                "attn_type",
                impl.attn_type != AttentionType.DECODER,
                "decoder layers",
                AttentionType(impl.attn_type).value,
            ),
            ("sliding_window", impl.sliding_window != -1, "none", impl.sliding_window),
            ("alibi_slopes", impl.alibi_slopes is not None, "none", "ALiBi"),
            ("logits_soft_cap", bool(impl.logits_soft_cap), "none", impl.logits_soft_cap),
            ("sinks", impl.sinks is not None, "none", "learned attention sinks"),
            (
                "kv_sharing_target_layer_name",
                impl.kv_sharing_target_layer_name is not None,
                "a cache for every layer",
                impl.kv_sharing_target_layer_name,
            ),
            (
                "kv_cache_dtype",
                is_quantized_kv_cache(impl.kv_cache_dtype),
                "auto",
                impl.kv_cache_dtype,
            ),
            (
                "head_size",
                impl.head_size > _MAX_HEAD_DIM,
                f"at most {_MAX_HEAD_DIM}",
                impl.head_size,
            ),
        ):
            if is_set:
                raise NotImplementedError(
                    f"moba.vllm: {name}: expected {wanted} in {layer.layer_name} (or the layer in moba_full_layers), got {got}"
                )
        page, block = self.kv_cache_spec.block_size, config.moba_chunk_size
        if page % block != 0 and block % page != 0:
            raise ValueError(
                f"moba.vllm: block_size: expected a divisor or a multiple of moba_chunk_size {block}, got {page} "
                "(--block-size sets it)"
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.config is None:
            return metadata
        if metadata.causal is not True or metadata.dynamic_causal is not None:
            raise NotImplementedError("moba.vllm: causal: expected True, got a batch that is not")
        lengths = metadata.seq_lens.tolist()
        starts = metadata.query_start_loc.tolist()
        prompts = common_attn_metadata.rswa_prefix_lens
        parts = parts_of(
            self.config, starts, lengths, lengths if prompts is None else prompts.tolist()
        )
        before = [length - (end - first) for length, first, end in zip(lengths, starts, starts[1:])]
        return MobaMetadata(
            **vars(metadata),
            before=torch.tensor(before, dtype=torch.int32),
            completed=frozenset(
                size
                for size in self.block_sizes
                if any(a // size < b // size for a, b in zip(before, lengths))
            ),
            runs=runs_of(parts, metadata.block_table),
        )


class MobaImpl(CPUAttentionBackendImpl):
    """A layer of vLLM's CPU backend, or one with MoBA if its builder sets a configuration."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.config: MoBAConfig | None = None
        self._kv_cache: Tensor | None = None

    def _bind(self, kv_cache: Tensor) -> None:
        """Make views [pages, page_tokens, Hkv, D] of keys and values, and the means beside them."""
        pages, heads, tokens, width = kv_cache.shape
        rows = kv_cache.view(pages, heads, 2 * tokens, width // 2)
        self._k, self._v = (half.transpose(1, 2) for half in rows.chunk(2, dim=2))
        blocks = max(tokens // self.config.moba_chunk_size, 1)
        self._means = torch.zeros(pages, blocks, heads, width // 2)
        self._kv_cache = kv_cache

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        if self.config is None:
            return super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self._kv_cache is not kv_cache:
            self._bind(kv_cache)
        count = slot_mapping.shape[0]
        page_tokens = kv_cache.shape[2]
        place = slot_mapping // page_tokens, slot_mapping % page_tokens
        self._k[place] = key[:count]
        self._v[place] = value[:count]

    def forward(
        self,
        layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: MobaMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if self.config is None or attn_metadata is None:
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        config = self.config
        if config.moba_chunk_size in attn_metadata.completed:
            ops.update_means(
                self._k,
                self._means,
                attn_metadata.block_table,
                attn_metadata.seq_lens,
                attn_metadata.before,
                config.moba_chunk_size,
                attn_metadata.max_query_len,
            )
        for run in attn_metadata.runs:
            attend = ops.paged_decode if run.decodes else ops.paged_attention
            lists = (run.page_table, run.lengths) + (() if run.decodes else (run.cu_seqlens_q,))
            top_k = EVERYTHING if run.is_full else config.moba_topk
            sinks = 0 if run.is_full else config.sink_blocks
            out, _ = attend(
                query[run.first : run.last],
                self._k,
                self._v,
                self._means,
                *lists,
                config.moba_chunk_size,
                top_k,
                sinks,
                self.scale,
            )
            output[run.first : run.last] = out
        return output


class MobaBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[MobaImpl]:
        return MobaImpl

    @staticmethod
    def get_builder_cls() -> type[MobaMetadataBuilder]:
        return MobaMetadataBuilder
