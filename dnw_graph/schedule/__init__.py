"""When nodes fire: by block (static); in discrete or continuous time."""

from dnw_graph.schedule.base import SCHEDULES, PullFunction, Schedule
from dnw_graph.schedule.static import Static

__all__ = ["SCHEDULES", "PullFunction", "Schedule", "Static"]
