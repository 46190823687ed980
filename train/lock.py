"""One process trains in a run folder: a lock that ends with its process."""

import errno
import json
import os
import socket
import sys
import uuid
import weakref
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from train.files import atomically

if sys.platform != "win32":
    import fcntl

LOCK, OWNER = "lock", "owner.json"
"""Files in a run folder: what is locked, and who has locked it."""

_open_files: dict[str, int] = {}
"""Lock files that this process has open, by path: to close one would end every lock on it."""


class RunLock:
    """The right to write to a run folder.

    The operating system holds the lock for a process and ends it with that process, also on network
    file systems. A file beside it names the owner. Where a file system has no locks, or lost one
    because a machine could not be reached, two processes may own the folder one after the other;
    :meth:`check` then tells the first.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._token: str | None = None
        self._finalizer: weakref.finalize[..., RunLock] | None = None

    def acquire(self) -> None:
        """Become the owner of the folder, which has to exist.

        Raises:
            ValueError: Another process is; the message names it.
        """
        path = str((self.folder / LOCK).resolve())
        while path not in _open_files:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if not _lock(file):
                os.close(file)
                raise ValueError(
                    f"{self.folder} is being trained by {self._owner_text()}: wait for it, stop "
                    f"it, or take another folder. If its machine is gone, remove {path}"
                )
            if _is_at(file, path):
                _open_files[path] = file
            else:  # who had locked it removed it meanwhile
                os.close(file)
        self._token = uuid.uuid4().hex
        owner = {
            "token": self._token,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": datetime.now(UTC).isoformat(" ", "seconds"),
        }
        text = json.dumps(owner, indent=2) + "\n"
        atomically(self.folder / OWNER, lambda path: path.write_text(text))
        given = self.folder, path, self._token, os.getpid()
        self._finalizer = weakref.finalize(self, _release, *given)

    def check(self) -> None:
        """Raise a ``ValueError`` if the folder now belongs to another process, or is gone."""
        if not self.is_held:
            return
        try:
            if json.loads((self.folder / OWNER).read_text())["token"] == self._token:
                return
        except FileNotFoundError:
            pass
        except (OSError, ValueError, LookupError, TypeError):
            return  # it cannot be read, which tells nothing of another process
        if not self.folder.exists():
            raise ValueError(f"{self.folder} was removed while it was trained in; training stops")
        owner = "another process, which has ended"
        if (self.folder / OWNER).exists():
            owner = self._owner_text()
        raise ValueError(
            f"{self.folder} was taken over by {owner}, while this process did not answer; this one "
            "stops, and leaves the folder as it is"
        )

    @property
    def is_held(self) -> bool:
        """Whether this has been the owner, and has not ended it."""
        return self._token is not None

    def release(self) -> None:
        """End being the owner, if this is."""
        if self._finalizer is not None:
            self._finalizer()
        self._token = None

    def _owner_text(self) -> str:
        owner = _owner(self.folder)
        known = {name: owner.get(name, "unknown") for name in ("process", "host", "since")}
        return "process {process} on {host} since {since}".format_map(known)


def _owner(folder: Path) -> dict[str, object]:
    """Return what the owner of a folder wrote; nothing if that cannot be read."""
    with suppress(OSError, ValueError):
        owner = json.loads((folder / OWNER).read_text())
        return owner if isinstance(owner, dict) else {}
    return {}


def _lock(file: int) -> bool:
    """Return whether an open file is now locked by this process, or locks are not supported."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def _is_at(file: int, path: str) -> bool:
    """Return whether an open file is the one that has this path."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _release(folder: Path, path: str, token: str, process: int) -> None:
    """Remove and close the lock file, if the folder belongs to whoever has this token.

    A process that was forked from the one that locked it leaves it alone.
    """
    if os.getpid() != process:
        return
    if _owner(folder).get("token") != token and (folder / OWNER).exists():
        return
    for name in (OWNER, LOCK):
        (folder / name).unlink(missing_ok=True)
    file = _open_files.pop(path, None)
    if file is not None:
        os.close(file)
