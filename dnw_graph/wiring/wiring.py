"""The real edges of one forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dnw_graph.topology import Block, Grouping, Topology


class GradientObserver(Protocol):
    """Interface of observers of a backward pass, such as :class:`Sampler`."""

    def observe(
        self,
        block: Block,
        states: Sequence[Tensor],
        grad: Tensor,
        correlate: Callable[["Wiring"], Tensor],
    ) -> None:
        """Receive the source states of a block and the gradient of its inputs.

        ``correlate`` returns ``<Z_u, dL/dI_v>`` of the edges of a wiring.
        """

    def regrouped(self, grouping: Grouping) -> "GradientObserver":
        """Return the observer for the blocks of a grouping."""


class Selection(NamedTuple):
    """Selection of real edges by a rule for one forward pass.

    Attributes:
        edge_id: Ids of the real edges ``[k]``, int64, ascending.
        straight_through: Whether every candidate has a gradient.
        gradient_id: If not, ids of the edges that have one, ascending; None for the real edges.
        edge_weight: Weights of the real edges in this pass ``[k]``; None for the stored weights.
        slot: Index of each real edge's weight among the stored weights ``[k]``, if only real edges
            have weights; None if every candidate has one.
    """

    edge_id: Tensor
    straight_through: bool
    gradient_id: Tensor | None = None
    edge_weight: Tensor | None = None
    slot: Tensor | None = None


@dataclass(frozen=True)
class Wiring:
    """The real edges of one forward pass.

    Attributes:
        edge_id: Ids of the real edges ``[k]``, ascending.
        rowptr: Real edges into node ``v`` are ``rowptr[v]`` to ``rowptr[v + 1] - 1``. ``[V + 1]``
        edge_weight: Weights of the real edges ``[k]``, detached: the backend computes the gradient
            of the stored weights.
        topology: The candidates.
        straight_through: Whether every candidate has a gradient.
        others: If not, the edges that have one; None for the real edges.
        edges: The :attr:`edge_index`; None if all candidates are real.
        slot: Index of each real edge's weight among the stored weights ``[k]``, if only real edges
            have weights; None if every candidate has one.
        ends: If ``slot`` is not None, the index of the first real edge into each block, followed by
            the number of real edges.
        order: Index of each candidate's weight among the stored weights ``[E]``, if the topology
            renumbers the candidates.
        sampler: Observer of the states and gradients of the pass, if any.
    """

    edge_id: Tensor
    rowptr: Tensor
    edge_weight: Tensor
    topology: Topology
    straight_through: bool
    others: "Wiring | None"
    edges: Tensor | None
    slot: Tensor | None = None
    ends: tuple[int, ...] | None = None
    order: Tensor | None = None
    sampler: GradientObserver | None = None

    @classmethod
    def of(cls, selection: Selection, weight: Tensor, topology: Topology) -> "Wiring":
        """Return the wiring of a rule's selection.

        Args:
            selection: The selection.
            weight: Candidate weights ``[E]``, or weights of real edges ``[k]`` if the selection
                has ``slot``.
            topology: The candidates.
        """
        edge_id, edge_weight = selection.edge_id, selection.edge_weight
        if edge_weight is None:
            weight, slot = weight.detach(), selection.slot
            all_real = slot is None and len(edge_id) == len(weight)
            edge_weight = weight if all_real else weight[edge_id if slot is None else slot]
        rowptr, edges = torch.searchsorted(edge_id, topology.rowptr_on(edge_id.device)), None
        if len(edge_id) < topology.num_candidates:
            nodes = torch.arange(topology.num_nodes, device=edge_id.device)
            target = nodes.repeat_interleave(rowptr.diff(), output_size=len(edge_id))
            edges = topology.edges(edge_id, target)
        others, gradient_id = None, selection.gradient_id
        if gradient_id is not None:
            others = cls.of(Selection(gradient_id, straight_through=False), weight, topology)
        ends = None
        if selection.slot is not None:
            first = [block.nodes.start for block in topology.blocks]
            ends = tuple(rowptr[[*first, topology.num_nodes]].tolist())
        return cls(
            edge_id=edge_id,
            rowptr=rowptr,
            edge_weight=edge_weight,
            topology=topology,
            straight_through=selection.straight_through,
            others=others,
            edges=edges,
            slot=selection.slot,
            ends=ends,
        )

    def regrouped(self, grouping: Grouping) -> "Wiring":
        """Return the same edges in the topology of a grouping."""
        if grouping.topology is self.topology:
            return self
        edge_id, order = grouping.regrouped(self.edge_id)
        weight, slot = self.edge_weight, self.slot
        if order is not None:
            weight, slot = weight[order], None if slot is None else slot[order]
        selection = Selection(edge_id, self.straight_through, edge_weight=weight, slot=slot)
        return replace(
            Wiring.of(selection, weight, grouping.topology),
            others=None if self.others is None else self.others.regrouped(grouping),
            order=grouping.edge_on(edge_id.device),
            sampler=None if self.sampler is None else self.sampler.regrouped(grouping),
        )

    @property
    def edge_index(self) -> Tensor:
        """Sources and targets ``[2, k]``, sorted by ``(target, source)``."""
        return self.topology.edges(self.edge_id) if self.edges is None else self.edges

    @property
    def with_gradient(self) -> "Wiring | None":
        """Wiring of the edges that have a gradient; None if all candidates have one."""
        if self.straight_through:
            return None
        return self if self.others is None else self.others

    def trained(self, weight: Tensor) -> Tensor:
        """Return stored weights by edge id: ``[E]``, or ``[k]`` if only real edges have any."""
        order = self.order if self.slot is None else self.slot
        return weight if order is None else weight.index_select(0, order)

    def span(self, block: Block) -> range:
        """Return the indices in :meth:`trained` of the weights of edges into a block."""
        if self.ends is None:
            return block.edges
        return range(self.ends[block.index], self.ends[block.index + 1])

    @property
    def position(self) -> Tensor:
        """Index of each real edge's weight in :meth:`trained` ``[k]``."""
        if self.slot is None:
            return self.edge_id
        return torch.arange(len(self.edge_id), device=self.edge_id.device)

    @property
    def mask(self) -> Tensor:
        """Boolean mask of the real edges ``[E]``; computed on each access."""
        mask = self.edge_id.new_zeros(self.topology.num_candidates, dtype=torch.bool)
        return mask.index_fill_(0, self.edge_id, True)

    @property
    def candidate_weight(self) -> Tensor:
        """Weights of all candidates ``[E]``, 0 for hallucinated edges; computed on each access."""
        number = self.topology.num_candidates
        if len(self.edge_id) == number:
            return self.edge_weight
        return self.edge_weight.new_zeros(number).index_copy_(0, self.edge_id, self.edge_weight)

    def validate(self) -> "Wiring":
        """Check that the attributes are consistent, and return the wiring; waits for the device.

        Raises:
            ValueError: If an attribute is not as described above; the message names it.
        """
        number, ids = self.topology.num_candidates, self.edge_id.cpu()
        check_ids(ids, number)
        expected = {
            "rowptr": torch.searchsorted(ids, self.topology.rowptr),
            "edge_index": self.topology.edges(ids),
        }
        for name, value in expected.items():
            if not torch.equal(getattr(self, name).cpu(), value):
                raise ValueError(f"{name} of the wiring does not match the edges in edge_id")
        if self.edge_weight.shape != ids.shape:
            raise ValueError(
                f"edge_weight must have shape [{len(ids)}], one number per real edge, got "
                f"{list(self.edge_weight.shape)}"
            )
        indices = torch.arange(len(ids), device="cpu")
        if self.slot is not None and not torch.equal(self.slot.cpu().sort().values, indices):
            raise ValueError(f"slot must contain each number from 0 to {len(ids) - 1} once")
        return self


