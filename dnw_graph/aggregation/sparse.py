"""The backend of compiled sums over real edges only."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from dnw_graph import _jit
from dnw_graph.aggregation import _kernels
from dnw_graph.aggregation.base import BACKENDS, Backend, BlockEdges
from dnw_graph.aggregation.dense import correlate_all, find_places
from dnw_graph.aggregation.whole import SparseWholeGraph, WholeGraph, suits_dense_products
from dnw_graph.wiring import Wiring


@BACKENDS.register("sparse")
class Sparse(Backend):
    """Computes exactly the ``k`` multiplications per pixel that the paper counts.

    The gradient to all candidates of a block is one dense product if at least 1 in 16 pairs of
    nodes is a candidate; otherwise, and for real edges alone, it is a sum per edge. Memory beyond
    states and weights is of order ``k``. Types narrower than float32 are computed in float32. On
    GPUs, Triton is needed, and the host never waits.

    Raises:
        ValueError: If Numba's compiler is disabled.
    """

    def __init__(self) -> None:
        if not _jit.can_compile():
            raise ValueError(
                "the sparse backend needs Numba's compiler, which NUMBA_DISABLE_JIT=1 disables: "
                'unset that variable, or use backend="auto", "dense" or "reference"'
            )
        super().__init__()

    @override
    def prepare(self, wiring: Wiring) -> None:
        """Find the matrix positions of candidates; blocks read the rest from the wiring.

        Raises:
            ValueError: If there are no kernels for the device of the wiring.
        """
        _check_device(wiring)
        find_places(wiring)

    @override
    def message_and_aggregate(
        self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor]
    ) -> Tensor:
        """Return ``I = A Z``, without storing messages."""
        return _kernels.gather(*self._real_edges(edges), list(states))

    @override
    def gradient_to_states(
        self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor], grad: Tensor
    ) -> list[Tensor]:
        return _kernels.spread(*self._real_edges(edges), [len(z) for z in states], grad)

    @override
    def gradient_to_weight(
        self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor], grad: Tensor
    ) -> Tensor:
        wiring = edges.wiring.with_gradient
        if wiring is not None:
            real = wiring.position, wiring.edge_index[0], wiring.rowptr
            place = _place(edges, wiring)
            return _kernels.correlate(weight, *real, *place, list(states), grad)
        if suits_dense_products(len(edges.block.edges), edges.block.pairs):
            return correlate_all(edges, states, grad, weight.dtype)
        candidates, place = self._all_candidates(edges), _place(edges, edges.wiring)
        return _kernels.correlate(weight, *candidates, *place, list(states), grad)

    @override
    def whole_graph(self, wiring: Wiring) -> WholeGraph | None:
        _check_device(wiring)
        return SparseWholeGraph(wiring) if type(self) is Sparse else None

    @override
    def by_edge(self, wiring: Wiring) -> bool:
        _check_device(wiring)
        return type(self) is Sparse

    @staticmethod
    def _real_edges(edges: BlockEdges) -> tuple[Tensor, Tensor, Tensor, list[int], list[int]]:
        wiring, nodes = edges.wiring, [edges.block.nodes.start, edges.block.nodes.stop]
        return wiring.edge_weight, wiring.edge_index[0], wiring.rowptr, nodes, _starts(edges)

    @staticmethod
    def _all_candidates(edges: BlockEdges) -> tuple[Tensor, Tensor, Tensor]:
        topology, span = edges.wiring.topology, edges.block.edges
        edge_id = torch.arange(span.start, span.stop, device=edges.wiring.edge_id.device)
        rowptr = topology.rowptr_on(edge_id.device)
        return edge_id, topology.edges(edge_id)[0], rowptr - span.start


def _place(edges: BlockEdges, wiring: Wiring) -> tuple[list[int], list[int]]:
    """Return a block's node range and first weight, and the first node of each source block."""
    nodes = edges.block.nodes
    return [nodes.start, nodes.stop, wiring.span(edges.block).start], _starts(edges)


def _starts(edges: BlockEdges) -> list[int]:
    return [source.nodes.start for source in edges.sources]


def _check_device(wiring: Wiring) -> None:
    device = wiring.edge_id.device
    if device.type == "cuda" and not _jit.has_triton():
        raise ValueError(
            f"backend 'sparse' needs Triton on {device}, which is not installed: pip install "
            "triton, or use backend='auto'"
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"backend 'sparse' has no kernels for {device}, only for CPUs and CUDA; use "
            "backend='auto'"
        )
