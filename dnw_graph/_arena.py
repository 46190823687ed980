"""Memory for feature maps on a CPU, in one region that is kept from step to step.

The C library gives large pieces back to the system, which hands them out again page by page, and
puts small objects between medium ones, where they keep holes open; on a CPU that costs a training
step more memory than its tensors and, in places, more time than its arithmetic.
"""

import bisect
import math
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_LEAST = 1 << 20  # bytes from which a tensor is placed here; smaller ones the C library does well
_ALIGNMENT = 64
_NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.13 on


class Arena:
    """Hands out pieces of one region, always the first hole that is large enough.

    A piece is free again as soon as the last tensor that shares its memory is gone, whoever held
    it. Pages are taken from the system when they are first written to, and kept.

    Args:
        size: Bytes of the region.
    """

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._region = np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=np.uint8)
        self._holes = [(0, size)]  # starts and ends, ascending, never touching one another
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor | None:
        """Return a tensor of bytes, with whatever was there; None where no hole is large enough."""
        span = -(-size // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            while self._returned:
                self._close(*self._returned.popleft())
            for i, (start, end) in enumerate(self._holes):
                if end - start >= span:
                    rest = [(start + span, end)] if end - start > span else []
                    self._holes[i : i + 1] = rest
                    break
            else:
                return None
        piece = self._region[start : start + size]
        # Only noted here: tensors may go at any moment, in any thread, the lock held or not.
        weakref.finalize(piece, self._returned.append, (start, start + span)).atexit = False
        return torch.from_numpy(piece)

    def _close(self, start: int, end: int) -> None:
        """Add a hole, and join it to those it touches."""
        at = bisect.bisect(self._holes, (start, end))
        if at < len(self._holes) and self._holes[at][0] == end:
            end = self._holes.pop(at)[1]
        if at and self._holes[at - 1][1] == start:
            start = self._holes.pop(at - 1)[0]
            at -= 1
        self._holes.insert(at, (start, end))


def _make() -> Arena | None:
    """Return an arena as large as the memory, where a region costs nothing until it is used."""
    if sys.platform != "linux":
        return None
    try:
        return Arena(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (OSError, ValueError):  # the process may not have that many addresses
        return None


_arena = _make()


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor of a shape, of the type and on the device of another, as ``new_empty``."""
    size = math.prod(shape) * like.element_size()
    if _arena is None or size < _LEAST or not like.is_cpu or torch.compiler.is_compiling():
        return like.new_empty(shape)
    piece = _arena.take(size)
    return like.new_empty(shape) if piece is None else piece.view(like.dtype).view(shape)
