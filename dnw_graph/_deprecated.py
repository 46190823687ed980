"""Names of an earlier version, which still work and say what they are called now."""

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module that also knows its earlier names.

    Args:
        module: The module's ``__name__``.
        names: Today's names by earlier ones.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", names[name])
        return getattr(sys.modules[module], names[name])

    return __getattr__


def warn_renamed(old: str, new: str) -> None:
    """Warn whoever called the caller that a name has changed."""
    message = f"{old} is called {new} now; the old name goes in version 0.2"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
