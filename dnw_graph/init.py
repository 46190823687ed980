"""Initial size of the edge weights of a graph."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

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
        rule: The rule that chooses the real edges.
        num_edges: The budget ``k``.
        gain: ``1 / rms(f(I))`` of each node ``[V]``, for inputs ``I`` with mean 0 and standard
            deviation 1.
    """

    topology: Topology
    rule: Rule
    num_edges: int
    gain: Tensor


class Init(ABC):
    """Sets the largest initial weight of the edges into each node."""

    @abstractmethod
    def bound(self, start: Start) -> Tensor:
        """Return ``b_v [V]``: weights of edges into node ``v`` are drawn from ``U(-b_v, b_v)``."""


INITS = PartRegistry("init", Init)


@INITS.register("uniform")
class Uniform(Init):
    """``b = 1 / sqrt(n)`` for ``n`` nodes with a candidate edge out, the same for all nodes.

    Source: the published implementation, whose nodes normalise their inputs.
    """

    @override
    def bound(self, start: Start) -> Tensor:
        bound = 1 / math.sqrt(start.topology.num_sources)
        return torch.full((start.topology.num_nodes,), bound, dtype=torch.float64, device="cpu")


@INITS.register("fan_in")
class FanIn(Init):
    r"""Keeps the scale of states from node to node: :math:`\sum_u w_{uv}^2 = g_v^2` on average.

    The sum is over the real edges into :math:`v`, and :math:`g_v^2` is the mean squared gain of the
    nodes that may feed it. For :math:`m_v` edges chosen at random, :math:`b_v = g_v \sqrt{3 / m_v}`
    (He et al. 2015, equation 10). For the :math:`m_v` largest of :math:`E_v` candidates into a
    node, the mean square is larger by the factor :math:`(1 - (1 - s)^3) / s` with
    :math:`s = m_v / E_v`. If the real edges are the ``k`` candidates of the graph with the largest
    ``|w|``, the bounds and the smallest real ``|w|``, :math:`t`, follow from

    .. math::
        \frac{E_v}{b_v} \int_t^{b_v} w^2 dw = g_v^2, \qquad
        \sum_v E_v \Big(1 - \frac{t}{b_v}\Big) = k

    so that, if few candidates are real, all nodes have about the same number of real edges,
    regardless of their numbers of candidates.
    """

    @override
    def bound(self, start: Start) -> Tensor:
        topology, rule, gain = start.topology, start.rule, _source_gain(start)
        fan_in = topology.rowptr.diff().double().numpy()
        has_edges, bound = fan_in > 0, np.ones(topology.num_nodes)
        if rule.ranking == "all":
            bound[has_edges] = _bounds(fan_in[has_edges], gain[has_edges], start.num_edges)
            return torch.from_numpy(bound)
        expected = rule.start_fan_in(topology, start.num_edges).double().numpy()
        real = np.clip(expected, 1, None)[has_edges]
        # Mean square of U(-b, b), or of its largest values, in units of b^2 / 3.
        share = np.minimum(real / fan_in[has_edges], 1)
        square = 1 if rule.ranking == "none" else (1 - (1 - share) ** 3) / share
        bound[has_edges] = gain[has_edges] * np.sqrt(3 / (real * square))
        return torch.from_numpy(bound)


class Custom(Init):
    """Calls a custom function in place of :meth:`Init.bound`.

    Args:
        function: Called with a :class:`Start`; returns a tensor ``[V]`` or a number.
    """

    def __init__(self, function: Callable[[Start], Tensor | float]) -> None:
        self.function = function

    @override
    def bound(self, start: Start) -> Tensor:
        """Return the result of the function as a tensor ``[V]``.

        Raises:
            ValueError: If the result is not a finite number of 0 or more, or one for each node.
        """
        nodes = start.topology.num_nodes
        bound = self.function(start)
        expected = (
            f"init must return a finite bound, 0 or more, for each of the {nodes} nodes, or one "
            "for all"
        )
        try:
            bounds = torch.as_tensor(bound, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{expected}, got {bound!r}") from error
        largest = torch.finfo(torch.float32).max
        within = bool(((bounds >= 0) & (bounds <= largest)).all())
        if (bounds.dim() and bounds.shape != (nodes,)) or not within:
            raise ValueError(f"{expected}, got {bounds}")
        return bounds.expand(nodes).clone()


def resolve(
    init: str | Init | type[Init] | Callable[[Start], Tensor | float] | None,
    nodes: Sequence[nn.Module],
) -> Init:
    """Return the :class:`Init` for a name, a class, an object or a function.

    If ``init`` is None, return ``uniform`` if a node function normalises or filters maps, as every
    :class:`NodeFunction` other than :class:`Pointwise` does, and ``fan_in`` otherwise.
    """
    if init is None:
        functions = [node for node in nodes if isinstance(node, NodeFunction)]
        return FanIn() if all(isinstance(node, Pointwise) for node in functions) else Uniform()
    if callable(init) and not isinstance(init, type | Init):
        return Custom(init)
    return INITS.resolve(init)


def gain_of(node: nn.Module) -> float:
    """Return ``1 / rms(f(I))`` for inputs with mean 0 and standard deviation 1; 1 if unknown."""
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
    """Return the root mean squared gain of the source blocks of each node ``[V]``."""
    blocks, squares = start.topology.blocks, start.gain.double().square().numpy()
    gains = np.ones(start.topology.num_nodes)
    for block in blocks:
        if block.sources:
            sources = [blocks[i] for i in block.sources]
            total = sum(squares[source.rows].sum() for source in sources)
            mean = total / sum(len(source.nodes) for source in sources)
            gains[block.rows] = math.sqrt(mean)
    return gains


def _bounds(fan_in: Floats, gain: Floats, num_edges: int) -> Floats:
    """Solve the equations of :class:`FanIn` for ``b_v``, by bisection for ``t``."""
    kinds, kind, counts = np.unique(
        np.stack([fan_in, gain]), axis=1, return_inverse=True, return_counts=True
    )
    edges, square = kinds[0], kinds[1] ** 2 / kinds[0]

    def bounds_at(threshold: float) -> Floats:
        """Return the root of ``b^3 - 3 g^2 / E_v b - t^3``, by Newton's method from above."""
        bound: Floats = np.sqrt(3 * square) + threshold
        for _ in range(40):
            value = bound**3 - 3 * square * bound - threshold**3
            slope = 3 * bound**2 - 3 * square
            bound = bound - value / np.maximum(slope, 1e-300)
        return bound

    low, high = 0.0, math.sqrt(float(kinds[1].max()) ** 2 * len(fan_in) / num_edges) + 1.0
    for _ in range(60):
        threshold = (low + high) / 2
        real = (counts * edges * (1 - threshold / bounds_at(threshold))).sum()
        low, high = (threshold, high) if real > num_edges else (low, threshold)
    return bounds_at(low)[kind.reshape(-1)]
