"""``norm_relu_conv`` as one operator, which reads and writes maps as rarely as possible."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dnw_graph import _jit
from dnw_graph.node import _kernels
from dnw_graph.precision import accepted_dtype

_ON_CPU = (torch.float32, torch.float64, torch.bfloat16)
_ON_GPU = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MAX_PIXELS = 2**31  # of all images of a node: kernels for GPUs number them by 32-bit integers


def available(x: Tensor, scale: Tensor) -> bool:
    """Return whether there are kernels for the types and device of ``x`` and ``scale``."""
    if x.is_cpu:
        supported = accepted_dtype(x) in _ON_CPU and scale.dtype in (torch.float32, torch.float64)
        return supported and _jit.can_compile()
    return (
        x.is_cuda
        and accepted_dtype(x) in _ON_GPU
        and scale.dtype in (torch.float32, torch.float64)
        and x.numel() < _MAX_PIXELS * len(x)
        and _has_triton()
    )


def _has_triton() -> bool:
    """Return whether kernels can be compiled for a GPU; warn if not."""
    if _jit.has_triton():
        return True
    warnings.warn(
        "Triton is not installed, so node functions run as PyTorch layers on this GPU, which takes "
        "longer: pip install triton",
        stacklevel=2,
    )
    return False


Statistics = tuple[Tensor, Tensor]
"""Means and reciprocal standard deviations of the nodes ``[V, G]``."""


@dataclass(frozen=True)
class Plan:
    """The arguments of the operator other than inputs.

    Attributes:
        scale: ``s`` ``[V]``.
        shift: ``b`` ``[V]``.
        filters: ``K`` ``[V, 3, 3]``, applied with padding 1.
        stride: Stride of the filters.
        eps: Added to variances.
        mean: Means ``[V, G]`` over all images (``G`` is 1) or over each image (``G`` is ``B``);
            uninitialised unless ``given``.
        rstd: Likewise ``1 / sqrt(var + eps)``.
        given: Whether to use these statistics instead of those of the inputs.
    """

    scale: Tensor
    shift: Tensor
    filters: Tensor
    stride: int
    eps: float
    mean: Tensor
    rstd: Tensor
    given: bool


def plan_without_norm(scale: Tensor, shift: Tensor, filters: Tensor, stride: int) -> Plan:
    """Return the arguments for ``K * max(s I + b, 0)``."""
    zeros = scale.detach().new_zeros(len(scale), 1)
    return Plan(scale, shift, filters, stride, eps=0.0, mean=zeros, rstd=zeros + 1, given=True)


def norm_relu_conv(x: Tensor, plan: Plan) -> tuple[Tensor, Statistics]:
    """Return ``K * max(s (I - mean) / sqrt(var + eps) + b, 0)`` and the statistics.

    Args:
        x: Inputs ``I`` of the nodes ``[V, B, H, W]``, contiguous, for which kernels are
            :func:`available`.
        plan: All other arguments.

    Returns:
        States ``[V, B, ceil(H / stride), ceil(W / stride)]``, and the statistics that were used,
        which have no gradient.
    """
    tensors = plan.scale, plan.shift, plan.filters, plan.mean, plan.rstd
    z, mean, rstd = _Function.apply(x, *tensors, plan.stride, plan.eps, plan.given)
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
        z = x.new_empty(shape(x, stride))
        mean, rstd = mean.clone(), rstd.clone()
        forward(x, scale, shift, filters, mean, rstd, z, stride, eps, given)
        ctx.save_for_backward(x, scale, shift, filters, mean, rstd)
        ctx.stride, ctx.given = stride, given
        ctx.mark_non_differentiable(mean, rstd)
        return z, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in saved[:4]]
        backward(grad.contiguous(), *saved, *grads, None, ctx.stride, ctx.given)
        return (*grads, None, None, None, None, None)


@torch.library.custom_op(
    "dnw_graph::norm_relu_conv", mutates_args=("mean", "rstd", "z"), device_types="cpu"
)
def forward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    filters: Tensor,
    mean: Tensor,
    rstd: Tensor,
    z: Tensor,
    stride: int,
    eps: float,
    given: bool,
) -> None:
    """Write the states, and the statistics unless ``given``.

    Args:
        x: Inputs ``[V, B, H, W]``, contiguous.
        scale: See :class:`Plan`.
        shift: See :class:`Plan`.
        filters: See :class:`Plan`.
        mean: See :class:`Plan`.
        rstd: See :class:`Plan`.
        z: States, contiguous, of the shape that :func:`shape` returns.
        stride: See :class:`Plan`.
        eps: See :class:`Plan`.
        given: See :class:`Plan`.
    """
    if z.numel():
        arrays = [_jit.array(t) for t in (x, scale, shift, filters, mean, rstd, z)]
        _kernels.forward(*arrays, stride, given, eps, _chunks(x))


@torch.library.custom_op(
    "dnw_graph::norm_relu_conv_backward",
    mutates_args=("dx", "dscale", "dshift", "dfilters", "z"),
    device_types="cpu",
)
def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    filters: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor,
    dscale: Tensor,
    dshift: Tensor,
    dfilters: Tensor,
    z: Tensor | None,
    stride: int,
    given: bool,
) -> None:
    """Write the gradients to the first four arguments of :func:`forward`.

    Unless ``z`` is None, also write the states again.
    """
    if not grad.numel():
        for gradient in (dx, dscale, dshift, dfilters):
            gradient.zero_()
        return
    states = x.new_empty(0, 0, 0, 0) if z is None else z
    tensors = grad, x, scale, shift, filters, mean, rstd
    arrays = [_jit.array(t) for t in (*tensors, dx, dscale, dshift, dfilters, states)]
    _kernels.backward(*arrays, stride, given, _chunks(x))


@forward.register_kernel("cuda")
def _(*args: Any) -> None:
    from dnw_graph.node import _triton

    with torch.cuda.device_of(args[0]):  # Triton uses the current GPU
        _triton.forward(*args)


@backward.register_kernel("cuda")
def _(*args: Any) -> None:
    from dnw_graph.node import _triton

    with torch.cuda.device_of(args[0]):
        _triton.backward(*args)


def shape(x: Tensor, stride: int) -> tuple[int, ...]:
    """Return the shape of the states for inputs ``[V, B, H, W]``."""
    return (*x.shape[:2], -(-x.shape[2] // stride), -(-x.shape[3] // stride))


def _chunks(x: Tensor) -> int:
    return max(1, min(len(x), _jit.threads()))
