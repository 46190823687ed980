"""Checkpoints: everything that the rest of a run depends on, whole or not at all.

::

    checkpoints/0000012000-3f1c9a50d2b7e864.pt    steps done, and the SHA-256 of what the file holds

A checkpoint is written under another name and renamed, and the two newest are kept, so that there
is one to go on from whatever happens while another is written. They are read without executing
code.
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
"""Checkpoints that are kept."""

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run.

    Args:
        run: The run folder.
    """

    def __init__(self, run: str | Path) -> None:
        self.path = Path(run) / FOLDER

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._newest_first())

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Write a checkpoint, then remove those that are no longer needed.

        Args:
            state: Tensors and plain values.
            step: Steps of the optimizer done.

        Raises:
            OSError: It could not be written; those before it are still there.
        """
        self.path.mkdir(exist_ok=True)
        buffer = io.BytesIO()  # what is hashed is what was meant, not what a disk made of it
        torch.save(dict(state), buffer)
        data = buffer.getbuffer()
        path = self.path / f"{step:010d}-{_checksum(data)}.pt"
        atomically(path, lambda to: to.write_bytes(data))
        before = [old for old in self._newest_first() if _step(old) < step]
        for old in set(self._newest_first()) - {path, *before[: KEPT - 1]}:
            old.unlink()  # also those of a future that this run went back from
        for half in self.path.glob(".*.half"):  # of processes that were killed while they wrote
            half.unlink()

    def load(self) -> dict[str, Any]:
        """Return the newest state that is not damaged, and say so where that is not the newest.

        Raises:
            ValueError: There is none.
        """
        found = self._newest_first()
        if not found:
            raise ValueError(
                f"{self.path.parent} has nothing to resume: it stopped before its first "
                f"checkpoint, or {self.path} was emptied; {self._other_way()}"
            )
        reasons = []
        for path in found:
            try:
                state = _read(path)
            except (ValueError, OSError) as error:
                reasons.append(str(error))
                continue
            for reason in reasons:
                _log.warning("%s; going on from the checkpoint before, %s", reason, path.name)
            return state
        told = "; ".join(reasons)
        raise ValueError(f"{self.path.parent} cannot be resumed: {told}; {self._other_way()}")

    def _other_way(self) -> str:
        if (self.path.parent / "last.safetensors").exists():
            return f"a new run may start from its network with --init {self.path.parent}"
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
        raise ValueError(f"{path} is damaged: it is not what its checksum says")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever PyTorch makes of a file that is not its own
        raise ValueError(
            f"{path} is not read: it holds more than the tensors and plain values that are read "
            "without executing code"
        ) from error
    return state
