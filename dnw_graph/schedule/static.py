"""The static schedule: every node fires once, block by block."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from dnw_graph.aggregation import TYPES
from dnw_graph.aggregation.auto import SMALL
from dnw_graph.precision import accepted_dtype
from dnw_graph.schedule import _blocks, _maps, _pointwise
from dnw_graph.schedule._chain import Chain
from dnw_graph.schedule.base import (
    SCHEDULES,
    ForwardPass,
    Schedule,
    check_outputs,
    outputs_of,
    parts_of,
)
from dnw_graph.topology import Block, Role, Topology


class _Sums:
    """The messages of the blocks that have fired; like :class:`Chain`, but for any backend."""

    def __init__(self, forward_pass: ForwardPass) -> None:
        self._aggregate = forward_pass.aggregator()
        self._messages: list[Tensor] = []

    def aggregate(self, block: Block) -> Tensor:
        """Return the inputs of a block ``[nodes, *features]``."""
        return self._aggregate(block, self._messages)

    def push(self, block: Block, messages: Tensor) -> None:
        """Add the messages of a block ``[nodes, *features]``."""
        self._messages.append(messages)


def _sums(forward_pass: ForwardPass, like: Tensor) -> "Chain | _Sums":
    """Return an object that sums messages like ``like``, those of the first block."""
    wiring, dtype = forward_pass.wiring, accepted_dtype(like)
    supported = dtype in TYPES or like.is_cuda
    compiled = supported and forward_pass.backend.by_edge(wiring)
    if not compiled or wiring.sampler is not None or torch.compiler.is_compiling():
        return _Sums(forward_pass)
    return Chain(wiring, forward_pass.weight, like.to(dtype))


@SCHEDULES.register("static")
class Static(Schedule):
    r"""A feed-forward network: each block fires once, after all earlier blocks (section 2.1).

    .. math::
        I_j = \sum_{i<j} A_{ji} Z_i, \qquad Z_j = f_j(I_j)

    Edges must lead to later blocks, inputs must not have parents, and each output needs a path from
    an input.
    """

    @override
    def check(self, topology: Topology) -> None:
        for block in topology.blocks:
            if any(i >= block.index for i in block.sources):
                self._raise_for_backward_edge(topology, block)
        input_blocks = [b for b in topology.blocks if b.role == Role.INPUT and b.edges]
        if input_blocks:
            targets = self._edges(topology, input_blocks[0])[1].unique()
            raise ValueError(
                "in a static graph inputs must not have parents, but there are edges into "
                f"{topology.describe(targets)}; use a schedule in time"
            )
        roles = [block.role for block in topology.blocks]
        if Role.INPUT in roles[roles.count(Role.INPUT) :]:
            raise ValueError(
                "in a static graph the blocks of the inputs must come first; renumber the blocks"
            )
        if not self.allows_constant_outputs:
            check_outputs(topology, self._reached(topology))

    @classmethod
    def _reached(cls, topology: Topology) -> Tensor:
        """Return whether each node has a path from an input ``[V]``, boolean."""
        has_path = topology.role == Role.INPUT
        for block in topology.blocks:
            if block.complete:
                sources = [topology.blocks[i].rows for i in block.sources]
                reachable = any(bool(has_path[rows].any()) for rows in sources)
                has_path[block.rows] |= reachable
            else:
                source, target = cls._edges(topology, block)
                has_path[target[has_path[source]]] = True
        return has_path

    @override
    def run(self, forward_pass: ForwardPass, frames: Sequence[Tensor]) -> list[Tensor]:
        (x,) = frames
        small = forward_pass.topology.num_nodes < SMALL * len(forward_pass.topology.blocks)
        on_maps = (_maps.run, _blocks.run) if small else (_blocks.run, _maps.run)
        for compute in (_pointwise.run, *on_maps):
            outputs = compute(forward_pass, x)
            if outputs is not None:
                return [outputs]
        parts = parts_of(forward_pass.topology, x)
        states: list[Tensor] = []
        sums: Chain | _Sums | None = None
        for block in forward_pass.topology.blocks:
            if block.index in parts:
                inputs = parts[block.index]
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
    def _raise_for_backward_edge(cls, topology: Topology, block: Block) -> None:
        """Raise ValueError for an edge that does not lead to a later block; a cycle is named."""
        if topology.depth is None:
            import networkx as nx

            graph = nx.DiGraph(topology.edge_index.t().tolist())
            cycle = [u for u, _ in nx.find_cycle(graph)]
            raise ValueError(
                "a static graph must not have a cycle, but this topology has one through nodes "
                f"{topology.describe(cycle)}; remove an edge of it, or use a schedule in time"
            )
        edges = cls._edges(topology, block)
        u, v = edges[:, topology.block[edges[0]] >= block.index][:, 0].tolist()
        raise ValueError(
            f"in a static graph edges must lead to later blocks, but {topology.describe([u])} -> "
            f"{topology.describe([v])} leads from block {int(topology.block[u])} to block "
            f"{int(topology.block[v])}; Topology.from_edges finds blocks for any acyclic graph"
        )
