"""Types of computations: those that autocast asks for, and those this processor is fast at."""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_HAS = dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}
"""Whether the processor has an instruction set; empty before PyTorch 2.11."""
_UNITS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16"),
}
"""Instruction sets that multiply numbers of each type, on x86 and on ARM."""


def has(*names: str) -> bool:
    """Return whether the processor has one of some instruction sets, by PyTorch's names."""
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
            f"this CPU has no units for {name}: graphs multiply in float32, so autocast saves "
            "memory but no time, and PyTorch's own layers take longer than without it",
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


def call(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``layer(x)``, computed in float32 under autocast if that takes less time.

    The result has the type of :func:`accepted_dtype`.
    """
    is_tensor = isinstance(x, Tensor)  # and not a proxy, with which torch.fx traces networks
    if not is_tensor or not x.is_cpu or not torch.is_autocast_enabled("cpu"):
        return layer(x)
    dtype = torch.get_autocast_dtype("cpu")
    if has(*_UNITS[dtype]):
        return layer(x)
    with torch.autocast("cpu", enabled=False):
        return layer(x.float()).to(torch.float32 if dtype == torch.float16 else dtype)
