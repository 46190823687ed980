"""Picks a backend by what it costs."""

from collections.abc import Sequence

from torch import Tensor

from dnw_graph.aggregation.base import BACKENDS, Aggregation, Pull
from dnw_graph.aggregation.dense import Dense
from dnw_graph.aggregation.reference import Reference
from dnw_graph.aggregation.sparse import Sparse

DENSE_FROM = 0.2
"""Share of real edges from which a dense product beats the sparse kernels on a CPU.

From benchmarks/layout_spike.md: 12 ms for 72,991 edges sparse, 155 ms for 4,718,592 dense.
"""


@BACKENDS.register("auto")
class Auto(Aggregation):
    """Sparse on a CPU unless most candidates are real; dense on a GPU where the block allows it."""

    def __init__(self) -> None:
        super().__init__()
        self._dense, self._sparse, self._reference = Dense(), Sparse(), Reference()

    def choose(self, pull: Pull, weight: Tensor) -> Aggregation:
        """Return the backend for one block."""
        real, candidates = len(pull.wiring.edge_id), len(pull.wiring.weight)
        if weight.device.type == "cpu" and real < DENSE_FROM * candidates:
            return self._sparse
        if self._dense.supports(pull.block):
            return self._dense
        return self._sparse if weight.device.type == "cpu" else self._reference

    def forward(self, pull: Pull, weight: Tensor, states: Sequence[Tensor]) -> Tensor:
        """See :meth:`Aggregation.forward`."""
        result: Tensor = self.choose(pull, weight)(pull, weight, states)
        return result
