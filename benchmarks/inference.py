"""Measure inference times: frozen graphs compared with other engines.

    python -m benchmarks.inference [--threads 1 2] [--batch 1] [--json FILE]

All engines take turns in one process, at 224 x 224 pixels. A turn is 30 ms of calls that are not
timed, followed by one that is, as in a stream of images. The engines are the frozen network with
states in float32 and in bfloat16, and ONNX Runtime on dense MobileNetV1 with folded norms; with
--all, also the frozen network with PyTorch's layers, the network itself, the network with dense
masked products, and ONNX Runtime on the exported network. At the end, the frozen networks are
compared with the dense ones of the same accuracy in the paper.
"""

import contextlib
import copy
import io
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import onnxruntime
import torch
import tyro
from torch import Tensor, nn

from benchmarks.measure import alternate, machine
from dnw_graph import NeuralGraph, cost, freeze
from dnw_graph.aggregation import BACKENDS
from dnw_graph.frozen import to_onnx
from models import create_model
from train.run import RunFolder


@dataclass(frozen=True)
class Arguments:
    """Time the inference of one image with several engines."""

    widths: tuple[float, ...] = (0.225, 0.3, 0.49)
    """Width multipliers of mbv1_dnw and mbv1_random."""
    dense: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Width multipliers of MobileNetV1."""
    runs: tuple[str, ...] = ()
    """Run folders whose learned wirings are timed too."""
    image_size: int = 224
    """Height and width, in pixels."""
    batch: tuple[int, ...] = (1,)
    """Numbers of images per call."""
    all: bool = False
    """Also time the slower engines."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of threads."""
    repeats: int = 50
    """Number of timed rounds."""
    json: Path | None = None
    """File for the results."""


@dataclass(frozen=True)
class Line:
    """The time of one engine."""

    network: str
    engine: str
    threads: int
    batch: int
    macs: int
    milliseconds: float
    low: float
    high: float

    @property
    def rate(self) -> float:
        """GFLOP/s, with 2 FLOPs per multiply-add."""
        return 2 * self.macs * self.batch / self.milliseconds / 1e6


@dataclass(frozen=True)
class Comparison:
    """A frozen network and a dense one of the same accuracy.

    Attributes:
        frozen: Name of the frozen network.
        engine: Engine of the frozen network.
        dense: Name of the dense network, which ONNX Runtime computes.
        threads: Number of threads.
        batch: Images per call.
        ratio: Time of the frozen network over that of the dense one.
        better: ``"frozen"`` or ``"dense"``, whichever is faster.
    """

    frozen: str
    engine: str
    dense: str
    threads: int
    batch: int
    ratio: float
    better: str


DENSE_OF = {"x0.3": "mbv1 x0.5", "x0.49": "mbv1 x1.0"}
"""Dense network with about the accuracy of a wiring, by its width multiplier, in the paper."""
FROZEN = {"frozen": torch.float32, "frozen, bfloat16": torch.bfloat16}
"""Types of states by engine."""
ONNX = "ONNX Runtime"


def compare(lines: Sequence[Line]) -> list[Comparison]:
    """Compare the frozen networks with the dense ones of about the same accuracy."""
    times = {(n.network, n.engine, n.threads, n.batch): n.milliseconds for n in lines}
    comparisons = []
    for (network, engine, *setting), time_frozen in times.items():
        dense = DENSE_OF.get(network.rpartition(" ")[2], "")
        time_dense = times.get((dense, ONNX, *setting))
        if engine in FROZEN and time_dense:
            better = "frozen" if time_frozen < time_dense else "dense"
            ratio = time_frozen / time_dense
            comparisons.append(Comparison(network, engine, dense, *setting, ratio, better))
    return comparisons


Engine = Callable[[Tensor], object]


