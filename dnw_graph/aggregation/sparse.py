"""The backend for CPUs: sums over real edges only, by kernels compiled for the machine."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dnw_graph import _jit
from dnw_graph.aggregation import _kernels
from dnw_graph.aggregation.base import BACKENDS, Backend, BlockEdges
from dnw_graph.aggregation.dense import correlate_all, find_places
from dnw_graph.aggregation.whole import SparseWholeGraph, WholeGraph, suits_dense_products
from dnw_graph.wiring import Wiring


@BACKENDS.register("sparse")
class Sparse(Backend):
    """Does the ``k`` multiplications a pixel that the paper counts, and no others, on a CPU.

    The gradient to all candidates of a block is one dense product where at least one pair of
    nodes in 16 is a candidate; otherwise, and to real edges alone, it is a sum per edge. Memory
    beyond states and weights is of the order of ``k``. Types narrower than float32 are computed in
    float32.

    Raises:
        ValueError: Numba's compiler is disabled.
    """

    def __init__(self) -> None:
        if not _jit.can_compile():
            raise ValueError(
                "the sparse backend needs Numba's compiler, which NUMBA_DISABLE_JIT=1 disables: "
                'unset that variable, or take backend="auto", "dense" or "reference"'
            )
        super().__init__()

    def prepare(self, wiring: Wiring) -> None:
        """See :meth:`Backend.prepare`; every block reads what it needs from the wiring."""
        find_places(wiring)

    def message_and_aggregate(
        self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor]
    ) -> Tensor:
        """See :meth:`Backend.message_and_aggregate`; a message is added as it is formed."""
        return _kernels.gather(*self._real_edges(edges), list(states))

    def gradient_to_states(
        self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor], grad: Tensor
    ) -> list[Tensor]:
        """See :meth:`Backend.gradient_to_states`."""
        return _kernels.spread(*self._real_edges(edges), [len(z) for z in states], grad)

    def gradient_to_weight(
        self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor], grad: Tensor
    ) -> Tensor:
        """See :meth:`Backend.gradient_to_weight`."""
        wiring = edges.wiring.with_gradient
        if wiring is not None:
            real, at = (wiring.position, wiring.edge_index[0], wiring.rowptr), _place(edges, wiring)
            return _kernels.correlate(weight, *real, *at, list(states), grad)
        if suits_dense_products(len(edges.block.edges), edges.block.pairs):
            return correlate_all(edges, states, grad, weight.dtype)
        candidates, at = self._all_candidates(edges), _place(edges, edges.wiring)
        return _kernels.correlate(weight, *candidates, *at, list(states), grad)

    def whole_graph(self, wiring: Wiring) -> WholeGraph | None:
        """See :meth:`Backend.whole_graph`."""
        return SparseWholeGraph(wiring) if type(self) is Sparse else None

    def by_edge(self, wiring: Wiring) -> bool:
        """See :meth:`Backend.by_edge`."""
        return type(self) is Sparse

    @staticmethod
    def _real_edges(edges: BlockEdges) -> tuple[Tensor, Tensor, Tensor, list[int], list[int]]:
        wiring, nodes = edges.wiring, [edges.block.nodes.start, edges.block.nodes.stop]
        return wiring.edge_weight, wiring.edge_index[0], wiring.rowptr, nodes, _starts(edges)

    @staticmethod
    def _all_candidates(edges: BlockEdges) -> tuple[Tensor, Tensor, Tensor]:
        topology, span = edges.wiring.topology, edges.block.edges
        edge_id = torch.arange(span.start, span.stop)
        return edge_id, topology.edges(edge_id)[0], topology.rowptr - span.start


def _place(edges: BlockEdges, wiring: Wiring) -> tuple[list[int], list[int]]:
    """Return where a block stands, and the first node of each source block."""
    nodes = edges.block.nodes
    return [nodes.start, nodes.stop, wiring.span(edges.block).start], _starts(edges)


def _starts(edges: BlockEdges) -> list[int]:
    return [source.nodes.start for source in edges.sources]
