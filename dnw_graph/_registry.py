"""Registries of parts by name: a name resolves to a new object, and an object to itself."""

import ast
import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from typing_extensions import override

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries by name, added by a decorator.

    Args:
        kind: What the entries are, for error messages: ``"rule"``, ``"model"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an object as ``name``.

        Raises:
            ValueError: If the name is already registered.
            TypeError: If it is not a name, as in a decorator without a call.
        """
        if not isinstance(name, str):
            raise TypeError(
                f"the decorator that registers a {self.kind} must be called with a name, "
                f"got {name!r}"
            )

        def add(entry: T) -> T:
            self._check(entry)
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is already registered; choose another name")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name in self._entries:
            return self._entries[name]
        close = difflib.get_close_matches(str(name), self._entries, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        names = ", ".join(sorted(self._entries))
        custom = "" if close else "; to use a custom one, import its module first"
        raise ValueError(f"unknown {self.kind} {name!r}{hint} (known: {names}){custom}")

    def _check(self, entry: T) -> None:
        """Raise TypeError if an object cannot be registered."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


class PartRegistry(Registry[type[T]], Generic[T]):
    """A registry of classes with a common base; users may pass objects of their own classes."""

    def __init__(self, kind: str, base: type[T]) -> None:
        super().__init__(kind)
        self._base = base

    @override
    def _check(self, entry: type[T]) -> None:
        if not isinstance(entry, type) or not issubclass(entry, self._base):
            raise TypeError(f"a {self.kind} is a subclass of {self._base.__name__}, got {entry!r}")

    def resolve(self, part: str | T | type[T]) -> T:
        """Return the object for a name, a class or an object.

        Args:
            part: A name, optionally with arguments (``"targeted_dropout(rho=0.9)"``), a class, or
                an object, which is returned unchanged.

        Raises:
            ValueError: If the name is unknown (the message lists the known ones), or the part does
                not take the arguments.
            TypeError: If ``part`` is not a name, nor a class or an object of the right kind.
        """
        if isinstance(part, str):
            return self._build(part)
        if isinstance(part, type) and issubclass(part, self._base):
            part = part()
        if not isinstance(part, self._base):
            raise TypeError(
                f"{self.kind} must be a name ({', '.join(self)}) or an object of "
                f"{self._base.__name__}, got {part!r}"
            )
        return part

    def name_of(self, part: T) -> str:
        """Return the registered name of an object's class, or the class name if it has none."""
        names = (name for name, entry in self._entries.items() if entry is type(part))
        return next(names, type(part).__name__)

    def _build(self, text: str) -> T:
        """Return the object for ``name`` or ``name(argument=value, ...)``."""
        name = text.partition("(")[0].strip()
        part, call = self[name], None
        if name == text.strip():
            return part()
        try:
            call = ast.parse(text.strip(), mode="eval").body
            assert isinstance(call, ast.Call)
            arguments = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        except (SyntaxError, ValueError, AssertionError):
            call = None
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError(
                f"{self.kind} {text!r} cannot be parsed; write {name}(argument=value, ...) with "
                "literal values"
            )
        parameters = list(inspect.signature(part).parameters)
        for argument in arguments:
            if argument not in parameters:
                names = ", ".join(parameters) or "none"
                raise ValueError(
                    f"{self.kind} {name} has no argument {argument!r} (known: {names})"
                )
        try:
            return part(**arguments)
        except TypeError as error:
            raise ValueError(f"{self.kind} {text!r}: {error}") from error
