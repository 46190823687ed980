"""Batches of small pictures that live in memory whole, on the device where they fit."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from train.data.batches import batch_indices, check_batch_size
from train.data.images import Images, MemoryImages
from train.data.sources import Source
from train.data.transforms import shift

SHARE = 0.25
"""Images are put on a GPU where they take at most this share of what is free there."""


def fits(source: Source) -> bool:
    """Return whether a source is one for :class:`ResidentBatches`: one size, and in memory."""
    splits = source.train, source.validation
    return source.augmentation != "crop" and all(
        isinstance(split, MemoryImages) and split.same_size for split in splits
    )


class ResidentBatches:
    """Training and validation batches like :class:`Batches`, cut and augmented a batch at a time.

    Order depends on seed and epoch, augmentation on seed, epoch and step alone.

    Args:
        source: Images that :func:`fits`.
        image_size: Height and width to return, in pixels.
        batch_size: Images a batch; the last of an epoch is left out of training if smaller.
        seed: Of order and augmentation.
        device: Where batches are wanted; the CPU unless given.
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size: int,
        batch_size: int,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.device = device or torch.device("cpu")
        self.num_train, self.num_validation = len(source.train), len(source.validation)
        self.steps = self.num_train // batch_size
        self._shifts = source.augmentation == "shift"
        self._train = self._place(source.train, image_size)
        self._validation = self._place(source.validation, image_size)

    def check(self) -> None:
        """Raise a ``ValueError`` where there are fewer training images than one batch has."""
        check_batch_size(self.batch_size, self.num_train)

    def train(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images ``[B, 3, H, W]``, uint8, and labels ``[B]`` of an epoch, from a step on."""
        order = batch_indices(self.num_train, self.batch_size, self.seed, epoch)
        for step in range(first_step, self.steps):
            images, labels = self._take(self._train, torch.from_numpy(order[step]))
            if self._shifts:
                entropy = np.random.SeedSequence([self.seed, epoch, step]).generate_state(1)
                images = shift(images, torch.Generator().manual_seed(int(entropy[0])))
            yield images, labels

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every validation image once, in order; the last batch may be smaller."""
        for which in torch.arange(self.num_validation).split(self.batch_size):
            yield self._take(self._validation, which)

    def _take(self, split: tuple[Tensor, Tensor], which: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = split
        chosen = which.to(images.device)
        return images[chosen].to(self.device), labels[chosen].to(self.device)

    def _place(self, images: Images, size: int) -> tuple[Tensor, Tensor]:
        """Return images of the right size, and labels, on the device if there is room."""
        assert isinstance(images, MemoryImages)
        pictures = images.stacked()
        if len(pictures) and pictures.shape[2:] != (size, size):
            resize = v2.Resize((size, size))
            pictures = torch.cat([resize(part) for part in pictures.split(1024)])
        labels, place = images.labels, self.device
        if place.type == "cuda" and pictures.nbytes > SHARE * torch.cuda.mem_get_info(place)[0]:
            place = torch.device("cpu")
        return pictures.to(place), labels.to(place)
