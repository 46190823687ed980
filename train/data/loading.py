"""What is done for a batch in whichever process loads it."""

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
    """A batch on its way to the main process.

    Attributes:
        images: The images ``[B, 3, S, S]``, uint8; None where they are in a slot.
        slot: The slot.
        labels: Their labels ``[B]``.
        missing: Images that could not be read: raised in a worker, they would arrive as tracebacks.
    """

    images: Tensor | None
    slot: int
    labels: Tensor
    missing: list[BadImage]


class Transformed(Dataset[Batch]):
    """Batches of images, augmented by random numbers that depend on seed, epoch and index.

    Args:
        images: The images.
        transform: What is done to each.
        seed: Of the random numbers.

    Attributes:
        slots: Where to leave batches, if not in memory of their own.
    """

    def __init__(self, images: Images, transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed
        self.slots: Slots | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, chosen: BatchRequest) -> Batch:
        """Return a batch; called by PyTorch's loader."""
        loaded = {index: self._load(chosen.epoch, index) for index in chosen.indices}
        images = {i: image for i, image in loaded.items() if isinstance(image, Tensor)}
        missing = [bad for bad in loaded.values() if isinstance(bad, BadImage)]
        labels = self.images.labels[list(images)]
        if chosen.slot == NO_SLOT or self.slots is None:
            return Batch(_stacked(list(images.values())), NO_SLOT, labels, missing)
        self.slots.write(chosen.slot, list(images.values()))
        return Batch(None, chosen.slot, labels, missing)

    def _load(self, epoch: int, index: int) -> Tensor | BadImage:
        try:
            image = self.images[index]
        except BadImage as bad:
            return bad
        return self.transform(image, Random(f"{self.seed} {epoch} {index}"))


def as_ever(transform: v2.Transform, image: Tensor, _: Random) -> Tensor:
    """Return an image that is transformed without chance."""
    return transform(image)


def _stacked(images: list[Tensor]) -> Tensor:
    """Return images ``[B, 3, S, S]`` in ``torch.channels_last``."""
    if not images:
        return torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
