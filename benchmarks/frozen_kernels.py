"""Compare the kernels that a frozen graph can use, and fit the costs by which it chooses.

    python -m benchmarks.frozen_kernels [--threads 1 2] [--repeats 10]

Times each part of frozen networks, and of graphs of several sizes and densities, with each kernel.
Prints how much slower each way of choosing is than the fastest kernel of every part, and the
constants of `dnw_graph/frozen/engine.py` that fit the times best.
"""

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
import tyro
from torch import Tensor

from benchmarks.measure import machine
from dnw_graph import NeuralGraph, Topology, freeze
from dnw_graph.frozen import FrozenGraph, FrozenModel, engine
from dnw_graph.frozen import _kernels as kernels
from models import create_model

KERNELS = {"by node": kernels.BY_NODE, "by tile": kernels.BY_TILE, "dense": kernels.DENSE}


@dataclass(frozen=True)
class Arguments:
    """Time the kernels of frozen graphs."""

    threads: tuple[int, ...] = (1, 2)
    """Numbers of threads."""
    repeats: int = 10
    """Times that each kernel runs; the shortest time counts."""


@dataclass(frozen=True)
class Sample:
    """Times of one part.

    Attributes:
        case: Graph, size of its input, and number of threads.
        size: Arguments of :func:`dnw_graph.frozen.engine.kernel_of`.
        seconds: Time by kernel.
    """

    case: str
    size: tuple[int, ...]
    seconds: dict[int, float]


def cases() -> Iterator[tuple[str, FrozenModel, Tensor]]:
    """Yield frozen networks and graphs, with inputs."""
    torch.manual_seed(0)
    for width, size in itertools.product((0.1, 0.225, 0.49), (32, 64, 128, 224)):
        network = create_model("mbv1_dnw", width=width, num_classes=10).eval()
        yield f"mbv1_dnw x{width}, {size} pixels", freeze(network), torch.randn(1, 3, size, size)
    yield "tiny_static", freeze(create_model("tiny_static").eval()), torch.randn(8, 3, 32, 32)
    for hidden, density in itertools.product((64, 256), (0.05, 0.2, 0.5, 0.8, 1.0)):
        topology = Topology.layered([32, hidden, hidden, 32])
        edges = round(density * topology.num_candidates)
        for node, features in (("norm_relu_conv", (4, 4)), ("norm_relu_conv", (16, 16))):
            graph = NeuralGraph(topology, num_edges=edges, node=node).eval()
            name = f"{topology.num_nodes} nodes, density {density}, {features[0]} pixels"
            yield name, freeze(graph), torch.randn(1, 32, *features)
        graph = NeuralGraph(topology, num_edges=edges, node="relu").eval()
        yield f"{topology.num_nodes} nodes, density {density}", freeze(graph), torch.randn(32, 32)


def time_parts(
    case: str, model: FrozenModel, x: Tensor, threads: int, repeats: int
) -> list[Sample]:
    """Return the times of all parts that have edges, with each kernel."""
    torch.set_num_threads(threads)
    samples = []
    sizes: list[tuple[int, ...]] = []
    choose = engine.kernel_of

    def note(*size: int) -> int:
        sizes.append(size)
        return choose(*size)

    for layer in model:
        if layer not in model.graphs:
            x = layer(x)
            continue
        sizes.clear()
        with patch.object(engine, "kernel_of", note):
            chosen = plan_of(layer, x, threads)
        plans, images = {}, x.reshape(*x.shape[:2], -1).contiguous()
        outputs = []  # the plans go on writing to them
        for kind in KERNELS.values():
            with patch.object(engine, "kernel_of", lambda *_, kind=kind: kind):
                plans[kind] = plan_of(layer, x, threads)
                outputs.append(plans[kind].run(images))
        for at, size in zip(chosen.kinds, sizes, strict=True):
            seconds = {
                kind: shortest(partial(plan.fire, at, at + 1), repeats)
                for kind, plan in plans.items()
            }
            samples.append(Sample(f"{case}, {threads} threads", size, seconds))
        x = layer(x)
    return samples


def plan_of(layer: FrozenGraph, x: Tensor, threads: int) -> "engine._Plan":
    """Return a plan for inputs of the size of ``x``."""
    return engine._Plan(layer.engine, torch.zeros_like(x[:1]), len(x), threads=threads)


def shortest(function: Callable[[], object], repeats: int) -> float:
    """Return the shortest time of some calls in seconds, after a call to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def losses(samples: Sequence[Sample], choose: Callable[..., int]) -> list[float]:
    """Return, for each case, the time with chosen kernels over that with the fastest ones."""
    chosen, least = defaultdict(float), defaultdict(float)
    for sample in samples:
        chosen[sample.case] += sample.seconds[choose(*sample.size)]
        least[sample.case] += min(sample.seconds.values())
    return [chosen[case] / least[case] for case in chosen]


def fitted(samples: Sequence[Sample]) -> tuple[int, float, int]:
    """Return the constants with the smallest mean loss."""
    grid = itertools.product((30, 60, 90, 120, 180), (0.4, 0.5, 0.6, 0.7, 0.8), (4, 8, 12, 16))
    return min(grid, key=lambda constants: statistics.mean(losses_with(samples, constants)))


def losses_with(samples: Sequence[Sample], constants: tuple[int, float, int]) -> list[float]:
    """Return :func:`losses` with other constants in place of those of the engine."""
    names = ("NODE_COST", "COLUMN_COST", "EDGES_BY_TILE")
    with patch.multiple(engine, **dict(zip(names, constants, strict=True))):
        return losses(samples, engine.kernel_of)


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m benchmarks.frozen_kernels")
    samples: list[Sample] = []
    with torch.no_grad():
        for (case, model, x), threads in itertools.product(cases(), args.threads):
            samples += time_parts(case, model, x, threads, args.repeats)
    best = fitted(samples)
    choices = {
        "chosen by sizes": losses(samples, engine.kernel_of),
        f"with constants {best}, which fit best": losses_with(samples, best),
    }
    for name, kind in KERNELS.items():
        choices[f"always {name}"] = losses(samples, lambda *_, kind=kind: kind)
    print(f"{machine('cpu')}, {len(samples)} parts of {len(choices['always dense'])} cases\n")
    print("| kernels | time / shortest time, mean | largest |\n| --- | --- | --- |")
    for name, values in choices.items():
        print(f"| {name} | {statistics.mean(values):.3f} | {max(values):.2f} |")


if __name__ == "__main__":
    main()
