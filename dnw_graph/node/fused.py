"""``norm_relu_conv`` as one operator: a block's maps cross memory as few times as they can."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dnw_graph import _jit
from dnw_graph.node import _kernels

TYPES = (torch.float32, torch.float64, torch.bfloat16)
"""Types of inputs that the operator takes."""

Statistics = tuple[Tensor, Tensor]
"""Means and reciprocal standard deviations of the nodes ``[V, G]``."""


def norm_relu_conv(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    filters: Tensor,
    *,
    stride: int,
    eps: float,
    groups: int = 1,
    given: Statistics | None = None,
) -> tuple[Tensor, Statistics]:
    """Return ``K * max(s (I - mean) / sqrt(var + eps) + b, 0)`` and the statistics.

    Args:
        x: Inputs of the nodes ``[V, B, H, W]``, contiguous.
        scale: ``s`` ``[V]``.
        shift: ``b`` ``[V]``.
        filters: ``K`` ``[V, 3, 3]``, applied with padding 1.
        stride: Of the filter.
        eps: Added to variances.
        groups: Statistics are taken over all images (1) or of each (``B``).
        given: Statistics to use instead of those of ``x``.

    Returns:
        States ``[V, B, ceil(H / stride), ceil(W / stride)]`` and the statistics in use, of which no
        gradient is taken.
    """
    mean, rstd = given or (scale.new_empty(len(x), groups), scale.new_empty(len(x), groups))
    z, mean, rstd = _Function.apply(
        x, scale, shift, filters, mean, rstd, stride, eps, given is not None
    )
    return z, (mean, rstd)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        filters: Tensor,
        mean: Tensor,
        rstd: Tensor,
        stride: int,
        eps: float,
        given: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if given:
            z, _, _ = _forward(x, scale, shift, filters, mean, rstd, stride, eps, given)
        else:
            z, mean, rstd = _forward(x, scale, shift, filters, mean, rstd, stride, eps, given)
        ctx.save_for_backward(x, scale, shift, filters, mean, rstd)
        ctx.stride, ctx.given = stride, given
        ctx.mark_non_differentiable(mean, rstd)
        return z, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = _backward(grad.contiguous(), *saved, ctx.stride, ctx.given)
        return (*grads, None, None, None, None, None)


@torch.library.custom_op("dnw_graph::norm_relu_conv", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    filters: Tensor,
    mean: Tensor,
    rstd: Tensor,
    stride: int,
    eps: float,
    given: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    z = x.new_empty(_shape(x, stride))
    mean, rstd = mean.clone(), rstd.clone()
    if z.numel():
        arrays = [_jit.array(t.contiguous()) for t in (x, scale, shift, filters, mean, rstd, z)]
        _kernels.forward(*arrays, stride, given, eps, _chunks(x))
    return z, mean, rstd


@torch.library.custom_op("dnw_graph::norm_relu_conv_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    filters: Tensor,
    mean: Tensor,
    rstd: Tensor,
    stride: int,
    given: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = (torch.empty_like(x), *(torch.zeros_like(t) for t in (scale, shift, filters)))
    if grad.numel():
        arrays = [
            _jit.array(t.contiguous()) for t in (grad, x, scale, shift, filters, mean, rstd, *grads)
        ]
        _kernels.backward(*arrays, stride, given, _chunks(x))
    return grads  # type: ignore[return-value]


@_forward.register_fake
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, mean, rstd, stride, _, _ = args
    return x.new_empty(_shape(x, stride)), torch.empty_like(mean), torch.empty_like(rstd)


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, filters: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (x, scale, shift, filters))


def _shape(x: Tensor, stride: int) -> tuple[int, ...]:
    return (*x.shape[:2], -(-x.shape[2] // stride), -(-x.shape[3] // stride))


def _chunks(x: Tensor) -> int:
    return max(1, min(len(x), _jit.threads()))
