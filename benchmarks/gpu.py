"""Measure on a GPU whatever the project's pages leave open, with one command.

    python -m benchmarks.gpu [--device cuda] [--minutes 9] [--out benchmarks/gpu]

Runs the tests that need a GPU, then times training steps, backends, the selection of edges, node
functions, one step of each row of the paper's tables (to predict what a table costs), and frozen
networks. Writes OUT.md and OUT.json after each row. If it is stopped, or its time is over, the same
command continues; rows with an error are measured again.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from benchmarks import training_step
from benchmarks.measure import alternate
from benchmarks.training_step import Candidate
from benchmarks.wirings import small_world
from dnw_graph import NeuralGraph, Topology, attach, freeze
from dnw_graph._files import replacing
from dnw_graph.node import NormReluConv
from dnw_graph.wiring import top_k
from models import create_model
from train import provenance
from train.run import build_network
from train.table_rows import TABLES
from train.tables import Arguments as TableArguments
from train.tables import plan

TESTS = ("tests", "-k", "cuda")
IMAGES = {"1": 50_000, "2": 50_000, "3": 1_281_167, "4": 1_281_167, "resnet18": 9_469}
"""Training images of each table."""


@dataclass(frozen=True)
class Arguments:
    """Measure on a GPU whatever the project's pages leave open."""

    device: str = "cuda"
    """cuda, cuda:N, or cpu (to try the command)."""
    minutes: float = 9
    """No row is begun after this time."""
    repeats: int = 10
    """Number of timed runs of each row."""
    out: Path = Path("benchmarks/gpu")
    """Path of the results, to which .md and .json are appended."""
    only: tuple[str, ...] = ()
    """Studies to run; all by default."""
    small: bool = False
    """Measure small sizes, to try the command."""


Columns = Mapping[str, str]
Rows = Iterator[tuple[str, Callable[[], Columns]]]
"""The name of each row, and a function that measures its columns."""


def run_tests(args: Arguments) -> Rows:
    """Tests that need a GPU."""

    def run() -> Columns:
        command = [sys.executable, "-m", "pytest", "-q", *TESTS]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
        return {"result": lines[-1].strip("= "), "failures": ", ".join(failures)}

    yield f"pytest {' '.join(TESTS)}", run


def training_steps(args: Arguments) -> Rows:
    """Training step of mbv1_dnw ×0.225 and of the dense baseline."""
    known = training_step.CANDIDATES
    candidates = {
        "dense, sort": known["dense, sort"],
        "dense, sort, bf16": known["dense, sort, bf16"],
        "default": known["default"],
        "default, bf16": known["default, bf16"],
        "default, compiled": known["default, compiled"],
        "default, compiled, bf16": Candidate(known["default"].build, bf16=True, compiled=True),
        "sparse": Candidate(training_step.network("sparse")),
        "sparse, bf16": Candidate(training_step.network("sparse"), bf16=True),
        "dnw_factored": known["dnw_factored"],
    }
    for size, batch in ((32, 2),) if args.small else ((224, 128), (32, 128)):
        settings = training_step.Arguments(args.device, image_size=size, batch_size=batch)
        for name, candidate in candidates.items():
            yield f"{name}, {size} pixels, batch {batch}", partial(_step, candidate, settings, args)


def _step(candidate: Candidate, settings: training_step.Arguments, args: Arguments) -> Columns:
    run = training_step.make_step(candidate, settings)
    columns = _time(run, args)
    rate = settings.batch_size / (float(columns["ms"].split()[0].replace(",", "")) / 1e3)
    return {**columns, "images/s": f"{rate:,.0f}", "peak memory, GB": _peak(run, args)}


def backends(args: Arguments) -> Rows:
    """Training step of one graph of ReLU nodes by backend, half of the candidates real."""
    nodes, width = (40, 8) if args.small else (2000, 512)
    topologies = {
        f"Watts-Strogatz, {nodes:,} nodes": small_world(nodes),
        f"4 blocks of {width}": Topology.layered([width] * 4),
    }
    for name, topology in topologies.items():
        for features in ((), (14, 14)):
            for backend in ("auto", "sparse", "dense", "reference"):
                yield (
                    f"{name}, {backend}, maps {list(features)}",
                    partial(_backend, topology, features, backend, args),
                )


