"""Batches of small images that are all kept in memory, on the device if they fit."""

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
"""Images are stored on a GPU if they take at most this share of its free memory."""


def fits(source: Source) -> bool:
    """Return whether :class:`ResidentBatches` can use a source: in memory, one size, no crops."""
    splits = source.train, source.validation
    return source.augmentation != "crop" and all(
        isinstance(split, MemoryImages) and split.same_size for split in splits
    )


class ResidentBatches:
    """Training and validation batches like :class:`Batches`, selected and augmented as a whole.

    The order depends only on seed and epoch; the augmentation only on seed, epoch, step and
    position in the batch.

    Args:
        source: Images for which :func:`fits` is true.
        image_size: Height and width to return, in pixels.
        batch_size: Images per batch, over all processes that train together; a smaller last batch
            of an epoch is left out of training.
        seed: Seed of order and augmentation.
        device: Device of the batches. If None, the CPU.
        rank: Rank of this process among those that train together.
        world_size: Number of processes that train together.

    Attributes:
        steps: Number of training batches per epoch.
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
        """Raise ValueError if there are fewer training images than one batch needs."""
        check_batch_size(self.batch_size, self.num_train)

    def train(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images ``[B, 3, H, W]``, uint8, and labels ``[B]``, starting from a step."""
        order = batch_indices(self.num_train, self.batch_size, self.seed, epoch)
        for step in range(first_step, self.steps):
            images, labels = self._take(self._train, torch.from_numpy(order[step, self._part]))
            if self._shifts:
                entropy = np.random.SeedSequence([self.seed, epoch, step]).generate_state(1)
                generator = torch.Generator().manual_seed(int(entropy[0]))
                offsets = moves(self.batch_size, images.shape[-1], generator)
                images = shift(images, offsets[self._part])
            yield images, labels

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process' validation batches in order, each image once; some are smaller."""
        for batch in self._held_out:
            yield self._take(self._validation, torch.tensor(batch.indices))

    def _take(self, split: tuple[Tensor, Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and labels at some indices, on the device."""
        images, labels = split
        indices = indices.to(images.device)
        return images[indices].to(self.device), labels[indices].to(self.device)

    def _place(self, images: Images, size: int) -> tuple[Tensor, Tensor]:
        """Return resized images and labels, on the device if they fit, otherwise on the CPU."""
        assert isinstance(images, MemoryImages)
        pictures = images.stacked()
        if len(pictures) and pictures.shape[2:] != (size, size):
            resize = v2.Resize((size, size))
            pictures = torch.cat([resize(part) for part in pictures.split(1024)])
        labels, place = images.labels, self.device
        if place.type == "cuda" and pictures.nbytes > SHARE * torch.cuda.mem_get_info(place)[0]:
            place = torch.device("cpu")
        return pictures.to(place), labels.to(place)
