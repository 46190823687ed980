"""Measure a training step of custom wirings with many small blocks.

    python -m benchmarks.wirings [--repeats 7] [--only static levels]

Static graphs are compared with a loop over nodes in PyTorch, in which a node stacks the states of
its parents. Graphs in time are compared with a topology that has one block per role. Further
studies have the same number of nodes, candidates and edges in more and more levels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from benchmarks.measure import alternate, machine
from dnw_graph import NeuralGraph, Topology, freeze
from dnw_graph.node import NormReluConv
from dnw_graph.topology import by_role

INSTANCE = partial(NormReluConv, norm="instance")
STUDIES = ("static", "time", "large", "levels", "maps", "frozen")


@dataclass(frozen=True)
class Arguments:
    """Time a training step of graphs with custom wirings."""

    repeats: int = 7
    """Number of timed rounds."""
    only: tuple[str, ...] = STUDIES
    """Studies: static, time, large, levels, maps, frozen."""


class Loop(nn.Module):
    """A static graph of ReLU nodes as a loop over nodes, with one state ``[B]`` per node."""

    def __init__(self, graph: NeuralGraph) -> None:
        super().__init__()
        self.weight = nn.Parameter(graph.weight.detach().clone())
        self.topology, self.number = graph.topology, graph.num_edges

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs ``[B, outputs]`` for inputs ``[B, inputs]``."""
        topology, sizes = self.topology, self.weight.detach().abs()
        real = torch.zeros_like(sizes).index_fill_(0, sizes.topk(self.number).indices, 1)
        weight = self.weight * real
        source = topology.edge_index[0].split(topology.rowptr.diff().tolist())
        weights = weight.split(topology.rowptr.diff().tolist())
        states: list[Tensor] = list(x.relu().unbind(1))
        outputs = set(topology.outputs.tolist())
        for v in range(topology.num_inputs, topology.num_nodes):
            parents = torch.stack([states[u] for u in source[v].tolist()])
            total = weights[v] @ parents
            states.append(total if v in outputs else total.relu())
        return torch.stack([states[v] for v in topology.outputs.tolist()], 1)


def step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a function that computes outputs and gradients."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()

    return run


