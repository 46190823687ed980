"""Compare a training step of mbv1_dnw with that of a plain dense baseline.

    python -m benchmarks.training_step [--batch-size 16] [--image-size 224] [--device cuda]

All candidates take turns in one process, each on the same images with SGD, momentum and weight
decay. Peak memory is measured in a separate process for each candidate. ``--original PATH`` also
times a checkout of the published implementation (https://github.com/allenai/dnw).
"""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.dense_baseline import DenseBaseline
from benchmarks.measure import Timing, alternate, machine
from benchmarks.original import load_original
from dnw_graph import attach
from models import create_model
from models.mbv1 import MobileNetV1Config
from models.mbv1_dnw import STAGES


@dataclass(frozen=True)
class Arguments:
    """Time a training step."""

    device: str = "cpu"
    """cpu or cuda."""
    image_size: int = 224
    """Height and width, in pixels."""
    batch_size: int = 16
    """Images per step."""
    width: float = 0.225
    """Width multiplier."""
    repeats: int = 7
    """Number of timed rounds."""
    only: tuple[str, ...] = ()
    """Candidates to time; all by default."""
    original: Path | None = None
    """Checkout of the published implementation to time too."""
    json: Path | None = None
    """JSON file for the results."""
    memory_of: str | None = None
    """Candidate whose peak memory, in bytes, is all that is measured and printed."""


@dataclass(frozen=True)
class Candidate:
    """A network and the settings of its training step."""

    build: Callable[[Arguments], nn.Module]
    bf16: bool = False
    compiled: bool = False
    once: bool = False  # so slow that a single step without warm-up is timed
    steps: int = 1  # timed together, if they differ


def _config(args: Arguments) -> MobileNetV1Config:
    return MobileNetV1Config(width=args.width, image_size=args.image_size)


def network(backend: str = "auto", rule: str = "dnw") -> Callable[[Arguments], nn.Module]:
    return lambda args: create_model(
        "mbv1_dnw", backend=backend, rule=rule, **_options(_config(args))
    )


def _options(config: MobileNetV1Config) -> dict[str, Any]:
    return {"width": config.width, "image_size": config.image_size}


CANDIDATES = {
    "dense, sort": Candidate(lambda args: DenseBaseline(_config(args), "sort")),
    "dense, partition": Candidate(lambda args: DenseBaseline(_config(args), "partition")),
    "dense, sort, bf16": Candidate(lambda args: DenseBaseline(_config(args), "sort"), bf16=True),
    "reference": Candidate(network("reference"), once=True),
    "default": Candidate(network()),
    "default, bf16": Candidate(network(), bf16=True),
    "default, compiled": Candidate(network(), compiled=True),
    "dnw_factored": Candidate(network(rule="dnw_factored")),
    "hallucinate_every=4": Candidate(network(rule="dnw(hallucinate_every=4)"), steps=4),
    "hallucinate_every=4, bf16": Candidate(
        network(rule="dnw(hallucinate_every=4)"), bf16=True, steps=4
    ),
}
ANCHOR = "dense, sort"


def make_step(candidate: Candidate, args: Arguments) -> Callable[[], object]:
    """Return a function that runs a training step, or all steps that are timed together."""
    torch.manual_seed(0)
    model = candidate.build(args).to(args.device).train()
    if candidate.compiled:
        mode = "default" if args.device == "cpu" else "reduce-overhead"  # with CUDA graphs
        model = torch.compile(model, mode=mode)  # type: ignore[assignment]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-5)
    attach(model, optimizer, total_steps=1_000_000)
    size = args.image_size
    images = torch.randn(args.batch_size, 3, size, size, device=args.device)
    labels = torch.randint(0, 1000, (args.batch_size,), device=args.device)
    cast = (
        torch.autocast(torch.device(args.device).type, torch.bfloat16)
        if candidate.bf16
        else nullcontext()
    )

    def step() -> None:
        for _ in range(candidate.steps):
            optimizer.zero_grad(set_to_none=True)
            with cast:
                loss = F.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return step


def peak_memory(name: str, args: Arguments) -> float:
    """Return the peak memory of five steps, in bytes.

    On a CPU, this is the resident memory of a separate process, the median of three, minus that of
    a process that only imports modules.
    """
    if args.device != "cpu":
        step = make_step(all_candidates(args)[name], args)
        torch.cuda.reset_peak_memory_stats(args.device)
        step()
        return float(torch.cuda.max_memory_allocated(args.device))
    return _resident(name, args) - _resident("nothing", args)


@cache
def _resident(name: str, args: Arguments) -> float:
    """Return the median peak resident memory of three separate processes, in bytes."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in _numbers(args).items()]
    flags += [f"--original={args.original}"] if args.original else []
    command = [sys.executable, "-m", "benchmarks.training_step", *flags, f"--memory-of={name}"]
    sizes = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
        for _ in range(3)
    ]
    return median(map(float, sizes))


def parts(step: Callable[[], object]) -> dict[str, float]:
    """Return the time of each part of a step in seconds, from PyTorch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    seconds: dict[str, float] = {}
    for event in profiler.key_averages():
        part = next((part for part, marks in PARTS if any(m in event.key for m in marks)), "other")
        seconds[part] = seconds.get(part, 0) + event.self_cpu_time_total / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


