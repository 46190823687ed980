"""A static graph of pointwise node functions as one function, in compiled code.

What takes long in a graph of many small blocks is to go from one to the next. Here that costs
nothing: see :mod:`dnw_graph.schedule._kernels`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dnw_graph import _jit
from dnw_graph._arena import empty
from dnw_graph.aggregation import Correlation
from dnw_graph.aggregation._kernels import TYPES, wide
from dnw_graph.node import Bias, Gelu, Identity, Linear, Relu, Tanh, fused
from dnw_graph.schedule import _kernels
from dnw_graph.schedule.base import ForwardPass, is_identity, is_observed
from dnw_graph.topology import Role
from dnw_graph.wiring import Wiring

KINDS = {
    "identity": _kernels.IDENTITY,
    "relu": _kernels.RELU,
    "gelu": _kernels.GELU,
    "tanh": _kernels.TANH,
}
KNOWN = (Bias, Gelu, Identity, Linear, Relu, Tanh)


def run(forward_pass: ForwardPass, x: Tensor) -> Tensor | None:
    """Return the states of the output nodes, or None where the graph is not of this kind.

    Args:
        forward_pass: The graph.
        x: Inputs of the input nodes ``[inputs, *features]``, by number of the node.

    Returns:
        States ``[outputs, *features]``, by number of the node.
    """
    wiring = forward_pass.wiring
    x = x.to(fused.accepted(x))
    if not x.is_cpu or x.dtype not in TYPES or not x.numel() or wiring.sampler is not None:
        return None
    if not forward_pass.backend.by_edge(wiring) or not all(
        map(_known, forward_pass.nodes, forward_pass.messages)
    ):
        return None
    like = wide(wiring.edge_weight)
    scale, shift = (_affine(forward_pass.nodes, name, like) for name in ("scale", "bias"))
    keeps_inputs = scale is not None or shift is not None or _needs_inputs(forward_pass)
    tensors = _kinds(forward_pass), forward_pass.weight, x, scale, shift
    result: Tensor = _Function.apply(wiring, Correlation(wiring), keeps_inputs, *tensors)
    return result


def _known(node: nn.Module, message: nn.Module) -> bool:
    """Return whether compiled code knows a node function, and nobody listens to it."""
    if is_observed(node) or is_observed(message):
        return False
    return is_identity(message) and type(node) in KNOWN


def _kinds(forward_pass: ForwardPass) -> Tensor:
    """Return the kind of each node's activation ``[V]``, int8."""
    kinds = [KINDS[node.activation] for node in forward_pass.nodes]  # type: ignore[index]
    sizes = torch.tensor([len(block.nodes) for block in forward_pass.topology.blocks], device="cpu")
    each = torch.tensor(kinds, dtype=torch.int8, device="cpu")
    return each.repeat_interleave(sizes)


def _needs_inputs(forward_pass: ForwardPass) -> bool:
    """Return whether the derivative of an activation is not a function of what it returns."""
    return any(node.activation == "gelu" for node in forward_pass.nodes)


def _affine(nodes: Any, name: str, like: Tensor) -> Tensor | None:
    """Return the factors or biases of all nodes ``[V]``; None if no node has one."""
    given = [getattr(node, name) for node in nodes]
    if all(part is None for part in given):
        return None
    neutral = 1.0 if name == "scale" else 0.0
    parts = [
        torch.full((node.num_nodes,), neutral, dtype=like.dtype, device=like.device)
        if part is None
        else part.to(like.dtype)
        for node, part in zip(nodes, given, strict=True)
    ]
    return torch.cat(parts)


class _Function(torch.autograd.Function):
    """All nodes in their order forward, and in the reverse order backward."""

    @staticmethod
    def forward(
        ctx: Any,
        wiring: Wiring,
        correlation: Correlation,
        keeps_inputs: bool,
        kinds: Tensor,
        weight: Tensor,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        topology = wiring.topology
        shape = topology.num_nodes, *x.shape[1:]
        inputs = empty(x, shape) if keeps_inputs else x.new_empty(0, *x.shape[1:])
        z = empty(x, shape)
        forward(*_edges(wiring), x.contiguous(), scale, shift, kinds, inputs, z)
        ctx.wiring, ctx.correlation, ctx.dtype = wiring, correlation, weight.dtype
        ctx.save_for_backward(scale, shift, kinds, inputs, z)
        return z.index_select(0, _outputs(wiring))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wiring, (scale, shift, kinds, inputs, z) = ctx.wiring, ctx.saved_tensors
        to_inputs = empty(z, z.shape)
        width = 0 if scale is None and shift is None else len(z)
        affine_dtype = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        to_affine = torch.empty(_tiles(z), 2, width, dtype=affine_dtype, device=z.device)
        backward(
            grad.contiguous(),
            _outputs(wiring),
            *_edges(wiring),
            scale,
            shift,
            kinds,
            inputs,
            z,
            to_inputs,
            to_affine,
        )
        along, total = to_affine.sum(0)
        wanted = ctx.needs_input_grad
        return (
            *[None] * 4,
            ctx.correlation(z, to_inputs, ctx.dtype) if wanted[4] else None,
            to_inputs[: wiring.topology.num_inputs] if wanted[5] else None,
            along if wanted[6] else None,
            total if wanted[7] else None,
        )


@torch.library.custom_op("dnw_graph::static", mutates_args=("inputs", "z"), device_types="cpu")
def forward(
    ptr: Tensor,
    source: Tensor,
    weight: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    kinds: Tensor,
    inputs: Tensor,
    z: Tensor,
) -> None:
    """Write the states of all nodes.

    Args:
        ptr: Edges into node ``v`` are ``ptr[v]`` to ``ptr[v + 1] - 1``. ``[V + 1]``
        source: Sources of the edges ``[k]``.
        weight: Their weights ``[k]``.
        x: ``I`` of the first nodes ``[inputs, *features]``, contiguous.
        scale: ``a [V]``; 1 unless given.
        shift: ``b [V]``; 0 unless given.
        kinds: Which activation each node has ``[V]``, int8.
        inputs: Where to write ``I [V, *features]``; empty if it is not needed.
        z: Where to write ``Z [V, *features]``.
    """
    arrays = [_jit.array(t) for t in (ptr, source, weight, _rows(x))]
    affine = [_jit.array(weight[:0] if t is None else t) for t in (scale, shift)]
    rest = [_jit.array(t) for t in (kinds, _rows(inputs), _rows(z))]
    _kernels.forward(*arrays, *affine, *rest, _tile(z))


@torch.library.custom_op(
    "dnw_graph::static_backward", mutates_args=("to_inputs", "to_affine"), device_types="cpu"
)
def backward(
    grad: Tensor,
    output: Tensor,
    ptr: Tensor,
    source: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    kinds: Tensor,
    inputs: Tensor,
    z: Tensor,
    to_inputs: Tensor,
    to_affine: Tensor,
) -> None:
    """Write ``dL/dI [V, *features]``, and of each tile ``dL/da`` and ``dL/db [tiles, 2, V]``.

    Args as for :func:`forward`, and ``grad [outputs, *features]``, gradients to the states of the
    nodes ``output [outputs]``.
    """
    arrays = [_jit.array(t) for t in (_rows(grad), output, ptr, source, weight)]
    affine = [_jit.array(weight[:0] if t is None else t) for t in (scale, shift)]
    rest = [_jit.array(t) for t in (kinds, _rows(inputs), _rows(z), _rows(to_inputs), to_affine)]
    _kernels.backward(*arrays, *affine, *rest, _tile(z))


def _edges(wiring: Wiring) -> tuple[Tensor, Tensor, Tensor]:
    return wiring.rowptr, wiring.edge_index[0], wide(wiring.edge_weight)


def _outputs(wiring: Wiring) -> Tensor:
    """Return the output nodes, ascending."""
    blocks = [block for block in wiring.topology.blocks if block.role == Role.OUTPUT]
    return torch.tensor([v for block in blocks for v in block.nodes], device="cpu")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(len(x), x.shape[1:].numel())


def _tile(z: Tensor) -> int:
    """Return how many columns go through the graph together: those of all nodes stay in cache."""
    columns = z[0].numel()
    fits = _CACHE // (len(z) * z.element_size())
    return max(16, min(fits, -(-columns // 4)) // 16 * 16)


def _tiles(z: Tensor) -> int:
    return -(-z[0].numel() // _tile(z))


_CACHE = 1 << 19  # bytes
