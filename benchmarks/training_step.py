"""How long one training step of mbv1_dnw takes, against a plain dense baseline.

    python -m benchmarks.training_step [--batch-size 16] [--image-size 224] [--device cuda]

All candidates take turns in one process, each on the same images with SGD, momentum and weight
decay; peak memory is that of a process of its own. ``--original PATH`` times a checkout of the
published implementation (https://github.com/allenai/dnw) beside them.
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
    """Images a step."""
    width: float = 0.225
    """Width multiplier."""
    repeats: int = 7
    """Timed rounds."""
    only: tuple[str, ...] = ()
    """Candidates to time; all unless given."""
    original: Path | None = None
    """Checkout of the published implementation to time as well."""
    json: Path | None = None
    """File to write the figures to as well."""
    memory_of: str | None = None
    """Print the peak memory of one candidate, in bytes, and do nothing else."""


@dataclass(frozen=True)
class Candidate:
    """A network, and how a step of it is run."""

    build: Callable[[Arguments], nn.Module]
    bf16: bool = False
    compiled: bool = False
    once: bool = False  # takes so long that one step without a rehearsal must do
    steps: int = 1  # that are timed together, where they differ


def _config(args: Arguments) -> MobileNetV1Config:
    return MobileNetV1Config(width=args.width, image_size=args.image_size)


def _ours(backend: str = "auto", rule: str = "dnw") -> Callable[[Arguments], nn.Module]:
    return lambda args: create_model(
        "mbv1_dnw", backend=backend, rule=rule, **_given(_config(args))
    )


def _given(config: MobileNetV1Config) -> dict[str, Any]:
    return {"width": config.width, "image_size": config.image_size}


CANDIDATES = {
    "dense, sort": Candidate(lambda args: DenseBaseline(_config(args), "sort")),
    "dense, partition": Candidate(lambda args: DenseBaseline(_config(args), "partition")),
    "dense, sort, bf16": Candidate(lambda args: DenseBaseline(_config(args), "sort"), bf16=True),
    "reference": Candidate(_ours("reference"), once=True),
    "default": Candidate(_ours()),
    "default, bf16": Candidate(_ours(), bf16=True),
    "default, compiled": Candidate(_ours(), compiled=True),
    "dnw_factored": Candidate(_ours(rule="dnw_factored")),
    "hallucinate_every=4": Candidate(_ours(rule="dnw(hallucinate_every=4)"), steps=4),
    "hallucinate_every=4, bf16": Candidate(
        _ours(rule="dnw(hallucinate_every=4)"), bf16=True, steps=4
    ),
}
ANCHOR = "dense, sort"


def make_step(candidate: Candidate, args: Arguments) -> Callable[[], object]:
    """Return what runs one training step, or as many as a candidate has timed together."""
    torch.manual_seed(0)
    model = candidate.build(args).to(args.device).train()
    if candidate.compiled:
        model = torch.compile(model)  # type: ignore[assignment]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-5)
    attach(model, optimizer, total_steps=1_000_000)
    size = args.image_size
    images = torch.randn(args.batch_size, 3, size, size, device=args.device)
    labels = torch.randint(0, 1000, (args.batch_size,), device=args.device)
    cast = torch.autocast(args.device, torch.bfloat16) if candidate.bf16 else nullcontext()

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

    On a CPU it is the resident memory of a process of its own, the median of three, above that of
    one that does nothing.
    """
    if args.device != "cpu":
        step = make_step(all_candidates(args)[name], args)
        torch.cuda.reset_peak_memory_stats(args.device)
        step()
        return float(torch.cuda.max_memory_allocated(args.device))
    return _resident(name, args) - _resident("nothing", args)


@cache
def _resident(name: str, args: Arguments) -> float:
    """Return the most resident memory of processes of their own, in bytes, the median of three."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in _numbers(args).items()]
    flags += [f"--original={args.original}"] if args.original else []
    command = [sys.executable, "-m", "benchmarks.training_step", *flags, f"--memory-of={name}"]
    seen = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
        for _ in range(3)
    ]
    return median(map(float, seen))


def parts(step: Callable[[], object]) -> dict[str, float]:
    """Return where the time of a step goes: seconds by part, from PyTorch's profiler."""
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
    """Return the multiply-adds that one step needs at least, in units of 1e9."""
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
    """Return every candidate by name, the published implementation included where it is given."""
    path = args.original
    extra = {"original": Candidate(lambda a: load_original(path, a.image_size))} if path else {}
    return {**CANDIDATES, **extra}


def check(args: Arguments) -> None:
    """Exit with a line that says what is wrong, if anything is."""
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"error: --device {args.device} is not there; this machine has cpu")
    if args.original is not None and not (args.original / "models" / "graphs").is_dir():
        raise SystemExit(f"error: --original {args.original} is no checkout of allenai/dnw")
    known = all_candidates(args)
    for name in args.only:
        if name not in known:
            raise SystemExit(f"error: there is no candidate {name!r} (known: {', '.join(known)})")
    if min(args.image_size // 32, args.batch_size // 2, args.repeats) < 1:
        raise SystemExit("error: images of 32 pixels, batches of 2 and 1 repeat are the least")


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
    shown = [n for n in steps if candidates[n].steps == 1 and not candidates[n].compiled]
    where_it_goes = {name: parts(steps[name]) for name in shown}
    memory = {name: peak_memory(name, args) for name in steps}
    del steps
    for name in names:
        if candidates[name].once:
            step = {name: make_step(candidates[name], args)}
            times |= alternate(step, 1, args.device, warmup=0)
    report(args, times, memory, where_it_goes)


def report(
    args: Arguments,
    times: dict[str, Timing],
    memory: dict[str, float],
    where_it_goes: dict[str, dict[str, float]],
) -> None:
    """Print tables in Markdown; write JSON where asked."""
    print(f"{machine(args.device)}, batch {args.batch_size}, {args.image_size} pixels\n")
    anchor = times.get(ANCHOR)
    print("| step | ms, median (range) | images/s | times faster | peak memory, GB |")
    print("| --- | --- | --- | --- | --- |")
    for name, timing in times.items():
        faster = f"{anchor.median / timing.median:.1f}" if anchor else ""
        rate = args.batch_size / timing.median
        taken = f"{memory[name] / 1e9:.2f}" if name in memory else ""
        print(f"| {name} | {timing} | {rate:,.1f} | {faster} | {taken} |")
    print("\n| ms of a step | " + " | ".join(where_it_goes) + " |")
    print("| --- |" + " --- |" * len(where_it_goes))
    for part in [name for name, _ in PARTS] + ["other"]:
        cells = [f"{1e3 * row.get(part, 0):,.1f}" for row in where_it_goes.values()]
        print(f"| {part} | {' | '.join(cells)} |")
    print("\nWhat a step needs at least, in 1e9 multiply-adds:")
    for name, count in floor(args).items():
        print(f"- {name}: {count:.2f}")
    if args.json:
        figures = {
            "machine": machine(args.device),
            "arguments": _numbers(args),
            "seconds": {name: asdict(timing)["seconds"] for name, timing in times.items()},
            "peak_memory_bytes": memory,
            "parts_seconds": where_it_goes,
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def _high_water() -> int:
    """Return the most memory this process ever had, in bytes (Linux).

    Not ``getrusage``: there a child begins with what its parent had.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _numbers(args: Arguments) -> dict[str, Any]:
    names = ("device", "image_size", "batch_size", "width")
    return {name: getattr(args, name) for name in names}


if __name__ == "__main__":
    main()
