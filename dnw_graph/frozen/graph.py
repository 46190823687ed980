"""A frozen graph as a layer, which chooses between kernels and PyTorch's operations."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from dnw_graph.frozen.engine import Engine, usable
from dnw_graph.frozen.layout import Layout, Part


class FrozenGraph(Layout):
    """A :class:`Layout` computed by kernels on a CPU, and by PyTorch's operations elsewhere."""

    def __init__(self, parts: Sequence[Part], strides: Sequence[int], **tensors: Tensor) -> None:
        super().__init__(parts, strides, **tensors)
        self._engine: Engine | None = None
        self._state_dtype = torch.float32

    @property
    def state_dtype(self) -> torch.dtype:
        """Type in which the kernels store the states of nodes: float32 or bfloat16.

        Raises:
            ValueError: If it is set to another type.
        """
        return self._state_dtype

    @state_dtype.setter
    def state_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"states are stored in torch.float32 or torch.bfloat16, not in {dtype}"
            )
        self._state_dtype, self._engine = dtype, None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_engine": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._engine = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._engine = None

    @property
    def engine(self) -> Engine:
        """The engine that computes it on a CPU, built at the first access."""
        if self._engine is None:
            self._engine = Engine(self, self._state_dtype)
        return self._engine

    def counted(self, features: Sequence[int]) -> tuple[int, int]:
        """Return multiply-adds and parameters for one input.

        Multiply-adds of constant nodes, and their filters, are not counted.

        Args:
            features: Size of an input's channels.
        """
        filters = 9 * sum(len(part) for part in self.engine.parts if part.filters)
        return self.engine.multiply_adds(features), self.num_edges + filters

    def forward(self, x: Tensor) -> Tensor:
        """Return the states of the outputs, by kernels if the input allows it."""
        self._check_input(x)
        if usable(x) and self.edge_weight.device == x.device:
            return self.engine(x)
        return self.forward_by_torch(x)
