"""Batches of small pictures that live in memory whole, on the device where they fit."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from train.data.images import Images, MemoryImages
from train.data.order import batch_indices, check_batch_size, held_out_batches, share
from train.data.source import Source
from train.data.transforms import moves, shift

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

    Order depends on seed and epoch, augmentation on seed, epoch, step and place in the batch alone.

    Args:
        source: Images that :func:`fits`.
        image_size: Height and width to return, in pixels.
        batch_size: Images a batch, over all processes that train together; the last of an epoch is
            left out of training if smaller.
        seed: Of order and augmentation.
        device: Where batches are wanted; the CPU unless given.
        rank: Which of the processes that train together this is.
        world_size: How many there are.

    Attributes:
        steps: Batches an epoch.
        bad: The images that could not be read when the source was opened.
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size: int,
        batch_size: int,
        seed: int = 0,
        device: torch.device | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.batch_size, self.seed, self.bad = batch_size, seed, source.bad
        self.device = device or torch.device("cpu")
        self.num_train, self.num_validation = len(source.train), len(source.validation)
        self.steps = self.num_train // batch_size
        self._shifts = source.augmentation == "shift"
        self._part = share(batch_size, rank, world_size)
        self._held_out = held_out_batches(self.num_validation, batch_size, rank, world_size)
        self._train = self._place(source.train, image_size)
        self._validation = self._place(source.validation, image_size)

    def check(self) -> None:
        """Raise a ``ValueError`` where there are fewer training images than one batch has."""
        check_batch_size(self.batch_size, self.num_train)

    def train(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images ``[B, 3, H, W]``, uint8, and labels ``[B]`` of an epoch, from a step on."""
        order = batch_indices(self.num_train, self.batch_size, self.seed, epoch)
        for step in range(first_step, self.steps):
            images, labels = self._take(self._train, torch.from_numpy(order[step, self._part]))
            if self._shifts:
                entropy = np.random.SeedSequence([self.seed, epoch, step]).generate_state(1)
                generator = torch.Generator().manual_seed(int(entropy[0]))
                how = moves(self.batch_size, images.shape[-1], generator)
                images = shift(images, how[self._part])
            yield images, labels

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process' validation batches in order, every image once; some are smaller."""
        for batch in self._held_out:
            yield self._take(self._validation, torch.tensor(batch.indices))

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
