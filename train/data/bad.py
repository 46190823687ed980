"""Pictures that cannot be read: an error, or counted and left out."""

import logging

_log = logging.getLogger(__name__)


class BadImage(ValueError):
    """A picture that cannot be read.

    Args:
        place: The file, or the shard and the sample in it.
        reason: Why.
        what: What cannot be done with it.
    """

    def __init__(self, place: str, reason: str, what: str = "cannot be read as an image") -> None:
        super().__init__(place, reason, what)  # all of them, or it could not be pickled
        self.place, self.reason, self.what = place, reason, what

    def __str__(self) -> str:
        return f"{self.place} {self.what} ({self.reason}): repair the file or remove it"


class BadImages:
    """The pictures of a source that could not be read so far.

    Args:
        skip: Whether such are counted and left out; else the first is an error.

    Attributes:
        paths: Why, by place: a file, or a shard and the sample in it.
    """

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.paths: dict[str, str] = {}

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.paths)

    def found(self, bad: BadImage) -> None:
        """Count a picture and log it, the first time; or raise it.

        Raises:
            ValueError: Such pictures are not to be left out.
        """
        if not self.skip:
            raise ValueError(f"{bad}, or leave such out with --bad-images skip") from bad
        if bad.place not in self.paths:
            self.paths[bad.place] = bad.reason
            _log.warning("%s %s (%s), and is left out", bad.place, bad.what, bad.reason)
