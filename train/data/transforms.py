"""Transforms of images: random ones for training, fixed ones for evaluation."""

import math
from collections.abc import Callable
from functools import partial
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from train.choices import Augmentation

Transform = Callable[[Tensor, Random], Tensor]
"""Function from an image ``[3, H, W]``, uint8, and a random generator to ``[3, S, S]``, uint8."""


def training_transform(kind: Augmentation, size: int) -> Transform:
    """Return the transform of one training image, from bytes to bytes.

    For photographs it has the distribution of torchvision's ``RandomResizedCrop`` and
    ``RandomHorizontalFlip``, and takes less than half their time.

    Args:
        kind: Kind of augmentation.
        size: Height and width to return, in pixels.
    """
    return partial({"crop": _cropped, "shift": _shifted, "none": _resized}[kind], size)


def evaluation_transform(kind: Augmentation, size: int) -> v2.Transform:
    """Return the transform of one validation image, from bytes to bytes.

    For photographs it is the paper's: resize the shorter side to 256 / 224 of the size, then crop
    the centre.

    Args:
        kind: Kind of augmentation.
        size: Height and width to return, in pixels.
    """
    if kind != "crop":
        return v2.Resize((size, size))
    return v2.Compose([_shorten, v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])


def random_part(height: int, width: int, chance: Random) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random crop, as ``RandomResizedCrop`` does.

    Its area is uniform from 8 to 100 % of the image's, the logarithm of width over height uniform
    from log 3/4 to log 4/3, and its position uniform. If ten such crops do not fit, it is the
    largest crop in the centre whose width over height is between 3/4 and 4/3.
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


def _cropped(size: int, image: Tensor, random: Random) -> Tensor:
    """Return a random crop of an image, resized, and mirrored at random."""
    top, left, height, width = random_part(image.shape[1], image.shape[2], random)
    part = image[:, top : top + height, left : left + width]
    return _mirrored(_resized(size, part, random), random)


def _shifted(size: int, image: Tensor, random: Random) -> Tensor:
    """Return a resized image, shifted and mirrored at random."""
    margin = size // 8
    padded = F.pad(_resized(size, image, random), [margin] * 4)
    top, left = _below(2 * margin + 1, random), _below(2 * margin + 1, random)
    return _mirrored(padded[:, top : top + size, left : left + size], random)


def _resized(size: int, image: Tensor, _: Random) -> Tensor:
    """Return an image resized to ``[3, S, S]``; PyTorch is fastest with ``channels_last``."""
    batch = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, size=(size, size), mode="bilinear", antialias=True)[0]


def _mirrored(image: Tensor, random: Random) -> Tensor:
    """Return an image, mirrored with probability 0.5."""
    return image.flip(-1) if random.random() < 0.5 else image


def _below(limit: int, random: Random) -> int:
    """Return a random integer from 0 to ``limit - 1``, five times as fast as ``randrange``."""
    return int(limit * random.random())


def moves(batch: int, size: int, generator: torch.Generator) -> Tensor:
    """Return the random shift of each image down and right, and whether to mirror it ``[B, 3]``.

    The random numbers come from a CPU generator, so they are the same for all devices.
    """
    offsets = torch.randint(2 * (size // 8) + 1, (2, batch), generator=generator)
    mirrored = torch.rand(batch, generator=generator) < 0.5
    return torch.stack([*offsets, mirrored.long()], dim=1)


def shift(images: Tensor, how: Tensor) -> Tensor:
    """Return a batch ``[B, C, S, S]`` shifted and mirrored as :func:`moves` describes."""
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
    """Crop a long strip to its centre, since resizing it whole could exhaust the memory."""
    height, width = image.shape[-2:]
    limit = LONGEST * min(height, width)
    return v2.functional.center_crop(image, [min(height, limit), min(width, limit)])


LONGEST = 16
"""Largest ratio of the longer to the shorter side up to which an image is resized whole."""
