"""Measure accuracy and changes of edges against the length of training.

    python -m benchmarks.epochs --data DIR [--seeds 3] [--epochs 2 5 10 20] [--only dnw random]

Trains mbv1_dnw x0.225 on Imagenette as in docs/training.md, once for each variant, number of epochs
and seed, and writes benchmarks/epochs.csv, epochs_tables.md and epochs.png. Runs that are in the
CSV file are not trained again. If it is stopped, the same command continues.
"""

import csv
import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from train.files import atomically
from train.options import Options
from train.provenance import commit, folder_name, machine
from train.table_rows import Row
from train.tables import Cell, train_cells

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

COLORS = {"dnw": "C0", "dnw_factored": "C3", "random": "C1", "no_update": "C2"}
"""Colours of the rules in plots."""

RESTING = "dnw_factored, until 0.85"

RULES = (*COLORS, RESTING)
"""Rules that are compared at every number of epochs."""

VARIANTS: dict[str, dict[str, object]] = {
    **{rule: {"rule": rule} for rule in COLORS},
    RESTING: {"rule": "dnw_factored(until=0.85)"},
    "dnw, edges stay from 0.5 on": {"rule": "dnw(freeze_at=0.5)"},
    "dnw, edges stay from 0.75 on": {"rule": "dnw(freeze_at=0.75)"},
    "dnw, edges move from 0.1 on": {"rule": "dnw(move_from=0.1)"},
    "dnw, statistics recomputed": {"rule": "dnw", "recalibrate": 50},
    "dnw, weight decay 0": {"rule": "dnw", "weight_decay": 0.0},
    "dnw, weight decay 5e-4": {"rule": "dnw", "weight_decay": 5e-4},
}
"""Settings by variant. All but the rules are compared at a single number of epochs."""


@dataclass(frozen=True)
class Arguments:
    """Train rules and variants for different numbers of epochs."""

    data: str
    """Folder with Imagenette."""
    epochs: tuple[int, ...] = (2, 5, 10, 20)
    """Numbers of epochs."""
    at: int = 5
    """Number of epochs at which variants are compared."""
    seeds: int = 3
    """Number of runs of each variant and number of epochs."""
    only: tuple[str, ...] = ()
    """Variants to train; all by default."""
    runs: str = "runs/epochs"
    """Folder for the run folders."""
    parallel: int = 1
    """Number of runs at a time; they share the cores."""
    time_budget: float = float("inf")
    """Minutes after which runs stop at the end of an epoch; they can be continued."""


@dataclass(frozen=True)
class Line:
    """A finished run.

    Attributes:
        variant: The key in VARIANTS.
        epochs: Number of epochs.
        seed: Seed of the training.
        top1: Validation accuracy after the last epoch, in percent.
        dead_nodes: Nodes without a real edge out.
        macs: Multiply-adds per image.
        edges_changed: For each epoch, edges that are real after it and were not before it.
        seconds: Time of the whole run.
        commit: Commit of the code.
        machine: Machine of the run.
    """

    variant: str
    epochs: int
    seed: int
    top1: float
    dead_nodes: int
    macs: int
    edges_changed: tuple[int, ...]
    seconds: float
    commit: str
    machine: str

    @property
    def cell(self) -> tuple[str, int, int]:
        """Variant, number of epochs and seed."""
        return self.variant, self.epochs, self.seed


def cells(args: Arguments) -> Iterator[tuple[str, int, int]]:
    """Yield variant, epochs and seed of every requested run, shorter ones first."""
    for seed, epochs in itertools.product(range(args.seeds), sorted({*args.epochs, args.at})):
        for name in args.only or VARIANTS:
            if (name in RULES and epochs in args.epochs) or epochs == args.at:
                yield name, epochs, seed


def cell_of(args: Arguments, name: str, epochs: int, seed: int) -> Cell:
    """Return the run of a variant as a cell of a table."""
    folder = f"{name.replace(', ', '-').replace(' ', '_')}-e{epochs}-seed{seed}"
    options = Options.from_flat(
        {
            **BASE,
            **VARIANTS[name],
            "epochs": epochs,
            "seed": seed,
            "data": args.data,
            "out": str(Path(args.runs) / folder_name() / folder),  # one folder per commit
            "report": False,
        }
    )
    return Cell(Row(name, name, "", None), options)


