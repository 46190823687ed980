"""Measure a training step of one graph by number of nodes, candidates, real edges and images.

    python -m benchmarks.scaling [--device cpu] [--plot benchmarks/scaling.png]

One quantity (V, E, k or B) grows at a time. The exponent is the slope of a straight line fitted to
the logarithms, so 1 is linear growth. Memory is what a step allocates in addition to what was
allocated before.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Timing, alternate, machine
from dnw_graph import NeuralGraph, Topology, _arena, attach


@dataclass(frozen=True)
class Arguments:
    """Time a training step of one graph by size."""

    device: str = "cpu"
    """cpu or cuda."""
    repeats: int = 5
    """Number of timed rounds."""
    plot: Path | None = None
    """PNG file for the plot."""


@dataclass(frozen=True)
class Size:
    """Sizes of a graph and a batch.

    Attributes:
        topology: Topology of the graph.
        edges: Number of real edges.
        batch: Number of images.
        side: Height and width of the maps, in pixels.
        rule: Rule that selects edges.
    """

    topology: Topology
    edges: int
    batch: int = 16
    side: int = 14
    rule: str = "dnw"


def by_nodes() -> Iterable[tuple[int, Size]]:
    """Yield chains of blocks, each connected to the next, so that V, E and k grow alike."""
    for blocks in (4, 8, 16, 32, 64):
        topology = Topology.layered([128] * blocks, skip=False)
        yield topology.num_nodes, Size(topology, topology.num_candidates // 50)


def by_candidates() -> Iterable[tuple[int, Size]]:
    """Yield more random candidates between the same nodes; blocks are not complete."""
    generator = torch.Generator().manual_seed(0)
    for share in (0.02, 0.04, 0.08, 0.16, 0.32):
        pairs = torch.rand(3, 512, 512, generator=generator) < share
        edges = [(p.nonzero() + torch.tensor([i, i + 1]) * 512).t() for i, p in enumerate(pairs)]
        blocks = torch.arange(4).repeat_interleave(512)
        role = torch.tensor([0, 1, 1, 2]).repeat_interleave(512)
        topology = Topology(torch.cat(edges, 1), blocks, role)
        yield topology.num_candidates, Size(topology, 10_000)


def by_complete_candidates() -> Iterable[tuple[int, Size]]:
    """Yield wider complete blocks with the same k; V grows as the square root of E."""
    for width in (64, 128, 256, 512, 1024):
        topology = Topology.layered([width] * 4)
        yield topology.num_candidates, Size(topology, 10_000)


def by_edges() -> Iterable[tuple[int, Size]]:
    """Yield more real edges of the same candidates."""
    topology = Topology.layered([256, *[512] * 6])
    for edges in (25_000, 50_000, 100_000, 200_000, 400_000, 800_000):
        yield edges, Size(topology, edges)


def by_images() -> Iterable[tuple[int, Size]]:
    """Yield larger batches for the 14x14 graph of mbv1_dnw x0.225."""
    topology = Topology.layered([256, *[512] * 6])
    for batch in (2, 4, 8, 16, 32, 64):
        yield batch, Size(topology, 72_991, batch)


EXPLORING = "gse(every=1)"
"""The rule without a tensor of all candidates, in its slowest setting: edges change every step."""


def by_unseen_candidates() -> Iterable[tuple[int, Size]]:
    """Yield the same number of nodes in fewer and wider complete blocks, each fed by the last."""
    for blocks in (64, 32, 16, 8, 4):
        topology = Topology.layered([16_384 // blocks] * blocks, skip=False)
        yield topology.num_candidates, Size(topology, 100_000, batch=4, side=4, rule=EXPLORING)


def by_edges_alone() -> Iterable[tuple[int, Size]]:
    """Yield more real edges of the same 50 million candidates."""
    topology = Topology.layered([4096] * 4, skip=False)
    for edges in (62_500, 125_000, 250_000, 500_000, 1_000_000, 2_000_000):
        yield edges, Size(topology, edges, batch=4, side=4, rule=EXPLORING)


def huge() -> Size:
    """Return a size of 101,000 nodes, 100 million candidates and 500,000 real edges."""
    topology = Topology.layered([1000] * 101, skip=False)
    return Size(topology, edges=500_000, batch=4, side=4, rule=EXPLORING)


def large(nodes: int = 100_000, number: int = 5_000_000) -> Size:
    """Return nodes in ten blocks with random candidates, of which one in 25 is real."""
    generator = torch.Generator().manual_seed(0)
    width = nodes // 10
    target = torch.randint(width, nodes, (number + number // 100,), generator=generator)
    num_sources = target // width * width
    source = (
        torch.rand(len(target), generator=generator, dtype=torch.float64) * num_sources
    ).long()
    edges = torch.stack([source, target]).unique(dim=1)
    edges = edges[:, torch.randperm(edges.shape[1], generator=generator)[:number]]
    block = torch.arange(nodes) // width
    role = torch.ones(nodes, dtype=torch.int64)
    role[:width], role[-width:] = 0, 2
    return Size(Topology(edges, block, role), edges=number // 25, batch=4, side=4)


STUDIES: dict[str, Callable[[], Iterable[tuple[int, Size]]]] = {
    "V, nodes": by_nodes,
    "E, candidates, blocks not complete": by_candidates,
    "E, candidates, complete blocks": by_complete_candidates,
    "k, real edges": by_edges,
    "B, images": by_images,
    "E, candidates, rule gse": by_unseen_candidates,
    "k, real edges, rule gse": by_edges_alone,
}


def make_step(size: Size, device: str) -> Callable[[], object]:
    """Return a function that runs one training step of one graph."""
    torch.manual_seed(0)
    graph = NeuralGraph(size.topology, rule=size.rule, num_edges=size.edges).to(device)
    with torch.no_grad():  # so large that gradients reach the first of a hundred blocks
        graph.weight.mul_(
            (3 * size.topology.num_sources * graph.topology.num_nodes / size.edges) ** 0.5
        )
    inputs = size.topology.num_inputs
    x = torch.randn(size.batch, inputs, size.side, size.side, device=device, requires_grad=True)
    optimizer = torch.optim.SGD(graph.parameters(), lr=1e-6)
    attach(graph, optimizer, total_steps=10**6)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        graph(x).square().mean().backward()
        optimizer.step()

    return step


def allocated(step: Callable[[], object], device: str) -> int:
    """Return the peak memory that a step allocates, in bytes."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    arena, _arena._arena = _arena._arena, None  # which the profiler does not record
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    finally:
        _arena._arena = arena
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocations = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(allocations.max())


