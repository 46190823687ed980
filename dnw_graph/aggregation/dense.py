"""The backend for matrix units: one masked dense matrix per block."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from dnw_graph.aggregation import _matmul
from dnw_graph.aggregation.base import BACKENDS, Backend, BlockEdges
from dnw_graph.aggregation.whole import DenseWholeGraph, WholeGraph, suits_dense_products
from dnw_graph.topology import Block
from dnw_graph.wiring import Wiring


@BACKENDS.register("dense")
class Dense(Backend):
    """Multiplies ``[targets, sources]`` matrices with zeros at hallucinated edges.

    This computes all pairs of nodes rather than the ``k`` real edges, but with the fastest
    available kernels, and never waits for the device. At least 1 in 16 pairs must be a candidate. A
    state that is not finite also affects sums that do not include it, since 0 times infinity is not
    0.
    """

    @override
    def supports(self, block: Block) -> bool:
        return suits_dense_products(len(block.edges), block.pairs)

    @override
    def prepare(self, wiring: Wiring) -> Tensor:
        """Return the weights of all candidates ``[E]``, 0 for hallucinated edges."""
        find_places(wiring)
        return wiring.candidate_weight

    @override
    def message_and_aggregate(
        self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor]
    ) -> Tensor:
        """Return ``I = A Z``, computed as one matrix product per source block."""
        matrix = self._matrix(edges, states[0].dtype)
        out = matrix.new_empty(len(matrix), *states[0].shape[1:])
        for cols, z in _matmul.columns(states):
            _matmul.add_product(matrix[:, cols], z, _matmul.matrix(out), first=cols.start == 0)
        return out

    @override
    def gradient_to_states(
        self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor], grad: Tensor
    ) -> list[Tensor]:
        matrix = self._matrix(edges, grad.dtype)
        outs = [grad.new_empty(len(z), *grad.shape[1:]) for z in states]
        for (cols, _), out in zip(_matmul.columns(states), outs, strict=True):
            flat = _matmul.matrix(out)
            _matmul.add_product(matrix[:, cols].t(), _matmul.matrix(grad), flat, first=True)
        return outs

    @override
    def gradient_to_weight(
        self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor], grad: Tensor
    ) -> Tensor:
        block, wiring = edges.block, edges.wiring.with_gradient
        out = correlate_all(edges, states, grad, weight.dtype)
        if wiring is None:
            return out
        if wiring.slot is not None:
            span = wiring.span(block)
            return out[wiring.edge_id[span.start : span.stop] - block.edges.start]
        return out * wiring.mask[block.edges.start : block.edges.stop]

    @override
    def whole_graph(self, wiring: Wiring) -> WholeGraph | None:
        if type(self) is not Dense or wiring.slot is not None:
            return None
        return DenseWholeGraph(wiring)

    def _matrix(self, edges: BlockEdges, dtype: torch.dtype) -> Tensor:
        """Return the weights into a block ``[targets, sources]``, 0 without a real edge."""
        block, topology = edges.block, edges.wiring.topology
        weight = self.prepare(edges.wiring) if edges.prepared is None else edges.prepared
        weight = weight[block.edges.start : block.edges.stop].to(dtype)
        if not block.complete:
            places = topology.places_on(block, weight.device)
            weight = weight.new_zeros(block.pairs).index_copy_(0, places, weight)
        return weight.view(len(block.nodes), block.pairs // len(block.nodes))


def find_places(wiring: Wiring) -> None:
    """Compute the matrix positions of candidates, which are then cached in the topology.

    ``torch.compile`` does not allow this inside an autograd function.
    """
    for block in wiring.topology.blocks:
        if not block.complete and suits_dense_products(len(block.edges), block.pairs):
            wiring.topology.places_on(block, wiring.edge_id.device)


def correlate_all(
    edges: BlockEdges, states: Sequence[Tensor], grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return ``<Z_u, dL/dI_v>`` of every candidate into a block ``[E of the block]``."""
    pairs = _matmul.outer(list(states), [grad], dtype).flatten()
    if edges.block.complete:
        return pairs
    return pairs[edges.wiring.topology.places_on(edges.block, pairs.device)]
