"""How pictures become what a network sees: in training at random, in evaluation always alike."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

Augmentation = Literal["crop", "shift", "none"]
"""``crop``: photographs of any size; a random part in training, the centre in evaluation; mirrored.
``shift``: small pictures; moved by up to an eighth of their size over black, and mirrored.
``none``: squeezed to the size, nothing else."""


def training_transform(kind: Augmentation, size: int) -> v2.Transform:
    """Return the transform of one training image, from bytes to bytes."""
    if kind == "crop":
        return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])
    squeeze = v2.Resize((size, size))
    if kind == "none":
        return squeeze
    return v2.Compose([squeeze, v2.RandomCrop(size, size // 8), v2.RandomHorizontalFlip()])


def evaluation_transform(kind: Augmentation, size: int) -> v2.Transform:
    """Return the transform of one image to be judged, from bytes to bytes.

    For photographs it is the paper's: the shorter side to 256 / 224 of the size, then the centre.

    Args:
        kind: What may be done to the pictures.
        size: Height and width to return, in pixels.
    """
    if kind != "crop":
        return v2.Resize((size, size))
    return v2.Compose([_shorten, v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a batch ``[B, C, S, S]`` moved and mirrored, each image by random numbers of its own.

    The random numbers come from a CPU, so that they are the same for every device.
    """
    batch, channels, size, _ = images.shape
    margin = size // 8
    moved = torch.randint(2 * margin + 1, (2, batch, 1), generator=generator)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    line = torch.arange(size)
    columns = torch.where(mirrored, line.flip(0), line) + moved[1]
    rows, columns = ((i.to(images.device)) for i in (line + moved[0], columns))
    padded = F.pad(images, [margin] * 4)
    number = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return padded[number, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _shorten(image: Tensor) -> Tensor:
    """Cut a strip to its centre, or enlarging it would fill the memory with what is cropped."""
    height, width = image.shape[-2:]
    limit = LONGEST * min(height, width)
    return v2.functional.center_crop(image, [min(height, limit), min(width, limit)])


LONGEST = 16
"""Longer side over shorter side up to which a picture is resized whole."""
