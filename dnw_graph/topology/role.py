"""Roles of nodes."""

from enum import IntEnum


class Role(IntEnum):
    """Whether a node takes the graph's input, gives its output, or neither."""

    INPUT = 0
    HIDDEN = 1
    OUTPUT = 2

    @classmethod
    def of(cls, role: object) -> "Role":
        """Return a role by its name, in any case, or its number.

        Raises:
            ValueError: If there is no such role.
        """
        try:
            return cls[role.upper()] if isinstance(role, str) else cls(int(role))  # type: ignore[call-overload]
        except (KeyError, ValueError, TypeError):
            known = ", ".join(r.name.lower() for r in cls)
            raise ValueError(f"unknown role {role!r} (known: {known})") from None
