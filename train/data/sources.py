"""Where images come from: a folder of classes, or scikit-learn's digits."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from train.data.images import Images, MemoryImages, load
from train.data.read import SUFFIXES

MEMORY_SHARE = 0.25
"""Images are kept decoded in memory where they take at most this share of what is free."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Training and validation images of the same classes.

    Attributes:
        train: Images to learn from.
        validation: Images to measure on.
        split: What the validation split is called.
        classes: Names, by label.
        natural: Whether pictures may be cropped and mirrored.
        mean: Of each channel, for pixels from 0 to 1.
        std: Likewise the standard deviation.
    """

    train: Images
    validation: Images
    split: str
    classes: tuple[str, ...]
    natural: bool
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


def open_source(data: str | None) -> Source:
    """Find and check the images of a run.

    Args:
        data: As in :class:`train.options.DataOptions`.

    Raises:
        ValueError: No such folder, an empty class, classes that differ between the splits, a file
            that is no picture; the message names it.
    """
    return digits() if data == "digits" else folder(_find(data))


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
        classes=tuple(str(name) for name in bunch.target_names),
        natural=False,
        mean=(0.3, 0.3, 0.3),
        std=(0.38, 0.38, 0.38),
    )


def folder(root: Path) -> Source:
    """Return the images of a folder ``train/<class>/*`` and ``val/<class>/*`` (or ``test/``)."""
    split = next((name for name in ("val", "test") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or split is None:
        there = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{root} must hold train/<class>/* and val/<class>/* (or test/<class>/*), "
            f"but holds {there}"
        )
    train, held_out = _files(root / "train"), _files(root / split)
    if train.keys() != held_out.keys():
        apart = sorted(train.keys() ^ held_out.keys())
        raise ValueError(
            f"classes differ: {', '.join(apart[:5])} in {root / 'train'} or {root / split} only; "
            "give both the same folders"
        )
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
        classes=tuple(sorted(train)),
        natural=True,
    )


def _find(data: str | None) -> Path:
    if data is not None:
        if Path(data).is_dir():
            return Path(data)
        raise ValueError(f"--data {data}: there is no such folder; {_WAYS}")
    places = [Path("data/imagenet")]
    if root := os.environ.get("DNW_DATA"):
        places.insert(0, Path(root) / "imagenet")
    for place in places:
        if place.is_dir():
            return place
    raise ValueError(f"no images: looked in {' and '.join(map(str, places))}; {_WAYS}")


_WAYS = (
    "to get going, give --data DIR with train/<class>/* and val/<class>/* in it, or try "
    "--data digits --image-size 32 --batch-size 64 --lr 0.05 --epochs 3, which needs no download"
)


def _files(split: Path) -> Mapping[str, list[Path]]:
    """Return the pictures of each class; folders and files that begin with a dot do not count."""
    classes = sorted(p for p in split.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise ValueError(f"{split} has no class folders; images go into {split}/<class>/")
    files: dict[str, list[Path]] = {}
    for folder in classes:
        files[folder.name] = sorted(
            p
            for p in folder.rglob("*")
            if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
        )
        if not files[folder.name]:
            raise ValueError(
                f"class folder {folder} holds no pictures ({', '.join(sorted(SUFFIXES))}); "
                "fill it or remove it"
            )
    return files
