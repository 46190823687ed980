"""Kernels compiled by Numba, cached if possible, which use PyTorch's number of threads."""

import os
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numba
import numpy as np
import torch
from llvmlite.binding import get_host_cpu_features
from numba.core import types
from numba.core.typing.templates import Signature
from numba.extending import intrinsic, overload
from torch import Tensor

_launching = threading.Lock()
_in_forked_child = False
_has_triton = find_spec("triton") is not None  # not cached by a function: torch.compile would warn


def _note_fork() -> None:
    global _in_forked_child
    _in_forked_child = True


os.register_at_fork(after_in_child=_note_fork)


def in_forked_child() -> bool:
    """Return whether this process was forked, so that kernels run on one thread."""
    return _in_forked_child


def can_compile() -> bool:
    """Return whether Numba compiles, which ``NUMBA_DISABLE_JIT=1`` disables."""
    return not numba.config.DISABLE_JIT


def compiles_for(device: torch.device) -> bool:
    """Return whether kernels are available: from Numba on CPUs, from Triton on GPUs."""
    return can_compile() and (device.type == "cpu" or (device.type == "cuda" and has_triton()))


def has_triton() -> bool:
    """Return whether Triton is installed."""
    return _has_triton


def vector_floats() -> int:
    """Return how many floats a vector of the processor holds for which Numba compiles."""
    features = numba.config.CPU_FEATURES  # set by NUMBA_CPU_FEATURES
    if features is None:
        return 16 if get_host_cpu_features().get("avx512f") else 8
    return 16 if "+avx512f" in features else 8


def threads() -> int:
    """Return the number of threads a kernel uses: PyTorch's, up to Numba's maximum."""
    return max(1, min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS)))


class Kernel:
    """A compiled function of arrays and numbers, with ``numba.prange`` over PyTorch's threads.

    Sums may be reassociated and contracted, so results agree with PyTorch's up to rounding; NaN and
    infinity are preserved. Calls from several Python threads run one after the other, since not
    every threading layer allows concurrent launches. In a forked process, where OpenMP must not
    start threads, a kernel runs on one thread.

    Args:
        function: The function to compile. Numba caches the result next to its file and compiles
            again when that file changes, but not when a function it calls from another file does.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        options: dict[str, Any] = {"fastmath": {"contract", "reassoc"}}
        try:
            self._parallel = numba.njit(parallel=True, cache=True, **options)(function)
        except RuntimeError:  # neither this folder nor the user's cache folder is writable
            self._parallel = numba.njit(parallel=True, **options)(function)
        # Compiled at its first call and not cached: it would overwrite the parallel version's file.
        self._serial = numba.njit(**options)(function)
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any) -> Any:
        if _in_forked_child:
            return self._serial(*args)
        with _launching:
            count = torch.get_num_threads()
            numba.set_num_threads(threads())
            # Numba's first launch sets OpenMP's thread count, which PyTorch shares.
            if torch.get_num_threads() != count:
                torch.set_num_threads(count)
            return self._parallel(*args)


def inline(function: Callable[..., Any]) -> Any:
    """Compile a function to be called by kernels of the same file."""
    return numba.njit(fastmath={"contract", "reassoc"}, error_model="numpy")(function)


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typing_context: Any, address: Any, like: Any) -> tuple[Signature, Any]:
    """Convert an address to a pointer to the type of ``like``, for ``numba.carray`` in a kernel."""
    result = types.CPointer(like)  # type: ignore[attr-defined]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(address, like), generate


def array(x: Tensor) -> np.ndarray:
    """Return a contiguous tensor as an array for a kernel.

    bfloat16 becomes 16-bit integers, which :func:`load` and :func:`store` convert.
    """
    x = x.detach()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


# Numba requires the four signatures below to be alike, so they have no annotations.
# ruff: noqa: ANN001, ANN202


def load(row, i):  # type: ignore[no-untyped-def]
    """Return element ``i`` of a row as a float, in a kernel."""
    raise NotImplementedError


def store(row, i, value):  # type: ignore[no-untyped-def]
    """Write a float to element ``i`` of a row, in a kernel."""
    raise NotImplementedError


@overload(load)
def _load(row, i):  # type: ignore[no-untyped-def]
    if row.dtype == types.uint16:
        return lambda row, i: _as_float(np.uint32(row[i]) << np.uint32(16))
    return lambda row, i: row[i]


@overload(store)
def _store(row, i, value):  # type: ignore[no-untyped-def]
    if row.dtype != types.uint16:

        def write(row, i, value):  # type: ignore[no-untyped-def]
            row[i] = value

        return write

    def write_rounded(row, i, value):  # type: ignore[no-untyped-def]  # to nearest even; NaN stays NaN
        bits = _as_bits(np.float32(value))
        nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        row[i] = np.uint16((nearest if value == value else bits) >> np.uint32(16))

    return write_rounded


@intrinsic  # type: ignore[untyped-decorator]
def _as_float(typing_context: Any, bits: Any) -> tuple[Signature, Any]:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _as_bits(typing_context: Any, value: Any) -> tuple[Signature, Any]:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate
