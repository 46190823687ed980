"""GPU kernels of ``norm_relu_conv`` in Triton, which read maps in place, without padding.

Rows of memory are nodes. A program processes one node and some of its pixels. Sums over a node are
written as one partial sum per program and added afterwards, so that their order does not depend on
the machine. Programs are numbered in one dimension, since the others are limited to 65,535.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIXELS = 1024  # per iteration of a program
_TURNS = 8  # iterations of a program that computes sums

# Triton derives the types of the arguments below.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"


@triton.jit
def _sums(x, parts, n, group_size, TOTAL: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr):
    """Write count, mean and sum of squared deviations of each part of each group's pixels."""
    group, part = tl.program_id(0).to(tl.int64) // n, tl.program_id(0) % n
    offsets = part * (TURNS * BLOCK) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], TOTAL)
    for turn in range(TURNS):
        at = offsets + turn * BLOCK
        total += tl.load(x + (group * group_size + at), mask=at < group_size, other=0).to(TOTAL)
    count = tl.minimum(tl.maximum(group_size - part * (TURNS * BLOCK), 0), TURNS * BLOCK)
    mean = tl.sum(total) / tl.maximum(count, 1)
    spread = tl.zeros([BLOCK], TOTAL)
    for turn in range(TURNS):
        at = offsets + turn * BLOCK
        value = tl.load(x + (group * group_size + at), mask=at < group_size, other=0).to(TOTAL)
        spread += tl.where(at < group_size, (value - mean) * (value - mean), 0.0)
    to = parts + (group * n + part) * 3
    tl.store(to, count.to(TOTAL))
    tl.store(to + 1, mean)
    tl.store(to + 2, tl.sum(spread))


@triton.jit
def _activation(x, v, image, row, column, a, b, B, H, W, inside):
    """Return ``max(a I + b, 0)`` at some pixels, 0 in the padding."""
    inside = inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    at = ((v * B + image) * H + row) * W + column
    value = a * tl.load(x + at, mask=inside, other=0).to(a.dtype) + b
    return tl.where(inside & ~(value < 0), value, 0.0)


