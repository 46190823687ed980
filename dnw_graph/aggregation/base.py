"""The interface of a backend, and its autograd function with straight-through gradients."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch_geometric.nn import MessagePassing

from dnw_graph._registry import PartRegistry
from dnw_graph.aggregation.whole import WholeGraph
from dnw_graph.precision import accepted_dtype
from dnw_graph.topology import Block
from dnw_graph.wiring import Wiring
from dnw_graph.wiring.wiring import GradientObserver


@dataclass(frozen=True)
class BlockEdges:
    """The edges into one block.

    Attributes:
        block: The block whose inputs are computed.
        sources: The blocks that may feed it, in the order of the states passed with this.
        wiring: The real edges of the whole graph.
        prepared: The result of the backend's :meth:`~Backend.prepare`; None if it was not called.
    """

    block: Block
    sources: tuple[Block, ...]
    wiring: Wiring
    prepared: Any = None


class Backend(MessagePassing):  # type: ignore[misc]
    r"""Sums messages over real edges, and computes a gradient for every candidate.

    .. math::
        I_v = \sum_{(u,v) \in E} w_{uv} Z_u, \qquad
        \frac{\partial L}{\partial Z_u} = \sum_{(u,v) \in E} w_{uv}
            \frac{\partial L}{\partial I_v}, \qquad
        \frac{\partial L}{\partial w_{uv}} = \Big\langle Z_u,
            \frac{\partial L}{\partial I_v} \Big\rangle

    The last equation holds for every candidate edge, real or hallucinated (Algorithm 1 of the
    paper). If the rule has no straight-through gradient, it holds for real edges, and the gradient
    of other edges is 0.

    A backend computes the three products; it has no parameters and may be shared. Below, :math:`Z`
    is one tensor ``[nodes, *features]`` per source block (for images the features are ``B, H, W``),
    and the candidate weights of one block are ``[E of the block]``. A backend uses only the type of
    these weights, and computes their gradient; the values :math:`w_{uv}` of a pass are in
    ``edges.wiring.edge_weight``, since a rule may replace them (:meth:`Rule.edge_weight`). If only
    real edges have weights, read :math:`E` as :math:`k` (:meth:`Wiring.span`).
    """

    def __init__(self) -> None:
        super().__init__(aggr="sum", node_dim=0)

    def forward(self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Return the inputs of a block.

        Args:
            edges: The block and its real edges.
            weight: Weights of the candidates into the block ``[E of the block]``.
            states: States of the source blocks, each ``[nodes, *features]``.

        Returns:
            Inputs ``[nodes, *features]`` in the type of the states, or of autocast if enabled.
        """
        if torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64:
            states = [z.to(accepted_dtype(z)) for z in states]
        result: Tensor = _StraightThrough.apply(self, edges, weight, *states)
        return result

    @abstractmethod
    def message_and_aggregate(
        self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor]
    ) -> Tensor:
        """Return ``I = A Z`` ``[nodes, *features]`` over the real edges, as a new tensor."""

    @abstractmethod
    def gradient_to_states(
        self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor], grad: Tensor
    ) -> list[Tensor]:
        """Return ``A^T dL/dI`` over the real edges, one tensor per source block."""

    @abstractmethod
    def gradient_to_weight(
        self, edges: BlockEdges, weight: Tensor, states: Sequence[Tensor], grad: Tensor
    ) -> Tensor:
        """Return ``<Z_u, dL/dI_v>`` ``[E of the block]`` in the type of ``weight``.

        It is computed for every candidate or, if ``edges.wiring.with_gradient`` is not None, for
        the edges in that, with 0 elsewhere.
        """

    def whole_graph(self, wiring: Wiring) -> WholeGraph | None:
        """Return the same products for a whole graph of complete blocks; None if not available.

        Subclasses of the built-in backends return None unless they override this.
        """
        return None

    def by_edge(self, wiring: Wiring) -> bool:
        """Return whether compiled sums over real edges may replace this backend.

        If so, a whole graph may be computed at once.
        """
        return False

    def prepare(self, wiring: Wiring) -> Any:
        """Return data for all blocks of a pass, which :attr:`BlockEdges.prepared` will hold."""
        return None

    def supports(self, block: Block) -> bool:
        """Return whether the backend can compute this block."""
        return True


class _StraightThrough(torch.autograd.Function):
    """Combines the three products of a backend into one differentiable function.

    Functions for whole graphs (in :mod:`dnw_graph.schedule`) define the same gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, backend: Backend, edges: BlockEdges, weight: Tensor, *states: Tensor
    ) -> Tensor:
        ctx.backend, ctx.edges = backend, edges
        ctx.save_for_backward(weight, *states)
        return backend.message_and_aggregate(edges, weight, states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *states = ctx.saved_tensors
        grad = grad.contiguous()
        to_weight, to_states = None, [None] * len(states)
        if ctx.needs_input_grad[2]:
            to_weight = ctx.backend.gradient_to_weight(ctx.edges, weight, states, grad)
            if ctx.edges.wiring.sampler is not None:
                _observe(ctx.edges.wiring.sampler, ctx.backend, ctx.edges, weight, states, grad)
        if any(ctx.needs_input_grad[3:]):
            to_states = ctx.backend.gradient_to_states(ctx.edges, weight, states, grad)
        return None, None, to_weight, *to_states


def _observe(
    sampler: GradientObserver,
    backend: Backend,
    edges: BlockEdges,
    weight: Tensor,
    states: Sequence[Tensor],
    grad: Tensor,
) -> None:
    """Call a sampler in the backward of a block, with a function that computes gradients."""

    def correlate(wiring: Wiring) -> Tensor:
        weights = weight.new_zeros(len(wiring.edge_id))
        return backend.gradient_to_weight(replace(edges, wiring=wiring), weights, states, grad)

    sampler.observe(edges.block, states, grad, correlate)


BACKENDS = PartRegistry("backend", Backend)
