"""The candidate graph: nodes in blocks, and the edges that a rule may choose from."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dnw_graph.topology import _order

P = ParamSpec("P")
R = TypeVar("R")


def _on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """Make tensors on the CPU, whatever device a network is being built on."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run


class Role(IntEnum):
    """What a node is to the world outside the graph."""

    INPUT = 0
    HIDDEN = 1
    OUTPUT = 2


@dataclass(frozen=True)
class Block:
    """Consecutive nodes of one role that fire together, and the candidate edges into them.

    Attributes:
        index: Position of the block in :attr:`Topology.blocks`.
        role: Role of all its nodes.
        nodes: Its nodes, ``range(first, last + 1)``.
        edges: Ids of the candidate edges into it, a contiguous range.
        sources: Indices of the blocks those edges come from, ascending.
        complete: Whether every node of every source block may feed every node of this one; its
            candidate weights then view as a matrix ``[len(nodes), number of source nodes]``.
    """

    index: int
    role: Role
    nodes: range
    edges: range
    sources: tuple[int, ...]
    complete: bool


class Topology:
    """Candidate edges over nodes in blocks; says which edges may exist, not which do.

    Nodes are numbered block by block, edges sorted by ``(target, source)``, so the candidates into
    a block are contiguous. An object never changes after it is made, and copies share it.

    Args:
        edge_index: Candidate edges ``[2, E]``, row 0 the sources, row 1 the targets, in any order.
        block: Block of each node ``[V]``; must not decrease.
        role: :class:`Role` of each node ``[V]``; one role a block.
        names: What errors and exports call the nodes; their numbers unless given.
        inputs: Input nodes in the order of the input's channels; ascending unless given.
        outputs: Output nodes in the order of the output's channels; ascending unless given.

    Raises:
        ValueError: An edge to a node that does not exist, a duplicate edge, a block with two
            roles, no input or no output.
    """

    @_on_cpu
    def __init__(
        self,
        edge_index: Tensor,
        block: Tensor,
        role: Tensor,
        names: Sequence[Any] | None = None,
        inputs: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> None:
        block, role = block.long().cpu(), role.long().cpu()
        self.num_nodes = len(block)
        self._copies: dict[str, tuple[Tensor, Tensor]] = {}
        self.names: Sequence[Any] = range(self.num_nodes) if names is None else tuple(names)
        self._check_nodes(block, role)
        self.block, self.role = torch.unique_consecutive(block, return_inverse=True)[1], role
        self.inputs = self._nodes_of(Role.INPUT, inputs)
        self.outputs = self._nodes_of(Role.OUTPUT, outputs)
        edge_index = _order.sorted_edges(edge_index, self.num_nodes, self.describe)
        #: Source of each candidate ``[E]``, int32; with :attr:`rowptr` all there is to keep of it.
        self.source = edge_index[0].int()
        self.num_candidates = len(self.source)
        counts = torch.bincount(edge_index[1], minlength=self.num_nodes)
        #: Candidates into node ``v`` are ``rowptr[v]`` to ``rowptr[v + 1]`` - 1. ``[V + 1]``
        self.rowptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.blocks = tuple(self._blocks())

    @classmethod
    @_on_cpu
    def layered(cls, sizes: Sequence[int], skip: bool = True) -> "Topology":
        """Blocks in a row: the first the inputs, the last the outputs.

        Args:
            sizes: Number of nodes of each block, two blocks at least.
            skip: Whether any earlier block may feed any later one; otherwise adjacent ones only.

        Raises:
            ValueError: Fewer than two blocks, or an empty one.
        """
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(
                "a layered topology needs two blocks or more of one node or more, "
                f"got {list(sizes)}"
            )
        start = torch.tensor([0, *sizes]).cumsum(0).tolist()
        edges = []
        for j, size in enumerate(sizes[1:], start=1):
            sources = torch.arange(0 if skip else start[j - 1], start[j])
            targets = torch.arange(start[j], start[j + 1])
            edges.append(
                torch.stack([sources.repeat(size), targets.repeat_interleave(len(sources))])
            )
        roles = [Role.INPUT, *[Role.HIDDEN] * (len(sizes) - 2), Role.OUTPUT]
        repeats = torch.tensor(list(sizes))
        return cls(
            torch.cat(edges, dim=1),
            block=torch.arange(len(sizes)).repeat_interleave(repeats),
            role=torch.tensor(roles).repeat_interleave(repeats),
        )

    @classmethod
    @_on_cpu
    def from_edges(
        cls,
        edge_index: Tensor | Sequence[Sequence[int]],
        inputs: Iterable[int],
        outputs: Iterable[int],
        num_nodes: int | None = None,
    ) -> "Topology":
        """Any directed graph; blocks follow from its longest paths.

        A node's block is the length of the longest path that ends in it, nodes of different roles
        apart. A graph with a cycle has one block a role. Nodes are renumbered block by block, and
        :attr:`names` keeps the numbers given here.

        Args:
            edge_index: Candidate edges ``[2, E]``.
            inputs: Nodes that are given the graph's input, in the order of its channels.
            outputs: Nodes whose states are the graph's output, in the order of its channels.
            num_nodes: Number of nodes; one more than the largest number seen unless given.

        Raises:
            ValueError: As for :class:`Topology`; or a node that is both input and output.
        """
        inputs, outputs = [int(v) for v in inputs], [int(v) for v in outputs]
        edge_index = torch.as_tensor(edge_index, device="cpu")
        if num_nodes is None:
            largest = int(edge_index.max()) if edge_index.numel() else -1
            num_nodes = max(largest, *inputs, *outputs, -1) + 1
        _order.check_edges(edge_index, num_nodes)
        edge_index = edge_index.long()
        if both := sorted(set(inputs) & set(outputs)):
            raise ValueError(f"a node is an input or an output, not both: {both[:5]}")
        for kind, nodes in (("input", inputs), ("output", outputs)):
            if outside := [v for v in nodes if not 0 <= v < num_nodes]:
                raise ValueError(f"{kind}s {outside[:5]} are not among the {num_nodes} nodes")
        role = torch.full((num_nodes,), Role.HIDDEN)
        role[inputs], role[outputs] = Role.INPUT, Role.OUTPUT
        level = _order.levels(edge_index, num_nodes)
        key = role.clone() if level is None else level * len(Role) + role
        order = torch.argsort(key, stable=True)
        number = torch.empty_like(order)
        number[order] = torch.arange(num_nodes)
        _, block = torch.unique(key[order], return_inverse=True)
        return cls(
            number[edge_index],
            block,
            role[order],
            names=order.tolist(),
            inputs=number[inputs],
            outputs=number[outputs],
        )

    @property
    def edge_index(self) -> Tensor:
        """Candidates ``[2, E]``, int64, sorted by ``(target, source)``; made when asked for."""
        return self.edges(torch.arange(self.num_candidates, device="cpu"))

    def edges(self, edge_id: Tensor) -> Tensor:
        """Return sources and targets ``[2, n]``, int64, of candidates ``[n]`` by id."""
        source, rowptr = self.on(edge_id.device)
        target = torch.searchsorted(rowptr, edge_id, right=True) - 1
        return torch.stack([source[edge_id].long(), target])

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return :attr:`source` and :attr:`rowptr` on a device, copied there once."""
        if device.type == "cpu":
            return self.source, self.rowptr
        name = str(device)
        if name not in self._copies:
            self._copies[name] = self.source.to(device), self.rowptr.to(device)
        return self._copies[name]

    @property
    def num_inputs(self) -> int:
        """Number of input nodes."""
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        """Number of output nodes."""
        return len(self.outputs)

    @property
    def num_sources(self) -> int:
        """Number of nodes with a candidate edge out, the ``n`` of the initial distribution."""
        return int(torch.bincount(self.source).count_nonzero())

    @cached_property
    def depth(self) -> int | None:
        """Length in edges of the longest path over candidates; ``None`` where there is a cycle."""
        level = _order.levels(self.edge_index, self.num_nodes)
        return None if level is None else int(level.max())

    def describe(self, nodes: Iterable[int], most: int = 5) -> str:
        """Name some nodes for an error message."""
        nodes = [int(v) for v in nodes]
        shown = ", ".join(repr(self.names[v]) for v in nodes[:most])
        return shown + (f" and {len(nodes) - most} more" if len(nodes) > most else "")

    def __repr__(self) -> str:
        sizes = [len(b.nodes) for b in self.blocks]
        return f"Topology(blocks={sizes}, num_candidates={self.num_candidates:,})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Topology":
        return self

    def _check_nodes(self, block: Tensor, role: Tensor) -> None:
        if block.shape != role.shape or block.dim() != 1 or len(self.names) != len(block):
            raise ValueError(
                "block, role and names must have one entry a node, got "
                f"{tuple(block.shape)}, {tuple(role.shape)} and {len(self.names)}"
            )
        if not set(role.tolist()) <= set(Role):
            unknown = sorted(set(role.tolist()) - set(Role))
            raise ValueError(f"unknown roles {unknown}; known: {[f'{r.name}={r}' for r in Role]}")
        if Role.INPUT not in role or Role.OUTPUT not in role:
            raise ValueError("a topology needs an input node and an output node at least")
        falls = block.diff() < 0
        if bool(falls.any()):
            v = int(falls.nonzero()[0])
            raise ValueError(
                f"nodes must be numbered block by block, but node {self.describe([v])} of block "
                f"{int(block[v])} comes before node {self.describe([v + 1])} of block "
                f"{int(block[v + 1])}; Topology.from_edges renumbers for you"
            )
        mixed = (block.diff() == 0) & (role.diff() != 0)
        if bool(mixed.any()):
            v = int(mixed.nonzero()[0])
            raise ValueError(
                f"block {int(block[v])} mixes roles: node {self.describe([v])} is "
                f"{Role(int(role[v])).name}, node {self.describe([v + 1])} is "
                f"{Role(int(role[v + 1])).name}; give them blocks of their own"
            )

    def _nodes_of(self, role: Role, ordered: Tensor | None) -> Tensor:
        nodes = (self.role == role).nonzero().flatten()
        if ordered is None:
            return nodes
        if not torch.equal(ordered.sort().values, nodes):
            raise ValueError(
                f"the order of the {role.name.lower()}s must name each of them once: expected "
                f"{self.describe(nodes)}, got {self.describe(ordered)}"
            )
        return ordered.long().cpu()

    def _blocks(self) -> Iterable[Block]:
        _, sizes = torch.unique_consecutive(self.block, return_counts=True)
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        member = torch.arange(len(sizes)).repeat_interleave(sizes)
        for j in range(len(sizes)):
            nodes = range(int(starts[j]), int(starts[j + 1]))
            edges = range(int(self.rowptr[nodes.start]), int(self.rowptr[nodes.stop]))
            fed_by = torch.bincount(
                member[self.source[edges.start : edges.stop]], minlength=len(sizes)
            )
            sources = tuple(fed_by.nonzero().flatten().tolist())
            possible = len(nodes) * sum(int(sizes[i]) for i in sources)
            yield Block(
                j, Role(int(self.role[nodes.start])), nodes, edges, sources, len(edges) == possible
            )
