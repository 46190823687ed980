"""Images in a folder of classes."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from train.data.bad import BadImages
from train.data.images import Images, load
from train.data.read import SUFFIXES
from train.data.source import Source

MEMORY_SHARE = 0.25
"""Images are kept decoded in memory where they take at most this share of what is free."""

_log = logging.getLogger(__name__)


def folder(root: Path, training: bool = True, bad: BadImages | None = None) -> Source:
    """Return the images of a folder ``train/<class>/*`` and ``val/<class>/*`` (or ``test/``).

    Args:
        root: The folder.
        training: Whether there have to be images to learn from; else there are none.
        bad: Where to count what cannot be read; an error unless given.

    Raises:
        ValueError: As :func:`train.data.sources.open_source`.
    """
    bad = bad or BadImages()
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
    ours, taken = _load(root / "train", train, memory, bad)
    theirs, _ = _load(root / split, held_out, memory - taken, bad)
    return Source(
        train=ours,
        validation=theirs,
        split=split,
        place=str(root.resolve()),
        classes=tuple(sorted(train)),
        augmentation="crop",
        bad=bad,
    )


def _load(
    place: Path, files: dict[str, list[Path]], memory: int, bad: BadImages
) -> tuple[Images, int]:
    """Return the images of a split that can be read, and the bytes of memory they take."""
    names = sorted(files)
    sizes = torch.tensor([len(files[name]) for name in names])
    labels = torch.arange(len(sizes)).repeat_interleave(sizes)
    images, taken = load([path for name in names for path in files[name]], labels, memory, bad)
    left = images.labels.bincount(minlength=len(names))
    for name, before, after in zip(names, sizes.tolist(), left.tolist(), strict=True):
        if before and not after:
            raise ValueError(
                f"class folder {place / name} holds no pictures that can be read, of {before}; "
                "fill it or remove it"
            )
    return images, taken


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