def static() -> Iterable[tuple[str, dict[str, Callable[[], object]]]]:
    """Static graphs with feature vectors, batch 32, half of the candidates real."""
    for name, topology in (
        ("Watts-Strogatz, 500 nodes", small_world(500)),
        ("Watts-Strogatz, 2,000 nodes", small_world(2000)),
        ("complete acyclic, 300 hidden nodes", Topology.complete(16, 300, 10, acyclic=True)),
    ):
        x = torch.randn(32, topology.num_inputs)
        graph = NeuralGraph(topology, num_edges=topology.num_candidates // 2, node="relu")
        other = NeuralGraph(topology, num_edges=topology.num_candidates // 2, node=nn.ELU)
        loop = Loop(graph)
        assert torch.allclose(loop(x), graph(x), atol=1e-4)
        yield (
            f"{name}, {len(topology.blocks)} levels",
            {"loop": step(loop, x), "graph": step(graph, x), "any module": step(other, x)},
        )


def small_world(nodes: int) -> Topology:
    """Return a small-world topology."""
    return Topology.random_dag("watts_strogatz", nodes, inputs=16, outputs=10, k=8, p=0.5)


def in_time() -> Iterable[tuple[str, dict[str, Callable[[], object]]]]:
    """Graphs in time with feature maps of 8x8, batch 32, half of the candidates real."""
    for nodes, schedule in (
        (176, "discrete(steps=10)"),
        (60, "discrete(steps=5)"),
        (60, "continuous"),
    ):
        topology = small_world(nodes)
        options: dict[str, Any] = {
            "num_edges": topology.num_candidates // 2,
            "node": INSTANCE,
            "schedule": schedule,
        }
        graph = NeuralGraph(topology, **options)
        grouping = by_role(topology)
        other = NeuralGraph(grouping.topology, **options)
        state = graph.state_dict() | {"fingerprint": other.fingerprint}
        if grouping.edge is not None:
            state["weight"] = state["weight"][grouping.edge]
        other.load_state_dict(state)
        x = torch.randn(32, 16, 8, 8)
        y = graph(x), other(x)[:, _positions(topology, grouping.topology)]
        assert torch.allclose(*y, atol=1e-3)
        name = f"{nodes} nodes, {len(topology.blocks)} levels, {schedule}"
        yield name, {"one block per role": step(other, x), "graph": step(graph, x)}


def _positions(topology: Topology, other: Topology) -> list[int]:
    names = [other.names[v] for v in other.outputs.tolist()]
    return [names.index(topology.names[v]) for v in topology.outputs.tolist()]


def levelled(nodes: int, levels: int, candidates: int) -> Topology:
    """Return levels of equal size, with edges from the level before and random ones from all."""
    generator = torch.Generator().manual_seed(0)
    level = torch.arange(nodes) * levels // nodes
    first = torch.searchsorted(level, torch.arange(levels + 1))
    target = torch.arange(int(first[1]), nodes)
    before = first[level[target] - 1]
    chain = before + torch.rand(len(target), generator=generator).mul(first[level[target]] - before)
    pairs = torch.randint(nodes, (2, 3 * candidates), generator=generator).sort(0).values
    pairs = pairs[:, level[pairs[0]] < level[pairs[1]]][:, : candidates - len(target)]
    edges = torch.cat([torch.stack([chain.long(), target]), pairs], 1).unique(dim=1)
    outputs = range(int(first[-2]), nodes)
    return Topology.from_edges(edges, range(int(first[1])), outputs, num_nodes=nodes)


def large() -> Iterable[tuple[str, dict[str, Callable[[], object]]]]:
    """20,000 nodes and a million candidates in 226 levels, feature vectors, batch 32."""
    topology = levelled(20_000, 226, 1_000_000)
    x = torch.randn(32, topology.num_inputs)
    for edges in (100_000, 500_000):
        graph = NeuralGraph(topology, num_edges=edges, node="relu")
        name = f"{topology.num_candidates:,} candidates, {len(topology.blocks)} levels, k={edges:,}"
        yield name, {"graph": step(graph, x)}


def levels() -> Iterable[tuple[str, dict[str, Callable[[], object]]]]:
    """2,048 nodes and 20,000 candidates, feature vectors, batch 32, in more and more levels."""
    for number in (4, 16, 64, 256, 1024):
        topology = levelled(2048, number, 20_000)
        x = torch.randn(32, topology.num_inputs)
        graph, other = (
            NeuralGraph(topology, num_edges=5_000, node=node) for node in ("relu", nn.ELU)
        )
        yield (
            f"{len(topology.blocks)} levels, {topology.num_inputs} inputs",
            {"graph": step(graph, x), "any module": step(other, x)},
        )


def maps() -> Iterable[tuple[str, dict[str, Callable[[], object]]]]:
    """512 nodes of norm_relu_conv and 5,000 candidates, maps of 8x8, batch 16, in more levels."""
    for number in (4, 16, 64, 256):
        topology = levelled(512, number, 5_000)
        graph = NeuralGraph(topology, num_edges=1_500)
        x = torch.randn(16, topology.num_inputs, 8, 8)
        yield f"{len(topology.blocks)} levels", {"graph": step(graph, x)}


def frozen() -> Iterable[tuple[str, dict[str, Callable[[], object]]]]:
    """The same small worlds in evaluation, frozen and not frozen."""
    for nodes in (500, 2000):
        topology = small_world(nodes)
        graph = NeuralGraph(topology, num_edges=topology.num_candidates // 2, node="relu").eval()
        frozen_graph, x = freeze(graph), torch.randn(32, 16)
        forward = torch.no_grad()(graph.forward)
        yield f"{nodes} nodes", {"frozen": partial(frozen_graph, x), "graph": partial(forward, x)}


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m benchmarks.wirings", description=__doc__)
    print(f"{machine('cpu')}, float32\n")
    studies = dict(zip(STUDIES, (static, in_time, large, levels, maps, frozen), strict=True))
    for study in args.only:
        torch.manual_seed(0)
        print(f"{studies[study].__doc__}\n")
        first = True
        for name, candidates in studies[study]():
            timings = alternate(candidates, args.repeats, "cpu", warmup=2)
            if first:
                print("| " + " | ".join(["ms, median (range)", *timings]) + " |")
                print("| --- " * (len(timings) + 1) + "|")
                first = False
            print("| " + " | ".join([name, *map(str, timings.values())]) + " |", flush=True)
        print()


if __name__ == "__main__":
    main()
