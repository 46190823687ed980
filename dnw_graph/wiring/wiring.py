"""The real edges of one forward pass."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dnw_graph.topology import Topology


class Selection(NamedTuple):
    """What a rule decided for one forward pass.

    Attributes:
        edge_id: Ids of the real edges ``[k]``, int64, ascending.
        straight_through: Whether every candidate has a gradient.
        gradient_id: Where not, ids of those that have one, ascending; the real edges if None.
        values: Weights in the pass ``[E]``, without a gradient, if not the candidates' own.
    """

    edge_id: Tensor
    straight_through: bool
    gradient_id: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class Wiring:
    """The real edges, decided once per forward pass and handed down.

    Attributes:
        edge_id: Places of the real edges among the candidates ``[k]``, ascending.
        rowptr: Real edges into node ``v`` are ``rowptr[v]`` to ``rowptr[v + 1] - 1``. ``[V + 1]``
        weight: Weights of all candidates in this pass ``[E]``, without a gradient.
        replaced: Whether they are other than the parameter's.
        topology: The candidates.
        straight_through: Whether every candidate has a gradient.
        gradient_id: Where not, ids of those that have one; the real edges if None.
        edges: What :attr:`edge_index` is, unless all candidates are real.
    """

    edge_id: Tensor
    rowptr: Tensor
    weight: Tensor
    replaced: bool
    topology: Topology
    straight_through: bool
    gradient_id: Tensor | None
    edges: Tensor | None

    @classmethod
    def of(cls, selection: Selection, weight: Tensor, topology: Topology) -> "Wiring":
        """Look up the edges that a rule selected.

        Args:
            selection: What it selected.
            weight: Candidate weights ``[E]``.
            topology: The candidates.
        """
        edge_id = selection.edge_id
        rowptr, edges = torch.searchsorted(edge_id, topology.rowptr_on(weight.device)), None
        if len(edge_id) < len(weight):
            nodes = torch.arange(topology.num_nodes, device=weight.device)
            target = nodes.repeat_interleave(rowptr.diff(), output_size=len(edge_id))
            edges = topology.edges(edge_id, target)
        return cls(
            edge_id=edge_id,
            rowptr=rowptr,
            weight=weight.detach() if selection.values is None else selection.values,
            replaced=selection.values is not None,
            topology=topology,
            straight_through=selection.straight_through,
            gradient_id=selection.gradient_id,
            edges=edges,
        )

    @property
    def edge_index(self) -> Tensor:
        """Sources and targets ``[2, k]``, sorted by ``(target, source)``."""
        return self.topology.edges(self.edge_id) if self.edges is None else self.edges

    @cached_property
    def with_gradient(self) -> "Wiring | None":
        """The edges that have a gradient, as a wiring; None for all candidates."""
        if self.straight_through:
            return None
        if self.gradient_id is None:
            return self
        return Wiring.of(Selection(self.gradient_id, False), self.weight, self.topology)

    @property
    def mask(self) -> Tensor:
        """Which candidates are real ``[E]``, boolean; made when asked for."""
        nothing = torch.zeros_like(self.weight, dtype=torch.bool)
        return nothing.index_fill_(0, self.edge_id, True)

    def applied(self, weight: Tensor) -> Tensor:
        """Return the weights of this pass, with a gradient that goes to ``weight [E]`` unchanged.

        Args:
            weight: The parameter.
        """
        if not self.replaced:
            return weight
        values: Tensor = _Replace.apply(weight, self.weight)
        return values

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


class _Replace(torch.autograd.Function):
    """Other values in place of a tensor; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


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
