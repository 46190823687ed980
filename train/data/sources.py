"""Where images come from: a folder of classes, shards, or scikit-learn's digits."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torchvision.datasets import CIFAR10

from train.data.bad import BadImages
from train.data.folders import folder
from train.data.images import MemoryImages
from train.data.shards import are_shards, shards
from train.data.source import Source

Dataset = Literal["imagenet", "cifar10"]


def open_source(
    data: str | None,
    training: bool = True,
    dataset: Dataset = "imagenet",
    train_images: int | None = None,
    validation_images: int | None = None,
    validation_data: str | None = None,
    bad_images: Literal["fail", "skip"] = "fail",
    classes: Sequence[str] | None = None,
) -> Source:
    """Find and check the images of a run.

    Args:
        data: A folder of classes; WebDataset shards, as a pattern of files or the folder they are
            in; ``"digits"``; or None, for the usual places.
        training: Whether there have to be images to learn from; else there are none.
        dataset: As in :class:`train.options.DataOptions`.
        train_images: Likewise.
        validation_images: Likewise.
        validation_data: Shards to measure on, unless they are in the folder of the others.
        bad_images: Whether an image that cannot be read is an error, or counted and left out.
        classes: The classes that a network was trained on, of which a folder need not hold all. If
            None, those of the images.

    Raises:
        ValueError: No such folder, an empty class, classes that differ between the splits, a file
            that is no picture; the message names it.
    """
    bad = BadImages(skip=bad_images == "skip")
    if data is not None and are_shards(data):
        source = shards(data, validation_data, training, bad)
        source = _as_cifar10(source) if dataset == "cifar10" else source
    elif validation_data is not None:
        raise ValueError(
            f"--validation-data {validation_data} is for shards, but --data is "
            f"{data or 'not given'}; a folder of classes has val/<class>/* in it"
        )
    elif data == "digits":
        source = digits()
    elif dataset == "cifar10":
        source = cifar10(data, training, bad, classes)
    else:
        source = folder(_find(data, "imagenet"), training, bad, classes)
    return source.subset(train_images if training else None, validation_images)


def cifar10(
    data: str | None,
    training: bool = True,
    bad: BadImages | None = None,
    classes: Sequence[str] | None = None,
) -> Source:
    """Return CIFAR-10: a folder of images by class, or what torchvision downloads.

    Args:
        data: A folder, of either kind; ``$DNW_DATA/cifar10`` or ``data/cifar10`` unless given,
            where it is downloaded to if it is not there.
        training: Whether there have to be images to learn from.
        bad: Collects the images that cannot be read. If None, such an image is an error.
        classes: As for :func:`open_source`.

    Raises:
        ValueError: No such folder, or nowhere to download from.
    """
    places = [Path(root) / "cifar10" for root in (os.environ.get("DNW_DATA"), "data") if root]
    place = Path(data) if data else next((p for p in places if p.is_dir()), places[0])
    if data and not place.is_dir():
        raise ValueError(f"--data {data}: there is no such folder; {_CIFAR10_WAYS}")
    if (place / "test").is_dir() or (place / "train").is_dir():
        return _as_cifar10(folder(place, training, bad, classes))
    return _as_cifar10(_torchvision_cifar10(place, given=data is not None))


def _as_cifar10(source: Source) -> Source:
    mean, std = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
    return replace(source, augmentation="shift", mean=mean, std=std)


def _torchvision_cifar10(place: Path, given: bool) -> Source:
    """Return CIFAR-10 as torchvision keeps it, downloaded if need be."""
    if given and not (place / "cifar-10-batches-py").is_dir() and any(place.iterdir()):
        raise ValueError(f"--data {place} does not hold CIFAR-10; {_CIFAR10_WAYS}")
    splits = []
    for train in (True, False):
        try:
            found = CIFAR10(str(place), train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"CIFAR-10 is not in {place}, and could not be downloaded "
                f"({str(error).splitlines()[0]}); {_CIFAR10_WAYS}"
            ) from error
        pictures = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        splits.append(MemoryImages(list(pictures), torch.tensor(found.targets)))
    return Source(
        train=splits[0],
        validation=splits[1],
        split="test",
        place=str(place.resolve()),
        classes=tuple(found.classes),
        augmentation="shift",
    )


_CIFAR10_WAYS = (
    "give --data DIR with train/<class>/* and test/<class>/* in it, or with torchvision's "
    "cifar-10-batches-py"
)


def digits() -> Source:
    """Return scikit-learn's 1,797 handwritten digits of 8x8 pixels, every fifth for validation."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images / 16 * 255).round().to(torch.uint8)
    pictures, labels = grey[:, None].repeat(1, 3, 1, 1), torch.from_numpy(bunch.target).long()
    held_out = torch.arange(len(labels)) % 5 == 4
    return Source(
        train=MemoryImages(list(pictures[~held_out]), labels[~held_out]),
        validation=MemoryImages(list(pictures[held_out]), labels[held_out]),
        split="every fifth digit",
        place="digits",
        classes=tuple(str(name) for name in bunch.target_names),
        augmentation="none",
        mean=(0.3, 0.3, 0.3),
        std=(0.38, 0.38, 0.38),
    )


def _find(data: str | None, name: str) -> Path:
    if data is not None:
        if Path(data).is_dir():
            return Path(data)
        raise ValueError(f"--data {data}: there is no such folder; {_WAYS}")
    places = [Path(root) / name for root in (os.environ.get("DNW_DATA"), "data") if root]
    for place in places:
        if place.is_dir():
            return place
    raise ValueError(f"no images: looked in {' and '.join(map(str, places))}; {_WAYS}")


_WAYS = (
    "to get going, give --data DIR with train/<class>/* and val/<class>/* in it, or try "
    "--data digits --image-size 32 --batch-size 64 --lr 0.05 --epochs 3, which needs no download"
)
