"""Types of computations: those that autocast asks for, and those this processor is fast at."""

import warnings
from functools import cache

import torch
from torch import Tensor, nn

_CAPABILITIES = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
_HAS = dict(_CAPABILITIES) if _CAPABILITIES.get("architecture") == "x86_64" else {}
"""Whether the processor has an instruction set; empty if that is not known."""
_UNITS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}
"""Instruction sets that multiply numbers of each type."""


def has(*names: str) -> bool:
    """Return whether the processor has one of some instruction sets; True if that is not known."""
    return not _HAS or any(_HAS.get(name, False) for name in names)


def lacks_units_for(x: Tensor) -> bool:
    """Return whether products of ``x`` take longer than in float32, since it is narrower.

    Without units for bfloat16, PyTorch's products take eight times as long (AMD Zen 3).
    """
    return x.is_cpu and x.dtype in _UNITS and not has(*_UNITS[x.dtype])


def check_autocast(device: torch.device) -> None:
    """Warn once if autocast is enabled on a CPU without units for its type."""
    if device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        warn_without_units(torch.get_autocast_dtype("cpu"))


@cache
def warn_without_units(dtype: torch.dtype) -> None:
    """Warn if this CPU has no units for a type that is narrower than float32."""
    if not has(*_UNITS[dtype]):
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"this CPU has no units for {name}: graphs multiply in float32, so autocast saves no "
            "time, and PyTorch's own layers take longer than without it",
            stacklevel=2,
        )


def accepted_dtype(x: Tensor) -> torch.dtype:
    """Return the type of the computation: autocast's if that is enabled, else that of ``x``.

    On a CPU, there are no kernels for float16, so the type is float32, as for many of PyTorch's
    operations under autocast.
    """
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x.dtype
    dtype = torch.get_autocast_dtype(x.device.type)
    return torch.float32 if x.is_cpu and dtype == torch.float16 else dtype


def call(layer: nn.Module, x: Tensor) -> Tensor:
    """Return ``layer(x)``, computed in float32 under autocast if that takes less time.

    The result has the type of :func:`accepted_dtype`. Layers with weights of other types are called
    as they are.
    """
    is_tensor = isinstance(x, Tensor)  # and not a proxy, with which torch.fx traces networks
    if not is_tensor or not x.is_cpu or not torch.is_autocast_enabled("cpu"):
        result: Tensor = layer(x)
        return result
    has_units = has(*_UNITS[torch.get_autocast_dtype("cpu")])
    if has_units or any(p.dtype != torch.float32 for p in layer.parameters()):
        result = layer(x)
        return result
    dtype = accepted_dtype(x)
    with torch.autocast("cpu", enabled=False):
        result = layer(x.float()).to(dtype)
    return result
