"""Every node fires once, block after block, each pulling from all earlier ones."""

from collections.abc import Sequence

import networkx as nx
import torch
from torch import Tensor

from dnw_graph.schedule.base import SCHEDULES, Flow, Schedule, outputs_of, parts_of
from dnw_graph.topology import Block, Role, Topology


@SCHEDULES.register("static")
class Static(Schedule):
    r"""``I_j = \sum_{i<j} A_{ji} Z_i``, ``Z_j = f_j(I_j)``: a feed-forward network (section 2.1).

    Edges must lead to later blocks, inputs have no parents, and each output needs a path from an
    input.
    """

    def check(self, topology: Topology) -> None:
        """See :meth:`Schedule.check`."""
        for block in topology.blocks:
            if any(i >= block.index for i in block.sources):
                self._explain_backward(topology, block)
        fed = [b for b in topology.blocks if b.role == Role.INPUT and b.edges]
        if fed:
            raise ValueError(
                "in a static graph inputs have no parents, but there are edges into "
                f"{topology.describe(self._edges(topology, fed[0])[1].unique())}; use a schedule "
                "in time"
            )
        roles = [block.role for block in topology.blocks]
        if Role.INPUT in roles[roles.count(Role.INPUT) :]:
            raise ValueError("in a static graph the blocks of the inputs come first; renumber them")
        reached = topology.role == Role.INPUT
        for block in topology.blocks:
            if block.complete:
                fed_by = [topology.blocks[i].nodes for i in block.sources]
                some = any(bool(reached[nodes.start : nodes.stop].any()) for nodes in fed_by)
                reached[block.nodes.start : block.nodes.stop] |= some
            else:
                source, target = self._edges(topology, block)
                reached[target[reached[source]]] = True
        lost = topology.outputs[~reached[topology.outputs]]
        if len(lost):
            raise ValueError(
                "no path of candidate edges leads from an input to output "
                f"{topology.describe(lost)}; add edges, or take the node out of the outputs"
            )

    def run(self, flow: Flow, frames: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`Schedule.run`."""
        pull, (x,) = flow.puller(), frames
        given = parts_of(flow.topology, x)
        states: list[Tensor] = []
        messages: list[Tensor] = []
        for block in flow.topology.blocks:
            taken = block.index in given
            inputs = given[block.index] if taken else pull(block, messages)
            states.append(flow.fire(block, inputs, t=0.0))
            messages.append(flow.send(block, states[-1], t=0.0))
            if messages[-1].shape[2:] != messages[0].shape[2:]:
                raise ValueError(
                    f"node functions must agree on the size of feature maps: block 0 has "
                    f"{list(messages[0].shape[2:])}, block {block.index} "
                    f"{list(messages[-1].shape[2:])}; only input nodes may have a stride"
                )
        return [outputs_of(flow.topology, states)]

    @staticmethod
    def _edges(topology: Topology, block: Block) -> Tensor:
        """Return the candidates into a block ``[2, n]``."""
        return topology.edges(torch.arange(block.edges.start, block.edges.stop, device="cpu"))

    @classmethod
    def _explain_backward(cls, topology: Topology, block: Block) -> None:
        """Raise for edges that do not lead to a later block: a cycle, or blocks out of order."""
        if topology.depth is None:
            graph = nx.DiGraph(topology.edge_index.t().tolist())
            cycle = [u for u, _ in nx.find_cycle(graph)]
            raise ValueError(
                "a static graph has no cycle, but this topology has one through nodes "
                f"{topology.describe(cycle)}; remove an edge of it, or use a schedule in time"
            )
        edges = cls._edges(topology, block)
        u, v = edges[:, topology.block[edges[0]] >= block.index][:, 0].tolist()
        raise ValueError(
            f"in a static graph edges lead to later blocks, but {topology.describe([u])} -> "
            f"{topology.describe([v])} leads from block {int(topology.block[u])} to block "
            f"{int(topology.block[v])}; Topology.from_edges finds blocks for any acyclic graph"
        )
