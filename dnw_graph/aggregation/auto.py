"""Picks a backend by what it costs."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dnw_graph import _jit
from dnw_graph.aggregation.base import BACKENDS, Backend, BlockEdges
from dnw_graph.aggregation.dense import Dense
from dnw_graph.aggregation.reference import Reference
from dnw_graph.aggregation.sparse import Sparse
from dnw_graph.aggregation.whole import WholeGraph
from dnw_graph.wiring import Wiring

DENSE_FROM = 0.2
"""Share of real edges from which a dense product beats the sparse kernels on a CPU.

From benchmarks/layout_spike.md: 12 ms for 72,991 edges sparse, 155 ms for 4,718,592 dense.
"""

SMALL = 32
"""Mean number of nodes of a block below which calls cost more than products."""


@BACKENDS.register("auto")
class Auto(Backend):
    """Sparse on a CPU unless most candidates are real; dense on a GPU where the block allows it.

    Where Numba's compiler is disabled, a CPU is treated as a GPU is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._dense, self._reference = Dense(), Reference()
        self._sparse = Sparse() if _jit.can_compile() else self._reference

    def choose(self, edges: BlockEdges, weight: Tensor) -> Backend:
        """Return the backend for one block."""
        block, wiring = edges.block, edges.wiring
        share = len(wiring.edge_id) / wiring.topology.num_candidates
        few = share * len(block.edges) < DENSE_FROM * block.pairs or wiring.slot is not None
        if few and self._compiled(wiring):
            return self._sparse
        return self._dense if self._dense.supports(block) else self._reference

    def prepare(self, wiring: Wiring) -> Any:
        """See :meth:`Backend.prepare`."""
        return (self._sparse if self._few(wiring) else self._dense).prepare(wiring)

    def whole_graph(self, wiring: Wiring) -> WholeGraph | None:
        """See :meth:`Backend.whole_graph`."""
        if type(self) is not Auto:
            return None
        return (self._sparse if self._few(wiring) else self._dense).whole_graph(wiring)

    def by_edge(self, wiring: Wiring) -> bool:
        """See :meth:`Backend.by_edge`: here, where real edges are few, or blocks small."""
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
        """Return whether there are compiled sums over real edges."""
        return wiring.edge_id.is_cpu and _jit.can_compile()

    def forward(self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor]) -> Tensor:
        """See :meth:`Backend.forward`."""
        result: Tensor = self.choose(edges, weight)(edges, weight, states)
        return result
