"""Images in a folder of classes."""

import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import psutil
import torch

from train.data.bad import BadImages
from train.data.images import Images, load
from train.data.read import SUFFIXES
from train.data.source import Source, class_name

MEMORY_SHARE = 0.25
"""Decoded images are kept in memory if they take at most this share of the free memory."""

_log = logging.getLogger(__name__)


def folder(
    root: Path,
    training: bool = True,
    bad: BadImages | None = None,
    classes: Sequence[str] | None = None,
) -> Source:
    """Return the images of a folder ``train/<class>/*`` and ``val/<class>/*`` (or ``test/``).

    Class names that differ only in their Unicode form are the same class. Files and folders whose
    names begin with a dot are ignored, and links are followed, but each folder is read once.

    Args:
        root: The folder.
        training: Whether training images are required. If False, only validation images are read.
        bad: Collects the images that cannot be read. If None, such an image is an error.
        classes: Class names that the labels index. If None, the names of the training folders.

    Raises:
        ValueError: If :func:`train.data.sources.open_source` does.
    """
    bad = bad or BadImages()
    split = next((name for name in ("val", "test") if (root / name).is_dir()), None)
    if split is None or (training and not (root / "train").is_dir()):
        entries = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
        expected = "train/<class>/* and " if training else ""
        raise ValueError(
            f"{root} must hold {expected}val/<class>/* (or test/<class>/*), but holds {entries}"
        )
    train_files = _class_files(root / "train") if training else {}
    held_out_files = _class_files(root / split)
    _check_not_empty(root / "train", train_files)
    names = tuple(class_name(name) for name in classes or sorted(train_files or held_out_files))
    if unknown := sorted(held_out_files.keys() - set(names)):
        raise ValueError(
            f"{root / split} has class folders that are not among the {len(names)} classes of "
            f"the training images: {', '.join(unknown[:5])}; rename or remove them"
        )
    if training and len(names) < 2:
        raise ValueError(f"{root / 'train'} has one class; training needs two or more")
    if not any(held_out_files.values()):
        raise ValueError(f"{root / split} holds no images in its class folders; add some")
    if missing := [name for name in names if not held_out_files.get(name)]:
        _log.warning(
            "%s has no images of %d of the %d classes (%s); accuracy is measured on the others",
            *(root / split, len(missing), len(names), ", ".join(missing[:5])),
        )
    memory = int(MEMORY_SHARE * psutil.virtual_memory().available)
    train, train_bytes = _load(root / "train", train_files, names, memory, bad)
    validation, _ = _load(root / split, held_out_files, names, memory - train_bytes, bad)
    return Source(
        train=train,
        validation=validation,
        split=split,
        place=str(root.resolve()),
        classes=names,
        augmentation="crop",
        bad=bad,
    )


def _check_not_empty(split: Path, files: dict[str, list[Path]]) -> None:
    """Raise ValueError if a class has no images."""
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        raise ValueError(
            f"class folder {split / empty[0]} holds no images (.jpg, .png, .webp, or another "
            "format that Pillow reads); fill it or remove it"
        )


def _load(
    split: Path, files: dict[str, list[Path]], names: Sequence[str], memory: int, bad: BadImages
) -> tuple[Images, int]:
    """Return the readable images of a split, and the bytes of memory they take."""
    paths = [files.get(name, []) for name in names]
    sizes = torch.tensor([len(class_paths) for class_paths in paths])
    labels = torch.arange(len(sizes)).repeat_interleave(sizes)
    all_paths = [path for class_paths in paths for path in class_paths]
    images, num_bytes = load(all_paths, labels, memory, bad)
    readable = images.labels.bincount(minlength=len(names))
    for name, before, after in zip(names, sizes.tolist(), readable.tolist(), strict=True):
        if before and not after:
            raise ValueError(
                f"none of the {before} images in class folder {split / name} can be read; repair "
                "them or remove the folder"
            )
    return images, num_bytes


def _class_files(split: Path) -> dict[str, list[Path]]:
    """Return the image files of each class, and log how many other files are ignored."""
    entries = [p for p in sorted(split.iterdir()) if not p.name.startswith(".")]
    folders = [p for p in entries if p.is_dir()]
    if not folders:
        raise ValueError(f"{split} has no class folders; put images into {split}/<class>/")
    _check_distinct(folders)
    others = Counter(p.suffix.lower() for p in entries if not p.is_dir())
    files: dict[str, list[Path]] = {class_name(p.name): [] for p in folders}
    for place, path in _walk(split, folders):
        if path.suffix.lower() in SUFFIXES:
            files[class_name(place.name)].append(path)
        else:
            others[path.suffix.lower()] += 1
    if others:
        kinds = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in others.most_common())
        _log.warning(
            "%s: %d files are ignored: they are not images, or not in a class folder (%s)",
            *(split, others.total(), kinds),
        )
    return {name: sorted(paths) for name, paths in files.items()}


def _check_distinct(folders: Iterable[Path]) -> None:
    """Raise ValueError if two class folders are the same folder."""
    by_identity: dict[tuple[int, int], Path] = {}
    for place in folders:
        first = by_identity.setdefault(_identity(place), place)
        if first is not place:
            raise ValueError(
                f"class folders {first} and {place} are the same folder (a link); remove one of "
                "them"
            )


def _walk(split: Path, folders: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield each file below the class folders of a split, with its class folder.

    Each folder is visited once, as part of the class that contains it. Links are followed last, so
    a link into another class adds nothing; nor does a link to a folder that contains the split.
    """
    visited = {_identity(place) for place in (split, *split.resolve().parents, *folders)}
    pending = deque((place, place) for place in folders)
    while pending:
        class_folder, place = pending.popleft()
        if place != class_folder:
            if _identity(place) in visited:
                continue
            visited.add(_identity(place))
        for entry in _entries(place):
            path = Path(entry.path)
            if not _is_folder(entry):
                yield class_folder, path
            elif entry.is_symlink():
                pending.append((class_folder, path))
            else:
                pending.appendleft((class_folder, path))


def _entries(place: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name, without hidden files and folders."""
    try:
        with os.scandir(place) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error
    return sorted(visible, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for example; reading it as an image raises an error
        return False


def _identity(place: Path) -> tuple[int, int]:
    """Return a value that is equal for two paths if and only if they are the same folder."""
    status = place.stat()
    return status.st_dev, status.st_ino
