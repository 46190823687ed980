"""The backend for matrix units: a masked dense matrix a block."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dnw_graph.aggregation import _matmul
from dnw_graph.aggregation.base import BACKENDS, Aggregation, Pull
from dnw_graph.topology import Block


@BACKENDS.register("dense")
class Dense(Aggregation):
    """Multiplies ``[targets, sources]`` matrices with zeros at hallucinated edges.

    Does ``E`` multiplications a pixel for ``k`` that count, in exchange for the fastest kernels
    there are; never waits for the device. Blocks must be complete.
    """

    def supports(self, block: Block) -> bool:
        """See :meth:`Aggregation.supports`."""
        return block.complete

    def message_and_aggregate(self, pull: Pull, weight: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Return ``A Z``, messages and their sums in one product."""
        matrix = self._matrix(pull, weight, states[0].dtype)
        out = matrix.new_zeros(len(matrix), states[0][0].numel())
        for cols, z in _matmul.columns(states):
            out.addmm_(matrix[:, cols], z)
        return out.view(len(matrix), *states[0].shape[1:])

    def product(self, pull: Pull, weight: Tensor, states: Sequence[Tensor]) -> Tensor:
        """See :meth:`Aggregation.product`."""
        return self.message_and_aggregate(pull, weight, states)

    def product_to_states(
        self, pull: Pull, weight: Tensor, states: Sequence[Tensor], grad: Tensor
    ) -> list[Tensor]:
        """See :meth:`Aggregation.product_to_states`."""
        matrix = self._matrix(pull, weight, grad.dtype)
        flat = grad.reshape(len(grad), -1)
        return [
            (matrix[:, cols].t() @ flat).view(len(z), *grad.shape[1:])
            for cols, z in _matmul.columns(states)
        ]

    def product_to_weight(
        self, pull: Pull, weight: Tensor, states: Sequence[Tensor], grad: Tensor
    ) -> Tensor:
        """See :meth:`Aggregation.product_to_weight`."""
        out = _matmul.outer(list(states), grad, weight.dtype)
        return out if pull.wiring.straight_through else out * self._mask(pull)

    @staticmethod
    def _mask(pull: Pull) -> Tensor:
        return pull.wiring.mask[pull.block.edges.start : pull.block.edges.stop]

    def _matrix(self, pull: Pull, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if len(pull.wiring.edge_id) < pull.wiring.candidate_index.shape[1]:
            weight = torch.where(self._mask(pull), weight, 0)
        return weight.to(dtype).view(len(pull.block.nodes), -1)