def train(args: Arguments, lines: Sequence[Line]) -> Iterator[Line]:
    """Train the missing runs, and yield each one when it is finished."""
    done = {line.cell for line in lines}
    missing = {cell: cell_of(args, *cell) for cell in cells(args) if cell not in done}
    names = {id(cell): name for name, cell in missing.items()}
    deadline = time.time() + 60 * args.time_budget
    for cell, summary in train_cells(list(missing.values()), args.parallel, deadline):
        name, epochs, seed = names[id(cell)]
        with (cell.folder.path / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        yield Line(
            variant=name,
            epochs=epochs,
            seed=seed,
            top1=100 * summary["top1"],
            dead_nodes=summary["dead_nodes"],
            macs=summary["macs"],
            edges_changed=tuple(int(row["edges_changed"]) for row in rows),
            seconds=summary["seconds"],
            commit=commit(),
            machine=machine("cpu"),
        )


def mean(values: Sequence[float], digits: int = 1) -> str:
    """Return mean and standard deviation as text."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{spread}"


def as_markdown(lines: Iterable[Line], args: Arguments) -> str:
    """Return Markdown tables: rules by number of epochs, and variants at one number of epochs."""
    lines = list(lines)
    numbers = sorted({line.epochs for line in lines if line.variant in RULES})
    text = ["Top-1, %, mean ± standard deviation over seeds (n):", ""]
    text.append("| rule | " + " | ".join(f"{n} epochs" for n in numbers) + " |")
    text.append("| --- |" + " --- |" * len(numbers))
    for rule in RULES:
        row = []
        for n in numbers:
            accuracies = [line.top1 for line in lines if (line.variant, line.epochs) == (rule, n)]
            row.append(f"{mean(accuracies)} ({len(accuracies)})")
        text.append(f"| {rule} | {' | '.join(row)} |")
    for title, value in (
        ("Edges that changed in the last epoch, of 158,944", lambda line: line.edges_changed[-1]),
        ("Dead nodes, of 6,944", lambda line: line.dead_nodes),
        ("Thousands of multiply-adds per image", lambda line: line.macs / 1000),
    ):
        text += ["", f"{title}:", ""]
        text.append("| rule | " + " | ".join(f"{n} epochs" for n in numbers) + " |")
        text.append("| --- |" + " --- |" * len(numbers))
        for rule in RULES:
            row = []
            for n in numbers:
                runs = [line for line in lines if (line.variant, line.epochs) == (rule, n)]
                row.append(mean([value(line) for line in runs], 0))
            text.append(f"| {rule} | {' | '.join(row)} |")
    text += ["", f"Variants at {args.at} epochs:", ""]
    text.append("| variant | top-1, % | n | dead nodes | changed in the last epoch |")
    text.append("| --- | --- | --- | --- | --- |")
    for name in VARIANTS:
        runs = [line for line in lines if (line.variant, line.epochs) == (name, args.at)]
        if runs:
            cols = [
                mean([line.top1 for line in runs]),
                str(len(runs)),
                mean([line.dead_nodes for line in runs], 0),
                mean([line.edges_changed[-1] for line in runs], 0),
            ]
            text.append(f"| {name} | {' | '.join(cols)} |")
    return "\n".join(text) + "\n"


def draw(lines: Iterable[Line], path: Path) -> None:
    """Plot accuracy by number of epochs, and the number of edges that change in each epoch."""
    import matplotlib.pyplot as plt

    lines = list(lines)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for rule, color in COLORS.items():
        runs = [line for line in lines if line.variant == rule]
        numbers = sorted({line.epochs for line in runs})
        groups = [[line.top1 for line in runs if line.epochs == n] for n in numbers]
        means = [statistics.mean(group) for group in groups]
        spread = [statistics.stdev(group) if len(group) > 1 else 0 for group in groups]
        left.errorbar(numbers, means, spread, marker="o", capsize=3, color=color, label=rule)
        longest = [line for line in runs if line.epochs == max(numbers, default=0)]
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
    lines = read()
    for line in train(args, lines):
        lines.append(line)
        write(lines, args)
    write(lines, args)
    print(as_markdown(lines, args))


def read() -> list[Line]:
    """Return the finished runs of the CSV file."""
    path = HERE / "epochs.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Line(
                variant=row["variant"],
                epochs=int(row["epochs"]),
                seed=int(row["seed"]),
                top1=float(row["top1"]),
                dead_nodes=int(row["dead_nodes"]),
                macs=int(row["macs"]),
                edges_changed=tuple(map(int, row["edges_changed"].split())),
                seconds=float(row["seconds"]),
                commit=row["commit"],
                machine=row["machine"],
            )
            for row in csv.DictReader(file)
        ]


def write(lines: Sequence[Line], args: Arguments) -> None:
    """Write the CSV file, the Markdown tables and the plot."""

    def table(path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(field.name for field in dataclasses.fields(Line))
            for line in sorted(lines, key=lambda line: (line.seed, line.epochs, line.variant)):
                values = vars(line) | {"edges_changed": " ".join(map(str, line.edges_changed))}
                writer.writerow(values.values())

    atomically(HERE / "epochs.csv", table)
    atomically(HERE / "epochs_tables.md", lambda path: path.write_text(as_markdown(lines, args)))
    draw(lines, HERE / "epochs.png")


if __name__ == "__main__":
    main()
