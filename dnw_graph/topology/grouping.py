"""Topologies with nodes regrouped into the blocks that a schedule evaluates together."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnw_graph.topology.topology import Topology

LARGE = 32
"""Mean number of nodes per block from which complete blocks are not merged.

Dense products are then as fast block by block.
"""


@dataclass(frozen=True, eq=False)
class Grouping:
    """A topology regrouped into blocks that a schedule evaluates together, and the renumbering.

    Attributes:
        topology: The same candidates in other blocks.
        node: Number of each of its nodes in the original topology ``[V]``; None if unchanged.
        edge: Id of each of its candidates in the original topology ``[E]``; None if unchanged.
    """

    topology: Topology
    node: Tensor | None = None
    edge: Tensor | None = None

    def edge_on(self, device: torch.device) -> Tensor | None:
        """Return :attr:`edge` on a device."""
        return None if self.edge is None else self._on(device)[0]

    def regrouped(self, edge_id: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the ids of candidates in :attr:`topology`, ascending.

        Args:
            edge_id: Ids in the original topology ``[n]``.

        Returns:
            Ids ``[n]`` and the index of each in ``edge_id`` ``[n]``, which is None if unchanged.
        """
        if self.edge is None:
            return edge_id, None
        ids, order = self._on(edge_id.device)[1][edge_id].sort()
        return ids, order

    def original(self, nodes: Tensor | range) -> Tensor:
        """Return the numbers that nodes have in the original topology."""
        if isinstance(nodes, range):
            nodes = torch.arange(nodes.start, nodes.stop, device="cpu")
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
    """Return a grouping with one block per role, for schedules that evaluate all nodes at once.

    Complete blocks of on average at least :data:`LARGE` nodes are not merged.
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
