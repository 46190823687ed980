"""Numba, set up once: kernels are cached where possible and obey PyTorch's thread count."""

import os
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba.core import types
from numba.core.typing.templates import Signature
from numba.extending import intrinsic, overload
from torch import Tensor

_launching = threading.Lock()
_in_forked_child = False


def _note_fork() -> None:
    global _in_forked_child
    _in_forked_child = True


os.register_at_fork(after_in_child=_note_fork)


def can_compile() -> bool:
    """Return whether Numba compiles; with ``NUMBA_DISABLE_JIT=1`` it does not."""
    return not numba.config.DISABLE_JIT


def threads() -> int:
    """Return how many threads a kernel uses: as many as PyTorch does."""
    return max(1, min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS)))


class Kernel:
    """A compiled function of arrays and numbers, with ``numba.prange`` over PyTorch's threads.

    Sums may be reassociated and contracted, so a result agrees with PyTorch's to rounding; NaN and
    infinity keep their meaning. Threads of Python take turns, since not every threading layer lets
    two launch at once; and a forked process, in which OpenMP must not start threads, runs on one.

    Args:
        function: What to compile. Numba keeps the result beside its file, and compiles again when
            that file changes, but not when a function it calls from another file does.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        options: dict[str, Any] = {"fastmath": {"contract", "reassoc"}}
        try:
            self._parallel = numba.njit(parallel=True, cache=True, **options)(function)
        except RuntimeError:  # neither this folder nor the user's cache folder can be written to
            self._parallel = numba.njit(parallel=True, **options)(function)
        # Compiled at its first call, if ever, and not kept: the file would be the parallel one's.
        self._serial = numba.njit(**options)(function)
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any) -> Any:
        if _in_forked_child:
            return self._serial(*args)
        with _launching:
            given = torch.get_num_threads()
            numba.set_num_threads(threads())
            if (
                torch.get_num_threads() != given
            ):  # Numba's first launch sets OpenMP's, PyTorch's too
                torch.set_num_threads(given)
            return self._parallel(*args)


def inline(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels of the same file call."""
    return numba.njit(fastmath={"contract", "reassoc"}, error_model="numpy")(function)


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typing_context: Any, address: Any, like: Any) -> tuple[Signature, Any]:
    """Turn an address into a pointer to the type of ``like``, for ``numba.carray`` in a kernel."""
    result = types.CPointer(like)  # type: ignore[attr-defined]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(address, like), generate


def array(x: Tensor) -> np.ndarray:
    """Return a contiguous tensor for a kernel; bfloat16 as 16-bit integers, for load and store."""
    x = x.detach()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


# Numba wants the four signatures below alike, so they have no annotations.
# ruff: noqa: ANN001, ANN202


def load(row, i):  # type: ignore[no-untyped-def]
    """Return an element as a float, in a kernel."""
    raise NotImplementedError


def store(row, i, value):  # type: ignore[no-untyped-def]
    """Write a float as an element, in a kernel."""
    raise NotImplementedError


@overload(load)
def _load(row, i):  # type: ignore[no-untyped-def]
    if row.dtype == types.uint16:
        return lambda row, i: _as_float(np.uint32(row[i]) << np.uint32(16))
    return lambda row, i: row[i]


@overload(store)
def _store(row, i, value):  # type: ignore[no-untyped-def]
    if row.dtype != types.uint16:

        def plain(row, i, value):  # type: ignore[no-untyped-def]
            row[i] = value

        return plain

    def rounded(row, i, value):  # type: ignore[no-untyped-def]  # to nearest even; NaN stays
        bits = _as_bits(np.float32(value))
        nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        row[i] = np.uint16((nearest if value == value else bits) >> np.uint32(16))

    return rounded


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
