"""The real edges of one forward pass."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dnw_graph.topology import Topology


@dataclass(frozen=True)
class Wiring:
    """The real edges, decided once per forward pass and handed down.

    Attributes:
        edge_index: Sources and targets ``[2, k]``, sorted by ``(target, source)``.
        edge_weight: Their weights ``[k]``, for reading; gradients flow through the aggregation.
        edge_id: Their places among the candidates ``[k]``, ascending.
        rowptr: Real edges into node ``v`` are ``rowptr[v]`` to ``rowptr[v + 1] - 1``. ``[V + 1]``
        mask: Which candidates are real ``[E]``, boolean.
        candidate_index: All candidate edges ``[2, E]``, in the same order.
        straight_through: Whether hallucinated edges have a gradient too.
    """

    edge_index: Tensor
    edge_weight: Tensor
    edge_id: Tensor
    rowptr: Tensor
    mask: Tensor
    candidate_index: Tensor
    straight_through: bool

    @classmethod
    def of(
        cls,
        edge_id: Tensor,
        weight: Tensor,
        edge_index: Tensor,
        rowptr: Tensor,
        straight_through: bool,
    ) -> "Wiring":
        """Look up what a rule chose.

        Args:
            edge_id: Ids of the real edges ``[k]``, ascending.
            weight: Candidate weights ``[E]``.
            edge_index: :attr:`Topology.edge_index`, on the device of ``weight``.
            rowptr: :attr:`Topology.rowptr`, on the device of ``weight``.
            straight_through: :attr:`Rule.straight_through`.
        """
        everything = edge_id.numel() == weight.numel()
        return cls(
            edge_index=edge_index if everything else edge_index[:, edge_id],
            edge_weight=weight.detach()[edge_id],
            edge_id=edge_id,
            rowptr=torch.searchsorted(edge_id, rowptr),
            mask=torch.zeros_like(weight, dtype=torch.bool).index_fill_(0, edge_id, True),
            candidate_index=edge_index,
            straight_through=straight_through,
        )

    def validate(self, topology: Topology) -> "Wiring":
        """Check every promise above against a topology, and return the wiring.

        Raises:
            ValueError: Ids that are not ascending, out of range, or at odds with ``edge_index``.
        """
        ids = self.edge_id.cpu()
        if not bool((ids.diff() > 0).all()):
            raise ValueError("edge ids must ascend, each at most once")
        if ids.numel() and not (int(ids[0]) >= 0 and int(ids[-1]) < topology.num_candidates):
            raise ValueError(
                f"edge ids must lie in [0, {topology.num_candidates:,}), "
                f"got {int(ids[0])} to {int(ids[-1])}"
            )
        if not torch.equal(self.edge_index.cpu(), topology.edge_index[:, ids]):
            raise ValueError("edge_index does not hold the edges that edge_id names")
        return self
