"""Sums over all earlier blocks, for node functions without compiled code.

The messages of all nodes are in one buffer, and so are the gradients to the inputs of all nodes.
For autograd this is a chain: every block reads the buffer and then writes its messages to it. The
cost of a block does not depend on the number of blocks before it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dnw_graph import _jit
from dnw_graph._arena import empty
from dnw_graph.aggregation import Correlation, by_source, push, wide
from dnw_graph.schedule import _kernels
from dnw_graph.topology import Block
from dnw_graph.wiring import Wiring


class Chain:
    """The messages of the blocks that have fired.

    Args:
        wiring: The real edges.
        weight: The trained weights, in the order of edges.
        like: The messages of the first block, for type and features.
    """

    def __init__(self, wiring: Wiring, weight: Tensor, like: Tensor) -> None:
        shape = wiring.topology.num_nodes, *like.shape[1:]
        self._shared = _Shared(wiring, empty(like, shape), Correlation(wiring))
        # Represents the buffer in autograd: a tensor of its shape with almost no memory, whose
        # gradient is the buffer of gradients.
        self._link: Tensor = _Begin.apply(self._shared, weight, like.detach())

    def aggregate(self, block: Block) -> Tensor:
        """Return the inputs of a block ``[nodes, *features]``."""
        inputs: Tensor
        inputs, self._link = _Aggregate.apply(self._shared, block, self._link)
        return inputs

    def push(self, block: Block, messages: Tensor) -> None:
        """Add the messages of a block ``[nodes, *features]``."""
        messages = messages.to(self._shared.messages.dtype)
        self._link = _Push.apply(self._shared, block, self._link, messages)


@dataclass(frozen=True)
class _Shared:
    """What all functions of a chain use: edges, the buffer of messages, gradients to weights."""

    wiring: Wiring
    messages: Tensor
    correlation: Correlation

    @cached_property
    def into(self) -> list[Any]:
        """Edges by target: row pointers, sources and weights."""
        wiring = self.wiring
        return _arrays(wiring.rowptr, wiring.edge_index[0], wiring.edge_weight)

    @cached_property
    def out(self) -> list[Any]:
        """Edges by source: row pointers, targets and weights."""
        ptr, target, order = by_source(self.wiring.edge_index[0], self.wiring.rowptr)
        return _arrays(ptr, target, self.wiring.edge_weight[order])


class _Begin(torch.autograd.Function):
    """Starts a chain; its backward, the last to run, computes the gradients to the weights."""

    @staticmethod
    def forward(ctx: Any, shared: _Shared, weight: Tensor, like: Tensor) -> Tensor:
        ctx.shared, ctx.dtype = shared, weight.dtype
        return shared.messages.new_empty(1).expand(shared.messages.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        shared = ctx.shared
        return None, shared.correlation(shared.messages, grads, ctx.dtype), None


class _Aggregate(torch.autograd.Function):
    """Sums messages into a block; its backward writes to the buffer of gradients."""

    @staticmethod
    def forward(ctx: Any, shared: _Shared, block: Block, link: Tensor) -> tuple[Tensor, Tensor]:
        ctx.shared, ctx.block = shared, block
        ctx.set_materialize_grads(False)
        return _gather(block, shared.into, shared.messages), _new_link(link)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads is None:
            grads = torch.zeros_like(ctx.shared.messages)
        if grad is not None:
            grads[ctx.block.rows] = grad
        return None, None, grads


class _Push(torch.autograd.Function):
    """Writes the messages of a block; its backward sums gradients from the buffer."""

    @staticmethod
    def forward(ctx: Any, shared: _Shared, block: Block, link: Tensor, messages: Tensor) -> Tensor:
        ctx.shared, ctx.block = shared, block
        shared.messages[block.rows] = messages
        return _new_link(link)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        to_messages = None
        if ctx.needs_input_grad[3]:
            to_messages = _gather(ctx.block, ctx.shared.out, grads)
        return None, None, grads, to_messages


def _arrays(ptr: Tensor, index: Tensor, weight: Tensor) -> list[Any]:
    """Return tensors, as arrays on a CPU, where calling an operator would take longer."""
    tensors = ptr, index, wide(weight)
    return [_jit.array(x) for x in tensors] if weight.is_cpu else list(tensors)


def _gather(block: Block, edges: list[Any], rows: Tensor) -> Tensor:
    """Return the sums over the edges of the nodes of a block ``[nodes, *features]``."""
    nodes, flat = block.nodes, rows.view(len(rows), rows.shape[1:].numel())
    out = rows.new_empty(len(nodes), flat.shape[1])
    if rows.is_cpu:
        _kernels.gather(nodes.start, nodes.stop, *edges, _jit.array(flat), _jit.array(out))
    else:
        ptr, index, weight = edges
        push(weight, ptr, index, [nodes.start, nodes.stop], [0], [flat], out)
    return out.view(len(nodes), *rows.shape[1:])


def _new_link(link: Tensor) -> Tensor:
    return link.new_empty(1).expand(link.shape)
