"""Products of a dense matrix per block with states that are in separate tensors."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dnw_graph import precision


def matrix(x: Tensor) -> Tensor:
    """Return ``[nodes, *features]`` reshaped to ``[nodes, N]``, even for an empty batch."""
    return x.reshape(len(x), x[0].numel())


def columns(states: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Yield the matrix columns and the states ``[nodes, N]`` of each source block."""
    at = 0
    for z in states:
        yield slice(at, at + len(z)), matrix(z)
        at += len(z)


@torch.library.custom_op("dnw_graph::outer", mutates_args=())
def outer(states: list[Tensor], grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return ``dL/dI Z^T`` ``[targets, sources]``, one product per target and source block.

    Args:
        states: States of the source blocks, each ``[nodes, *features]``.
        grads: ``dL/dI`` of the target blocks, each ``[nodes, *features]``.
        dtype: Type of the result.
    """
    out = grads[0].new_empty(sum(map(len, grads)), sum(map(len, states)), dtype=dtype)
    with torch.autocast(out.device.type, enabled=False):
        if precision.lacks_units_for(states[0]):
            _add_in_parts(list(columns(states)), list(columns(grads)), out)
            return out
        for rows, grad in columns(grads):
            for cols, z in columns(states):
                _times_transposed(grad, z, out[rows, cols])
    return out


def _add_in_parts(
    sources: list[tuple[slice, Tensor]], targets: list[tuple[slice, Tensor]], out: Tensor
) -> None:
    """Write products that are computed in float32, for types that this CPU has no units for.

    A part of the features is converted at a time, and is in cache when it is read.
    """
    total = out.new_zeros(out.shape, dtype=torch.float32)
    for start in range(0, sources[0][1].shape[1], _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        states = [(cols, z[:, part].float().t()) for cols, z in sources]
        for rows, grad in targets:
            values = grad[:, part].float()
            for cols, z in states:
                total[rows, cols].addmm_(values, z)
    out.copy_(total)


def add_product(a: Tensor, b: Tensor, out: Tensor, first: bool) -> None:
    """Add ``a b`` of ``[M, K]`` and ``[K, N]`` to ``out``, or overwrite ``out`` if ``first``.

    On CPUs, oneDNN computes large float32 products, as a 1x1 convolution of one image of N pixels.
    """
    if precision.lacks_units_for(b):
        a, b = a.float(), b.float()
    (m, k), n = a.shape, b.shape[1]
    if k >= 128 and _uses_onednn(a, m * n * k):
        product = F.conv2d(b.view(1, k, 1, n), a.reshape(m, k, 1, 1)).view(m, n)
        out.copy_(product) if first else out.add_(product)
    elif out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(not first), out=out)
    else:
        out.copy_(a @ b) if first else out.add_(a @ b)


def _times_transposed(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write ``a b^T`` of ``[M, K]`` and ``[N, K]`` to ``out``.

    oneDNN is used as in :func:`add_product`, with M pixels and K channels.
    """
    (m, k), n = a.shape, len(b)
    if _uses_onednn(a, m * n * k):
        pixels = a.view(1, m, 1, k).permute(0, 3, 1, 2)
        out.copy_(F.conv2d(pixels, b.view(n, k, 1, 1)).permute(0, 2, 3, 1).reshape(m, n))
    elif out.dtype == a.dtype:
        torch.mm(a, b.t(), out=out)
    else:
        out.copy_(a @ b.t())


def _uses_onednn(a: Tensor, multiply_adds: int) -> bool:
    """Return whether oneDNN should compute a product.

    On AMD CPUs with AVX-512 it takes half the time of MKL, which does not use these instructions
    there. With AVX2 alone it takes up to 2.7 times as long. PyTorch passes float32 products to MKL,
    and products of narrower types to oneDNN already.
    """
    large = a.is_cpu and a.dtype == torch.float32 and multiply_adds >= _LARGE
    return large and torch.backends.mkldnn.is_available() and precision.has("avx512_f")


_LARGE = 1 << 22  # multiply-adds from which a convolution is faster
_AT_ONCE = 4096  # columns that are converted together


@outer.register_fake
def _(states: list[Tensor], grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    return grads[0].new_empty(sum(map(len, grads)), sum(map(len, states)), dtype=dtype)
