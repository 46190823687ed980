"""How large weights are when a graph is made."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dnw_graph._registry import PartRegistry
from dnw_graph.node import NodeFunction, Pointwise, WithoutTime
from dnw_graph.topology import Topology
from dnw_graph.wiring import Rule

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Start:
    """A graph before its weights are drawn.

    Attributes:
        topology: The candidates.
        rule: How edges are chosen.
        num_edges: The budget ``k``.
        gain: Of each node, ``1 / rms(f(I))`` for inputs ``I`` of mean 0 and deviation 1 ``[V]``.
    """

    topology: Topology
    rule: Rule
    num_edges: int
    gain: Tensor


class Init(ABC):
    """Says how large the weights of the edges into each node may be when a graph is made."""

    @abstractmethod
    def bound(self, start: Start) -> Tensor:
        """Return ``b_v [V]``: weights of edges into node ``v`` are drawn from ``U(-b_v, b_v)``."""


INITS = PartRegistry("init", Init)


@INITS.register("uniform")
class Uniform(Init):
    r"""``b = 1 / \sqrt n`` for ``n`` nodes with a candidate edge out, the same for all nodes.

    Source: the published implementation, whose nodes normalise what they are given.
    """

    def bound(self, start: Start) -> Tensor:
        """See :meth:`Init.bound`."""
        bound = 1 / math.sqrt(start.topology.num_sources)
        return torch.full((start.topology.num_nodes,), bound, dtype=torch.float64, device="cpu")


@INITS.register("fan_in")
class FanIn(Init):
    r"""Keeps the scale of states from node to node: :math:`\sum_u w_{uv}^2 = g_v^2` on average.

    The sum is over the real edges into :math:`v`, and :math:`g_v^2` is the mean squared gain of the
    nodes that may feed it. With ``m_v`` edges drawn at random, :math:`b_v = g_v \sqrt{3 / m_v}`
    (He et al. 2015, equation 10); of the ``m_v`` largest of :math:`E_v` candidates into a node, the
    mean square is larger by :math:`(1 - (1 - s)^3) / s` for the share :math:`s = m_v / E_v`. Where
    the real edges are the ``k`` of largest ``|w|`` of all candidates, bounds and the smallest real
    ``|w|``, ``t``, follow from

    .. math::
        \frac{E_v}{b_v} \int_t^{b_v} w^2 dw = g_v^2, \qquad
        \sum_v E_v \Big(1 - \frac{t}{b_v}\Big) = k

    so that, where few candidates are real, every node has about as many real edges as any other,
    however many candidates it has.
    """

    def bound(self, start: Start) -> Tensor:
        """See :meth:`Init.bound`."""
        topology, rule, gain = start.topology, start.rule, _source_gain(start)
        fan_in = topology.rowptr.diff().double().numpy()
        fed, bound = fan_in > 0, np.ones(topology.num_nodes)
        if rule.ranking == "all":
            bound[fed] = _bounds(fan_in[fed], gain[fed], start.num_edges)
            return torch.from_numpy(bound)
        expected = rule.start_fan_in(topology, start.num_edges).double().numpy()
        real = np.clip(expected, 1, None)[fed]
        # Mean squares of U(-b, b), or of its largest ones, in b^2 / 3.
        share = np.minimum(real / fan_in[fed], 1)
        square = 1 if rule.ranking == "none" else (1 - (1 - share) ** 3) / share
        bound[fed] = gain[fed] * np.sqrt(3 / (real * square))
        return torch.from_numpy(bound)


class Custom(Init):
    """A function in the place of :meth:`Init.bound`.

    Args:
        function: Called with a :class:`Start`; returns a tensor ``[V]`` or a number.
    """

    def __init__(self, function: Callable[[Start], Tensor | float]) -> None:
        self.function = function

    def bound(self, start: Start) -> Tensor:
        """See :meth:`Init.bound`.

        Raises:
            ValueError: The function returned anything else, or a negative number.
        """
        nodes = start.topology.num_nodes
        bound = self.function(start)
        wanted = f"init must return a finite bound for each of the {nodes} nodes, or one for all"
        try:
            found = torch.as_tensor(bound, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{wanted}, got {bound!r}") from error
        largest = torch.finfo(torch.float32).max
        within = bool(((found >= 0) & (found <= largest)).all())
        if (found.dim() and found.shape != (nodes,)) or not within:
            raise ValueError(f"{wanted}, 0 or more, got {found}")
        return found.expand(nodes).clone()


def resolve(
    init: str | Init | type[Init] | Callable[[Start], Tensor | float] | None,
    nodes: Sequence[nn.Module],
) -> Init:
    """Return what a name, a class, an object or a function stands for.

    Without any of these, it is ``fan_in`` for graphs none of whose node functions normalises or
    filters maps, as all that are not :class:`Pointwise` do, and ``uniform`` for others.
    """
    if init is None:
        own = [node for node in nodes if isinstance(node, NodeFunction)]
        return FanIn() if all(isinstance(node, Pointwise) for node in own) else Uniform()
    if callable(init) and not isinstance(init, type | Init):
        return Custom(init)
    return INITS.resolve(init)


def gain_of(node: nn.Module) -> float:
    """Return ``1 / rms(f(I))`` for inputs of mean 0 and deviation 1; 1 where it is not known."""
    gain = getattr(node, "gain", None)
    if gain is not None:
        return float(gain)
    inner = node.function if isinstance(node, WithoutTime) else node
    if type(inner).__module__ != nn.ReLU.__module__ or next(inner.parameters(), None) is not None:
        return 1.0
    normal = torch.distributions.Normal(0.0, 1.0)
    inputs = normal.icdf(torch.linspace(0.0005, 0.9995, 1000, device="cpu")).view(1, -1)
    with torch.no_grad():
        rms = float(inner(inputs.clone()).square().mean().sqrt())
    return 1 / rms if rms > 0 else 1.0


def _source_gain(start: Start) -> Floats:
    """Return the root mean squared gain of the nodes of the blocks that may feed each node."""
    blocks, squares = start.topology.blocks, start.gain.double().square().numpy()
    found = np.ones(start.topology.num_nodes)
    for block in blocks:
        if block.sources:
            fed_by = [blocks[i].nodes for i in block.sources]
            total = sum(squares[nodes.start : nodes.stop].sum() for nodes in fed_by)
            mean = total / sum(len(nodes) for nodes in fed_by)
            found[block.nodes.start : block.nodes.stop] = math.sqrt(mean)
    return found


def _bounds(fan_in: Floats, gain: Floats, number: int) -> Floats:
    """Solve the equations of :class:`FanIn` for ``b_v``, by bisection for ``t``."""
    kinds, kind, times = np.unique(
        np.stack([fan_in, gain]), axis=1, return_inverse=True, return_counts=True
    )
    edges, square = kinds[0], kinds[1] ** 2 / kinds[0]

    def solved(threshold: float) -> Floats:
        """Return the root of ``b^3 - 3 g^2 / E_v b - t^3``, from above by Newton's method."""
        bound: Floats = np.sqrt(3 * square) + threshold
        for _ in range(40):
            value = bound**3 - 3 * square * bound - threshold**3
            slope = 3 * bound**2 - 3 * square
            bound = bound - value / np.maximum(slope, 1e-300)
        return bound

    low, high = 0.0, math.sqrt(float(kinds[1].max()) ** 2 * len(fan_in) / number) + 1.0
    for _ in range(60):
        threshold = (low + high) / 2
        real = (times * edges * (1 - threshold / solved(threshold))).sum()
        low, high = (threshold, high) if real > number else (low, threshold)
    return solved(low)[kind.reshape(-1)]
