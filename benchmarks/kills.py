"""Kill runs at random times, resume them, and compare their results with uninterrupted runs.

    python -m benchmarks.kills                  # twenty runs, over all rules

Each run is a separate process: ``python -m train.imagenet`` on the handwritten digits, killed by
SIGKILL between its first checkpoint and its end, and resumed with ``--resume``. Weights, state of
the optimizer, wiring, its history and all metrics except times must be the same, bit for bit.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dnw_graph.analysis import load_history
from train.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
RULES = (
    *("dnw", "rigl(every=4)", "targeted_dropout", "set(every=4)", "l1_anneal", "no_update"),
    *("random", "complete", "lottery", "fine_tune", "dnw(freeze_at=0.5)"),
)
SMALL = (
    *("--graph", "mbv1_dnw", "--width", "0.1", "--data", "digits", "--image-size", "16"),
    *("--batch-size", "128", "--lr", "0.05", "--epochs", "3", "--device", "cpu", "--no-report"),
)
TIMES = {"seconds", "seconds_training", "seconds_stepping", "images_per_second"}


@dataclass(frozen=True)
class Killed:
    """A run that was killed: the steps from which it resumed, and what differs at the end."""

    rule: str
    resumed_from: list[int]
    differences: list[str]


def command(*args: str) -> list[str]:
    """Return the command line of a training."""
    return [sys.executable, "-m", "train.imagenet", *args]


def environment() -> dict[str, str]:
    """Return environment variables that set one thread, so that sums have a fixed order."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*args: str) -> None:
    """Run a training to its end."""
    done = subprocess.run(command(*args), env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(args)}: {done.stderr}")


def run_and_kill(folder: Path, wait: float, *args: str) -> bool:
    """Kill a training ``wait`` seconds after its first new checkpoint; return if it was running."""
    before = names(folder)
    process = subprocess.Popen(
        command(*args),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while names(folder) <= before and process.poll() is None:
        time.sleep(0.02)
    time.sleep(wait)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


def names(folder: Path) -> set[str]:
    """Return the file names of a run's checkpoints."""
    return {path.name for path in (folder / "checkpoints").glob("*.pt")}


def whole(root: Path, rule: str) -> tuple[Path, float]:
    """Return the folder of an uninterrupted run and the duration of its epochs in seconds."""
    folder = root / f"{name_of(rule)}-whole"
    if not folder.exists():
        run(*flags(root, rule), "--out", str(folder))
    return folder, sum(float(row["seconds"]) for row in rows_of(folder))


def flags(root: Path, rule: str) -> list[str]:
    """Return the command-line flags of a run with a rule."""
    options = [*SMALL, "--rule", rule, "--checkpoint-every", "3", "--history-every", "4"]
    if rule in ("lottery", "fine_tune"):
        start = root / "complete-start"
        if not start.exists():
            run(*SMALL, "--rule", "complete", "--epochs", "1", "--out", str(start))
        options += ["--from", str(start)]
    return options


def name_of(rule: str) -> str:
    """Return a rule as part of a file name."""
    return "".join(c if c.isalnum() else "_" for c in rule)


def kill(root: Path, rule: str, number: int, draw: random.Random, times: int = 1) -> Killed:
    """Kill a run at random times, resume it, and compare it with an uninterrupted one.

    Args:
        root: Folder for run folders.
        rule: Rule of the run.
        number: Number of the run, used in its name.
        draw: Generator of the times at which the run is killed.
        times: Number of times that the run is killed.
    """
    reference, seconds = whole(root, rule)
    folder, resumed = root / f"{name_of(rule)}-{number}", []
    while len(resumed) < times:
        options = ["--resume", str(folder)]
        if not resumed:
            options = [*flags(root, rule), "--out", str(folder), "--overwrite"]
        if run_and_kill(folder, draw.uniform(0, seconds / times), *options):
            resumed.append(Checkpoints(folder).load()["steps"])
        elif resumed:  # it finished before it was killed: start again
            resumed = []
    run("--resume", str(folder))
    return Killed(rule, resumed, differences(reference, folder))


def differences(one: Path, other: Path) -> list[str]:
    """Return the fields of everything that differs between two run folders, except times."""
    fields = []
    for name in ("initial", "last", "best"):
        first, second = (load_file(folder / f"{name}.safetensors") for folder in (one, other))
        fields += [f"{name} {key}" for key in first if not torch.equal(first[key], second[key])]
    first, second = (Checkpoints(folder).load() for folder in (one, other))
    for key in ("model", "optimizer", "schedule", "steps", "epoch", "done"):
        if not equal(first[key], second[key]):
            fields.append(f"checkpoint {key}")
    for row, twin in zip(rows_of(one), rows_of(other), strict=True):
        columns = [name for name in row if name not in TIMES and row[name] != twin[name]]
        fields += [f"epoch {row['epoch']} {name}" for name in columns]
    histories = [load_history(folder) for folder in (one, other)]
    for name in histories[0]:
        first, second = ([vars(r) for r in history[name].records] for history in histories)
        if not equal(first, second):
            fields.append(f"history of {name}")
    return fields


def rows_of(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def equal(one: Any, other: Any) -> bool:
    """Return whether two nested values are equal bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="number of runs to kill")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times")
    options = parser.parse_args(args)
    draw, failed = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as root:
        for number in range(options.kills):
            killed = kill(Path(root), RULES[number % len(RULES)], number, draw)
            failed += bool(killed.differences)
            result = ", ".join(killed.differences[:5]) or "the same, bit for bit"
            print(
                f"{killed.rule}: resumed from step {killed.resumed_from[0]}: {result}", flush=True
            )
    print(f"{options.kills - failed} of {options.kills} runs ended as without being killed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
