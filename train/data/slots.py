"""Memory for batches that worker processes share with the main one, used over and over."""

from collections.abc import Sequence
from weakref import finalize

import torch
from torch import Tensor

NO_SLOT = -1


class Slots:
    """Room for some batches, each ``[B, S, S, 3]``, uint8.

    PyTorch's loader takes new shared memory for every batch. To get that from the operating system
    can take a tenth of the time that decoding takes. Here a batch's memory serves for another when
    nothing refers to the batch any more.

    Args:
        number: How many batches there may be at a time.
        batch: Images a batch.
        size: Their height and width, in pixels.

    Raises:
        ValueError: There is no room for that in shared memory.
    """

    def __init__(self, number: int, batch: int, size: int) -> None:
        room = torch.empty(number, batch, size, size, 3, dtype=torch.uint8)
        try:
            self._room = room.share_memory_()
        except RuntimeError as error:
            raise ValueError(
                f"worker processes need {room.nbytes / 1e6:,.0f} MB of shared memory for batches, "
                "and there is less: give a container more (docker run --shm-size 8g), or fewer "
                "--workers"
            ) from error
        self._free = list(range(number))
        self._away: set[int] = set()

    def reserve(self) -> int:
        """Return a slot for a worker process to write, ``NO_SLOT`` where none is free."""
        if not self._free:
            return NO_SLOT
        slot = self._free.pop()
        self._away.add(slot)
        return slot

    def reclaim(self) -> None:
        """Take back what was reserved for batches that were given up, and is no longer written."""
        self._free += self._away
        self._away.clear()

    def write(self, slot: int, images: Sequence[Tensor]) -> None:
        """Leave images, each ``[3, S, S]``, in a slot."""
        for place, image in zip(self._room[slot].permute(0, 3, 1, 2), images, strict=False):
            place.copy_(image)

    def take(self, slot: int, number: int) -> Tensor:
        """Return the images in a slot, which is free again when no tensor shows them any more.

        Args:
            slot: Which.
            number: How many images are in it.

        Returns:
            Images ``[B, 3, S, S]``, uint8, in ``torch.channels_last``.
        """
        self._away.remove(slot)
        seen = self._room[slot, :number].numpy()
        finalize(seen, self._free.append, slot)
        return torch.from_numpy(seen).permute(0, 3, 1, 2)
