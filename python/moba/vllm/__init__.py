"""MoBA in vLLM on CPUs: a plugin that vLLM finds by the entry-point group `vllm.general_plugins`.

Settings come from the model's config.json (or `--hf-overrides`), from `--additional-config '{"moba": {...}}'` or from the
environment variable MOBA_VLLM, a JSON object; the later in this list, the stronger. Their names are those of config.json:
`moba_chunk_size`, `moba_topk`, `moba_sink`, `moba_full_tail`, `moba_full_layers`, `moba_decode`. Without `moba_chunk_size` and
`moba_topk`, vLLM is left as it is.
"""

import json
import os
from typing import TYPE_CHECKING

from ..config import MoBAConfig, config_from, config_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_ENVIRONMENT = "MOBA_VLLM"


def register() -> None:
    """Put MoBA in place of the attention backends of vLLM's CPU platform, which ask for their settings when they are made."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, "moba.vllm.backend.MobaBackend")
    register_backend(AttentionBackendEnum.CPU_MLA, "moba.vllm.mla.CpuMlaBackend")
    register_backend(AttentionBackendEnum.AMX_MLA, "moba.vllm.mla.AmxMlaBackend")


def settings_of(vllm_config: "VllmConfig") -> MoBAConfig | None:
    """Return the settings of a model, or None if it has none. Raises TypeError or ValueError naming the setting."""
    text = os.environ.get(_ENVIRONMENT)
    if text:
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"moba.vllm: {_ENVIRONMENT}: expected a JSON object, got {text!r} ({error})"
            ) from None
        return config_from(given, f"moba.vllm: {_ENVIRONMENT}")
    additional = vllm_config.additional_config
    if isinstance(additional, dict) and additional.get("moba") is not None:
        return config_from(additional["moba"], "moba.vllm: additional_config.moba")
    if vllm_config.model_config is None:
        return None
    return config_of(vllm_config.model_config.hf_text_config, "moba.vllm")