def session(model: nn.Module, x: Tensor, threads: int, graph: bool) -> Engine:
    """Return a function that runs a network in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if graph:
            to_onnx(freeze(model), x, path)
        else:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    model, (x,), path, input_names=["images"], external_data=False, verbose=False
                )
        runtime = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: runtime.run(None, {"images": x.numpy()})


def with_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a network in evaluation mode whose norms have statistics of random images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(x.expand(4, -1, -1, -1) + torch.randn(4, *x.shape[1:]))
    return model.eval()


def with_backend(model: nn.Module, name: str) -> nn.Module:
    """Set the backend of all graphs."""
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = BACKENDS.resolve(name)
    return model


def peak(threads: int) -> float:
    """Return the GFLOP/s of a large dense product, as the practical peak of this machine.

    The product is computed by PyTorch and by ONNX Runtime; the faster one counts.
    """
    torch.set_num_threads(threads)
    a, best = torch.randn(2048, 2048), math.inf
    linear = session(nn.Linear(2048, 2048, bias=False), a, threads, graph=False)
    for product in (lambda: a @ a, lambda: linear(a)):
        for _ in range(5):
            start = time.perf_counter()
            product()
            best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best / 1e9


def engines_of(model: nn.Module, x: Tensor, threads: int, slow: bool) -> dict[str, Engine]:
    """Return the engines of a network with graphs, with or without the slower ones."""
    engines: dict[str, Engine] = {name: freeze(model, dtype) for name, dtype in FROZEN.items()}
    if not slow:
        return engines
    return engines | {
        "frozen, by PyTorch's layers": freeze(model).forward_by_torch,
        "the network": model,
        "the network, dense masked": with_backend(copy.deepcopy(model), "dense"),
        "ONNX Runtime, exported": session(model, x, threads, graph=True),
    }


def networks(args: Arguments) -> dict[str, nn.Module]:
    """Return the networks by name, with and without graphs."""
    models: dict[str, nn.Module] = {}
    for width in args.widths:
        for name in ("mbv1_dnw", "mbv1_random"):
            models[f"{name} x{width}"] = create_model(name, width=width, image_size=args.image_size)
    for run in args.runs:
        folder = RunFolder(run)
        width = folder.load_config().options.flat()["width"]
        models[f"learned x{width}"] = folder.load_model()
    for width in args.dense:
        models[f"mbv1 x{width}"] = create_model("mbv1", width=width, image_size=args.image_size)
    return models


def measure(args: Arguments, threads: int, batch: int) -> list[Line]:
    """Time every engine of every network."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.randn(batch, 3, args.image_size, args.image_size)
    engines: dict[tuple[str, str], Engine] = {}
    macs: dict[tuple[str, str], int] = {}
    for name, network in networks(args).items():
        model = network.eval() if name.startswith("learned") else with_statistics(network, x[:1])
        if any(isinstance(module, NeuralGraph) for module in model.modules()):
            candidates = engines_of(model, x, threads, args.all)
        else:
            candidates = {ONNX: session(model, x, threads, graph=False)}
        for engine, run in candidates.items():
            engines[name, engine] = run
            macs[name, engine] = cost(model, args.image_size).macs
    keys = {" / ".join(key): key for key in engines}
    with torch.inference_mode():
        calls = {text: partial(engines[key], x) for text, key in keys.items()}
        timings = alternate(calls, args.repeats, "cpu", warm=0.03, pause=0.05)
    lines = []
    for key, timing in zip(keys.values(), timings.values(), strict=True):
        milliseconds = (1e3 * t for t in (timing.median, timing.low, timing.high))
        lines.append(Line(*key, threads, batch, macs[key], *milliseconds))
    return lines


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m benchmarks.inference", description=__doc__)
    about = f"{machine('cpu')}, onnxruntime {onnxruntime.__version__}, {args.image_size} pixels"
    print(f"{about}\n")
    lines, peaks = [], {}
    for threads in args.threads:
        peaks[threads] = peak(threads)
        print(f"{threads} thread(s); a large dense product reaches {peaks[threads]:.0f} GFLOP/s\n")
        for batch in args.batch:
            results = measure(args, threads, batch)
            lines += results
            images = "ms" if batch == 1 else f"ms for {batch} images"
            print(f"| network | engine | {images}, median (range) | MACs counted | GFLOP/s |")
            print("| --- | --- | --- | --- | --- |")
            for line in results:
                time_range = f"{line.milliseconds:.2f} ({line.low:.2f}-{line.high:.2f})"
                print(
                    f"| {line.network} | {line.engine} | {time_range} | {line.macs / 1e6:.1f} M | "
                    f"{line.rate:.1f} |"
                )
            print(flush=True)
    comparisons = compare(lines)
    print("| network | engine | threads | images | dense network | time / its time | faster |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for c in comparisons:
        print(
            f"| {c.frozen} | {c.engine} | {c.threads} | {c.batch} | {c.dense} | {c.ratio:.2f} | "
            f"{c.better} |"
        )
    if args.json:
        values = {
            "machine": about,
            "peak": peaks,
            "lines": [asdict(line) for line in lines],
            "comparisons": [asdict(comparison) for comparison in comparisons],
        }
        args.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
