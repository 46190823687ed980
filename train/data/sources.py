"""Where images come from: a folder of classes, or scikit-learn's digits."""

import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from torchvision.datasets import CIFAR10

from train.data.images import Images, MemoryImages, load
from train.data.read import SUFFIXES
from train.data.transforms import Augmentation

MEMORY_SHARE = 0.25
"""Images are kept decoded in memory where they take at most this share of what is free."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Training and validation images of the same classes.

    Attributes:
        train: Images to learn from.
        validation: Images to measure on.
        split: What the validation split is called.
        place: Where the images are: a folder, absolute, or the name of a data set.
        classes: Names, by label.
        augmentation: What may be done to pictures.
        mean: Of each channel, for pixels from 0 to 1.
        std: Likewise the standard deviation.
    """

    train: Images
    validation: Images
    split: str
    place: str
    classes: tuple[str, ...]
    augmentation: Augmentation
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def fingerprint(self) -> str:
        """Return how many training images there are, and a checksum over labels and a few."""
        checksum = zlib.crc32(self.train.labels.numpy().tobytes())
        for i in np.linspace(0, len(self.train) - 1, 16).astype(int) if len(self.train) else ():
            checksum = zlib.crc32(self.train[int(i)].numpy().tobytes(), checksum)
        return f"{len(self.train)} images, checksum {checksum:08x}"

    def subset(self, train: int | None = None, validation: int | None = None) -> "Source":
        """Return the same with so many images of each kind, the first of each class alike.

        Raises:
            ValueError: There are not that many.
        """
        ours = self.train if train is None else self._first("train", train)
        held_out = self.validation if validation is None else self._first("validation", validation)
        return replace(self, train=ours, validation=held_out)

    def _first(self, name: str, number: int) -> Images:
        images: Images = getattr(self, name)
        labels = images.labels
        if not 1 <= number <= len(labels):
            raise ValueError(
                f"--{name}-images must be 1 to {len(labels):,}, which is how many there are, "
                f"got {number:,}"
            )
        rank = torch.zeros_like(labels)
        for label in range(len(self.classes)):
            own = labels == label
            rank[own] = torch.arange(int(own.sum()))
        chosen = (rank * len(self.classes) + labels).argsort()[:number].sort().values
        return images.select(chosen.tolist())


Dataset = Literal["imagenet", "cifar10"]


def open_source(
    data: str | None,
    training: bool = True,
    dataset: Dataset = "imagenet",
    train_images: int | None = None,
    validation_images: int | None = None,
) -> Source:
    """Find and check the images of a run.

    Args:
        data: As in :class:`train.options.DataOptions`.
        training: Whether there have to be images to learn from; else there are none.
        dataset: Likewise.
        train_images: Likewise.
        validation_images: Likewise.

    Raises:
        ValueError: No such folder, an empty class, classes that differ between the splits, a file
            that is no picture; the message names it.
    """
    if data == "digits":
        source = digits()
    elif dataset == "cifar10":
        source = cifar10(data, training)
    else:
        source = folder(_find(data, "imagenet"), training)
    return source.subset(train_images if training else None, validation_images)


def cifar10(data: str | None, training: bool = True) -> Source:
    """Return CIFAR-10: a folder of images by class, or what torchvision downloads.

    Args:
        data: A folder, of either kind; ``$DNW_DATA/cifar10`` or ``data/cifar10`` unless given,
            where it is downloaded to if it is not there.
        training: Whether there have to be images to learn from.

    Raises:
        ValueError: No such folder, or nowhere to download from.
    """
    places = [Path(root) / "cifar10" for root in (os.environ.get("DNW_DATA"), "data") if root]
    place = Path(data) if data else next((p for p in places if p.is_dir()), places[0])
    if data and not place.is_dir():
        raise ValueError(f"--data {data}: there is no such folder; {_CIFAR10_WAYS}")
    if (place / "test").is_dir() or (place / "train").is_dir():
        source = folder(place, training)
    else:
        source = _torchvision_cifar10(place, given=data is not None)
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


def folder(root: Path, training: bool = True) -> Source:
    """Return the images of a folder ``train/<class>/*`` and ``val/<class>/*`` (or ``test/``)."""
    split = next((name for name in ("val", "test") if (root / name).is_dir()), None)
    if split is None or (training and not (root / "train").is_dir()):
        there = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
        wanted = "train/<class>/* and " if training else ""
        raise ValueError(
            f"{root} must hold {wanted}val/<class>/* (or test/<class>/*), but holds {there}"
        )
    train = _files(root / "train") if training else {}
    held_out = _files(root / split)
    train = train or {name: [] for name in held_out}
    for one, other, place in ((train, held_out, "train"), (held_out, train, split)):
        if alone := sorted(one.keys() - other.keys()):
            raise ValueError(
                f"classes differ: {', '.join(alone[:5])} in {root / place} only; give "
                f"{root / 'train'} and {root / split} the same folders"
            )
    if training and len(train) < 2:
        raise ValueError(f"{root / 'train'} has one class; there is nothing to tell apart")
    memory = int(MEMORY_SHARE * psutil.virtual_memory().available)
    images = []
    for files in (train, held_out):
        paths = [path for name in sorted(files) for path in files[name]]
        sizes = torch.tensor([len(files[name]) for name in sorted(files)])
        loaded, taken = load(paths, torch.arange(len(sizes)).repeat_interleave(sizes), memory)
        memory -= taken
        images.append(loaded)
    return Source(
        train=images[0],
        validation=images[1],
        split=split,
        place=str(root.resolve()),
        classes=tuple(sorted(train)),
        augmentation="crop",
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


def _files(split: Path) -> dict[str, list[Path]]:
    """Return the pictures of each class; folders and files that begin with a dot do not count."""
    entries = [p for p in split.iterdir() if not p.name.startswith(".")]
    classes = sorted(p for p in entries if p.is_dir())
    if not classes:
        raise ValueError(f"{split} has no class folders; images go into {split}/<class>/")
    files: dict[str, list[Path]] = {}
    others = Counter(p.suffix.lower() for p in entries if not p.is_dir())
    for folder in classes:
        found = sorted(_walk(folder))
        files[folder.name] = [p for p in found if p.suffix.lower() in SUFFIXES]
        others.update(p.suffix.lower() for p in found if p.suffix.lower() not in SUFFIXES)
        if not files[folder.name]:
            raise ValueError(
                f"class folder {folder} holds no pictures ({', '.join(sorted(SUFFIXES))}); "
                "fill it or remove it"
            )
    if others:
        kinds = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in others.most_common())
        _log.warning(
            "%s: %d files are left out, as no pictures or in no class folder (%s)",
            *(split, others.total(), kinds),
        )
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder; a folder that may not be read is an error."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error

    for place, _, names in os.walk(folder, onerror=refuse, followlinks=True):
        yield from (Path(place) / name for name in names if not name.startswith("."))
