"""What was read from images once, kept on disk: decoded pictures, and where shards have samples.

In ``$DNW_CACHE``, or ``~/.cache/dnw-graph``; files there may be deleted at any time.
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
"""Bytes of decoded pictures up to which they are kept."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """What a file of the cache holds: pictures, one behind the other, and their shapes."""

    values: Tensor
    shapes: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the pictures."""
        return self.values.nbytes

    def pictures(self) -> list[Tensor]:
        """Return the pictures, each ``[3, H, W]``, uint8."""
        parts = self.values.split(self.shapes.prod(1).tolist())
        return [p.view(*s) for p, s in zip(parts, self.shapes.tolist(), strict=True)]


def folder() -> Path:
    """Return where things are kept."""
    return Path(os.environ.get("DNW_CACHE") or Path.home() / ".cache" / "dnw-graph")


def find(paths: Sequence[Path]) -> Kept | None:
    """Return the decoded pictures of some files, if they are kept and the files did not change."""
    found = find_tensors(_PICTURES, paths) if paths else None
    kept = Kept(found["values"], found["shapes"]) if found else None
    return kept if kept is not None and len(kept.shapes) == len(paths) else None


def keep(paths: Sequence[Path], pictures: Sequence[Tensor]) -> None:
    """Keep decoded pictures, where they are not too large and there is room."""
    if not 0 < sum(p.numel() for p in pictures) <= MOST:
        return
    values = torch.cat([p.flatten() for p in pictures])
    shapes = torch.tensor([p.shape for p in pictures])
    keep_tensors(_PICTURES, paths, {"values": values, "shapes": shapes})


def find_tensors(kind: str, paths: Sequence[Path]) -> dict[str, Tensor] | None:
    """Return what is kept of some files, if anything is and the files did not change.

    Args:
        kind: What is kept, and the version of what made it.
        paths: The files it was made from.
    """
    try:
        place = _place(kind, paths)
    except OSError:  # a file that cannot be looked at is named by whoever reads it
        return None
    try:
        with safe_open(place, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        _log.warning("%s is not used: %s", place, error)
        return None


def keep_tensors(kind: str, paths: Sequence[Path], tensors: dict[str, Tensor]) -> None:
    """Keep something of some files for :func:`find_tensors`, where there is room."""
    place = _place(kind, paths)
    half = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, half)
        half.replace(place)
    except (OSError, SafetensorError) as error:
        _log.warning("%s are not kept in %s: %s", kind, place.parent, error)
    finally:
        with suppress(OSError):
            half.unlink()


def _place(kind: str, paths: Sequence[Path]) -> Path:
    """Return where something of some files, as these are now, is kept."""
    stats = [path.stat() for path in paths]
    seen = [kind] + [
        f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}"
        for path, stat in zip(paths, stats, strict=True)
    ]
    return folder() / f"{hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:32]}.safetensors"


_PICTURES = f"pictures decoded by PIL {PIL.__version__} and torchvision {torchvision.__version__}"