def exponent(sizes: list[int], values: list[float]) -> float:
    """Return the slope of a straight line fitted to the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m benchmarks.scaling", description=__doc__)
    print(f"{machine(args.device)}, float32\n")
    curves: dict[str, tuple[list[int], list[Timing]]] = {}
    for name, study in STUDIES.items():
        sizes, times, memory = [], [], []
        for number, size in study():
            step = make_step(size, args.device)
            times.append(alternate({"step": step}, args.repeats, args.device, warmup=2)["step"])
            memory.append(allocated(step, args.device))
            sizes.append(number)
        curves[name] = sizes, times
        slope = exponent(sizes, [t.median for t in times])
        print(f"| {name} | ms, median (range) | MB |\n| --- | --- | --- |")
        for number, timing, peak in zip(sizes, times, memory, strict=True):
            print(f"| {number:,} | {timing} | {peak / 1e6:,.1f} |")
        growth = exponent(sizes, [float(m) for m in memory])
        print(f"| exponent | {slope:.2f} | {growth:.2f} |\n", flush=True)
    for size in (large(), huge()):
        step, topology = make_step(size, args.device), size.topology
        timing = alternate({"step": step}, args.repeats, args.device, warmup=2)["step"]
        peak = allocated(step, args.device)
        print(
            f"{topology.num_nodes:,} nodes, {topology.num_candidates:,} candidates, {size.edges:,} "
            f"real edges, {size.batch} images of {size.side}x{size.side} pixels, rule {size.rule}: "
            f"{timing} ms, {peak / 1e6:,.1f} MB per step\n"
        )
    if args.plot:
        draw(curves, args.plot)


def draw(curves: dict[str, tuple[list[int], list[Timing]]], path: Path) -> None:
    """Plot time against size, one panel per quantity, with a line of linear growth."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 3), sharey=True)
    for axis, (name, (sizes, times)) in zip(axes, curves.items(), strict=True):
        medians = [1e3 * t.median for t in times]
        axis.loglog(sizes, medians, marker="o", label="measured")
        axis.fill_between(
            sizes, [1e3 * t.low for t in times], [1e3 * t.high for t in times], alpha=0.2
        )
        linear = [medians[-1] * s / sizes[-1] for s in sizes]
        axis.loglog(sizes, linear, color="grey", linestyle=":", label="linear")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(name.replace(", blocks", ",\nblocks").replace(", complete", ",\ncomplete"))
    axes[0].set_ylabel("ms per step")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
