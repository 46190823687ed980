"""Numba, set up once: kernels are cached where possible and obey PyTorch's thread count."""

from collections.abc import Callable
from typing import Any

import numba
import torch
from numba.core import types
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

Kernel = Callable[..., Any]


def kernel(function: Kernel) -> Kernel:
    """Compile a function of arrays and numbers, with ``numba.prange`` over PyTorch's threads.

    Sums may be reassociated and contracted, so a result agrees with PyTorch's to rounding; NaN and
    infinity keep their meaning.
    """
    options: dict[str, Any] = {"parallel": True, "fastmath": {"contract", "reassoc"}}
    try:
        compiled: Kernel = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written to
        compiled = numba.njit(**options)(function)
    return compiled


def use_torch_threads() -> int:
    """Let the next kernel use as many threads as PyTorch does, and return their number."""
    threads = int(max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)))
    numba.set_num_threads(threads)
    return threads


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typing_context: Any, address: Any, like: Any) -> tuple[Signature, Any]:
    """Turn an address into a pointer to the type of ``like``, for ``numba.carray`` in a kernel."""
    result = types.CPointer(like)  # type: ignore[attr-defined]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(address, like), generate
