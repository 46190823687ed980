"""Schedules: when nodes fire, block by block (static) or in discrete or continuous time."""

from dnw_graph._deprecated import renamed
from dnw_graph.schedule.base import (
    SCHEDULES,
    AggregateFunction,
    ForwardPass,
    RecurrentState,
    Schedule,
    checked_lengths,
    outputs_of,
    parts_of,
)
from dnw_graph.schedule.continuous import Continuous
from dnw_graph.schedule.discrete import Discrete
from dnw_graph.schedule.static import Static

__all__ = [
    "SCHEDULES",
    "AggregateFunction",
    "Continuous",
    "Discrete",
    "ForwardPass",
    "RecurrentState",
    "Schedule",
    "Static",
    "checked_lengths",
    "outputs_of",
    "parts_of",
]

__getattr__ = renamed(
    __name__,
    {
        "Carried": "RecurrentState",
        "Flow": "ForwardPass",
        "PullFunction": "AggregateFunction",
    },
)
