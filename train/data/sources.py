"""Open a source of images: a folder of classes, shards, CIFAR-10 or scikit-learn's digits."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torchvision.datasets import CIFAR10

from train.choices import Dataset
from train.data.bad import BadImages
from train.data.folders import folder
from train.data.images import MemoryImages
from train.data.shards import are_shards, shards
from train.data.source import Source


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
        data: A folder of classes; WebDataset shards, as a pattern of files or their folder;
            ``"digits"``; or None, for the default folders.
        training: Whether training images are required. If False, only validation images are read.
        dataset: As in :class:`train.options.DataOptions`.
        train_images: As in :class:`train.options.DataOptions`.
        validation_images: As in :class:`train.options.DataOptions`.
        validation_data: Validation shards. If None, those in the folder of the training shards.
        bad_images: Whether an image that cannot be read is an error, or counted and left out.
        classes: The classes that a network was trained on; a folder may hold only some of them. If
            None, those of the images.

    Raises:
        ValueError: If a folder does not exist, a class is empty, the splits have different classes,
            or a file is not an image; the message names it.
    """
    bad = BadImages(skip=bad_images == "skip")
    if data is not None and are_shards(data):
        source = shards(data, validation_data, training, bad)
        source = _as_cifar10(source) if dataset == "cifar10" else source
    elif validation_data is not None:
        raise ValueError(
            f"--validation-data {validation_data} is for shards, but --data is "
            f"{data or 'not set'}; a folder of classes holds validation images in val/<class>/*"
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
    """Return CIFAR-10 from a folder of images by class, or in torchvision's format.

    Args:
        data: A folder in either format. If None, ``$DNW_DATA/cifar10`` or ``data/cifar10``, where
            it is downloaded to if necessary.
        training: Whether training images are required.
        bad: Collects the images that cannot be read. If None, such an image is an error.
        classes: As for :func:`open_source`.

    Raises:
        ValueError: If there is no such folder, or the download fails.
    """
    places = [Path(root) / "cifar10" for root in (os.environ.get("DNW_DATA"), "data") if root]
    place = Path(data) if data else next((p for p in places if p.is_dir()), places[0])
    if data and not place.is_dir():
        raise ValueError(f"--data {data}: there is no such folder; {_CIFAR10_WAYS}")
    if (place / "test").is_dir() or (place / "train").is_dir():
        return _as_cifar10(folder(place, training, bad, classes))
    return _as_cifar10(_torchvision_cifar10(place, explicit=data is not None))


def _as_cifar10(source: Source) -> Source:
    """Return a source with the augmentation and normalisation of CIFAR-10."""
    mean, std = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
    return replace(source, augmentation="shift", mean=mean, std=std)


def _torchvision_cifar10(place: Path, explicit: bool) -> Source:
    """Return CIFAR-10 in torchvision's format, downloading it if necessary.

    Args:
        place: The folder.
        explicit: Whether the folder was set with ``--data``; then it must be empty for a download.

    Raises:
        ValueError: If the folder holds something else, or the download fails.
    """
    if explicit and not (place / "cifar-10-batches-py").is_dir() and any(place.iterdir()):
        raise ValueError(f"--data {place} does not hold CIFAR-10; {_CIFAR10_WAYS}")
    splits = []
    for train in (True, False):
        try:
            dataset = CIFAR10(str(place), train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"CIFAR-10 is not in {place}, and could not be downloaded "
                f"({str(error).splitlines()[0]}); {_CIFAR10_WAYS}"
            ) from error
        pictures = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        splits.append(MemoryImages(list(pictures), torch.tensor(dataset.targets)))
    return Source(
        train=splits[0],
        validation=splits[1],
        split="test",
        place=str(place.resolve()),
        classes=tuple(dataset.classes),
        augmentation="shift",
    )


_CIFAR10_WAYS = (
    "use --data DIR with a folder that holds train/<class>/* and test/<class>/*, or torchvision's "
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
    """Return the folder of images: ``data``, or a default folder of this name."""
    if data is not None:
        if Path(data).is_dir():
            return Path(data)
        raise ValueError(f"--data {data}: there is no such folder; {_WAYS}")
    places = [Path(root) / name for root in (os.environ.get("DNW_DATA"), "data") if root]
    for place in places:
        if place.is_dir():
            return place
    raise ValueError(f"no images in {' or '.join(map(str, places))}; {_WAYS}")


_WAYS = (
    "use --data DIR with a folder that holds train/<class>/* and val/<class>/*, or try "
    "--data digits --image-size 32 --batch-size 64 --lr 0.05 --epochs 3, which needs no download"
)
