"""Find the shards of a pattern, ``train-{000..146}.tar`` or ``train-*.tar``, or of a folder."""

import os
import re
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_COMPRESSED = re.compile(r"\.(tgz|tar\.\w+)$")


def are_shards(data: str) -> bool:
    """Return whether ``--data`` names shards rather than a folder of classes."""
    if os.path.isdir(data):
        return not os.path.isdir(Path(data) / "train") and bool(in_folder(Path(data), "train"))
    return bool(_BRACES.search(data) or has_magic(data) or ".tar" in Path(data).name)


def in_folder(folder: Path, name: str) -> list[Path]:
    """Return the shards of a folder whose file names begin with ``name``."""
    return sorted(p for p in folder.glob(f"{name}*.tar*") if not p.is_dir())


def expand(pattern: str, flag: str) -> list[Path]:
    """Return the shards that match a pattern, each once.

    Args:
        pattern: A path with ranges ``{000..146}``, alternatives ``{a,b}``, or ``*``.
        flag: The command-line option of the pattern, for error messages.

    Raises:
        ValueError: If shards are missing or compressed.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(f"{flag} {pattern}: shards are read from files; download them first")
    patterns = _braces(pattern, flag)
    names = [p for name in patterns for p in (sorted(glob(name)) if has_magic(name) else [name])]
    if not names:
        raise ValueError(f"{flag} {pattern}: no shards match")
    return checked([Path(name) for name in dict.fromkeys(names)], f"{flag} {pattern}")


def checked(shards: list[Path], given: str) -> list[Path]:
    """Return shards, after checking that they exist and are not compressed.

    Args:
        shards: The shards.
        given: The option and its value, for error messages.

    Raises:
        ValueError: If shards are missing or compressed.
    """
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(
            f"{given}: {len(missing)} of {len(shards)} shards are missing: {_first(missing)}"
        )
    compressed = [shard for shard in shards if _COMPRESSED.search(shard.name)]
    if compressed:
        raise ValueError(
            f"{given}: {len(compressed)} shards are compressed, so they do not support random "
            f"access: {_first(compressed)}; unpack them to .tar"
        )
    return shards


def _braces(pattern: str, flag: str) -> list[str]:
    """Return the paths that braces in a pattern expand to; the first braces vary slowest."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    choices = braces[1].split(",")
    if range_ := _RANGE.fullmatch(braces[1]):
        first, last = range_[1], range_[2]
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        choices = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    if not choices or choices == [""] or (len(choices) == 1 and not range_):
        raise ValueError(
            f"{flag} {pattern}: {braces[0]} is not a range; write it as {{000..146}}, or {{a,b}}"
        )
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [path for choice in choices for path in _braces(before + choice + after, flag)]


def _first(paths: Sequence[Path]) -> str:
    """Return the first paths as text."""
    return ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
