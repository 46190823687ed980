"""Each benchmark runs, in the smallest size, or at least shows its help."""

import importlib
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dnw_graph import NeuralGraph, Topology, freeze

FOLDER = Path(__file__).parent.parent / "benchmarks"
SHARED = {"__init__", "dense_baseline", "measure", "original"}
"""Modules that benchmarks import."""
HELP = {"dynamics", "epochs", "kills"}
"""Benchmarks that train for longer."""
ARGUMENTS = {
    "data_loading": "--workers 1 --images 2 --repeats 1",
    "frozen_kernels": "--threads 1 --repeats 1",
    "gpu": "--device cpu --small --repeats 1 --only backends selection nodes tables frozen",
    "inference": "--image-size 4 --threads 1 --repeats 1",
    "layout_spike": "--batch-size 1 --repeats 1",
    "scaling": "--repeats 1",
    "selection": "--repeats 1",
    "soak": "--steps 4",
    "sparse_step": "--model resnet18 --rules dnw --image-size 32 --batch-size 2 --repeats 1",
    "training_step": "--only default --width 0.1 --image-size 32 --batch-size 2 --repeats 1",
    "wirings": "--only frozen --repeats 1",
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def test_every_benchmark_is_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == SHARED | HELP | ARGUMENTS.keys()


@pytest.mark.parametrize("name", sorted(SHARED))
def test_shared_modules_can_be_imported(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("name", sorted(HELP))
def test_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        importlib.import_module(f"benchmarks.{name}").main()
    assert "usage" in capsys.readouterr().out


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_smallest_size(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    arguments = ARGUMENTS[name].split()
    if name == "data_loading":
        arguments += ["--data", str(write_photographs(tmp_path / "photographs.tar"))]
    if name == "gpu":
        arguments += ["--out", str(tmp_path / "gpu")]
    for constant, value in constants(name, module).items():
        monkeypatch.setattr(module, constant, value)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    if name == "soak":  # four steps do not show whether memory is constant
        with pytest.raises(SystemExit, match=r"^(True|False)$"):
            module.main()
    else:
        module.main()
    assert capsys.readouterr().out


def test_gpu_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = importlib.import_module("benchmarks.gpu")
    measured: list[str] = []

    def rows(args: Any) -> Iterator[tuple[str, Any]]:
        """Rows."""
        for row in ("a", "b"):

            def measure(row: str = row) -> dict[str, str]:
                measured.append(row)
                if measured == ["a"]:
                    raise torch.cuda.OutOfMemoryError("too large\nat all")
                return {"ms": f"1 | {row}"}

            yield row, measure

    def run(*more: str) -> str:
        arguments = ["gpu", "--device", "cpu", "--out", str(tmp_path / "x"), *more]
        monkeypatch.setattr(sys, "argv", arguments)
        gpu.main()
        return capsys.readouterr().out

    monkeypatch.setattr(gpu, "STUDIES", {"rows": rows})
    assert "2 rows are left" in run("--minutes", "-1")
    assert not measured
    assert "OutOfMemoryError: too large" in run()
    assert "left" not in run()
    assert measured == ["a", "b", "a"]
    run()
    assert measured == ["a", "b", "a"]
    assert "| a | 1 \\| a |" in (tmp_path / "x.md").read_text()
    monkeypatch.setattr(gpu.provenance, "machine", lambda device: "another")
    with pytest.raises(SystemExit, match="results of another machine"):
        run()


def test_gpu_says_how_to_try_it_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu --small"):
        importlib.import_module("benchmarks.gpu").main()


def constants(name: str, module: Any) -> dict[str, Any]:
    """Return values for a benchmark's constants and functions that make it small."""
    topology = Topology.layered([4, 4])
    if name == "data_loading":
        return {"BATCH": 2}
    if name == "frozen_kernels":
        graph = NeuralGraph(topology, num_edges=8, node="relu").eval()
        return {"cases": lambda: [("small", freeze(graph), torch.randn(2, 4))]}
    if name == "inference":
        network = torch.nn.Sequential(NeuralGraph(Topology.layered([3, 2]), num_edges=4))
        return {"networks": lambda _: {"small": network}, "peak": lambda _: 1.0}
    if name == "scaling":
        size = module.Size(topology, edges=8, batch=2, side=2)
        studies = {"B": lambda: [(1, size), (2, size)]}
        return {"STUDIES": studies, "large": lambda: size, "huge": lambda: size}
    if name == "selection":
        return {"SIZE": 1000}
    if name == "soak":
        return {"EVERY": 2, "PER_EPOCH": 2, "BATCH": 2}
    if name == "training_step":
        return {"peak_memory": lambda *_: 0.0}  # measured in another process
    if name == "wirings":
        return {"small_world": lambda _: Topology.layered([16, 4, 10])}
    return {}


def write_photographs(path: Path) -> Path:
    """Write a tar file with two JPEGs."""
    with tarfile.open(path, "w") as tar:
        for i in range(2):
            data = io.BytesIO()
            Image.new("RGB", (32, 32), (100 * i, 0, 0)).save(data, "JPEG")
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = data.tell()
            data.seek(0)
            tar.addfile(member, data)
    return path
