"""Reusable memory for batches that worker processes share with the main process."""

from collections.abc import Sequence
from weakref import finalize

import torch
from torch import Tensor

NO_SLOT = -1


class Slots:
    """Shared memory for a fixed number of batches, each ``[B, S, S, 3]``, uint8.

    PyTorch's loader allocates new shared memory for each batch, which can take a tenth of the time
    of decoding. Here the memory of a batch is reused when nothing refers to the batch any more.

    Args:
        number: Number of batches in memory at a time.
        batch: Images per batch.
        size: Height and width of the images, in pixels.

    Raises:
        ValueError: If there is not enough shared memory.
    """

    def __init__(self, number: int, batch: int, size: int) -> None:
        memory = torch.empty(number, batch, size, size, 3, dtype=torch.uint8)
        try:
            self._memory = memory.share_memory_()
        except RuntimeError as error:
            raise ValueError(
                f"worker processes need {memory.nbytes / 1e6:,.0f} MB of shared memory for "
                "batches, but less is available: give a container more (docker run --shm-size 8g), "
                "or use fewer --workers"
            ) from error
        self._free = list(range(number))
        self._reserved: set[int] = set()

    def reserve(self) -> int:
        """Return a slot for a worker process to write to, or ``NO_SLOT`` if none is free."""
        if not self._free:
            return NO_SLOT
        slot = self._free.pop()
        self._reserved.add(slot)
        return slot

    def reclaim(self) -> None:
        """Free all reserved slots; no worker process may still write to them."""
        self._free += self._reserved
        self._reserved.clear()

    def write(self, slot: int, images: Sequence[Tensor]) -> None:
        """Write images, each ``[3, S, S]``, to a slot."""
        for place, image in zip(self._memory[slot].permute(0, 3, 1, 2), images, strict=False):
            place.copy_(image)

    def take(self, slot: int, number: int) -> Tensor:
        """Return the images in a slot, which is freed when no tensor refers to them any more.

        Args:
            slot: Number of the slot.
            number: Number of images in it.

        Returns:
            Images ``[B, 3, S, S]``, uint8, in ``torch.channels_last``.
        """
        self._reserved.remove(slot)
        view = self._memory[slot, :number].numpy()
        finalize(view, self._free.append, slot)
        return torch.from_numpy(view).permute(0, 3, 1, 2)
