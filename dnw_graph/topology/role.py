"""What nodes are to the world outside a graph."""

from enum import IntEnum


class Role(IntEnum):
    """What a node is to the world outside the graph."""

    INPUT = 0
    HIDDEN = 1
    OUTPUT = 2
