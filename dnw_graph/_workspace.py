"""Memory for maps that live no longer than one call, kept from call to call.

The C library gives large pieces back to the system, which hands them out again page by page, and
small ones leave holes between what lives longer; both cost a training step on a CPU more than its
arithmetic does in places.
"""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class _Kept(threading.local):
    """One thread's memory, and how much a call wanted at most so far, in bytes."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.wanted = 0


_kept = _Kept()


class Workspace:
    """Hands out pieces of the kept memory of this thread, one behind the other.

    What was taken may be used until the next workspace is made; nothing of it may be returned to a
    caller. On GPUs, and in code that is being compiled, pieces come from PyTorch's own allocator.

    Args:
        after: A workspace whose pieces are still in use; this one goes on where that stands now.
    """

    def __init__(self, after: "Workspace | None" = None) -> None:
        self._taken: int = after._taken if after else 0
        if after is None and len(_kept.memory) < _kept.wanted:
            with torch.inference_mode(False):
                _kept.memory = torch.empty(_kept.wanted, dtype=torch.uint8)

    def take(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a tensor of a shape, of the type and on the device of another; its values are
        whatever was there."""
        if not like.is_cpu or torch.compiler.is_compiling():
            return like.new_empty(shape)
        size = math.prod(shape) * like.element_size()
        start, self._taken = self._taken, self._taken + -(-size // 64) * 64
        _kept.wanted = max(_kept.wanted, self._taken)
        if self._taken > len(_kept.memory):
            return like.new_empty(shape)
        return _kept.memory[start : start + size].view(like.dtype).view(shape)
