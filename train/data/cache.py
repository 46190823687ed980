"""Cache decoded images and the index of shards on disk.

Entries are in ``$DNW_CACHE``, or ``~/.cache/dnw-graph``, and may be deleted at any time. If there
is neither, nothing is cached.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MOST = 2**30
"""Maximum number of bytes of decoded images that are cached."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedImages:
    """Cached images: their concatenated bytes, and their shapes."""

    values: Tensor
    shapes: Tensor

    @property
    def nbytes(self) -> int:
        """Number of bytes of the images."""
        return self.values.nbytes

    def pictures(self) -> list[Tensor]:
        """Return the images, each ``[3, H, W]``, uint8."""
        parts = self.values.split(self.shapes.prod(1).tolist())
        return [p.view(*s) for p, s in zip(parts, self.shapes.tolist(), strict=True)]


def folder() -> Path | None:
    """Return the folder of the cache; None if the user has no home directory."""
    if path := os.environ.get("DNW_CACHE"):
        return Path(path)
    try:
        return Path.home() / ".cache" / "dnw-graph"
    except RuntimeError:  # a container whose user has no entry, for example
        return None


def entry_of(kind: str, paths: Sequence[Path]) -> Path | None:
    """Return the path of the cache entry for something made from the current content of files.

    A file is identified by path, inode, size, and the times at which its content and its inode
    changed. The latter time cannot be set, so two files of equal size and time that were swapped
    are distinguished. Call this before reading the files: if they change meanwhile, the entry is
    never found again.

    Args:
        kind: What is cached, with the version of the code that makes it.
        paths: The files it is made from.

    Returns:
        The path of the entry; None if there is no cache, or a file is missing.
    """
    place = folder()
    if place is None:
        return None
    try:
        stats = [path.stat() for path in paths]
    except OSError:  # reading the file will raise an error that names it
        return None
    identities = [
        f"{path.absolute()} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"
        for path, s in zip(paths, stats, strict=True)
    ]
    digest = hashlib.sha256(json.dumps([kind, *identities]).encode()).hexdigest()
    return place / f"{digest[:32]}.safetensors"


def pictures_entry(paths: Sequence[Path]) -> Path | None:
    """Return the cache entry of the decoded images of some files; see :func:`entry_of`."""
    return entry_of(_PICTURES, paths) if paths else None


def find(entry: Path | None) -> CachedImages | None:
    """Return the images of an entry, or None if nothing is cached there."""
    tensors = find_tensors(entry)
    return CachedImages(tensors["values"], tensors["shapes"]) if tensors else None


def keep(entry: Path | None, pictures: Sequence[Tensor]) -> None:
    """Cache decoded images, unless they are too large or there is no room."""
    if not 0 < sum(p.numel() for p in pictures) <= MOST:
        return
    values = torch.cat([p.flatten() for p in pictures])
    shapes = torch.tensor([p.shape for p in pictures])
    keep_tensors(entry, {"values": values, "shapes": shapes})


def find_tensors(entry: Path | None) -> dict[str, Tensor] | None:
    """Return the tensors of an entry, or None if nothing is cached there."""
    if entry is None:
        return None
    try:
        with safe_open(entry, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        _log.warning("%s is ignored: %s", entry, error)
        return None


def keep_tensors(entry: Path | None, tensors: dict[str, Tensor]) -> None:
    """Cache tensors for :func:`find_tensors`, if there is room."""
    if entry is None:
        return
    partial = entry.with_name(f".{entry.name}.{os.getpid()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial)
        partial.replace(entry)
    except (OSError, SafetensorError) as error:
        _log.warning("nothing is cached in %s: %s", entry.parent, error)
    finally:
        with suppress(OSError):
            partial.unlink()


_PICTURES = f"images decoded by PIL {PIL.__version__} and torchvision {torchvision.__version__}"
