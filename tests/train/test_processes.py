"""Runs of several processes, started by torchrun as users start them."""

import csv
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.kills import ROOT, environment
from tests.conftest import relative_error
from train.checkpoint import Checkpoints
from train.evaluate import evaluate

SMALL = (
    *("--graph=mbv1_dnw", "--width=0.1", "--data=digits", "--image-size=16", "--batch-size=40"),
    *("--train-images=800", "--lr=0.05", "--epochs=1", "--device=cpu", "--no-report"),
)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def torchrun(*args: str, processes: int = 2) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*TORCHRUN, f"--nproc-per-node={processes}", *args],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


@pytest.fixture(autouse=True)
def _none_left() -> Iterator[None]:
    """End what a test that failed has left running."""
    before = psutil.Process().children(recursive=True)
    yield
    for child in psutil.Process().children(recursive=True):
        if child not in before:
            child.kill()


def finished(process: "subprocess.Popen[str]") -> str:
    """Return what a process printed, once it ended well."""
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0, told
    return told


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


PARTS = ["--precision=64", "--clip-grad-norm=2", "--ema-decay=0.9", "--train-images=200"]


@pytest.mark.parametrize(
    ("rule", "given", "alone", "together"),
    [
        ("dnw", ["--precision=64"], [], ["--sync-norms"]),
        ("random", [], [], ["--sync-norms"]),
        # Statistics are those of a part: one process has 20 images in it, or two have 10 each.
        ("dnw", PARTS, ["--micro-batch-size=20"], ["--micro-batch-size=10", "--sync-norms"]),
    ],
    ids=["dnw", "random", "in parts"],
)
def test_two_processes_learn_what_one_does(
    rule: str, given: list[str], alone: list[str], together: list[str], tmp_path: Path
) -> None:
    flags = ["-m", "train.imagenet", *SMALL, f"--rule={rule}", *given]
    one, flags = [*flags, *alone], [*flags, *together]
    command = [sys.executable, *one, f"--out={tmp_path / 'one'}"]
    subprocess.run(command, env=environment(), cwd=ROOT, check=True)
    told = finished(torchrun(*flags, f"--out={tmp_path / 'two'}"))
    assert told.count("epoch 1/1: loss") == told.count("\nnext: ") == 1  # one process speaks
    ours, theirs = (load_file(tmp_path / n / "last.safetensors") for n in ("one", "two"))
    learned = [name for name, value in ours.items() if value.is_floating_point()]
    if "--precision=64" in given:
        for name in learned:
            assert relative_error(theirs[name], ours[name]) < 1e-4, name
    # In 32 bits, the order of images within a batch alone changes small tensors by a percent.
    whole, other = (torch.cat([w[n].flatten() for n in learned]) for w in (ours, theirs))
    assert relative_error(other, whole) < 1e-4
    mine, their = rows(tmp_path / "one")[0], rows(tmp_path / "two")[0]
    for name in ("train_loss", "train_top1", "grad_norm", "loss"):
        assert float(mine[name]) == pytest.approx(float(their[name]), rel=1e-4)
    assert mine["edges_changed"] == their["edges_changed"]
    # 359 images in 9 batches: 5 of one process, 4 of the other, the last smaller
    assert mine["top1"] == their["top1"]
    if not given:
        assert evaluate(str(tmp_path / "two"), device="cpu")["top1"] == float(their["top1"])


def test_a_run_goes_on_after_a_process_was_lost(tmp_path: Path) -> None:
    flags = [*("-m", "train.imagenet"), *SMALL, "--epochs=2", "--checkpoint-every=3"]
    flags += ["--sync-norms", f"--out={tmp_path / 'run'}"]
    process = torchrun("--max-restarts=1", *flags)
    while not any(Checkpoints(tmp_path / "run").path.glob("000000000[6-9]-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    workers = [p for p in psutil.Process(process.pid).children() if "train.imagenet" in p.cmdline()]
    assert len(workers) == 2
    workers[1].kill()
    finished(process)
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["1", "2"]
    finished(torchrun(*flags[:-1], f"--out={tmp_path / 'whole'}"))
    ours, theirs = (load_file(tmp_path / n / "last.safetensors") for n in ("run", "whole"))
    for name, value in ours.items():
        assert bool((value == theirs[name]).all()), name


def test_a_signal_to_all_processes_saves_once(tmp_path: Path) -> None:
    process = torchrun("-m", "train.imagenet", *SMALL, "--epochs=500", f"--out={tmp_path / 'run'}")
    while not Checkpoints(tmp_path / "run"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert told.count("stopped by SIGTERM") == 1
    assert "--resume" in told
    assert Checkpoints(tmp_path / "run").load()["steps"] > 0


APART = """
import sys
import torch
from train.loop import start_training
from train.cli import parse_options, run_command

training = start_training(parse_options(sys.argv[1:], "", ""))
training.checkpoint()
if training.processes.rank == 1:
    with torch.no_grad():
        graph = training.plain_model.graphs[1]
        graph.weight[graph.weight.abs().argmin()] = 10.0
run_command(training.checkpoint)
"""


def test_other_edges_on_one_process_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "apart.py").write_text(APART)
    process = torchrun(str(tmp_path / "apart.py"), *SMALL, f"--out={tmp_path / 'run'}")
    told, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert (
        "error: after step 0 the real edges of rank 1 differ from those of rank 0 (hashes" in told
    )


def test_a_batch_that_cannot_be_shared_out_is_an_error(tmp_path: Path) -> None:
    flags = [*SMALL, "--batch-size=41", f"--out={tmp_path / 'run'}"]
    told, _ = torchrun("-m", "train.imagenet", *flags).communicate(timeout=120)
    assert "error: --batch-size 41 counts the images of all processes, so it must be" in told
    assert not (tmp_path / "run").exists()


def test_the_environment_of_a_cluster_is_no_reason_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "SLURM_NTASKS": "8",
        "SLURM_JOB_NAME": "train",
        "SLURM_PROCID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    flags = ["-m", "train.imagenet", *SMALL, f"--out={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, *flags], env=environment(), cwd=ROOT, timeout=120, capture_output=True
    )
    assert done.returncode == 0, done.stderr
