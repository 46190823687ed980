"""The backend for CPUs: sums over real edges only, by kernels compiled for the machine."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dnw_graph.aggregation import _kernels, _matmul
from dnw_graph.aggregation.base import BACKENDS, Aggregation, Pull


@BACKENDS.register("sparse")
class Sparse(Aggregation):
    """Does the ``k`` multiplications a pixel that the paper counts, and no others, on a CPU.

    The gradient to all candidates of a complete block is one dense product; that of any other
    block, and that to real edges alone, a sum per edge. Memory beyond states and weights is of the
    order of ``k``. Types narrower than float32 are computed in float32.
    """

    def message_and_aggregate(self, pull: Pull, weight: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Return ``A Z``, each message added to its sum as it is formed."""
        return _kernels.gather(weight, *self._real(pull), list(states))

    def product(self, pull: Pull, weight: Tensor, states: Sequence[Tensor]) -> Tensor:
        """See :meth:`Aggregation.product`."""
        return self.message_and_aggregate(pull, weight, states)

    def product_to_states(
        self, pull: Pull, weight: Tensor, states: Sequence[Tensor], grad: Tensor
    ) -> list[Tensor]:
        """See :meth:`Aggregation.product_to_states`."""
        return _kernels.spread(weight, *self._real(pull), [len(z) for z in states], grad)

    def product_to_weight(
        self, pull: Pull, weight: Tensor, states: Sequence[Tensor], grad: Tensor
    ) -> Tensor:
        """See :meth:`Aggregation.product_to_weight`."""
        if not pull.wiring.straight_through:
            return _kernels.correlate(weight, *self._real(pull), list(states), grad)
        if pull.block.complete:
            return _matmul.outer(list(states), grad, weight.dtype)
        return _kernels.correlate(weight, *self._candidates(pull), list(states), grad)

    @staticmethod
    def _real(pull: Pull) -> tuple[Tensor, Tensor, Tensor, list[int], int, list[int]]:
        """Return the real edges as the kernels take them."""
        wiring, block = pull.wiring, pull.block
        nodes = [block.nodes.start, block.nodes.stop]
        starts = [source.nodes.start for source in pull.sources]
        first = block.edges.start
        return wiring.edge_id, wiring.edge_index, wiring.rowptr, nodes, first, starts

    @staticmethod
    def _candidates(pull: Pull) -> tuple[Tensor, Tensor, Tensor, list[int], int, list[int]]:
        """Return the block's candidates as if all were real."""
        block = pull.block
        edge_index = pull.wiring.candidate_index[:, block.edges.start : block.edges.stop]
        targets = torch.arange(block.nodes.start, block.nodes.stop + 1)
        rowptr = torch.searchsorted(edge_index[1].contiguous(), targets)
        edge_id = torch.arange(len(block.edges))
        starts = [source.nodes.start for source in pull.sources]
        return edge_id, edge_index, rowptr, [0, len(block.nodes)], 0, starts
