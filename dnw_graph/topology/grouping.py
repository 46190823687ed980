"""A topology in the order in which a schedule lets its nodes fire."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnw_graph.topology.topology import Topology

LARGE = 32
"""Mean number of nodes from which complete blocks stay apart: dense products suit them as well."""


@dataclass(frozen=True, eq=False)
class Grouping:
    """The blocks of a topology as they fire, and how nodes and candidates are renumbered for them.

    Attributes:
        topology: The same candidates; the nodes of one block fire together.
        node: Number of each of its nodes in the original topology ``[V]``; None if unchanged.
        edge: Id of each of its candidates in the original topology ``[E]``; None if unchanged.
    """

    topology: Topology
    node: Tensor | None = None
    edge: Tensor | None = None

    def edge_on(self, device: torch.device) -> Tensor | None:
        """Return :attr:`edge` on a device, copied there once."""
        return None if self.edge is None else self._on(device)[0]

    def regrouped(self, edge_id: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the ids that candidates have in :attr:`topology`, ascending.

        Args:
            edge_id: Their ids in the original topology ``[n]``.

        Returns:
            Ids ``[n]``, and the index of each of them in ``edge_id`` ``[n]``, None if unchanged.
        """
        if self.edge is None:
            return edge_id, None
        ids, order = self._on(edge_id.device)[1][edge_id].sort()
        return ids, order

    def original(self, nodes: Tensor) -> Tensor:
        """Return the numbers that nodes have in the original topology."""
        return nodes if self.node is None else self.node[nodes]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Grouping":
        return self

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return :attr:`edge` and its inverse on a device."""

        def make() -> tuple[Tensor, ...]:
            assert self.edge is not None
            return self.edge, self.edge.argsort()

        return self.topology.copies_on("edges of the original", device, make)


def by_role(topology: Topology) -> Grouping:
    """Return a grouping with one block per role, for schedules under which all nodes fire at once.

    A topology whose blocks are complete and of :data:`LARGE` nodes or more on average is kept.
    """
    blocks = topology.blocks
    dense = all(block.complete or not block.edges for block in blocks)
    large = dense and topology.num_nodes >= LARGE * len(blocks)
    if large or len(blocks) == len({block.role for block in blocks}):
        return Grouping(topology)
    with torch.device("cpu"):
        node = topology.role.argsort(stable=True)
        number = node.argsort()
        edge_index = number[topology.edge_index]
        merged = Topology(
            edge_index,
            topology.role[node],
            topology.role[node],
            names=[topology.names[v] for v in node.tolist()],
            inputs=number[topology.inputs],
            outputs=number[topology.outputs],
        )
        if bool((node.diff() > 0).all()):
            return Grouping(merged)
        edge = (edge_index[1] * topology.num_nodes + edge_index[0]).argsort()
    return Grouping(merged, node, edge)
