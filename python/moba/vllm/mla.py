"""Backends of multi-head latent attention, which MoBA does not replace: vLLM's own without settings, refused with them."""

from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.mla.amx_mla import AMXMLABackend
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

from . import settings_of


def _refuse_settings() -> None:
    if settings_of(get_current_vllm_config()) is not None:
        raise NotImplementedError(
            "moba.vllm: model: expected keys and values for every head, got multi-head latent attention (MLA)"
        )


class CpuMlaBackend(CPUMLABackend):
    @staticmethod
    def get_impl_cls():
        _refuse_settings()
        return CPUMLABackend.get_impl_cls()


class AmxMlaBackend(AMXMLABackend):
    @staticmethod
    def get_impl_cls():
        _refuse_settings()
        return AMXMLABackend.get_impl_cls()
