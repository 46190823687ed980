"""Choose how batches are made."""

from typing import Literal

import torch

from train.data.batches import Batches
from train.data.resident import ResidentBatches, fits
from train.data.source import Source


def make_batches(
    source: Source,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    workers: int | Literal["auto"] = "auto",
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Batches | ResidentBatches:
    """Return a process' part of the batches of images, in memory if all images fit.

    Args:
        source: The images.
        image_size: Height and width to return, in pixels.
        batch_size: Images per batch, over all processes that train together.
        seed: Seed of order and augmentation.
        workers: Processes that load images; see :class:`Batches`.
        device: Device of training.
        rank: Rank of this process among those that train together.
        world_size: Number of processes that train together.

    Raises:
        ValueError: If a batch cannot be divided equally among processes.
    """
    if batch_size % world_size:
        raise ValueError(
            f"--batch-size {batch_size} counts the images of all processes, so it must be a "
            f"multiple of their number, {world_size}"
        )
    if fits(source):
        return ResidentBatches(
            source,
            image_size=image_size,
            batch_size=batch_size,
            seed=seed,
            device=device,
            rank=rank,
            world_size=world_size,
        )
    return Batches(
        source,
        image_size=image_size,
        batch_size=batch_size,
        seed=seed,
        workers=workers,
        on_cpu=device.type == "cpu",
        rank=rank,
        world_size=world_size,
    )
