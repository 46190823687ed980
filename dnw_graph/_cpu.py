"""What the processor of this machine can do."""

from collections.abc import Callable

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


def call(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``layer(x)``, computed in float32 under autocast if that takes less time.

    The result has the type that autocast promises.
    """
    if not x.is_cpu or not torch.is_autocast_enabled("cpu"):
        return layer(x)
    dtype = torch.get_autocast_dtype("cpu")
    if has(*_UNITS[dtype]):
        return layer(x)
    with torch.autocast("cpu", enabled=False):
        return layer(x.float()).to(dtype)
