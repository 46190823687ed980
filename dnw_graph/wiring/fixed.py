"""Wirings that never change: drawn at random, or taken from a trained complete graph."""

import torch
from torch import Tensor
from typing_extensions import override

from dnw_graph.wiring.base import RULES, Candidates, Rule, RuleState, TrainingProgress
from dnw_graph.wiring.select import top_k


class Fixed(Rule):
    """Base class of rules that store the ids of the real edges; other weights are never read."""

    ranking = "none"

    @override
    def select(self, candidates: Candidates) -> Tensor:
        return candidates.state["edge_id"].clone()  # a wiring may outlive the next change of state

    @override
    def straight_through(self, progress: TrainingProgress) -> bool:
        """Return False: only real edges have a gradient."""
        return False


@RULES.register("random")
class Random(Fixed):
    """Draw ``k`` candidates uniformly without replacement when the graph is built (RG)."""

    @override
    def init_state(self, candidates: Candidates) -> RuleState:
        """Return real edges drawn with PyTorch's generator, which ``torch.manual_seed`` seeds."""
        order = torch.randperm(candidates.topology.num_candidates, device="cpu")
        return {"edge_id": order[: candidates.num_edges].sort().values}


class Inherited(Fixed):
    """Keep the ``k`` largest weights of a trained complete graph; see :func:`dnw_graph.inherit`."""

    @override
    def init_state(self, candidates: Candidates) -> RuleState:
        """Return ids of -1, which :meth:`inherit` replaces."""
        return {"edge_id": torch.full((candidates.num_edges,), -1)}

    @override
    def inherit(self, candidates: Candidates, trained: Tensor) -> None:
        candidates.state["edge_id"].copy_(top_k(trained, candidates.num_edges))

    @override
    def select(self, candidates: Candidates) -> Tensor:
        """Return the ids of the real edges.

        Raises:
            ValueError: If :meth:`inherit` was not called yet. Checked on CPUs only, since the check
                would make the host wait for a GPU.
        """
        ids = candidates.state["edge_id"]
        if ids.is_cpu and not torch.compiler.is_compiling() and int(ids[0]) < 0:
            raise ValueError(
                f"rule {RULES.name_of(self)} keeps the largest weights of a trained complete "
                "graph: call dnw_graph.inherit first, or pass --from RUN to a training command"
            )
        return ids.clone()


@RULES.register("lottery")
class Lottery(Inherited):
    """Train the edges of a trained complete graph from its initial weights.

    Source: Frankle and Carbin 2019, one shot, as in Table 2 of the paper.
    """

    starts_from = "initial"


@RULES.register("fine_tune")
class FineTune(Inherited):
    """Train the edges of a trained complete graph from its trained weights.

    Source: Table 2 of the paper.
    """

    starts_from = "trained"
