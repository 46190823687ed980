"""Find the samples of a WebDataset shard, and cache their offsets for random access."""

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
"""Largest valid label."""

_KIND = "index of shards, version 1"
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # as in the package webdataset
_END = "cannot be read to its end"

Named = tuple[str, str, tarfile.TarInfo]  # key of the sample, suffix, member


@dataclass(frozen=True)
class Index:
    """The samples of a shard that have an image and a label, in order.

    Attributes:
        offsets: Offset of each image file, in bytes ``[N]``, int64.
        sizes: Number of bytes of each image file ``[N]``, int64.
        labels: Label of each image ``[N]``, int64.
    """

    offsets: Tensor
    sizes: Tensor
    labels: Tensor


def index(shard: Path, bad: BadImages) -> Index:
    """Return the offsets and labels of the samples of a shard.

    Args:
        shard: A tar that is not compressed.
        bad: Collects damaged shards and samples.

    Raises:
        ValueError: If the shard is damaged, or a sample has no image or label; the message names
            it.
    """
    entry = cache.entry_of(_KIND, [shard])
    cached = cache.find_tensors(entry)
    if cached is not None and cached.keys() == {"offsets", "sizes", "labels"}:
        return Index(**cached)
    rows, complete = [], True
    for row in _scan(shard):
        if isinstance(row, BadImage):
            bad.found(row)
            complete = False
        else:
            rows.append(row)
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 3).t().contiguous()
    if complete:  # a cache entry does not record what is bad
        cache.keep_tensors(
            entry,
            {"offsets": table[0], "sizes": table[1].clone(), "labels": table[2].clone()},
        )
    return Index(*table)


def name_at(shard: Path, offset: int) -> str:
    """Return the shard and the name of the sample whose image is at an offset."""
    members, _ = _members(shard)
    names = (key for key, _, member in members if member.offset_data == offset)
    return f"{shard}: {next(names, f'byte {offset}')}"


def _scan(shard: Path) -> Iterator[tuple[int, int, int] | BadImage]:
    """Yield offset, size and label of each sample of a shard, or an error if it is not valid."""
    members, damage = _members(shard)
    samples = [list(sample) for _, sample in groupby(members, key=lambda named: named[0])]
    with shard.open("rb") as file:
        for number, sample in enumerate(samples):
            try:
                yield _sample(sample, file)
            except ValueError as error:
                if damage and number == len(samples) - 1:
                    continue  # its end is missing, which the error below reports
                yield BadImage(f"{shard}: {sample[0][0]}", str(error), "is not a sample")
    if damage:
        yield BadImage(str(shard), damage, _END)


def _members(shard: Path) -> tuple[list[Named], str]:
    """Return the members of a tar that belong to samples, and the damage that ends it, if any."""
    members: list[Named] = []
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    return members, f"it ends within {member.name}"
                name = _NAME.fullmatch(member.name)
                if name and member.isreg() and not member.issparse():
                    members.append((name[1], name[2].lower(), member))
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        with shard.open("rb") as file:
            is_compressed = file.read(2) == b"\x1f\x8b"
        return members, "it is compressed: unpack it with gunzip" if is_compressed else str(error)
    with shard.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            return members, f"it is cut off or damaged at byte {end:,}"
    return members, ""


def _sample(members: list[Named], file: IO[bytes]) -> tuple[int, int, int]:
    """Return offset and size of a sample's image, and its label.

    Raises:
        ValueError: If it does not have one image and one label, or the label is not valid.
    """
    images = [member for _, suffix, member in members if f".{suffix}" in SUFFIXES]
    labels = [member for _, suffix, member in members if suffix == "cls"]
    for kind, files in (("image (.jpg, .png, ...)", images), ("label (.cls)", labels)):
        if len(files) != 1:
            raise ValueError(f"it has {len(files) or 'no'} {kind}")
    file.seek(labels[0].offset_data)
    text = file.read(min(labels[0].size, 100)).decode("ascii", "replace").strip()
    if not text.isdecimal() or int(text) > MOST_LABEL:
        raise ValueError(f"its .cls must hold a number from 0 to {MOST_LABEL:,}, not {text[:20]!r}")
    return images[0].offset_data, images[0].size, int(text)
