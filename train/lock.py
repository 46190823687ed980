"""A lock on a run folder that ends with its process, so only one process trains in it."""

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
"""Files in a run folder: the locked file, and a description of the owner of the lock."""

_open_files: dict[str, int] = {}
"""Lock files that this process has open, by path; closing one would end all locks on it."""


class RunLock:
    """An exclusive lock on a run folder.

    The operating system holds the lock for a process and ends it with that process, also on network
    file systems. A file beside it names the owner. If a file system has no locks, or lost one
    because a machine could not be reached, a second process may take over the folder;
    :meth:`check` then raises an error in the first.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._token: str | None = None
        self._finalizer: weakref.finalize[..., RunLock] | None = None

    def acquire(self) -> None:
        """Lock the folder, which must exist.

        Raises:
            ValueError: If another process has locked it; the message names the process.
        """
        path = str((self.folder / LOCK).resolve())
        while path not in _open_files:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if not _lock(file):
                os.close(file)
                raise ValueError(
                    f"{self.folder} is in use by {self._owner_text()}: wait for it, stop it, or "
                    f"choose another folder. If its machine no longer exists, remove {path}"
                )
            if _is_at(file, path):
                _open_files[path] = file
            else:  # the previous owner has removed it meanwhile
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
        arguments = self.folder, path, self._token, os.getpid()
        self._finalizer = weakref.finalize(self, _release, *arguments)

    def check(self) -> None:
        """Raise ValueError if another process has taken over the folder, or it was removed."""
        if not self.is_held:
            return
        try:
            if json.loads((self.folder / OWNER).read_text())["token"] == self._token:
                return
        except FileNotFoundError:
            pass
        except (OSError, ValueError, LookupError, TypeError):
            return  # an unreadable file does not mean that there is another process
        if not self.folder.exists():
            raise ValueError(f"{self.folder} was removed during training; training stops")
        owner = "another process, which has ended"
        if (self.folder / OWNER).exists():
            owner = self._owner_text()
        raise ValueError(
            f"{self.folder} was taken over by {owner}, while this process did not respond; this "
            "process stops, and leaves the folder unchanged"
        )

    @property
    def is_held(self) -> bool:
        """Whether :meth:`acquire` succeeded and :meth:`release` was not called since."""
        return self._token is not None

    def release(self) -> None:
        """Release the lock, if this holds it."""
        if self._finalizer is not None:
            self._finalizer()
        self._token = None

    def _owner_text(self) -> str:
        """Return a description of the owner, for error messages."""
        owner = _owner(self.folder)
        fields = {name: owner.get(name, "unknown") for name in ("process", "host", "since")}
        return "process {process} on {host} since {since}".format_map(fields)


def _owner(folder: Path) -> dict[str, object]:
    """Return the content of a folder's ``owner.json``; empty if it cannot be read."""
    with suppress(OSError, ValueError):
        owner = json.loads((folder / OWNER).read_text())
        return owner if isinstance(owner, dict) else {}
    return {}


def _lock(file: int) -> bool:
    """Try to lock an open file; return whether it is locked now, or locks are not supported."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def _is_at(file: int, path: str) -> bool:
    """Return whether an open file is the file at this path."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _release(folder: Path, path: str, token: str, process: int) -> None:
    """Remove and close the lock file, if the owner of the folder has this token.

    Does nothing in a process that was forked from the one that locked the folder.
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
