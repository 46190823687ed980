"""The reference backend: gathers one message per edge, then sums them per target."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch_geometric.utils import segment
from typing_extensions import override

from dnw_graph.aggregation.base import BACKENDS, Backend, BlockEdges
from dnw_graph.wiring import Wiring

_ELEMENTS_AT_ONCE = 1 << 26  # 256 MB of float32 messages in the loop over candidates


@BACKENDS.register("reference")
class Reference(Backend):
    """Plain message passing on any device and topology; every other backend must equal it.

    Memory is ``k * B * H * W`` for the messages. Sums are deterministic: torch-scatter's
    ``segment_csr`` if it is installed, otherwise PyTorch's segment reduction. States of narrower
    types than the weights are summed in the type of the weights.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @override
    def forward(self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Return the inputs of a block; ``torch.compile`` does not compile this."""
        return super().forward(edges, weight, states)

    @override
    def message_and_aggregate(
        self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor]
    ) -> Tensor:
        """Return ``I = A Z``, with the messages and their sums computed in two steps."""
        (edge_index, _), w = self._edges(edges, edges.wiring), self._edge_weight(edges)
        x = torch.cat(list(states)).to(weight.dtype)
        out = self._sum(x, edge_index, w, len(edges.block.nodes))
        return out.to(states[0].dtype)

    @override
    def gradient_to_states(
        self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor], grad: Tensor
    ) -> list[Tensor]:
        edge_index, _ = self._edges(edges, edges.wiring)
        order = edge_index[0].argsort(stable=True)
        sizes = [len(z) for z in states]
        backwards, w = edge_index.flip(0)[:, order], self._edge_weight(edges)[order]
        out = self._sum(grad.to(weight.dtype), backwards, w, sum(sizes))
        return list(out.to(states[0].dtype).split(sizes))

    @override
    def gradient_to_weight(
        self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor], grad: Tensor
    ) -> Tensor:
        wiring = edges.wiring.with_gradient
        if wiring is None:
            edge_id = torch.arange(len(weight), device=weight.device)
            all_edges = edges.wiring.topology.edges(edges.block.edges.start + edge_id)
            edge_index = self._renumbered(edges, all_edges)
        else:
            edge_index, edge_id = self._edges(edges, wiring)
        x, grad = torch.cat(list(states)).to(weight.dtype), grad.to(weight.dtype)
        out = torch.zeros_like(weight)
        step = max(1, _ELEMENTS_AT_ONCE // max(1, grad[0].numel()))
        for part, ids in zip(edge_index.split(step, 1), edge_id.split(step), strict=True):
            out[ids] = self.edge_updater(part, z=(x, None), grad=(None, grad))
        return out

    def message(self, x_j: Tensor, edge_weight: Tensor) -> Tensor:
        """Return ``w_uv Z_u`` ``[k, *features]``."""
        return edge_weight.view(-1, *[1] * (x_j.dim() - 1)) * x_j

    def aggregate(self, inputs: Tensor, rowptr: Tensor) -> Tensor:
        """Return the sum of the messages of each target."""
        return segment(inputs, rowptr)

    def edge_update(self, z_j: Tensor, grad_i: Tensor) -> Tensor:
        """Return ``<Z_u, dL/dI_v>`` ``[edges]``."""
        return (z_j * grad_i).flatten(1).sum(1)

    def _sum(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor, targets: int) -> Tensor:
        if edge_weight.numel() == 0:
            return x.new_zeros(targets, *x.shape[1:])
        rowptr = torch.searchsorted(
            edge_index[1].contiguous(), torch.arange(targets + 1, device=x.device)
        )
        size = (len(x), targets)
        out: Tensor = self.propagate(
            edge_index, x=(x, None), edge_weight=edge_weight, rowptr=rowptr, size=size
        )
        return out

    def _edges(self, edges: BlockEdges, wiring: Wiring) -> tuple[Tensor, Tensor]:
        """Return a wiring's edges into the block, renumbered, and their indices in its weights."""
        rowptr, nodes = wiring.rowptr, edges.block.nodes
        span = slice(int(rowptr[nodes.start]), int(rowptr[nodes.stop]))
        edge_id = wiring.position[span] - wiring.span(edges.block).start
        edge_index = wiring.topology.edges(wiring.edge_id[span])
        return self._renumbered(edges, edge_index), edge_id

    @staticmethod
    def _edge_weight(edges: BlockEdges) -> Tensor:
        """Return the weights of the real edges into the block."""
        rowptr, nodes = edges.wiring.rowptr, edges.block.nodes
        return edges.wiring.edge_weight[int(rowptr[nodes.start]) : int(rowptr[nodes.stop])]

    @staticmethod
    def _renumbered(edges: BlockEdges, edge_index: Tensor) -> Tensor:
        """Return edges renumbered by row: sources in the stacked states, targets in the block."""
        row = edge_index.new_zeros(max((s.nodes.stop for s in edges.sources), default=0))
        at = 0
        for source in edges.sources:
            nodes = source.nodes
            row[nodes.start : nodes.stop] = torch.arange(at, at + len(nodes), device=row.device)
            at += len(nodes)
        return torch.stack([row[edge_index[0]], edge_index[1] - edges.block.nodes.start])
