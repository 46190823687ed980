"""Write files so that they are either complete or absent."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from dnw_graph._files import replacing


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, then rename it, so it is never partially written.

    Args:
        path: The file.
        write: Writes the content to the path it is called with.

    Raises:
        OSError: If it could not be written; the previous content remains.
    """
    try:
        with replacing(path) as partial:
            partial.touch()
            mode = partial.stat().st_mode  # some writers create files only their owner may read
            write(partial)
            partial.chmod(mode)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # writers raise these for disk errors
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"{path} could not be written ({str(error).splitlines()[0]}; {free / 1e6:,.0f} MB are "
            "free there); its previous content is still there"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make the entries of a folder survive a power failure, on systems that support it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
