"""Images that cannot be read, which are errors, or are counted and left out."""

import logging

_log = logging.getLogger(__name__)


class BadImage(ValueError):
    """An image that cannot be read.

    Args:
        place: The file, or the shard and the sample in it.
        reason: Why it cannot be read.
        what: The problem as a predicate, for messages.
    """

    def __init__(self, place: str, reason: str, what: str = "cannot be read as an image") -> None:
        super().__init__(place, reason, what)  # pickling needs all of the arguments
        self.place, self.reason, self.what = place, reason, what

    def __str__(self) -> str:
        return f"{self.place} {self.what} ({self.reason}): repair the file or remove it"


class BadImages:
    """The images of a source that could not be read so far.

    Args:
        skip: Whether such images are counted and left out. If False, the first one is an error.

    Attributes:
        paths: Reasons, by place: a file, or a shard and the sample in it.
    """

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.paths: dict[str, str] = {}

    @property
    def count(self) -> int:
        """Number of images that could not be read."""
        return len(self.paths)

    def found(self, bad: BadImage) -> None:
        """Count an image, and log it the first time.

        Raises:
            ValueError: If ``skip`` is False.
        """
        if not self.skip:
            raise ValueError(f"{bad}, or skip such images with --bad-images skip") from bad
        if bad.place not in self.paths:
            self.paths[bad.place] = bad.reason
            _log.warning("%s %s (%s), so it is left out", bad.place, bad.what, bad.reason)
