"""Files that are there whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, then rename it: whatever happens, no half is left.

    Raises:
        OSError: It could not be written; what was there before still is.
    """
    half = path.with_name(f".{path.name}.half")
    try:
        half.touch()
        mode = half.stat().st_mode  # some writers make files that nobody else may read
        write(half)
        half.chmod(mode)
        with half.open("rb+") as file:
            os.fsync(file.fileno())
        half.replace(path)
        _keep_name(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # how writers say what a disk said
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"{path} could not be written ({str(error).splitlines()[0]}; {free / 1e6:,.0f} MB are "
            "free there); what it held before is still there"
        ) from error
    finally:
        half.unlink(missing_ok=True)


def _keep_name(folder: Path) -> None:
    """Let a new name outlive a power failure, where the system can be asked to."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
