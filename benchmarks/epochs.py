"""How accuracy and the movement of edges depend on how long a network is trained.

    python -m benchmarks.epochs --data DIR [--seeds 3] [--epochs 2 5 10 20] [--only dnw random]

Trains mbv1_dnw x0.225 on Imagenette as in docs/training.md, once for each variant, number of epochs
and seed, and writes benchmarks/epochs.csv, epochs_tables.md and epochs.png. Runs that are finished
are kept; stopped at any point, the same command goes on.
"""

import csv
import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.measure import machine
from train.checkpoint import Checkpoints
from train.files import atomically
from train.loop import Training
from train.metrics import as_line
from train.options import Options
from train.run import RunFolder

HERE = Path(__file__).parent

BASE = {
    "graph": "mbv1_dnw",
    "width": 0.225,
    "image_size": 64,
    "stem_stride": 2,
    "batch_size": 64,
    "lr": 0.05,
    "weight_decay": 5e-5,
}

RULES = ("dnw", "random", "no_update")
"""Compared at every number of epochs."""

VARIANTS: dict[str, dict[str, object]] = {
    **{rule: {"rule": rule} for rule in RULES},
    "dnw, edges stay from 0.5 on": {"rule": "dnw(freeze_at=0.5)"},
    "dnw, edges stay from 0.75 on": {"rule": "dnw(freeze_at=0.75)"},
    "dnw, edges move from 0.1 on": {"rule": "dnw(move_from=0.1)"},
    "dnw, statistics recomputed": {"rule": "dnw", "recalibrate": 50},
    "dnw, weight decay 0": {"rule": "dnw", "weight_decay": 0.0},
    "dnw, weight decay 5e-4": {"rule": "dnw", "weight_decay": 5e-4},
}
"""The others are compared at one number of epochs."""


@dataclass(frozen=True)
class Arguments:
    """Train for different numbers of epochs."""

    data: str
    """Folder with Imagenette."""
    epochs: tuple[int, ...] = (2, 5, 10, 20)
    """Numbers of epochs."""
    at: int = 5
    """Epochs at which variants are compared."""
    seeds: int = 3
    """Runs of each."""
    only: tuple[str, ...] = ()
    """Variants to train; all unless given."""
    runs: str = "runs/epochs"
    """Folder for the run folders."""
    time_budget: float = float("inf")
    """Minutes after which runs stop at the end of an epoch, to be continued."""


@dataclass(frozen=True)
class Line:
    """What came of one run."""

    variant: str
    epochs: int
    seed: int
    top1: float
    dead_nodes: int
    macs: int
    edges_changed: tuple[int, ...]
    seconds: float


def cells(args: Arguments) -> list[tuple[str, int, int]]:
    """Return variant, epochs and seed of every run, the shorter ones first."""
    found = []
    for seed, epochs in itertools.product(range(args.seeds), sorted({*args.epochs, args.at})):
        for name in args.only or VARIANTS:
            if (name in RULES and epochs in args.epochs) or epochs == args.at:
                found.append((name, epochs, seed))
    return found


def train(args: Arguments, name: str, epochs: int, seed: int, deadline: float) -> Line | None:
    """Train one run, or go on with it, or read what came of it; None where time ran out."""
    place = f"{name.replace(', ', '-').replace(' ', '_')}-e{epochs}-seed{seed}"
    folder = RunFolder(Path(args.runs) / place)
    given = {**BASE, **VARIANTS[name], "epochs": epochs, "seed": seed, "data": args.data}
    options = Options.from_flat({**given, "out": str(folder.path)})
    if Checkpoints(folder.path):
        options = folder.load_config().options.replace(resume=str(folder.path), data=args.data)
    else:
        options = options.replace(overwrite=folder.path.exists())
    training = Training(options)
    while training.epoch < epochs:
        if time.time() > deadline:
            return None
        training.advance()
        print(f"{place}: {as_line(training.rows[-1], epochs)}", flush=True)
    summary, rows = training.finish(), training.rows
    return Line(
        variant=name,
        epochs=epochs,
        seed=seed,
        top1=100 * summary["top1"],
        dead_nodes=summary["dead_nodes"],
        macs=summary["macs"],
        edges_changed=tuple(row["edges_changed"] for row in rows),
        seconds=sum(row["seconds"] for row in rows),
    )


