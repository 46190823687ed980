"""Ways of making a topology."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from numbers import Integral
from typing import Any, ParamSpec, Self, TypeVar

import networkx as nx
import torch
from torch import Tensor

from dnw_graph.topology.role import Role

P = ParamSpec("P")
R = TypeVar("R")

RANDOM_GRAPHS: dict[str, Callable[..., nx.Graph]] = {
    "erdos_renyi": nx.gnp_random_graph,
    "watts_strogatz": nx.connected_watts_strogatz_graph,
    "barabasi_albert": nx.barabasi_albert_graph,
}
"""Undirected random graphs, called with a number of nodes, their parameters and ``seed``."""


def on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """Make tensors on the CPU, whatever device a network is being built on."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run


class Builders:
    """The builders of :class:`Topology`, which inherits them."""

    @classmethod
    @abstractmethod
    def from_edges(
        cls,
        edge_index: Tensor | Sequence[Sequence[int]],
        inputs: Iterable[int],
        outputs: Iterable[int],
        num_nodes: int | None = None,
        names: Sequence[Any] | None = None,
    ) -> Self:
        """See :meth:`Topology.from_edges`."""

    @classmethod
    @abstractmethod
    def _of_blocks(
        cls, sizes: Sequence[int], roles: Sequence[Role], fed_by: Sequence[Tensor]
    ) -> Self:
        """Return blocks of which every node is fed by the same sources, given for each block."""

    @classmethod
    @on_cpu
    def layered(cls, sizes: Sequence[int], skip: bool = True) -> Self:
        """Blocks in a row: the first the inputs, the last the outputs.

        Args:
            sizes: Number of nodes of each block, two blocks at least.
            skip: Whether any earlier block may feed any later one; otherwise adjacent ones only.

        Raises:
            ValueError: Fewer than two blocks, or an empty one.
        """
        if len(sizes) < 2 or not all(map(_whole, sizes)) or min(sizes) < 1:
            raise ValueError(
                "a layered topology needs two blocks or more of one node or more, "
                f"got {list(sizes)}"
            )
        start = torch.tensor([0, *sizes]).cumsum(0).tolist()
        firsts = [0 if skip else start[j - 1] for j in range(1, len(sizes))]
        fed_by = [torch.arange(0), *map(torch.arange, firsts, start[1:-1])]
        roles = [Role.INPUT, *[Role.HIDDEN] * (len(sizes) - 2), Role.OUTPUT]
        return cls._of_blocks(sizes, roles, fed_by)

    @classmethod
    def bipartite(cls, inputs: int, outputs: int) -> Self:
        """Each input may feed each output: a linear layer, or a 1x1 convolution.

        Args:
            inputs: Number of inputs.
            outputs: Number of outputs.

        Raises:
            ValueError: None of them.
        """
        return cls.layered([inputs, outputs])

    @classmethod
    @on_cpu
    def complete(cls, inputs: int, hidden: int, outputs: int, acyclic: bool = False) -> Self:
        """Any node may feed any, itself included; or, acyclic, any later one but no input.

        Args:
            inputs: Number of inputs.
            hidden: Number of hidden nodes.
            outputs: Number of outputs.
            acyclic: Whether edges lead to later nodes only; each hidden node is then a block, and
                outputs feed nothing.

        Raises:
            ValueError: No input, no output, or fewer than no hidden nodes.
        """
        _check_sizes(inputs, hidden, outputs)
        if acyclic:
            return cls.layered([inputs, *[1] * hidden, outputs])
        sizes = {Role.INPUT: inputs, Role.HIDDEN: hidden, Role.OUTPUT: outputs}
        roles = [role for role, size in sizes.items() if size]
        everything = torch.arange(inputs + hidden + outputs)
        return cls._of_blocks([sizes[r] for r in roles], roles, [everything] * len(roles))

    @classmethod
    @on_cpu
    def recurrent(cls, inputs: int, hidden: int, outputs: int) -> Self:
        """Inputs feed hidden nodes, these each other and themselves, and the outputs (Elman 1990).

        For a schedule in time.

        Args:
            inputs: Number of inputs.
            hidden: Number of hidden nodes.
            outputs: Number of outputs.

        Raises:
            ValueError: None of one of them.
        """
        _check_sizes(inputs, hidden, outputs, least=1)
        nothing, all_before = torch.arange(0), torch.arange(inputs + hidden)
        return cls._of_blocks(
            [inputs, hidden, outputs], list(Role), [nothing, all_before, all_before[inputs:]]
        )

    @classmethod
    @on_cpu
    def grid(cls, rows: int, columns: int, reach: int = 1) -> Self:
        """Columns of nodes, each fed by those near it in the column before.

        Args:
            rows: Nodes of a column.
            columns: How many; the first holds the inputs, the last the outputs.
            reach: Rows up and down from which a node is fed.

        Raises:
            ValueError: No rows, fewer than two columns, or a negative reach.
        """
        whole = all(map(_whole, (rows, columns, reach)))
        if not whole or rows < 1 or columns < 2 or reach < 0:
            raise ValueError(
                "a grid needs a row, two columns and a reach of 0 at least, in whole numbers, got "
                f"{rows} rows, {columns} columns and a reach of {reach}"
            )
        row = torch.arange(rows)
        source, target = ((row[:, None] - row).abs() <= reach).nonzero().t()
        first = rows * torch.arange(columns - 1)[:, None]
        edges = torch.stack([(first + source).flatten(), (first + rows + target).flatten()])
        outputs = range(rows * (columns - 1), rows * columns)
        return cls.from_edges(edges, range(rows), outputs, num_nodes=rows * columns)

    @classmethod
    @on_cpu
    def random_dag(
        cls, kind: str, nodes: int, inputs: int, outputs: int, *, seed: int = 0, **parameters: Any
    ) -> Self:
        """A random graph whose edges lead from lower to higher numbers (Xie et al. 2019).

        The first nodes are the inputs, the last the outputs. Edges into inputs and out of outputs
        are left out; a node that nothing feeds is fed by all inputs, and one that feeds nothing
        feeds all outputs.

        Args:
            kind: ``"erdos_renyi"`` (``p``, probability of an edge), ``"watts_strogatz"`` (``k``
                neighbours, ``p``, probability of rewiring) or ``"barabasi_albert"`` (``m`` edges
                of each new node).
            nodes: Number of nodes, inputs and outputs included.
            inputs: Number of inputs.
            outputs: Number of outputs.
            seed: Of the random graph.
            parameters: Its parameters.

        Raises:
            ValueError: An unknown kind, a parameter that it does not take or that is missing or out
                of range, or more inputs and outputs than nodes.
        """
        if kind not in RANDOM_GRAPHS:
            raise ValueError(f"unknown random graph {kind!r} (known: {', '.join(RANDOM_GRAPHS)})")
        _check_sizes(inputs, nodes - inputs - outputs, outputs)
        p = parameters.get("p", 0)
        if isinstance(p, int | float) and not 0 <= p <= 1:
            raise ValueError(f"p must be a probability, from 0 to 1, got {p}")
        try:
            drawn = RANDOM_GRAPHS[kind](nodes, **parameters, seed=seed)
        except (TypeError, nx.NetworkXException) as error:
            raise ValueError(f"random graph {kind} with {parameters}: {error}") from error
        pairs = torch.tensor(list(drawn.edges), dtype=torch.int64).view(-1, 2).sort(1).values
        first_output = nodes - outputs
        pairs = pairs[(pairs[:, 1] >= inputs) & (pairs[:, 0] < first_output)]
        every = torch.arange(nodes)
        unfed = every[(torch.bincount(pairs[:, 1], minlength=nodes) == 0) & (every >= inputs)]
        idle = every[(torch.bincount(pairs[:, 0], minlength=nodes) == 0) & (every < first_output)]
        more = [
            torch.cartesian_prod(every[:inputs], unfed),
            torch.cartesian_prod(idle, every[first_output:]),
        ]
        edges = torch.cat([pairs, *more]).unique(dim=0).t()
        return cls.from_edges(edges, range(inputs), range(first_output, nodes), num_nodes=nodes)


def _whole(number: object) -> bool:
    """Return whether it is a whole number, of Python's or NumPy's kinds."""
    return isinstance(number, Integral)


def _check_sizes(inputs: int, hidden: int, outputs: int, least: int = 0) -> None:
    for name, number in (("inputs", inputs), ("hidden", hidden), ("outputs", outputs)):
        if not _whole(number):
            raise TypeError(f"{name} must be a whole number of nodes, got {number!r}")
    if inputs < 1 or outputs < 1:
        raise ValueError(
            f"a topology needs an input and an output at least, got {inputs} inputs and {outputs} "
            "outputs"
        )
    if hidden < least:
        raise ValueError(
            f"{inputs} inputs and {outputs} outputs leave {hidden} hidden nodes; {least} at least "
            "are needed"
        )
