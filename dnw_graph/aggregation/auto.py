"""The backend that selects the cheapest other backend."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from dnw_graph import _jit
from dnw_graph.aggregation.base import BACKENDS, Backend, BlockEdges
from dnw_graph.aggregation.dense import Dense
from dnw_graph.aggregation.reference import Reference
from dnw_graph.aggregation.sparse import Sparse
from dnw_graph.aggregation.whole import WholeGraph
from dnw_graph.wiring import Wiring

DENSE_FROM = 0.2
"""Share of real edges from which a dense product is faster than the sparse kernels on a CPU.

From benchmarks/layout_spike.md: 12 ms for 72,991 edges sparse, 155 ms for 4,718,592 dense.
"""

SMALL = 32
"""Mean number of nodes per block below which calls cost more than products."""


@BACKENDS.register("auto")
class Auto(Backend):
    """Selects sparse or dense by the share of real edges and the device.

    On a CPU, sparse is used if few candidates are real. On a GPU, it is used for blocks that the
    dense backend does not support, and if only real edges have weights. Where sparse is not
    available (Numba's compiler is disabled, or Triton is not installed), the reference takes its
    place.
    """

    def __init__(self) -> None:
        super().__init__()
        self._dense, self._reference = Dense(), Reference()
        self._sparse = Sparse() if _jit.can_compile() else self._reference

    def choose(self, edges: BlockEdges) -> Backend:
        """Return the backend for one block."""
        block, wiring = edges.block, edges.wiring
        is_available = _jit.compiles_for(wiring.edge_id.device)
        share = len(wiring.edge_id) / wiring.topology.num_candidates
        few = wiring.edge_id.is_cpu and share * len(block.edges) < DENSE_FROM * block.pairs
        if is_available and (few or wiring.slot is not None):
            return self._sparse
        if self._dense.supports(block):
            return self._dense
        return self._sparse if is_available and wiring.edge_id.is_cuda else self._reference

    @override
    def prepare(self, wiring: Wiring) -> Any:
        return (self._sparse if self._few(wiring) else self._dense).prepare(wiring)

    @override
    def whole_graph(self, wiring: Wiring) -> WholeGraph | None:
        if type(self) is not Auto:
            return None
        return (self._sparse if self._few(wiring) else self._dense).whole_graph(wiring)

    @override
    def by_edge(self, wiring: Wiring) -> bool:
        """Return True if sums over real edges cost less, or if blocks are small."""
        topology = wiring.topology
        small = topology.num_nodes < SMALL * len(topology.blocks)
        few = self._few(wiring) or (small and _jit.compiles_for(wiring.edge_id.device))
        return type(self) is Auto and few

    def _few(self, wiring: Wiring) -> bool:
        """Return whether sums over real edges are available, and replace dense products."""
        blocks, device = wiring.topology.blocks, wiring.edge_id.device
        if device.type == "cpu":
            few = len(wiring.edge_id) < DENSE_FROM * sum(block.pairs for block in blocks)
        else:
            few = not all(map(self._dense.supports, blocks))
        return _jit.compiles_for(device) and (few or wiring.slot is not None)

    @override
    def forward(self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor]) -> Tensor:
        result: Tensor = self.choose(edges)(edges, weight, states)
        return result
