"""Blocks and edges of the topologies that :class:`Topology` builds, without the class itself."""

from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Integral
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dnw_graph.topology.role import Role

P = ParamSpec("P")
R = TypeVar("R")

Blocks = list[tuple[int, Role, range]]
"""Number of nodes, role and sources of each block; see :meth:`Topology.from_blocks`."""

Edges = tuple[Tensor, range, range, int]
"""Edges ``[2, E]``, inputs, outputs and number of nodes; see :meth:`Topology.from_edges`."""

RANDOM_GRAPHS = {
    "erdos_renyi": "gnp_random_graph",
    "watts_strogatz": "connected_watts_strogatz_graph",
    "barabasi_albert": "barabasi_albert_graph",
}
"""Functions of networkx that build undirected random graphs, by kind."""


def on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function create tensors on the CPU, regardless of the default device."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run


def layered(sizes: Sequence[int], skip: bool) -> Blocks:
    """Return the blocks of :meth:`Topology.layered`."""
    if not hasattr(sizes, "__len__"):
        raise TypeError(f"sizes must be a list of numbers of nodes, such as [3, 8], got {sizes!r}")
    if len(sizes) < 2 or not all(map(_is_whole, sizes)) or min(sizes) < 1:
        raise ValueError(
            f"a layered topology needs at least two blocks of at least one node, got {list(sizes)}"
        )
    starts = [sum(sizes[:j]) for j in range(len(sizes))]
    roles = [Role.INPUT, *[Role.HIDDEN] * (len(sizes) - 2), Role.OUTPUT]
    firsts = [0 if skip or not j else starts[j - 1] for j in range(len(sizes))]
    return [*zip(sizes, roles, map(range, firsts, starts), strict=True)]


def complete(inputs: int, hidden: int, outputs: int, acyclic: bool) -> Blocks:
    """Return the blocks of :meth:`Topology.complete`."""
    _check_sizes(inputs, hidden, outputs)
    if acyclic:
        return layered([inputs, *[1] * hidden, outputs], skip=True)
    nodes = range(inputs + hidden + outputs)
    sizes = {Role.INPUT: inputs, Role.HIDDEN: hidden, Role.OUTPUT: outputs}
    return [(size, role, nodes) for role, size in sizes.items() if size]


def recurrent(inputs: int, hidden: int, outputs: int) -> Blocks:
    """Return the blocks of :meth:`Topology.recurrent`."""
    _check_sizes(inputs, hidden, outputs, least=1)
    return [
        (inputs, Role.INPUT, range(0)),
        (hidden, Role.HIDDEN, range(inputs + hidden)),
        (outputs, Role.OUTPUT, range(inputs, inputs + hidden)),
    ]


@on_cpu
def grid(rows: int, columns: int, reach: int) -> Edges:
    """Return the edges of :meth:`Topology.grid`."""
    whole = all(map(_is_whole, (rows, columns, reach)))
    if not whole or rows < 1 or columns < 2 or reach < 0:
        raise ValueError(
            "a grid needs at least one row, two columns and a reach of 0, in whole numbers, got "
            f"{rows} rows, {columns} columns and a reach of {reach}"
        )
    row = torch.arange(rows)
    source, target = ((row[:, None] - row).abs() <= reach).nonzero().t()
    first = rows * torch.arange(columns - 1)[:, None]
    edges = torch.stack([(first + source).flatten(), (first + rows + target).flatten()])
    num_nodes = rows * columns
    return edges, range(rows), range(num_nodes - rows, num_nodes), num_nodes


@on_cpu
def random_dag(
    kind: str, nodes: int, inputs: int, outputs: int, *, seed: int, **parameters: Any
) -> Edges:
    """Return the edges of :meth:`Topology.random_dag`."""
    import networkx as nx

    if kind not in RANDOM_GRAPHS:
        raise ValueError(f"unknown random graph {kind!r} (known: {', '.join(RANDOM_GRAPHS)})")
    _check_sizes(inputs, nodes - inputs - outputs, outputs)
    p = parameters.get("p", 0)
    if isinstance(p, int | float) and not 0 <= p <= 1:
        raise ValueError(f"p must be a probability, from 0 to 1, got {p}")
    try:
        graph = getattr(nx, RANDOM_GRAPHS[kind])(nodes, **parameters, seed=seed)
    except (TypeError, nx.NetworkXException) as error:
        raise ValueError(f"random graph {kind} with {parameters}: {error}") from error
    pairs = torch.tensor(list(graph.edges), dtype=torch.int64).view(-1, 2).sort(1).values
    first_output = nodes - outputs
    pairs = pairs[(pairs[:, 1] >= inputs) & (pairs[:, 0] < first_output)]
    node = torch.arange(nodes)
    unfed = node[(torch.bincount(pairs[:, 1], minlength=nodes) == 0) & (node >= inputs)]
    idle = node[(torch.bincount(pairs[:, 0], minlength=nodes) == 0) & (node < first_output)]
    from_inputs = torch.cartesian_prod(node[:inputs], unfed)
    to_outputs = torch.cartesian_prod(idle, node[first_output:])
    edges = torch.cat([pairs, from_inputs, to_outputs]).unique(dim=0).t()
    return edges, range(inputs), range(first_output, nodes), nodes


def checked_size(size: object) -> int:
    """Return a number of nodes; raise ValueError unless it is a whole number above 0."""
    if not isinstance(size, Integral):
        raise ValueError(f"a block needs a whole number of nodes, got {size!r}")
    if int(size) < 1:
        raise ValueError(f"a block needs at least one node, got {size!r}")
    return int(size)


def _is_whole(number: object) -> bool:
    """Return whether a value is a whole number of Python's or NumPy's types."""
    return isinstance(number, Integral)


def _check_sizes(inputs: int, hidden: int, outputs: int, least: int = 0) -> None:
    for name, number in (("inputs", inputs), ("hidden", hidden), ("outputs", outputs)):
        if not _is_whole(number):
            raise TypeError(f"{name} must be a whole number of nodes, got {number!r}")
    if inputs < 1 or outputs < 1:
        raise ValueError(
            f"a topology needs at least one input and one output, got {inputs} inputs and "
            f"{outputs} outputs"
        )
    if hidden < least:
        raise ValueError(
            f"{inputs} inputs and {outputs} outputs leave {hidden} hidden nodes, but at least "
            f"{least} are needed"
        )
