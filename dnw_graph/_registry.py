"""Names for the parts of a graph: a string resolves to a class, and an object passes through."""

import ast
import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Things by name, filled by a decorator.

    Args:
        kind: What the things are, in the words of an error message: ``"rule"``, ``"model"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files what it decorates under ``name``.

        Raises:
            ValueError: The name is taken.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(
                    f"there is a {self.kind} named {name!r} already; choose another name"
                )
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name in self._entries:
            return self._entries[name]
        close = difflib.get_close_matches(str(name), self._entries, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        known = ", ".join(sorted(self._entries))
        raise ValueError(f"unknown {self.kind} {name!r}{hint} (known: {known})")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


class PartRegistry(Registry[type[T]], Generic[T]):
    """A registry of classes with a common base, of which users may bring their own objects."""

    def __init__(self, kind: str, base: type[T]) -> None:
        super().__init__(kind)
        self._base = base

    def resolve(self, part: str | T | type[T]) -> T:
        """Return the object that a name, a class or an object stands for.

        Args:
            part: A name may bring arguments along: ``"targeted_dropout(rho=0.9)"``.

        Raises:
            ValueError: Nothing has that name, the message lists what there is; or arguments that
                it does not take.
            TypeError: Not a name, nor a class or an object of the right kind.
        """
        if isinstance(part, str):
            return self._build(part)
        if isinstance(part, type) and issubclass(part, self._base):
            part = part()
        if not isinstance(part, self._base):
            raise TypeError(
                f"a {self.kind} is a name ({', '.join(self)}) or an object of "
                f"{self._base.__name__}, got {part!r}"
            )
        return part

    def name_of(self, part: T) -> str:
        """Return the name of an object's class here, or what that is called where it has none."""
        names = (name for name, known in self._entries.items() if known is type(part))
        return next(names, type(part).__name__)

    def _build(self, text: str) -> T:
        """Return what ``name`` or ``name(argument=value, ...)`` stands for."""
        name = text.partition("(")[0].strip()
        part, call = self[name], None
        if name == text.strip():
            return part()
        try:
            call = ast.parse(text.strip(), mode="eval").body
            assert isinstance(call, ast.Call)
            given = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        except (SyntaxError, ValueError, AssertionError):
            call = None
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError(
                f"{self.kind} {text!r} cannot be read; write {name}(argument=value, ...), with "
                "plain values"
            )
        known = list(inspect.signature(part).parameters)
        for argument in given:
            if argument not in known:
                takes = ", ".join(known) or "none"
                raise ValueError(f"{self.kind} {name} takes no {argument!r} (known: {takes})")
        try:
            return part(**given)
        except TypeError as error:
            raise ValueError(f"{self.kind} {text!r}: {error}") from error
