"""Memory for feature maps on a CPU, in one region that is reused from step to step.

The C library returns large allocations to the system, which provides them again page by page, and
places small objects between medium-sized ones, where they keep holes open. On a CPU this costs a
training step more memory than its tensors and, in places, more time than its arithmetic.
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

_MIN_SIZE = 1 << 20  # bytes; the C library allocates smaller tensors well
_ALIGNMENT = 64
_NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python defines from 3.13 on


class Arena:
    """Allocates pieces of one memory region, each in the first hole that is large enough.

    A piece becomes free as soon as the last tensor that shares its memory is deleted. Pages are
    taken from the system when they are first written to, and kept.

    Args:
        size: Size of the region in bytes.
    """

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._region = np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=np.uint8)
        self._holes = [(0, size)]  # (start, end), ascending, never adjacent
        self._pending: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor | None:
        """Return an uninitialised tensor of ``size`` bytes; None if no hole is large enough."""
        span = -(-size // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            while self._pending:
                self._add_hole(*self._pending.popleft())
            for i, (start, end) in enumerate(self._holes):
                if end - start >= span:
                    rest = [(start + span, end)] if end - start > span else []
                    self._holes[i : i + 1] = rest
                    break
            else:
                return None
        piece = self._region[start : start + size]
        # Tensors may be deleted at any moment, in any thread, even while the lock is held, so the
        # hole is only recorded here.
        weakref.finalize(piece, self._pending.append, (start, start + span)).atexit = False
        return torch.from_numpy(piece)

    def _add_hole(self, start: int, end: int) -> None:
        """Add a hole and merge it with adjacent ones."""
        index = bisect.bisect(self._holes, (start, end))
        if index < len(self._holes) and self._holes[index][0] == end:
            end = self._holes.pop(index)[1]
        if index and self._holes[index - 1][1] == start:
            start = self._holes.pop(index - 1)[0]
            index -= 1
        self._holes.insert(index, (start, end))


def _make() -> Arena | None:
    """Return an arena as large as the machine's memory; None if the system does not allow one."""
    if sys.platform != "linux":  # elsewhere, an unused region may cost memory
        return None
    try:
        return Arena(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (OSError, ValueError):  # the address space of the process may be smaller
        return None


_arena = _make()


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an uninitialised tensor of a shape, with the type and device of ``like``."""
    size = math.prod(shape) * like.element_size()
    if _arena is None or size < _MIN_SIZE or not like.is_cpu or torch.compiler.is_compiling():
        return like.new_empty(shape)
    piece = _arena.take(size)
    return like.new_empty(shape) if piece is None else piece.view(like.dtype).view(shape)
