"""Load and augment a batch, in the main process or in a worker process."""

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from train.data.bad import BadImage
from train.data.images import Images
from train.data.order import BatchRequest
from train.data.slots import NO_SLOT, Slots
from train.data.transforms import Transform


@dataclass(frozen=True)
class Batch:
    """A loaded batch, as sent to the main process.

    Attributes:
        images: The images ``[B, 3, S, S]``, uint8; None if they are in a slot.
        slot: Number of the slot, or ``NO_SLOT``.
        labels: Their labels ``[B]``.
        missing: Images that could not be read. They are not raised in a worker process, since the
            main process would receive only tracebacks.
    """

    images: Tensor | None
    slot: int
    labels: Tensor
    missing: list[BadImage]


class Transformed(Dataset[Batch]):
    """Dataset of batches, augmented by random numbers that depend on seed, epoch and index.

    Args:
        images: The images.
        transform: Transform of each image.
        seed: Seed of the random numbers.

    Attributes:
        slots: Shared memory for batches. If None, each batch is returned in new memory.
    """

    def __init__(self, images: Images, transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed
        self.slots: Slots | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, request: BatchRequest) -> Batch:
        """Return a batch; called by PyTorch's loader."""
        results = {index: self._load(request.epoch, index) for index in request.indices}
        images = {i: image for i, image in results.items() if isinstance(image, Tensor)}
        missing = [bad for bad in results.values() if isinstance(bad, BadImage)]
        labels = self.images.labels[list(images)]
        if request.slot == NO_SLOT or self.slots is None:
            return Batch(_stacked(list(images.values())), NO_SLOT, labels, missing)
        self.slots.write(request.slot, list(images.values()))
        return Batch(None, request.slot, labels, missing)

    def _load(self, epoch: int, index: int) -> Tensor | BadImage:
        """Return a transformed image, or the error if it cannot be read."""
        try:
            image = self.images[index]
        except BadImage as bad:
            return bad
        return self.transform(image, Random(f"{self.seed} {epoch} {index}"))


def as_ever(transform: v2.Transform, image: Tensor, _: Random) -> Tensor:
    """Return a transformed image; the random numbers are not used."""
    return transform(image)


def _stacked(images: list[Tensor]) -> Tensor:
    """Stack images into a batch ``[B, 3, S, S]`` in ``torch.channels_last``."""
    if not images:
        return torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