PARTS = (
    ("selection", ("top_k", "sort", "kthvalue", "searchsorted", "index_fill")),
    ("sum over real edges", ("dnw_graph::gather",)),
    ("gradient to states", ("dnw_graph::spread", "dnw_graph::push", "dnw_graph::by_source")),
    ("gradient to candidates", ("dnw_graph::outer",)),
    ("node functions", ("norm_relu_conv", "batch_norm", "relu", "threshold", "depthwise")),
    ("convolutions", ("convolution",)),
    ("optimizer", ("Optimizer", "_foreach", "_fused_sgd")),
    ("matrix products", ("aten::mm", "aten::addmm")),
)


def floor(args: Arguments) -> dict[str, float]:
    """Return the minimum number of multiply-adds of one step, in units of 1e9."""
    dense = sparse = 0
    size = args.image_size // _config(args).stride
    for stage in STAGES:
        size //= stage.stride
        blocks = stage.blocks * (stage.blocks - 1) // 2 * stage.width**2
        dense += (stage.inputs * stage.width * stage.blocks + blocks) * size**2
        sparse += stage.num_edges(_config(args).exact_width) * size**2
    scale = args.batch_size / 1e9
    return {"gradient to candidates": dense * scale, "each product over real edges": sparse * scale}


def all_candidates(args: Arguments) -> dict[str, Candidate]:
    """Return all candidates by name, with the published implementation if it is available."""
    path = args.original
    extra = {"original": Candidate(lambda a: load_original(path, a.image_size))} if path else {}
    return {**CANDIDATES, **extra}


def check(args: Arguments) -> None:
    """Exit with an error message if an argument is invalid."""
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"error: --device {args.device} is not available: use --device cpu")
    if args.original is not None and not (args.original / "models" / "graphs").is_dir():
        raise SystemExit(f"error: --original {args.original} is not a checkout of allenai/dnw")
    candidates = all_candidates(args)
    for name in args.only:
        if name not in candidates:
            raise SystemExit(f"error: unknown candidate {name!r} (known: {', '.join(candidates)})")
    if min(args.image_size // 32, args.batch_size // 2, args.repeats) < 1:
        raise SystemExit(
            "error: use images of at least 32 pixels, batches of at least 2 and at least 1 repeat"
        )


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m benchmarks.training_step", description=__doc__)
    check(args)
    candidates = all_candidates(args)
    if args.memory_of:
        if args.memory_of != "nothing":
            step = make_step(candidates[args.memory_of], args)
            for _ in range(5):
                step()
        print(_high_water())
        return
    names = list(args.only or candidates)
    steps = {n: make_step(candidates[n], args) for n in names if not candidates[n].once}
    times = alternate(steps, args.repeats, args.device, warmup=2)
    times = {name: timing / candidates[name].steps for name, timing in times.items()}
    profiled = [n for n in steps if candidates[n].steps == 1 and not candidates[n].compiled]
    part_times = {name: parts(steps[name]) for name in profiled}
    memory = {name: peak_memory(name, args) for name in steps}
    del steps
    for name in names:
        if candidates[name].once:
            step = {name: make_step(candidates[name], args)}
            times |= alternate(step, 1, args.device, warmup=0)
    report(args, times, memory, part_times)


def report(
    args: Arguments,
    times: dict[str, Timing],
    memory: dict[str, float],
    part_times: dict[str, dict[str, float]],
) -> None:
    """Print tables in Markdown, and write JSON if requested."""
    print(f"{machine(args.device)}, batch {args.batch_size}, {args.image_size} pixels\n")
    anchor = times.get(ANCHOR)
    print("| step | ms, median (range) | images/s | times faster | peak memory, GB |")
    print("| --- | --- | --- | --- | --- |")
    for name, timing in times.items():
        faster = f"{anchor.median / timing.median:.1f}" if anchor else ""
        rate = args.batch_size / timing.median
        peak = f"{memory[name] / 1e9:.2f}" if name in memory else ""
        print(f"| {name} | {timing} | {rate:,.1f} | {faster} | {peak} |")
    print("\n| ms of a step | " + " | ".join(part_times) + " |")
    print("| --- |" + " --- |" * len(part_times))
    for part in [name for name, _ in PARTS] + ["other"]:
        cells = [f"{1e3 * row.get(part, 0):,.1f}" for row in part_times.values()]
        print(f"| {part} | {' | '.join(cells)} |")
    print("\nMinimum cost of a step, in 1e9 multiply-adds:")
    for name, count in floor(args).items():
        print(f"- {name}: {count:.2f}")
    if args.json:
        results = {
            "machine": machine(args.device),
            "arguments": _numbers(args),
            "seconds": {name: asdict(timing)["seconds"] for name, timing in times.items()},
            "peak_memory_bytes": memory,
            "parts_seconds": part_times,
        }
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def _high_water() -> int:
    """Return the peak memory of this process, in bytes (Linux).

    ``getrusage`` is not used, since a child process starts with the peak of its parent.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _numbers(args: Arguments) -> dict[str, Any]:
    names = ("device", "image_size", "batch_size", "width")
    return {name: getattr(args, name) for name in names}


if __name__ == "__main__":
    main()
