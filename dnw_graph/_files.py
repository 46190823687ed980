"""Write files so that they are either complete or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to, which becomes ``path`` unless there is an error."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.half")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
