"""Every node fires once, block after block, each pulling from all earlier ones."""

from collections.abc import Sequence

import networkx as nx
import torch
from torch import Tensor

from dnw_graph.aggregation._kernels import TYPES
from dnw_graph.aggregation.auto import SMALL
from dnw_graph.node import fused
from dnw_graph.schedule import _blocks, _maps, _pointwise
from dnw_graph.schedule._chain import Chain
from dnw_graph.schedule.base import SCHEDULES, ForwardPass, Schedule, outputs_of, parts_of
from dnw_graph.topology import Block, Role, Topology


class _Sums:
    """The messages of the blocks that have fired, for any backend; as :class:`Chain`."""

    def __init__(self, forward_pass: ForwardPass) -> None:
        self._pull = forward_pass.aggregator()
        self._messages: list[Tensor] = []

    def aggregate(self, block: Block) -> Tensor:
        """Return the inputs of a block ``[nodes, *features]``."""
        return self._pull(block, self._messages)

    def push(self, block: Block, messages: Tensor) -> None:
        """Add what a block sends ``[nodes, *features]``."""
        self._messages.append(messages)


def _sums(forward_pass: ForwardPass, like: Tensor) -> "Chain | _Sums":
    """Return what sums messages like those of the first block."""
    wiring, dtype = forward_pass.wiring, fused.accepted(like)
    compiled = forward_pass.backend.by_edge(wiring) and dtype in TYPES
    if not compiled or wiring.sampler is not None or torch.compiler.is_compiling():
        return _Sums(forward_pass)
    return Chain(wiring, forward_pass.weight, like.to(dtype))


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

    def run(self, forward_pass: ForwardPass, frames: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`Schedule.run`."""
        (x,) = frames
        small = forward_pass.topology.num_nodes < SMALL * len(forward_pass.topology.blocks)
        on_maps = (_maps.run, _blocks.run) if small else (_blocks.run, _maps.run)
        for whole in (_pointwise.run, *on_maps):
            found = whole(forward_pass, x)
            if found is not None:
                return [found]
        given = parts_of(forward_pass.topology, x)
        states: list[Tensor] = []
        sums: Chain | _Sums | None = None
        for block in forward_pass.topology.blocks:
            if block.index in given:
                inputs = given[block.index]
            else:
                assert sums is not None  # inputs come first
                inputs = sums.aggregate(block)
            states.append(forward_pass.fire(block, inputs, t=0.0))
            messages = forward_pass.send(block, states[-1], t=0.0)
            if sums is None:
                first, sums = messages, _sums(forward_pass, messages)
            if messages.shape[2:] != first.shape[2:]:
                raise ValueError(
                    f"node functions must agree on the size of feature maps: block 0 has "
                    f"{list(first.shape[2:])}, block {block.index} {list(messages.shape[2:])}; "
                    "only input nodes may have a stride"
                )
            sums.push(block, messages)
        return [outputs_of(forward_pass.topology, states)]

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
