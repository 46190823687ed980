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
    """Selects sparse on a CPU if few candidates are real, otherwise dense or the reference.

    The reference is used for blocks that the dense backend does not support. If Numba's compiler is
    disabled, a CPU is treated like a GPU, where sparse is never selected.
    """

    def __init__(self) -> None:
        super().__init__()
        self._dense, self._reference = Dense(), Reference()
        self._sparse = Sparse() if _jit.can_compile() else self._reference

    def choose(self, edges: BlockEdges) -> Backend:
        """Return the backend for one block."""
        block, wiring = edges.block, edges.wiring
        share = len(wiring.edge_id) / wiring.topology.num_candidates
        few = share * len(block.edges) < DENSE_FROM * block.pairs or wiring.slot is not None
        if few and self._compiled(wiring):
            return self._sparse
        return self._dense if self._dense.supports(block) else self._reference

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
        """Return True on a CPU if real edges are few or blocks are small."""
        topology = wiring.topology
        small = topology.num_nodes < SMALL * len(topology.blocks)
        few = self._few(wiring) or (small and self._compiled(wiring))
        return type(self) is Auto and few

    @classmethod
    def _few(cls, wiring: Wiring) -> bool:
        """Return whether sums over real edges cost less than dense products."""
        pairs = sum(block.pairs for block in wiring.topology.blocks)
        few = len(wiring.edge_id) < DENSE_FROM * pairs or wiring.slot is not None
        return few and cls._compiled(wiring)

    @staticmethod
    def _compiled(wiring: Wiring) -> bool:
        """Return whether compiled sums over real edges are available."""
        return wiring.edge_id.is_cpu and _jit.can_compile()

    @override
    def forward(self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor]) -> Tensor:
        result: Tensor = self.choose(edges)(edges, weight, states)
        return result
