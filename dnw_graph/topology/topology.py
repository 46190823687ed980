"""The candidate graph: nodes in blocks, and the edges that a rule may choose from."""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from dnw_graph.topology import _order, exchange
from dnw_graph.topology.builders import Builders, on_cpu
from dnw_graph.topology.role import Role


@dataclass(frozen=True)
class Block:
    """Consecutive nodes of one role that fire together, and the candidate edges into them.

    Attributes:
        index: Position of the block in :attr:`Topology.blocks`.
        role: Role of all its nodes.
        nodes: Its nodes, ``range(first, last + 1)``.
        edges: Ids of the candidate edges into it, a contiguous range.
        sources: Indices of the blocks those edges come from, ascending.
        pairs: Number of pairs of a node of a source block and a node of this one.
    """

    index: int
    role: Role
    nodes: range
    edges: range
    sources: tuple[int, ...]
    pairs: int

    @property
    def complete(self) -> bool:
        """Whether every node of every source block may feed every node of this one.

        Its candidate weights then view as a matrix ``[len(nodes), number of source nodes]``.
        """
        return len(self.edges) == self.pairs


class Topology(Builders):
    """Candidate edges over nodes in blocks; says which edges may exist, not which do.

    Nodes are numbered block by block, edges sorted by ``(target, source)``, so the candidates into
    a block are contiguous. An object never changes after it is made, and copies share it. Complete
    blocks take memory for their nodes only; the edges are computed when asked for.

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

    @on_cpu
    def __init__(
        self,
        edge_index: Tensor,
        block: Tensor,
        role: Tensor,
        names: Sequence[Any] | None = None,
        inputs: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> None:
        self._set_nodes(block.long().cpu(), role.long().cpu(), names, inputs, outputs)
        source, target = _order.sorted_edges(edge_index, self.num_nodes, self.describe)
        counts = torch.bincount(target, minlength=self.num_nodes)
        per_block = torch.zeros(int(self.block[-1]) + 1, dtype=torch.int64, device="cpu")
        per_block.index_add_(0, self.block, counts)
        self._set_edges(counts, list(source.split(per_block.tolist())))

    @classmethod
    def _of_blocks(
        cls, sizes: Sequence[int], roles: Sequence[Role], fed_by: Sequence[Tensor]
    ) -> "Topology":
        """Return blocks of which every node is fed by the same sources, given for each block."""
        repeats = torch.tensor(list(sizes), device="cpu")
        made = cls.__new__(cls)
        made._set_nodes(
            torch.arange(len(sizes), device="cpu").repeat_interleave(repeats),
            torch.tensor(list(roles), device="cpu").repeat_interleave(repeats),
        )
        counts = torch.tensor([len(sources) for sources in fed_by], device="cpu").repeat_interleave(
            repeats
        )
        made._set_edges(counts, fed_by)
        return made

    @classmethod
    @on_cpu
    def from_edges(
        cls,
        edge_index: Tensor | Sequence[Sequence[int]],
        inputs: Iterable[int],
        outputs: Iterable[int],
        num_nodes: int | None = None,
        names: Sequence[Any] | None = None,
    ) -> "Topology":
        """Any directed graph; blocks follow from its longest paths.

        A node's block is the length of the longest path that ends in it, nodes of different roles
        apart. A graph with a cycle has one block a role. Nodes are renumbered block by block, and
        :attr:`names` keeps the numbers given here, or what they are called.

        Args:
            edge_index: Candidate edges ``[2, E]``.
            inputs: Nodes that are given the graph's input, in the order of its channels.
            outputs: Nodes whose states are the graph's output, in the order of its channels.
            num_nodes: Number of nodes; one more than the largest number seen unless given.
            names: What nodes are called, by the numbers given here.

        Raises:
            ValueError: As for :class:`Topology`; or a node that is both input and output.
            TypeError: Inputs or outputs that are no whole numbers.
        """
        for ends, given in (("inputs", inputs), ("outputs", outputs)):
            if not isinstance(given, Iterable):
                raise TypeError(
                    f"{ends} must be a list of nodes, such as [{given!r}], got {given!r}"
                )
        inputs, outputs = [index(v) for v in inputs], [index(v) for v in outputs]
        edge_index = torch.as_tensor(edge_index, device="cpu")
        if not edge_index.numel() and edge_index.shape[:1] == (2,):
            edge_index = edge_index.long()  # of empty lists, which have no type
        if num_nodes is None:
            largest = int(edge_index.max()) if edge_index.numel() else -1
            num_nodes = max(largest, *inputs, *outputs, -1) + 1
        _order.check_edges(edge_index, num_nodes)
        edge_index = edge_index.long()
        if names is not None and len(names) != num_nodes:
            raise ValueError(f"names must name each of the {num_nodes} nodes, got {len(names)}")
        if both := sorted(set(inputs) & set(outputs)):
            called = [v if names is None else names[v] for v in both[:5]]
            raise ValueError(f"a node is an input or an output, not both: {called}")
        for kind, nodes in (("input", inputs), ("output", outputs)):
            if outside := [v for v in nodes if not 0 <= v < num_nodes]:
                raise ValueError(f"{kind}s {outside[:5]} are not among the {num_nodes} nodes")
        role = torch.full((num_nodes,), Role.HIDDEN, device="cpu")
        role[inputs], role[outputs] = Role.INPUT, Role.OUTPUT
        level = _order.levels(edge_index, num_nodes)
        key = role.clone() if level is None else level * len(Role) + role
        order = torch.argsort(key, stable=True)
        number = torch.empty_like(order)
        number[order] = torch.arange(num_nodes, device="cpu")
        _, block = torch.unique(key[order], return_inverse=True)
        return cls(
            number[edge_index],
            block,
            role[order],
            names=order.tolist() if names is None else [names[v] for v in order.tolist()],
            inputs=number[inputs],
            outputs=number[outputs],
        )

    @classmethod
    @on_cpu
    def from_networkx(
        cls,
        graph: nx.DiGraph,
        inputs: Iterable[Hashable] | None = None,
        outputs: Iterable[Hashable] | None = None,
    ) -> "Topology":
        """The edges of a directed networkx graph as candidates.

        Args:
            graph: Its nodes may have a ``role`` (``"input"``, ``"hidden"``, the default, or
                ``"output"``), a ``block``, all or none of them, and inputs and outputs a
                ``channel``, their place in the input and output. :attr:`names` keeps the nodes.
            inputs: Input nodes in the order of the input's channels, in place of roles.
            outputs: Likewise output nodes.

        Raises:
            ValueError: As for :class:`Topology`; or an undirected graph, or an unknown role.
        """
        given = exchange.nodes_of(graph, inputs, outputs)
        names, ends = given["names"], (given["inputs"], given["outputs"])
        if given["blocks"] is None:
            return cls.from_edges(given["edges"], *ends, num_nodes=len(names), names=names)
        role = torch.full((len(names),), Role.HIDDEN, device="cpu")
        role[ends[0]], role[ends[1]] = Role.INPUT, Role.OUTPUT
        block = torch.tensor(given["blocks"], dtype=torch.int64, device="cpu")
        order = torch.argsort(block, stable=True)
        number = order.argsort()
        return cls(
            number[given["edges"]],
            block[order],
            role[order],
            names=[names[v] for v in order.tolist()],
            inputs=number[ends[0]],
            outputs=number[ends[1]],
        )

    def to_networkx(self) -> nx.DiGraph:
        """Return the candidates as a directed graph.

        Nodes go by :attr:`names` and have ``role`` and ``block``, inputs and outputs ``channel``;
        :meth:`from_networkx` undoes it.
        """
        graph, names = self.nodes_to_networkx(), self.names
        graph.add_edges_from((names[u], names[v]) for u, v in self.edge_index.t().tolist())
        return graph

    def nodes_to_networkx(self) -> nx.DiGraph:
        """Return the nodes as a directed graph without edges; see :meth:`to_networkx`."""
        names, graph = self.names, nx.DiGraph()
        channel = {int(v): i for v in (self.inputs, self.outputs) for i, v in enumerate(v)}
        for v, (role, block) in enumerate(
            zip(self.role.tolist(), self.block.tolist(), strict=True)
        ):
            graph.add_node(names[v], role=Role(role).name.lower(), block=block)
            if v in channel:
                graph.nodes[names[v]]["channel"] = channel[v]
        return graph

    @property
    def edge_index(self) -> Tensor:
        """Candidates ``[2, E]``, int64, sorted by ``(target, source)``; made when asked for."""
        return self.edges(torch.arange(self.num_candidates, device="cpu"))

    def edges(self, edge_id: Tensor, target: Tensor | None = None) -> Tensor:
        """Return sources and targets ``[2, n]``, int64, of candidates ``[n]`` by id.

        Args:
            edge_id: The ids.
            target: The targets ``[n]``, where they are known.
        """
        rowptr, block, table, lists = self._on(edge_id.device)
        if target is None:
            target = torch.searchsorted(rowptr, edge_id, right=True) - 1
        first_edge, first, length = lists[:, block[target]]
        return torch.stack([table[first + (edge_id - first_edge) % length].long(), target])

    def rowptr_on(self, device: torch.device) -> Tensor:
        """Return :attr:`rowptr` on a device."""
        return self._on(device)[0]

    def source_lists_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the sources of the candidates into each block; of a complete one, of one node."""
        lengths = [
            len(b.edges) // len(b.nodes) if b.complete else len(b.edges) for b in self.blocks
        ]
        return self._on(device)[2].split(lengths)

    def out_degree_on(self, device: torch.device) -> Tensor:
        """Return the number of candidates out of each node ``[V]`` on a device."""

        def make() -> tuple[Tensor]:
            degree = torch.zeros(self.num_nodes, dtype=torch.int64, device="cpu")
            lists = self.source_lists_on(torch.device("cpu"))
            for block, sources in zip(self.blocks, lists, strict=True):
                times = len(block.nodes) if block.complete else 1
                degree += times * torch.bincount(sources, minlength=self.num_nodes)
            return (degree,)

        return self.copies_on("out-degree", device, make)[0]

    def by_source_on(self, block: Block, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the candidates into a block in the order of their sources, on a device.

        Returns:
            Their places ``[E of the block]``, and where those out of each node begin ``[V + 1]``.
        """

        def make() -> tuple[Tensor, Tensor]:
            every = torch.arange(block.edges.start, block.edges.stop, device="cpu")
            ordered, order = self.edges(every)[0].sort(stable=True)
            ends = torch.searchsorted(ordered, torch.arange(self.num_nodes + 1, device="cpu"))
            return order, ends

        order, ends = self.copies_on(f"block {block.index} by source", device, make)
        return order, ends

    def places_on(self, block: Block, device: torch.device) -> Tensor:
        """Return where the candidates into a block are in its matrix, on a device.

        The matrix ``[len(block.nodes), sources]`` has a column for each node of a source block.

        Returns:
            Places ``[E of the block]`` in the flattened matrix, ascending.
        """

        def make() -> tuple[Tensor]:
            every = torch.arange(block.edges.start, block.edges.stop, device="cpu")
            source, target = self.edges(every)
            column = torch.zeros(self.num_nodes, dtype=torch.int64, device="cpu")
            width = 0
            for i in block.sources:
                nodes = self.blocks[i].nodes
                own = torch.arange(width, width + len(nodes), device="cpu")
                column[nodes.start : nodes.stop] = own
                width += len(nodes)
            return ((target - block.nodes.start) * width + column[source],)

        return self.copies_on(f"places of block {block.index}", device, make)[0]

    def places_of_all_on(self, device: torch.device) -> Tensor:
        """Return where candidates are in a flattened matrix ``[V, V]`` of targets and sources."""

        def make() -> tuple[Tensor]:
            source, target = self.edge_index
            return (target * self.num_nodes + source,)

        return self.copies_on("places", device, make)[0]

    def sources_of_all_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the ids of all candidates and their sources ``[E]`` each, on a device."""
        ids, sources = self.copies_on(
            "sources",
            device,
            lambda: (torch.arange(self.num_candidates, device="cpu"), self.edge_index[0]),
        )
        return ids, sources

    def copies_on(
        self, name: str, device: torch.device, make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Return tensors about the topology on a device, made and copied there once.

        Args:
            name: Under which they are kept.
            device: The device.
            make: Returns them on the CPU.
        """
        key = f"{name} on {device}"
        if key not in self._copies:
            self._copies[key] = tuple(x.to(device) for x in make())
        return self._copies[key]

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return what edges are looked up in on a device, copied there once."""
        return self.copies_on(
            "edges", device, lambda: (self.rowptr, self.block, self._table, self._lists)
        )

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
        return len(self._table.unique())

    @cached_property
    def depth(self) -> int | None:
        """Length in edges of the longest path over candidates; ``None`` where there is a cycle."""
        level = _order.levels(self.edge_index, self.num_nodes)
        return None if level is None else int(level.max())

    @cached_property
    def distance(self) -> Tensor:
        """Edges on a shortest path from an input to each node ``[V]``; -1 where there is none."""
        return _order.distances(self.edge_index, self.num_nodes, self.inputs)

    @cached_property
    def fingerprint(self) -> int:
        """A 63-bit hash of roles, blocks, candidates and channels; names do not change it."""
        digest = hashlib.sha256()
        parts = (self.block, self.role, self.inputs, self.outputs, self.rowptr, self._table.long())
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.contiguous().numpy().tobytes())
        return int.from_bytes(digest.digest()[:8], "little") >> 1

    def walks_from_inputs(self, length: int) -> Tensor:
        """Return the nodes at which a walk of that many edges from some input ends, ascending."""
        return _order.walks(self.edge_index, self.num_nodes, self.inputs, length)

    def describe(self, nodes: Iterable[int], most: int = 5) -> str:
        """Name some nodes for an error message."""
        nodes = [int(v) for v in nodes]
        shown = ", ".join(repr(self.names[v]) for v in nodes[:most])
        return shown + (f" and {len(nodes) - most} more" if len(nodes) > most else "")

    def __repr__(self) -> str:
        sizes = [len(b.nodes) for b in self.blocks]
        blocks = f"{sizes}" if len(sizes) <= 20 else f"<{len(sizes)} of {self.num_nodes:,} nodes>"
        return f"Topology(blocks={blocks}, num_candidates={self.num_candidates:,})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Topology":
        return self

    def _set_nodes(
        self,
        block: Tensor,
        role: Tensor,
        names: Sequence[Any] | None = None,
        inputs: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> None:
        self.num_nodes = len(block)
        self._copies: dict[str, tuple[Tensor, ...]] = {}
        self.names: Sequence[Any] = range(self.num_nodes) if names is None else tuple(names)
        self._check_nodes(block, role)
        self.block, self.role = torch.unique_consecutive(block, return_inverse=True)[1], role
        self.inputs = self._nodes_of(Role.INPUT, inputs)
        self.outputs = self._nodes_of(Role.OUTPUT, outputs)

    def _set_edges(self, counts: Tensor, sources: Sequence[Tensor]) -> None:
        """Keep the candidates.

        Args:
            counts: Number of edges into each node ``[V]``.
            sources: Of each block, the sources of its edges, or as much as is repeated for each
                of its nodes.
        """
        #: Candidates into node ``v`` are ``rowptr[v]`` to ``rowptr[v + 1]`` - 1. ``[V + 1]``
        self.rowptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.num_candidates = int(self.rowptr[-1])
        self.blocks = tuple(self._blocks(sources))
        lists = [
            fed_by[: len(block.edges) // len(block.nodes)] if block.complete else fed_by
            for block, fed_by in zip(self.blocks, sources, strict=True)
        ]
        # The edge with id e into block b comes from table[first + (e - first_edge) % length].
        self._table = torch.cat([fed_by.int() for fed_by in lists])
        lengths = torch.tensor([len(fed_by) for fed_by in lists], device="cpu")
        first_edge = torch.tensor([block.edges.start for block in self.blocks], device="cpu")
        self._lists = torch.stack([first_edge, lengths.cumsum(0) - lengths, lengths.clamp_min(1)])

    def _check_nodes(self, block: Tensor, role: Tensor) -> None:
        if block.shape != role.shape or block.dim() != 1 or len(self.names) != len(block):
            raise ValueError(
                "block, role and names must have one entry a node, got "
                f"{tuple(block.shape)}, {tuple(role.shape)} and {len(self.names)}"
            )
        if len(set(self.names)) < len(block):
            twice = [name for name, times in Counter(self.names).items() if times > 1]
            raise ValueError(f"nodes need names of their own, but some share {twice[:5]}")
        if not set(role.tolist()) <= set(Role):
            unknown = sorted(set(role.tolist()) - set(Role))
            raise ValueError(f"unknown roles {unknown}; known: {[f'{r.name}={r}' for r in Role]}")
        if Role.INPUT not in role or Role.OUTPUT not in role:
            raise ValueError(
                "a topology needs an input node and an output node at least: name them by inputs "
                'and outputs, or by role="input" and role="output" of nodes of a networkx graph'
            )
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
                f"{Role(int(role[v + 1])).name}; give them blocks of their own (in a networkx "
                "graph, another attribute block, or none on any node)"
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

    def _blocks(self, given: Sequence[Tensor]) -> Iterable[Block]:
        _, sizes = torch.unique_consecutive(self.block, return_counts=True)
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        member = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
        for j in range(len(sizes)):
            nodes = range(int(starts[j]), int(starts[j + 1]))
            edges = range(int(self.rowptr[nodes.start]), int(self.rowptr[nodes.stop]))
            sources = tuple(member[given[j]].unique().tolist())
            possible = len(nodes) * sum(int(sizes[i]) for i in sources)
            yield Block(j, Role(int(self.role[nodes.start])), nodes, edges, sources, possible)
