"""Assign images to batches by seed and epoch, and divide batches among processes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from train.data.slots import NO_SLOT, Slots


class BatchRequest(NamedTuple):
    """A batch to load.

    Attributes:
        epoch: Epoch, on which the augmentation depends.
        indices: Indices of its images.
        slot: Slot of shared memory to write it to, or ``NO_SLOT``.
    """

    epoch: int
    indices: list[int]
    slot: int = NO_SLOT


def batch_indices(num_images: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the images of each batch ``[steps, batch_size]``; an incomplete batch is left out."""
    order = np.random.default_rng([seed, epoch]).permutation(num_images)
    steps = num_images // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def share(batch_size: int, rank: int, world_size: int) -> slice:
    """Return one process' part of each training batch: every ``world_size``-th image from ``rank``.

    With this, the i-th micro-batches of all processes together are the i-th micro-batch that a
    single process would compute.
    """
    return slice(rank, batch_size, world_size)


def held_out_batches(
    num_images: int, batch_size: int, rank: int, world_size: int
) -> list[BatchRequest]:
    """Return one process' validation batches: every ``world_size``-th batch from ``rank``."""
    starts = range(rank * batch_size, num_images, world_size * batch_size)
    ends = (min(start + batch_size, num_images) for start in starts)
    return [BatchRequest(0, list(range(*bounds))) for bounds in zip(starts, ends, strict=True)]


def check_batch_size(batch_size: int, num_train: int) -> None:
    """Raise ValueError if there are fewer training images than one batch needs."""
    if batch_size > num_train:
        raise ValueError(
            f"--batch-size {batch_size} is larger than the {num_train} training images; use a "
            "smaller one"
        )


class Order(Sampler[BatchRequest]):
    """Sampler of one process' part of an epoch's batches.

    Args:
        num_images: Number of training images.
        batch_size: Images per batch, over all processes.
        seed: Seed of the order.
        part: This process' part of each batch.

    Attributes:
        epoch: Epoch to sample next.
        first_step: Step to start from.
        slots: Shared memory for batches. If None, each batch is returned in new memory.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, part: slice) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.part = part
        self.epoch = self.first_step = 0
        self.slots: Slots | None = None

    def __len__(self) -> int:
        return self.num_images // self.batch_size - self.first_step

    def __iter__(self) -> Iterator[BatchRequest]:
        batches = batch_indices(self.num_images, self.batch_size, self.seed, self.epoch)
        if self.slots:
            self.slots.reclaim()
        for indices in batches[self.first_step :, self.part]:
            yield BatchRequest(
                self.epoch, indices.tolist(), self.slots.reserve() if self.slots else NO_SLOT
            )
