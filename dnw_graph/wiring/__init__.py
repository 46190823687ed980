"""Which edges exist now: rules that choose the real edges from the candidate weights."""

from dnw_graph.wiring.base import RULES, Rule, RuleState
from dnw_graph.wiring.complete import Complete
from dnw_graph.wiring.dnw import DNW
from dnw_graph.wiring.random import Random
from dnw_graph.wiring.select import top_k
from dnw_graph.wiring.wiring import Wiring

__all__ = [
    "DNW",
    "RULES",
    "Complete",
    "Random",
    "Rule",
    "RuleState",
    "Wiring",
    "top_k",
]
