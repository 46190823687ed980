"""Matrix products between a block-complete matrix and states that lie in separate tensors."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def matrix(x: Tensor) -> Tensor:
    """Return ``[nodes, N]`` of ``[nodes, *features]``, an empty batch included."""
    return x.reshape(len(x), x[0].numel())


def columns(states: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Yield, for each source block, its columns of the matrix and its states ``[nodes, N]``."""
    at = 0
    for z in states:
        yield slice(at, at + len(z)), matrix(z)
        at += len(z)


@torch.library.custom_op("dnw_graph::outer", mutates_args=())
def outer(states: list[Tensor], grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``dL/dI Z^T`` ``[targets * sources]``: one large product a source block, in place.

    Args:
        states: States of the source blocks, each ``[nodes, *features]``.
        grad: ``dL/dI`` ``[targets, *features]``.
        dtype: Type of the result.
    """
    flat = matrix(grad)
    out = grad.new_empty(len(grad), sum(len(z) for z in states))
    for cols, z in columns(states):
        torch.mm(flat, z.t(), out=out[:, cols])
    return out.flatten().to(dtype)


@outer.register_fake
def _(states: list[Tensor], grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(len(grad) * sum(len(z) for z in states), dtype=dtype)
