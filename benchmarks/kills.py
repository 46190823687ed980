"""Kill runs at random moments, resume them, and compare what they leave with runs left alone.

    python -m benchmarks.kills                  # twenty, over all rules

Each run is a process of its own: ``python -m train.imagenet`` on the handwritten digits, ended by
SIGKILL between its first checkpoint and its end, and continued with ``--resume``. Weights, state of
the optimizer, wiring, its history and all metrics but times have to be the same, bit for bit.
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
    """A run that was killed, the steps from which it went on, and what differs in the end."""

    rule: str
    resumed_from: list[int]
    differences: list[str]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "train.imagenet", *args]


def environment() -> dict[str, str]:
    """Return variables with which one number of threads does all sums in one order."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*args: str) -> None:
    """Run a training to its end."""
    done = subprocess.run(command(*args), env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(args)}: {done.stderr}")


def run_and_kill(folder: Path, wait: float, *args: str) -> bool:
    """Kill a training some seconds after its first checkpoint; return whether it still ran."""
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
    """Return the checkpoints of a run."""
    return {path.name for path in (folder / "checkpoints").glob("*.pt")}


def whole(place: Path, rule: str) -> tuple[Path, float]:
    """Return the folder of a run left alone, and the seconds that its steps took."""
    folder = place / f"{name_of(rule)}-whole"
    if not folder.exists():
        run(*flags(place, rule), "--out", str(folder))
    return folder, sum(float(row["seconds"]) for row in rows_of(folder))


def flags(place: Path, rule: str) -> list[str]:
    """Return the flags of a run with a rule."""
    given = [*SMALL, "--rule", rule, "--checkpoint-every", "3", "--history-every", "4"]
    if rule in ("lottery", "fine_tune"):
        start = place / "complete-start"
        if not start.exists():
            run(*SMALL, "--rule", "complete", "--epochs", "1", "--out", str(start))
        given += ["--from", str(start)]
    return given


def name_of(rule: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in rule)


def kill(place: Path, rule: str, number: int, draw: random.Random, times: int = 1) -> Killed:
    """Kill a run at random, resume it, and compare.

    Args:
        place: Where run folders go.
        rule: Of the run.
        number: Tells this run from others.
        draw: Says when.
        times: How often the run, as it goes on, is killed.
    """
    alone, seconds = whole(place, rule)
    folder, resumed = place / f"{name_of(rule)}-{number}", []
    while len(resumed) < times:
        given = ["--resume", str(folder)]
        if not resumed:
            given = [*flags(place, rule), "--out", str(folder), "--overwrite"]
        if run_and_kill(folder, draw.uniform(0, seconds / times), *given):
            resumed.append(Checkpoints(folder).load()["steps"])
        elif resumed:  # it came to its end too soon: from the beginning
            resumed = []
    run("--resume", str(folder))
    return Killed(rule, resumed, differences(alone, folder))


def differences(one: Path, other: Path) -> list[str]:
    """Return what two run folders differ in, times apart."""
    found = []
    for name in ("initial", "last", "best"):
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (one, other))
        found += [f"{name} {key}" for key in ours if not torch.equal(ours[key], theirs[key])]
    ours, theirs = (Checkpoints(folder).load() for folder in (one, other))
    for key in ("model", "optimizer", "schedule", "steps", "epoch", "done"):
        if not equal(ours[key], theirs[key]):
            found.append(f"checkpoint {key}")
    for mine, his in zip(rows_of(one), rows_of(other), strict=True):
        apart = [name for name in mine if name not in TIMES and mine[name] != his[name]]
        found += [f"epoch {mine['epoch']} {name}" for name in apart]
    histories = [load_history(folder) for folder in (one, other)]
    for name in histories[0]:
        ours, theirs = ([vars(r) for r in history[name].records] for history in histories)
        if not equal(ours, theirs):
            found.append(f"history of {name}")
    return found


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def equal(one: Any, other: Any) -> bool:
    """Return whether two nested values are the same, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="how many runs are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args(args)
    draw, failed = random.Random(given.seed), 0
    with tempfile.TemporaryDirectory() as place:
        for number in range(given.kills):
            killed = kill(Path(place), RULES[number % len(RULES)], number, draw)
            failed += bool(killed.differences)
            told = ", ".join(killed.differences[:5]) or "the same, bit for bit"
            print(f"{killed.rule}: resumed from step {killed.resumed_from[0]}: {told}", flush=True)
    print(f"{given.kills - failed} of {given.kills} runs ended as if never killed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
