"""When nodes fire: by block (static); in discrete or continuous time."""

from dnw_graph.schedule.base import SCHEDULES, Carried, Flow, PullFunction, Schedule
from dnw_graph.schedule.continuous import Continuous
from dnw_graph.schedule.discrete import Discrete
from dnw_graph.schedule.static import Static

__all__ = [
    "SCHEDULES",
    "Carried",
    "Continuous",
    "Discrete",
    "Flow",
    "PullFunction",
    "Schedule",
    "Static",
]
