"""Checkpoints: everything that the rest of a run depends on.

::

    checkpoints/0000012000-3f1c9a50d2b7e864.pt    steps done, and the SHA-256 of the content

A checkpoint is written under a temporary name and then renamed, and the two newest are kept, so a
run can be resumed even if writing one fails. Checkpoints are read without executing code.
"""

import hashlib
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from train.files import atomically

FOLDER = "checkpoints"
KEPT = 2
"""Number of checkpoints to keep."""

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run.

    Args:
        run: The run folder.
    """

    def __init__(self, run: str | Path) -> None:
        self.path = Path(run) / FOLDER

    def __bool__(self) -> bool:
        """Return whether there are any checkpoints."""
        return bool(self._newest_first())

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Write a checkpoint, then remove those that are no longer needed.

        Args:
            state: Tensors and plain values.
            step: Number of optimizer steps done.

        Raises:
            OSError: If it could not be written; earlier checkpoints remain.
        """
        self.path.mkdir(exist_ok=True)
        buffer = io.BytesIO()  # the hash is of the data in memory, so it detects writing errors
        torch.save(dict(state), buffer)
        data = buffer.getbuffer()
        path = self.path / f"{step:010d}-{_checksum(data)}.pt"
        atomically(path, lambda to: to.write_bytes(data))
        earlier = [old for old in self._newest_first() if _step(old) < step]
        for old in set(self._newest_first()) - {path, *earlier[: KEPT - 1]}:
            old.unlink()  # including later steps, if the run was resumed from an earlier one
        for partial in self.path.glob(".*.half"):  # of processes that were killed while writing
            partial.unlink()

    def load(self) -> dict[str, Any]:
        """Return the newest undamaged state, and log a warning for each newer damaged one.

        Raises:
            ValueError: If there is none.
        """
        paths = self._newest_first()
        if not paths:
            raise ValueError(
                f"{self.path.parent} cannot be resumed: it stopped before its first checkpoint, or "
                f"{self.path} was emptied; {self._alternative()}"
            )
        reasons = []
        for path in paths:
            try:
                state = _read(path)
            except (ValueError, OSError) as error:
                reasons.append(str(error))
                continue
            for reason in reasons:
                _log.warning("%s; resuming from the earlier checkpoint %s", reason, path.name)
            return state
        raise ValueError(
            f"{self.path.parent} cannot be resumed: {'; '.join(reasons)}; {self._alternative()}"
        )

    def _alternative(self) -> str:
        """Return what a user can do instead of resuming, for error messages."""
        if (self.path.parent / "last.safetensors").exists():
            return f"start a new run from its network with --init {self.path.parent}"
        return "start it again with --overwrite"

    def _newest_first(self) -> list[Path]:
        return sorted(self.path.glob("[0-9]*-*.pt"), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _checksum(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    if _checksum(data) != path.stem.partition("-")[2]:
        raise ValueError(f"{path} is damaged: its content does not match its checksum")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises many types of errors for invalid files
        raise ValueError(
            f"{path} cannot be read: it contains more than tensors and plain values, and only "
            "these are read, because that executes no code"
        ) from error
    return state