@triton.jit
def _apply(
    x, scale, shift, filters, mean, rstd, z,
    B, H, W, Ho, Wo, G, stride, n, TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the states ``z``."""
    v = tl.program_id(0).to(tl.int64) // n
    at = tl.program_id(0) % n * BLOCK + tl.arange(0, BLOCK)
    inside = at < B * Ho * Wo
    image, row, column = at // (Ho * Wo), at // Wo % Ho, at % Wo
    group = v * G + tl.where(G > 1, image, 0)
    a = tl.load(scale + v) * tl.load(rstd + group, mask=inside, other=0)
    b = tl.load(shift + v) - tl.load(mean + group, mask=inside, other=0) * a
    total = tl.zeros([BLOCK], TOTAL)
    for tap in tl.static_range(9):
        i, j = row * stride + tap // 3 - 1, column * stride + tap % 3 - 1
        total += tl.load(filters + (v * 9 + tap)) * _activation(
            x, v, image, i, j, a, b, B, H, W, inside
        )
    tl.store(z + (v * B * Ho * Wo + at), total.to(z.dtype.element_ty), mask=inside)


@triton.jit
def _relu_gradient(x, grad, filters, v, image, row, column, a, b, B, H, W, Ho, Wo, stride, inside):
    """Return the gradient to the normalised inputs, and the inputs, at some pixels."""
    total = tl.zeros(row.shape, a.dtype)
    for tap in tl.static_range(9):
        i, j = row + 1 - tap // 3, column + 1 - tap % 3
        hit = inside & (i >= 0) & (j >= 0) & (i % stride == 0) & (j % stride == 0)
        i, j = i // stride, j // stride
        hit = hit & (i < Ho) & (j < Wo)
        g = tl.load(grad + (((v * B + image) * Ho + i) * Wo + j), mask=hit, other=0).to(a.dtype)
        total += tl.load(filters + (v * 9 + tap)) * g
    value = tl.load(x + (((v * B + image) * H + row) * W + column), mask=inside, other=0)
    value = value.to(a.dtype)
    return tl.where(inside & ~(a * value + b <= 0), total, 0.0), value


@triton.jit
def _backward_sums(
    grad, x, scale, shift, filters, mean, rstd, parts,
    B, H, W, Ho, Wo, G, stride, n,
    TOTAL: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the partial sums of the gradients to shift and scale, for each group."""
    group, part = tl.program_id(0).to(tl.int64) // n, tl.program_id(0) % n
    v, g = group // G, (group % G).to(tl.int32)
    images = B // G
    mu, r = tl.load(mean + group), tl.load(rstd + group)
    a = tl.load(scale + v) * r
    b = tl.load(shift + v) - mu * a
    total, dot = tl.zeros([BLOCK], TOTAL), tl.zeros([BLOCK], TOTAL)
    for turn in range(TURNS):
        at = (part * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)
        inside = at < images * H * W
        image, row, column = g * images + at // (H * W), at // W % H, at % W
        relu_grad, value = _relu_gradient(
            x, grad, filters, v, image, row, column, a, b, B, H, W, Ho, Wo, stride, inside
        )
        total += relu_grad
        dot += relu_grad * (value - mu)
    to = parts + (group * n + part) * 2
    tl.store(to, tl.sum(total))
    tl.store(to + 1, tl.sum(dot) * r)


@triton.jit
def _backward_apply(
    grad, x, scale, shift, filters, mean, rstd, slope, base, dx,
    B, H, W, Ho, Wo, G, stride, n, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ``dL/dI = a relu_grad + slope I + base``."""
    v = tl.program_id(0).to(tl.int64) // n
    at = tl.program_id(0) % n * BLOCK + tl.arange(0, BLOCK)
    inside = at < B * H * W
    image, row, column = at // (H * W), at // W % H, at % W
    group = v * G + tl.where(G > 1, image, 0)
    a = tl.load(scale + v) * tl.load(rstd + group, mask=inside, other=0)
    b = tl.load(shift + v) - tl.load(mean + group, mask=inside, other=0) * a
    relu_grad, value = _relu_gradient(
        x, grad, filters, v, image, row, column, a, b, B, H, W, Ho, Wo, stride, inside
    )
    slopes = tl.load(slope + group, mask=inside, other=0)
    result = a * relu_grad + slopes * value + tl.load(base + group, mask=inside, other=0)
    tl.store(dx + (v * B * H * W + at), result.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _correlate(
    grad, x, scale, shift, mean, rstd, parts,
    B, H, W, Ho, Wo, G, stride, n,
    TOTAL: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the partial sums of the gradients to the filters."""
    v, part = tl.program_id(0).to(tl.int64) // n, tl.program_id(0) % n
    for tap in tl.static_range(9):
        total = tl.zeros([BLOCK], TOTAL)
        for turn in range(TURNS):
            at = (part * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)
            inside = at < B * Ho * Wo
            image, row, column = at // (Ho * Wo), at // Wo % Ho, at % Wo
            group = v * G + tl.where(G > 1, image, 0)
            a = tl.load(scale + v) * tl.load(rstd + group, mask=inside, other=0)
            b = tl.load(shift + v) - tl.load(mean + group, mask=inside, other=0) * a
            i, j = row * stride + tap // 3 - 1, column * stride + tap % 3 - 1
            g = tl.load(grad + (v * B * Ho * Wo + at), mask=inside, other=0).to(TOTAL)
            total += g * _activation(x, v, image, i, j, a, b, B, H, W, inside)
        tl.store(parts + ((v * n + part) * 9 + tap), tl.sum(total))


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

    Arguments as for :func:`dnw_graph.node.fused.forward`. Sums have the type of the statistics and
    parameters, float32 or float64.
    """
    if not z.numel():
        return
    nodes, batch, height, width = x.shape
    groups = mean.shape[1]
    if not given:
        group_size = batch // groups * height * width
        n = triton.cdiv(group_size, _PIXELS * _TURNS)
        parts = scale.new_empty(nodes * groups, n, 3)
        _sums[(nodes * groups * n,)](x, parts, n, group_size, **_constants(scale, TURNS=_TURNS))
        count, means, spread = parts.unbind(2)
        mean.copy_(((count * means).sum(1) / group_size).view_as(mean))
        between = count * (means - mean.view(-1, 1)) ** 2
        variance = (spread + between).sum(1) / group_size
        rstd.copy_((variance + eps).rsqrt().view_as(rstd))
    sizes = batch, height, width, *z.shape[2:], groups, stride
    _write_states(x, (scale, shift, filters, mean, rstd), z, sizes)


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
    """Write the gradients, and the states again unless ``z`` is None.

    Arguments as for :func:`dnw_graph.node.fused.backward`.
    """
    if not grad.numel():
        for gradient in (dx, dscale, dshift, dfilters):
            gradient.zero_()
        return
    nodes, batch, height, width = x.shape
    groups, group_size = mean.shape[1], batch // mean.shape[1] * height * width
    sizes = batch, height, width, *grad.shape[2:], groups, stride
    turns = _constants(scale, TURNS=_TURNS)
    n = triton.cdiv(group_size, _PIXELS * _TURNS)
    parts = scale.new_empty(nodes, groups, n, 2)
    parameters = scale, shift, filters, mean, rstd
    _backward_sums[(nodes * groups * n,)](grad, x, *parameters, parts, *sizes, n, **turns)
    total, dot = parts.sum(2).unbind(2)
    dshift.copy_(total.sum(1))
    dscale.copy_(dot.sum(1))
    slope, base = torch.zeros_like(total), torch.zeros_like(total)
    if not given:
        a = scale[:, None] * rstd
        slope = -a * rstd * dot / group_size
        base = -a * total / group_size - slope * mean
    n = triton.cdiv(x[0].numel(), _PIXELS)
    maps = slope, base, dx
    _backward_apply[(nodes * n,)](grad, x, *parameters, *maps, *sizes, n, BLOCK=_PIXELS)
    n = triton.cdiv(grad[0].numel(), _PIXELS * _TURNS)
    parts = scale.new_empty(nodes, n, 9)
    _correlate[(nodes * n,)](grad, x, scale, shift, mean, rstd, parts, *sizes, n, **turns)
    dfilters.copy_(parts.sum(1).view_as(dfilters))
    if z is not None:
        _write_states(x, parameters, z, sizes)


def _write_states(
    x: Tensor, parameters: tuple[Tensor, ...], z: Tensor, sizes: tuple[int, ...]
) -> None:
    n = triton.cdiv(z[0].numel(), _PIXELS)
    _apply[(len(x) * n,)](x, *parameters, z, *sizes, n, **_constants(parameters[0]))


def _constants(scale: Tensor, **others: int) -> dict[str, object]:
    """Return the type of sums, the number of pixels per iteration, and other constants."""
    total = tl.float64 if scale.dtype == torch.float64 else tl.float32
    return {"TOTAL": total, "BLOCK": _PIXELS, **others}
