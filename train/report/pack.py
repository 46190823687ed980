"""Pack arrays into compressed text for a page."""

import base64
import gzip
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray


def compressed(content: bytes) -> str:
    """Return bytes as text: compressed by gzip, which browsers can read, in base64."""
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


class Pack:
    """A collection of named arrays that a page reads as typed arrays."""

    def __init__(self) -> None:
        self._arrays: list[tuple[str, NDArray[Any]]] = []

    def add(self, name: str, values: NDArray[Any]) -> str:
        """Add an array, and return its name."""
        self._arrays.append((name, np.ascontiguousarray(values)))
        return name

    def add_ids(self, name: str, ids: NDArray[np.int64]) -> str:
        """Add ascending numbers as differences, which compress better; return the name."""
        return self.add(name, np.diff(ids, prepend=0).astype(np.uint32))

    def text(self) -> str:
        """Return all arrays as compressed text: a line of JSON with offsets, then the bytes."""
        index, body = {}, b""
        for name, values in self._arrays:
            body += b"\0" * (-len(body) % 8)
            index[name] = [str(values.dtype), len(body), values.size]
            body += values.tobytes()
        head = json.dumps(index).encode()
        head += b" " * (-(len(head) + 1) % 8) + b"\n"
        return compressed(head + body)
