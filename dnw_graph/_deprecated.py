"""Deprecated names, which still work and issue a warning with the current name."""

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module that resolves deprecated names with a warning.

    Args:
        module: The module's ``__name__``.
        names: Current names by deprecated name.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", names[name])
        return getattr(sys.modules[module], names[name])

    return __getattr__


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller of the calling function that a name is deprecated."""
    message = f"{old} has been renamed to {new}; the old name will be removed in version 0.2"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
