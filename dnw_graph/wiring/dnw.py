"""Discovering neural wirings: the k candidates of largest magnitude (Algorithm 1)."""

from torch import Tensor

from dnw_graph.wiring.base import RULES, Rule, RuleState
from dnw_graph.wiring.select import top_k


@RULES.register("dnw")
class DNW(Rule):
    """The ``k`` edges of largest ``|w|`` are real; hallucinated ones are updated like them.

    Source: Wortsman, Farhadi and Rastegari 2019, Algorithm 1.
    """

    def select(self, weight: Tensor, num_edges: int, state: RuleState) -> Tensor:
        """See :meth:`Rule.select`."""
        return top_k(weight, num_edges)
