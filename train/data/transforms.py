"""How pictures become what a network sees: in training at random, in evaluation always alike."""

import math
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

Augmentation = Literal["crop", "shift", "none"]
"""``crop``: photographs of any size; a random part in training, the centre in evaluation; mirrored.
``shift``: small pictures; moved by up to an eighth of their size over black, and mirrored.
``none``: squeezed to the size, nothing else."""

Transform = Callable[[Tensor, Random], Tensor]
"""From a picture ``[3, H, W]``, uint8, and random numbers to ``[3, S, S]``, uint8."""


def training_transform(kind: Augmentation, size: int) -> Transform:
    """Return the transform of one training image, from bytes to bytes.

    That of photographs has the distribution of torchvision's ``RandomResizedCrop`` and
    ``RandomHorizontalFlip``, and takes less than half their time.

    Args:
        kind: What may be done to the pictures.
        size: Height and width to return, in pixels.
    """
    return partial({"crop": _photograph, "shift": _moved, "none": _squeezed}[kind], size)


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


def random_part(height: int, width: int, chance: Random) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a part of a picture, as ``RandomResizedCrop`` does.

    Its area is 8 to 100 % of the picture's, uniformly; width over height 3/4 to 4/3, uniformly in
    its logarithm; its place uniform. If ten of these do not fit, it is the largest one in the
    centre whose width over height is between 3/4 and 4/3.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * chance.uniform(0.08, 1)
        ratio = math.exp(chance.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _below(height - h + 1, chance), _below(width - w + 1, chance), h, w
    h, w = min(height, round(width / low)), min(width, round(height * high))
    return (height - h) // 2, (width - w) // 2, h, w


def _photograph(size: int, image: Tensor, chance: Random) -> Tensor:
    top, left, height, width = random_part(image.shape[1], image.shape[2], chance)
    part = image[:, top : top + height, left : left + width]
    return _mirrored(_squeezed(size, part, chance), chance)


def _moved(size: int, image: Tensor, chance: Random) -> Tensor:
    margin = size // 8
    padded = F.pad(_squeezed(size, image, chance), [margin] * 4)
    top, left = _below(2 * margin + 1, chance), _below(2 * margin + 1, chance)
    return _mirrored(padded[:, top : top + size, left : left + size], chance)


def _squeezed(size: int, image: Tensor, _: Random) -> Tensor:
    """Return an image ``[3, S, S]``; PyTorch is fastest where a pixel's channels are neighbours."""
    batch = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, size=(size, size), mode="bilinear", antialias=True)[0]


def _mirrored(image: Tensor, chance: Random) -> Tensor:
    return image.flip(-1) if chance.random() < 0.5 else image


def _below(limit: int, chance: Random) -> int:
    """Return a whole number from 0 on; ``Random.randrange`` takes five times as long."""
    return int(limit * chance.random())


def moves(batch: int, size: int, generator: torch.Generator) -> Tensor:
    """Return for each image of a batch ``[B, 3]`` how far it is moved, and whether mirrored.

    The random numbers come from a CPU, so that they are the same for every device.
    """
    moved = torch.randint(2 * (size // 8) + 1, (2, batch), generator=generator)
    mirrored = torch.rand(batch, generator=generator) < 0.5
    return torch.stack([*moved, mirrored.long()], dim=1)


def shift(images: Tensor, how: Tensor) -> Tensor:
    """Return a batch ``[B, C, S, S]`` moved and mirrored, each image by its :func:`moves`."""
    batch, channels, size, _ = images.shape
    down, right, mirrored = how.unsqueeze(-1).unbind(1)
    line = torch.arange(size)
    columns = torch.where(mirrored.bool(), line.flip(0), line) + right
    rows, columns = ((i.to(images.device)) for i in (line + down, columns))
    padded = F.pad(images, [size // 8] * 4)
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