def check_ids(edge_id: Any, num_candidates: int) -> None:
    """Raise ValueError if a rule's edge ids are not an int64 tensor of shape ``[k]``.

    On a CPU, also raise if they do not ascend or are out of range. On a GPU, where this check would
    make the host wait, :meth:`Wiring.validate` does it.
    """
    if not isinstance(edge_id, Tensor) or edge_id.dtype != torch.int64 or edge_id.dim() != 1:
        is_tensor = isinstance(edge_id, Tensor)
        value = f"{edge_id.dtype} {list(edge_id.shape)}" if is_tensor else repr(edge_id)[:60]
        raise ValueError(
            "a rule must return edge ids, int64 of shape [k] (for a mask, "
            f"mask.nonzero().flatten()), got {value}"
        )
    if edge_id.is_cpu and not torch.compiler.is_compiling() and len(edge_id):
        if not bool((edge_id.diff() > 0).all()):
            raise ValueError(
                "a rule must return edge ids in ascending order without duplicates: use "
                "ids.sort().values"
            )
        first, last = int(edge_id[0]), int(edge_id[-1])
        if first < 0 or last >= num_candidates:
            raise ValueError(
                f"a rule returned edge ids from {first} to {last}, but candidates have ids from 0 "
                f"to {num_candidates - 1}"
            )
