"""Picks a backend by what it costs."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dnw_graph import _jit
from dnw_graph.aggregation.base import BACKENDS, Aggregation, Pull
from dnw_graph.aggregation.dense import Dense
from dnw_graph.aggregation.reference import Reference
from dnw_graph.aggregation.sparse import Sparse
from dnw_graph.aggregation.whole import WholeGraph
from dnw_graph.wiring import Wiring

DENSE_FROM = 0.2
"""Share of real edges from which a dense product beats the sparse kernels on a CPU.

From benchmarks/layout_spike.md: 12 ms for 72,991 edges sparse, 155 ms for 4,718,592 dense.
"""


@BACKENDS.register("auto")
class Auto(Aggregation):
    """Sparse on a CPU unless most candidates are real; dense on a GPU where the block allows it.

    Where Numba's compiler is disabled, a CPU is treated as a GPU is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._dense, self._reference = Dense(), Reference()
        self._sparse = Sparse() if _jit.can_compile() else self._reference

    def choose(self, pull: Pull, weight: Tensor) -> Aggregation:
        """Return the backend for one block."""
        if self._few(pull.wiring):
            return self._sparse
        if self._dense.supports(pull.block):
            return self._dense
        return self._sparse if weight.is_cpu else self._reference

    def prepare(self, wiring: Wiring) -> Any:
        """See :meth:`Aggregation.prepare`."""
        return None if self._few(wiring) else self._dense.prepare(wiring)

    def whole_graph(self, wiring: Wiring) -> WholeGraph | None:
        """See :meth:`Aggregation.whole_graph`."""
        if type(self) is not Auto:
            return None
        return (self._sparse if self._few(wiring) else self._dense).whole_graph(wiring)

    @staticmethod
    def _few(wiring: Wiring) -> bool:
        """Return whether sums over real edges cost less than dense products."""
        share = len(wiring.edge_id) / wiring.topology.num_candidates
        few = share < DENSE_FROM or wiring.slot is not None  # nothing of the size of candidates
        return wiring.edge_id.is_cpu and few and _jit.can_compile()

    def forward(self, pull: Pull, weight: Tensor, states: Sequence[Tensor]) -> Tensor:
        """See :meth:`Aggregation.forward`."""
        result: Tensor = self.choose(pull, weight)(pull, weight, states)
        return result
