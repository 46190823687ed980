"""The real edges of one forward pass."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnw_graph.topology import Topology


@dataclass(frozen=True)
class Wiring:
    """The real edges, decided once per forward pass and handed down.

    Attributes:
        edge_id: Places of the real edges among the candidates ``[k]``, ascending.
        rowptr: Real edges into node ``v`` are ``rowptr[v]`` to ``rowptr[v + 1] - 1``. ``[V + 1]``
        weight: Weights of all candidates ``[E]``, without a gradient.
        topology: The candidates.
        straight_through: Whether hallucinated edges have a gradient too.
        edges: What :attr:`edge_index` is, unless all candidates are real.
    """

    edge_id: Tensor
    rowptr: Tensor
    weight: Tensor
    topology: Topology
    straight_through: bool
    edges: Tensor | None

    @classmethod
    def of(
        cls, edge_id: Tensor, weight: Tensor, topology: Topology, straight_through: bool
    ) -> "Wiring":
        """Look up what a rule chose.

        Args:
            edge_id: Ids of the real edges ``[k]``, int64, ascending; see :func:`check_ids`.
            weight: Candidate weights ``[E]``.
            topology: The candidates.
            straight_through: :attr:`Rule.straight_through`.

        """
        rowptr, edges = torch.searchsorted(edge_id, topology.rowptr_on(weight.device)), None
        if len(edge_id) < len(weight):
            nodes = torch.arange(topology.num_nodes, device=weight.device)
            target = nodes.repeat_interleave(rowptr.diff(), output_size=len(edge_id))
            edges = topology.edges(edge_id, target)
        return cls(
            edge_id=edge_id,
            rowptr=rowptr,
            weight=weight.detach(),
            topology=topology,
            straight_through=straight_through,
            edges=edges,
        )

    @property
    def edge_index(self) -> Tensor:
        """Sources and targets ``[2, k]``, sorted by ``(target, source)``."""
        return self.topology.edges(self.edge_id) if self.edges is None else self.edges

    @property
    def mask(self) -> Tensor:
        """Which candidates are real ``[E]``, boolean; made when asked for."""
        nothing = torch.zeros_like(self.weight, dtype=torch.bool)
        return nothing.index_fill_(0, self.edge_id, True)

    @property
    def edge_weight(self) -> Tensor:
        """Weights of the real edges ``[k]``, for reading; gradients go through the aggregation."""
        return self.weight[self.edge_id]

    def validate(self) -> "Wiring":
        """Check every promise above, and return the wiring; waits for the device.

        Raises:
            ValueError: Naming the promise that is broken.
        """
        number, ids = self.topology.num_candidates, self.edge_id.cpu()
        check_ids(ids, number)
        expected = {
            "rowptr": torch.searchsorted(ids, self.topology.rowptr),
            "edge_index": self.topology.edges(ids),
        }
        for name, value in expected.items():
            if not torch.equal(getattr(self, name).cpu(), value):
                raise ValueError(f"{name} of the wiring is not that of the edges in edge_id")
        if self.weight.shape != (number,):
            raise ValueError(f"weights must be [{number}], got {list(self.weight.shape)}")
        return self


def check_ids(edge_id: Any, num_candidates: int) -> None:
    """Raise a ``ValueError`` for ids of another type or shape than a wiring's.

    On a CPU also for ids that do not ascend or name no candidate; a GPU is not made to wait for
    that, which :meth:`Wiring.validate` does.
    """
    if not isinstance(edge_id, Tensor) or edge_id.dtype != torch.int64 or edge_id.dim() != 1:
        tensor = isinstance(edge_id, Tensor)
        got = f"{edge_id.dtype} {list(edge_id.shape)}" if tensor else repr(edge_id)[:60]
        raise ValueError(
            "a rule must choose edges by id, int64 [k] (mask.nonzero().flatten() of a mask), "
            f"got {got}"
        )
    if edge_id.is_cpu and not torch.compiler.is_compiling() and len(edge_id):
        if not bool((edge_id.diff() > 0).all()):
            raise ValueError(
                "a rule must choose edges in ascending order, each once: ids.sort().values"
            )
        first, last = int(edge_id[0]), int(edge_id[-1])
        if first < 0 or last >= num_candidates:
            raise ValueError(
                f"a rule chose edges {first} to {last}, but the candidates are numbered from 0 to "
                f"{num_candidates - 1}"
            )
