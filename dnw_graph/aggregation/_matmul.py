"""Matrix products between a block-complete matrix and states that lie in separate tensors."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
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
    out = grad.new_empty(len(grad), sum(len(z) for z in states), dtype=dtype)
    with torch.autocast(grad.device.type, enabled=False):
        for cols, z in columns(states):
            _times_transposed(flat, z, out[:, cols])
    return out.flatten()


def add_product(a: Tensor, b: Tensor, out: Tensor, first: bool) -> None:
    """Add ``a b`` of ``[M, K]`` and ``[K, N]`` to what ``out`` holds, or write it if it is first.

    A large one in float32 goes to oneDNN on CPUs, as a 1x1 convolution of one image of N pixels.
    """
    (m, k), n = a.shape, b.shape[1]
    if k >= 128 and _goes_to_onednn(a, m * n * k):
        found = F.conv2d(b.view(1, k, 1, n), a.reshape(m, k, 1, 1)).view(m, n)
        out.copy_(found) if first else out.add_(found)
    else:
        torch.addmm(out, a, b, beta=int(not first), out=out)


def _times_transposed(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write ``a b^T`` of ``[M, K]`` and ``[N, K]``; likewise, of M pixels and K channels."""
    (m, k), n = a.shape, len(b)
    if _goes_to_onednn(a, m * n * k):
        pixels = a.view(1, m, 1, k).permute(0, 3, 1, 2)
        out.copy_(F.conv2d(pixels, b.view(n, k, 1, 1)).permute(0, 2, 3, 1).reshape(m, n))
    elif out.dtype == a.dtype:
        torch.mm(a, b.t(), out=out)
    else:
        out.copy_(a @ b.t())


def _goes_to_onednn(a: Tensor, multiply_adds: int) -> bool:
    """Return whether oneDNN is the one to multiply: on AMD's, it takes half the time of MKL.

    Matrix products in float32 go to MKL; in narrower types they go to oneDNN by themselves.
    """
    large = a.is_cpu and a.dtype == torch.float32 and multiply_adds >= _LARGE
    return large and torch.backends.mkldnn.is_available()


_LARGE = 1 << 22  # multiply-adds from which calling a convolution pays


@outer.register_fake
def _(states: list[Tensor], grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(len(grad) * sum(len(z) for z in states), dtype=dtype)