def mean(values: Sequence[float], digits: int = 1) -> str:
    """Return mean and standard deviation."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{spread}"


def as_markdown(lines: Iterable[Line], args: Arguments) -> str:
    """Return two tables: rules by number of epochs, and variants at one of them."""
    lines = list(lines)
    numbers = sorted({line.epochs for line in lines if line.variant in RULES})
    text = ["Top-1, %, mean ± standard deviation over seeds (n):", ""]
    text.append("| rule | " + " | ".join(f"{n} epochs" for n in numbers) + " |")
    text.append("| --- |" + " --- |" * len(numbers))
    for rule in RULES:
        row = []
        for n in numbers:
            found = [line.top1 for line in lines if (line.variant, line.epochs) == (rule, n)]
            row.append(f"{mean(found)} ({len(found)})")
        text.append(f"| {rule} | {' | '.join(row)} |")
    text += ["", "Edges that changed in the last epoch, of 158,944:", ""]
    text.append("| rule | " + " | ".join(f"{n} epochs" for n in numbers) + " |")
    text.append("| --- |" + " --- |" * len(numbers))
    for rule in RULES:
        row = []
        for n in numbers:
            own = [line for line in lines if (line.variant, line.epochs) == (rule, n)]
            row.append(mean([line.edges_changed[-1] for line in own], 0))
        text.append(f"| {rule} | {' | '.join(row)} |")
    text += ["", f"Variants at {args.at} epochs:", ""]
    text.append("| variant | top-1, % | n | dead nodes | changed in the last epoch |")
    text.append("| --- | --- | --- | --- | --- |")
    for name in VARIANTS:
        own = [line for line in lines if (line.variant, line.epochs) == (name, args.at)]
        if own:
            cols = [
                mean([line.top1 for line in own]),
                str(len(own)),
                mean([line.dead_nodes for line in own], 0),
                mean([line.edges_changed[-1] for line in own], 0),
            ]
            text.append(f"| {name} | {' | '.join(cols)} |")
    return "\n".join(text) + "\n"


def draw(lines: Iterable[Line], path: Path) -> None:
    """Draw accuracy against epochs, and beside it how many edges change in each."""
    import matplotlib.pyplot as plt

    lines = list(lines)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for color, rule in zip(("C0", "C1", "C2"), RULES, strict=True):
        own = [line for line in lines if line.variant == rule]
        numbers = sorted({line.epochs for line in own})
        groups = [[line.top1 for line in own if line.epochs == n] for n in numbers]
        means = [statistics.mean(group) for group in groups]
        spread = [statistics.stdev(group) if len(group) > 1 else 0 for group in groups]
        left.errorbar(numbers, means, spread, marker="o", capsize=3, color=color, label=rule)
        longest = [line for line in own if line.epochs == max(numbers, default=0)]
        if longest and rule != "random":
            by_epoch = zip(*(line.edges_changed for line in longest), strict=True)
            turnover = [statistics.mean(values) for values in by_epoch]
            right.plot(range(1, len(turnover) + 1), turnover, marker=".", color=color, label=rule)
    left.set(xlabel="epochs of the whole training", ylabel="top-1, %", xscale="log")
    ticks = sorted({line.epochs for line in lines})
    left.set_xticks(ticks, [str(n) for n in ticks])
    left.minorticks_off()
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="epoch of the longest training", ylabel="edges that changed", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m benchmarks.epochs", description=__doc__)
    for name in args.only:
        if name not in VARIANTS:
            raise SystemExit(f"unknown variant {name!r} (known: {', '.join(VARIANTS)})")
    deadline, lines = time.time() + 60 * args.time_budget, []
    for cell in cells(args):
        line = train(args, *cell, deadline)
        if line is None:
            break
        lines.append(line)
        write(lines, args)
    print(as_markdown(lines, args))


def write(lines: Sequence[Line], args: Arguments) -> None:
    """Write CSV, Markdown and picture."""

    def table(path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Line.__dataclass_fields__)
            for line in lines:
                values = vars(line) | {"edges_changed": " ".join(map(str, line.edges_changed))}
                writer.writerow(values.values())

    atomically(HERE / "epochs.csv", table)
    title = f"{machine('cpu')}\n\n{as_markdown(lines, args)}"
    atomically(HERE / "epochs_tables.md", lambda path: path.write_text(title))
    draw(lines, HERE / "epochs.png")


if __name__ == "__main__":
    main()
