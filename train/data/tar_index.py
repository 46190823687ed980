"""Where the samples of a WebDataset shard are: found once, kept, and then read at random."""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from train.data import cache
from train.data.bad import BadImage, BadImages
from train.data.read import SUFFIXES

MOST_LABEL = 999_999
"""Labels are at most this; one that is larger is a mistake."""

_KIND = "index of shards, version 1"
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # as in the package webdataset
_END = "cannot be read to its end"

Named = tuple[str, str, tarfile.TarInfo]  # key of the sample, suffix, member


@dataclass(frozen=True)
class Index:
    """The samples of a shard that have an image and a label, in their order.

    Attributes:
        offsets: Where their images begin ``[N]``, int64.
        sizes: How many bytes these have ``[N]``, int64.
        labels: Their labels ``[N]``, int64.
    """

    offsets: Tensor
    sizes: Tensor
    labels: Tensor


def index(shard: Path, bad: BadImages) -> Index:
    """Return where the samples of a shard are.

    Args:
        shard: A tar, not compressed.
        bad: Where to count what is not as it should be.

    Raises:
        ValueError: A damaged shard, or a sample without image or label; the message names them.
    """
    entry = cache.entry_of(_KIND, [shard])
    kept = cache.find_tensors(entry)
    if kept is not None and kept.keys() == {"offsets", "sizes", "labels"}:
        return Index(**kept)
    rows, whole = [], True
    for row in _scan(shard):
        if isinstance(row, BadImage):
            bad.found(row)
            whole = False
        else:
            rows.append(row)
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 3).t().contiguous()
    if whole:  # else what is kept could not tell what is bad
        cache.keep_tensors(
            entry,
            {"offsets": table[0], "sizes": table[1].clone(), "labels": table[2].clone()},
        )
    return Index(*table)


def name_at(shard: Path, offset: int) -> str:
    """Return the name of a sample, by where its image begins."""
    found, _ = _members(shard)
    names = (key for key, _, member in found if member.offset_data == offset)
    return f"{shard}: {next(names, f'byte {offset}')}"


def _scan(shard: Path) -> Iterator[tuple[int, int, int] | BadImage]:
    """Yield offset, size and label of each sample of a shard, or what is wrong with it."""
    members, damage = _members(shard)
    samples = [list(sample) for _, sample in groupby(members, key=lambda named: named[0])]
    with shard.open("rb") as file:
        for number, sample in enumerate(samples):
            try:
                yield _sample(sample, file)
            except ValueError as error:
                if damage and number == len(samples) - 1:
                    continue  # its end is missing, as is said below
                yield BadImage(f"{shard}: {sample[0][0]}", str(error), "is no sample")
    if damage:
        yield BadImage(str(shard), damage, _END)


def _members(shard: Path) -> tuple[list[Named], str]:
    """Return the members of a tar that belong to samples, and why there are no more, if known."""
    found: list[Named] = []
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    return found, f"it ends within {member.name}"
                name = _NAME.fullmatch(member.name)
                if name and member.isreg() and not member.issparse():
                    found.append((name[1], name[2].lower(), member))
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        with shard.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return found, "it is compressed: unpack it with gunzip" if packed else str(error)
    with shard.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            return found, f"it is cut off or damaged at byte {end:,}"
    return found, ""


def _sample(members: list[Named], file: IO[bytes]) -> tuple[int, int, int]:
    """Return offset and size of a sample's image, and its label.

    Raises:
        ValueError: It has not one of each.
    """
    images = [member for _, suffix, member in members if f".{suffix}" in SUFFIXES]
    labels = [member for _, suffix, member in members if suffix == "cls"]
    for kind, found in (("image (.jpg, .png, ...)", images), ("label (.cls)", labels)):
        if len(found) != 1:
            raise ValueError(f"it has {len(found) or 'no'} {kind}")
    file.seek(labels[0].offset_data)
    text = file.read(min(labels[0].size, 100)).decode("ascii", "replace").strip()
    if not text.isdecimal() or int(text) > MOST_LABEL:
        raise ValueError(f"its .cls must hold a number from 0 to {MOST_LABEL:,}, not {text[:20]!r}")
    return images[0].offset_data, images[0].size, int(text)