def _backend(
    topology: Topology, features: tuple[int, ...], backend: str, args: Arguments
) -> Columns:
    number = topology.num_candidates // 2
    try:
        graph = NeuralGraph(topology, num_edges=number, node="relu", backend=backend)
    except ValueError:
        return {"ms": "not supported"}
    graph = graph.to(args.device)
    x = torch.randn(32, topology.num_inputs, *features, device=args.device)
    return _time(partial(_train, graph, x), args)


def _train(module: nn.Module, x: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    module(x).square().mean().backward()


def selection(args: Arguments) -> Rows:
    """Selection of the largest of 8.65 million weights."""
    size = 1000 if args.small else 8_650_000
    for share in (0.01, 0.05, 0.2):
        k = int(share * size)
        yield f"{k:,} of {size:,}", partial(_selection, size, k, args)


def _selection(size: int, k: int, args: Arguments) -> Columns:
    weight = torch.randn(size, device=args.device)
    methods = {
        "ms": partial(top_k, weight, k),
        "torch.topk, ms": partial(torch.topk, weight.abs(), k, sorted=False),
    }
    times = alternate(methods, args.repeats, args.device)
    return {name: str(timing) for name, timing in times.items()}


def node_functions(args: Arguments) -> Rows:
    """Forward and backward pass of norm_relu_conv: one kernel, and PyTorch's layers (cuDNN)."""
    shapes = ((4, 2, 5, 5),) if args.small else ((3072, 64, 14, 14), (512, 64, 56, 56))
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            yield f"{list(shape)}, {dtype}", partial(_node_function, shape, dtype, args)


def _node_function(shape: tuple[int, ...], dtype: torch.dtype, args: Arguments) -> Columns:
    x = torch.randn(shape, device=args.device).to(dtype).requires_grad_()
    kernels, layers = (
        NormReluConv(shape[0], use_fused=fused).to(args.device) for fused in (True, False)
    )

    def run(node: nn.Module) -> None:
        with torch.autocast(torch.device(args.device).type, dtype, enabled=dtype != torch.float32):
            y = node(x)
        y.backward(torch.ones_like(y))

    methods = {"ms": partial(run, kernels), "PyTorch's layers, ms": partial(run, layers)}
    times = alternate(methods, args.repeats, args.device, warmup=2)
    return {name: str(timing) for name, timing in times.items()}


def tables(args: Arguments) -> Rows:
    """One step of each row of the tables, without loading images, and the time of all runs."""
    for number, table in TABLES.items():
        cells = plan(TableArguments(number, seeds=1, device=args.device), table)
        for cell in cells[: 1 if args.small else None]:
            yield f"table {number}, {cell.row.name}", partial(_row, number, cell.options, args)


def _row(number: str, options: Any, args: Arguments) -> Columns:
    table, training = TABLES[number], options.optimization
    if args.small:
        options = options.replace(batch_size=2, image_size=32)
    batch, size = options.optimization.batch_size, options.data.image_size
    torch.manual_seed(0)
    model = build_network(options, table.classes).to(args.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    attach(model, optimizer, total_steps=1_000_000)
    x = torch.randn(batch, 3, size, size, device=args.device)
    labels = torch.randint(table.classes, (batch,), device=args.device)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    timing = alternate({"step": run}, min(args.repeats, 5), args.device, warmup=2)["step"]
    epoch = timing.median * IMAGES[number] / batch
    hours = epoch * training.epochs * table.seeds / 3600
    return {
        "ms": str(timing),
        "minutes an epoch": f"{epoch / 60:,.1f}",
        "hours for all epochs and seeds": f"{hours:,.1f}",
    }


def frozen(args: Arguments) -> Rows:
    """Inference at 224 pixels: the frozen network, the network, and dense MobileNetV1."""
    size = 32 if args.small else 224
    for width, dense in ((0.225, 0.25), (0.49, 1.0)):
        for batch in (1, 2) if args.small else (1, 256):
            yield (
                f"mbv1_dnw ×{width}, mbv1 ×{dense}, batch {batch}",
                partial(_frozen, width, dense, batch, size, args),
            )


def _frozen(width: float, dense: float, batch: int, size: int, args: Arguments) -> Columns:
    x = torch.randn(batch, 3, size, size, device=args.device)
    model = create_model("mbv1_dnw", width=width, image_size=size).eval()
    networks = {
        "ms": freeze(model).to(args.device),
        "not frozen, ms": model.to(args.device),
        "mbv1, ms": create_model("mbv1", width=dense, image_size=size).eval().to(args.device),
    }
    with torch.inference_mode():
        calls = {name: partial(network, x) for name, network in networks.items()}
        times = alternate(calls, args.repeats, args.device, warmup=3)
    return {name: str(timing) for name, timing in times.items()}


STUDIES: dict[str, Callable[[Arguments], Rows]] = {
    "tests": run_tests,
    "steps": training_steps,
    "backends": backends,
    "selection": selection,
    "nodes": node_functions,
    "tables": tables,
    "frozen": frozen,
}


def _time(run: Callable[[], object], args: Arguments) -> Columns:
    return {"ms": str(alternate({"": run}, args.repeats, args.device, warmup=3)[""])}


def _peak(run: Callable[[], object], args: Arguments) -> str:
    """Return the memory that a run allocates at most, in GB; empty on a CPU."""
    if not args.device.startswith("cuda"):
        return ""
    torch.cuda.reset_peak_memory_stats(args.device)
    run()
    return f"{torch.cuda.max_memory_allocated(args.device) / 1e9:.2f}"


Results = dict[str, dict[str, Columns]]
"""Columns by study and row."""


def read(args: Arguments) -> Results:
    """Return the results of earlier calls.

    Raises:
        SystemExit: If they are those of another machine or of other versions.
    """
    path = args.out.with_name(f"{args.out.name}.json")
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content["origin"] != _origin(args):
        raise SystemExit(
            f"error: {path} has the results of another machine or of other versions "
            f"({content['origin']}; here: {_origin(args)}): pass another --out, or delete the file"
        )
    results: Results = content["results"]
    return results


def write(args: Arguments, results: Results) -> None:
    """Write the results as JSON and Markdown."""
    content = {"origin": _origin(args), "commit": provenance.commit(), "results": results}
    lines = ["# On a GPU", "", f"`python -m benchmarks.gpu`; {_origin(args)}", ""]
    lines += [f"Commit {content['commit']}. Times are medians (range).", ""]
    for study, rows in results.items():
        names = list(dict.fromkeys(name for columns in rows.values() for name in columns))
        lines += [f"## {(STUDIES[study].__doc__ or study).rstrip('.')}", ""]
        lines += [f"| | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
        for row, columns in rows.items():
            cells = [columns.get(name, "").replace("|", "\\|") for name in names]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        lines.append("")
    for suffix, text in (("json", json.dumps(content, indent=2) + "\n"), ("md", "\n".join(lines))):
        with replacing(args.out.with_name(f"{args.out.name}.{suffix}")) as path:
            path.write_text(text)


def _origin(args: Arguments) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions().items())
    return f"{provenance.machine(args.device)}, {versions}"


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m benchmarks.gpu", description=__doc__)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            f"error: --device {args.device} is not available; to try the command without a GPU, "
            "use --device cpu --small"
        )
    for name in args.only:
        if name not in STUDIES:
            raise SystemExit(f"error: unknown study {name!r} (known: {', '.join(STUDIES)})")
    results, end, left = read(args), time.monotonic() + 60 * args.minutes, 0
    for study in args.only or STUDIES:
        for row, measure in STUDIES[study](args):
            if "error" in (columns := results.get(study, {}).get(row, {"error": ""})):
                if time.monotonic() > end:
                    left += 1
                    continue
                columns = _measured(measure)
                results.setdefault(study, {})[row] = columns
                write(args, results)
                print(f"{study}: {row}: {'; '.join(f'{k} {v}' for k, v in columns.items())}")
    print(f"{args.out}.md is written" + (f"; {left} rows are left, call again" if left else ""))


def _measured(measure: Callable[[], Columns]) -> Columns:
    """Return the columns of a row, or its error, such as too little memory."""
    try:
        return measure()
    except Exception as error:  # the other rows are still worth measuring
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
