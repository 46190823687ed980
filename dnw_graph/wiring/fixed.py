"""Wirings that never change: drawn at random, or found in a trained complete graph."""

import torch
from torch import Tensor

from dnw_graph.wiring.base import RULES, Candidates, Rule, RuleState, TrainingProgress
from dnw_graph.wiring.select import top_k


class Fixed(Rule):
    """Real edges that are remembered by id; the weights of the others are never read."""

    ranking = "none"

    def select(self, candidates: Candidates) -> Tensor:
        """See :meth:`Rule.select`."""
        return candidates.state["edge_id"].clone()  # a wiring outlives the next change

    def straight_through(self, progress: TrainingProgress) -> bool:
        """See :meth:`Rule.straight_through`: never."""
        return False


@RULES.register("random")
class Random(Fixed):
    """``k`` candidates drawn uniformly without replacement when the graph is made: RG."""

    def init_state(self, candidates: Candidates) -> RuleState:
        """Draw the wiring from PyTorch's generator, so that ``torch.manual_seed`` repeats it."""
        drawn = torch.randperm(candidates.topology.num_candidates, device="cpu")
        return {"edge_id": drawn[: candidates.num_edges].sort().values}


class Inherited(Fixed):
    """The ``k`` largest weights of a trained complete graph; see :func:`dnw_graph.inherit`."""

    def init_state(self, candidates: Candidates) -> RuleState:
        """Return no wiring yet."""
        return {"edge_id": torch.full((candidates.num_edges,), -1)}

    def inherit(self, candidates: Candidates, trained: Tensor) -> None:
        """See :meth:`Rule.inherit`."""
        candidates.state["edge_id"].copy_(top_k(trained, candidates.num_edges))

    def select(self, candidates: Candidates) -> Tensor:
        """See :meth:`Rule.select`.

        Raises:
            ValueError: Nothing was inherited yet (on a CPU; a GPU is not made to wait).
        """
        ids = candidates.state["edge_id"]
        if ids.is_cpu and not torch.compiler.is_compiling() and int(ids[0]) < 0:
            raise ValueError(
                f"rule {RULES.name_of(self)} keeps the largest weights of a trained complete "
                "graph: call dnw_graph.inherit first, or give --from RUN to a training command"
            )
        return ids.clone()


@RULES.register("lottery")
class Lottery(Inherited):
    """Trained edges, initial weights.

    Source: Frankle and Carbin 2019, one shot, as in Table 2 of the paper.
    """

    starts_from = "initial"


@RULES.register("fine_tune")
class FineTune(Inherited):
    """Trained edges, trained weights, trained on. Source: Table 2 of the paper."""

    starts_from = "trained"
