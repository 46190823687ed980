"""Reproduce a table of the paper, or train a study of this project.

    python -m train.tables 2 --data DIR --seeds 5
    python -m train.tables 3                      # only the cost; with --data, accuracy too
    python -m train.tables resnet18 --data DIR

Trains the runs that are missing, and writes results/table2.csv and results/table2.md. If it is
stopped, the same command continues.
"""

import itertools
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from dnw_graph import Cost, cost
from dnw_graph.wiring import NeverActsWarning, selectors
from train.checkpoint import Checkpoints
from train.cli import load_recipe, run_command
from train.files import atomically
from train.interrupt import Interrupted, Interrupts, stop_with_parent
from train.options import Options
from train.results import Results, as_markdown
from train.run import RunFolder, build_network
from train.table_rows import TABLES, Row, Table


@dataclass(frozen=True)
class Arguments:
    """Train the missing runs of a table of the paper, and write the table."""

    table: Annotated[Literal["1", "2", "3", "4", "resnet18"], tyro.conf.Positional]
    """Number of the paper's table, or the study resnet18 of this project."""
    data: str | None = None
    """Folder of images, as for train.cifar10 (tables 1 and 2) and train.imagenet (the others)."""
    preset: Literal["full", "smoke"] = "full"
    """smoke takes minutes: 2 seeds, 3 epochs, 5,000 training and 2,000 validation images (fewer for
    table 1), unless other options override these."""
    seeds: int | None = None
    """Runs of each row; by default, the table's number (5, 5, 1, 1, 2)."""
    rows: tuple[str, ...] = ()
    """Rows to train, by name; by default, those of the paper."""
    epochs: int | None = None
    """Epochs of each run; by default, the paper's."""
    train_images: int | None = None
    """Number of training images to use, the same from each class; by default, all."""
    validation_images: int | None = None
    """Number of validation images to use, likewise."""
    batch_size: int | None = None
    """Images per step; by default, the paper's."""
    image_size: int | None = None
    """Height and width of the network's input, in pixels; by default, the paper's."""
    precision: Literal["32", "bf16"] = "32"
    """Bits of activations, as for training."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto (a GPU if there is one)."""
    parallel: int = 1
    """Number of runs at a time, on the same device; on a CPU they share its cores."""
    time_budget: float = math.inf
    """Minutes after which runs stop at the end of an epoch; the same command continues them."""
    runs: str = "runs"
    """Folder for the run folders."""
    results: str = "results"
    """Folder for the CSV and Markdown files."""


@dataclass(frozen=True)
class Cell:
    """One run: a row and a seed."""

    row: Row
    options: Options

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.options.run.seed

    @property
    def folder(self) -> RunFolder:
        """Its run folder."""
        assert self.options.run.out is not None
        return RunFolder(self.options.run.out)


def plan(args: Arguments, table: Table) -> list[Cell]:
    """Return the cells of a table, in order of training.

    Raises:
        ValueError: If a row is unknown, a number is out of range, or a rule would never act.
    """
    names = [row.name for row in table.rows]
    for name in args.rows:
        if name not in names:
            raise ValueError(
                f"unknown row {name!r} of table {args.table} (known: {', '.join(names)})"
            )
    if not args.time_budget >= 0:  # also true for NaN
        raise ValueError(f"time-budget must be 0 minutes or more, got {args.time_budget}")
    default_seeds = 2 if args.preset == "smoke" else table.seeds
    seeds = default_seeds if args.seeds is None else args.seeds
    for name, value in (("seeds", seeds), ("parallel", args.parallel)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    rows = [row for row in table.rows if row.name in args.rows or (not args.rows and row.usual)]
    needed = {row.needs for row in rows}
    rows = [row for row in table.rows if row in rows or row.name in needed]
    changes = cut(args)
    place = Path(args.runs) / f"{stem(args)}{suffix(changes)}"
    cells = []
    for seed, row in itertools.product(range(seeds), rows):
        options: dict[str, Any] = {"seed": seed, "data": args.data, "device": args.device}
        options["out"] = str(place / f"{row.name}-seed{seed}")
        if row.needs:
            options["from_run"] = str(place / f"{row.needs}-seed{seed}")
        recipe = load_recipe(row.recipe)
        if "epochs" in changes:
            warmup = recipe.optimization.warmup_epochs
            options["warmup_epochs"] = max(0, min(warmup, changes["epochs"] - 1))
        options |= row.smoke if args.preset == "smoke" else {}
        cells.append(Cell(row, recipe.replace(**changes, **options)))
    for cell in cells[: len(rows)]:
        _check_acts(cell)
    return cells


def _check_acts(cell: Cell) -> None:
    """Raise ValueError if the rule of a row would never act; needs ``train_images`` to be set."""
    fit, images = cell.options.optimization, cell.options.data.train_images
    if images is None or not fit.epochs * (images // fit.batch_size):
        return
    with torch.device("meta"):
        network = build_network(cell.options, num_classes=2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", NeverActsWarning)
            for entry in selectors(network):
                entry.selector.rule.check_length(fit.epochs * (images // fit.batch_size))
    except NeverActsWarning as warning:
        raise _never_acts(cell.row, warning) from None


def _never_acts(row: Row, warning: Warning) -> ValueError:
    """Return the error for a row whose rule would never act."""
    return ValueError(
        f"the rule of row {row.name} would have no effect ({warning}): train longer or on more "
        "images, or leave out the row"
    )


def cut(args: Arguments) -> dict[str, Any]:
    """Return the options in which runs differ from the paper's."""
    smoke = TABLES[args.table].smoke if args.preset == "smoke" else {}
    names = ("epochs", "train_images", "validation_images", "batch_size", "image_size")
    values = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    precision = {"precision": args.precision} if args.precision != "32" else {}
    return {**smoke, **values, **precision}


def stem(args: Arguments) -> str:
    """Return the name of a table's files, without suffix."""
    return f"table{args.table}" if args.table.isdigit() else args.table


def suffix(changes: dict[str, Any]) -> str:
    """Return the end of the file names of a reduced table; empty for the full one."""
    short = {"epochs": "e", "train_images": "n", "validation_images": "v"}
    short |= {"batch_size": "b", "image_size": "s"}
    return "".join(f"-{short.get(name, '')}{value}" for name, value in changes.items())


_stopping: Interrupts | None = None
"""The signals of a worker process that trains cells; None in the main process."""


def _begin_worker(threads: int) -> None:
    """Set up a process that trains cells; it stops on a signal, or when the main process ends."""
    global _stopping
    torch.set_num_threads(threads)
    _stopping = stop_with_parent()


def train_cell(cell: Cell, deadline: float) -> dict[str, Any] | None:
    """Train a cell, or continue training it, and return its summary; None if time ran out.

    Args:
        cell: The cell.
        deadline: Time to stop, in seconds as returned by :func:`time.time`.

    Raises:
        Interrupted: If a signal stopped the run, after its state was saved.
        ValueError: If its folder holds a run with other options, or its rule would never act.
    """
    from train.loop import start_training
    from train.metrics import as_line

    folder, options = cell.folder, cell.options
    if _stopping is not None and _stopping.received:
        raise Interrupted(_stopping.received, f"{folder.path.name} was not started")
    if Checkpoints(folder.path):
        previous = folder.load_config().options
        free = {"data": previous.data.data, "device": previous.run.device, "out": previous.run.out}
        differences = previous.differences(options.resolved().replace(**free))
        if differences.keys() - {"overwrite"}:
            raise ValueError(
                f"{folder.path} is a run with other options ({', '.join(differences)}); move it "
                "away"
            )
        changes = {"data": options.data.data or previous.data.data, "device": options.run.device}
        options = previous.replace(resume=str(folder.path), **changes)
    else:
        options = options.replace(overwrite=folder.path.exists())
    epochs = options.optimization.epochs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", NeverActsWarning)
            training = start_training(options, _stopping)
    except NeverActsWarning as warning:
        raise _never_acts(cell.row, warning) from None
    with training.interrupts:
        try:
            while training.epoch < epochs:
                if time.time() > deadline:
                    return None
                training.advance()
                print(f"{folder.path.name}: {as_line(training.rows[-1], epochs)}", flush=True)
            return training.finish()
        finally:
            training.lock.release()


def train_cells(
    cells: Sequence[Cell], parallel: int, deadline: float
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Train cells, ``parallel`` at a time, and yield those that are finished with their summary."""
    if parallel == 1:
        for cell in cells:
            summary = train_cell(cell, deadline)
            if summary is not None:
                yield cell, summary
        return
    threads = max(1, torch.get_num_threads() // parallel)  # no more threads than cores
    with (
        Interrupts(patient=True) as interrupts,
        ProcessPoolExecutor(
            parallel, get_context("spawn"), initializer=_begin_worker, initargs=(threads,)
        ) as pool,
    ):
        futures = {pool.submit(train_cell, cell, deadline): cell for cell in cells}
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    summary = future.result()
                    if summary is not None:
                        yield futures[future], summary
                if interrupts.received:
                    raise Interrupted(
                        interrupts.received, "all runs are saved; the same command continues them"
                    )
        except BaseException:  # running cells save and stop, pending ones are not started
            for process in active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = tyro.cli(Arguments, args=args, prog="python -m train.tables", description=__doc__)
    table, changes = TABLES[arguments.table], cut(arguments)
    cells, deadline = plan(arguments, table), time.time() + 60 * arguments.time_budget
    results = Results(Path(arguments.results) / f"{stem(arguments)}{suffix(changes)}.csv")
    command = "python -m train.tables " + " ".join(sys.argv[1:] if args is None else args)
    untrained = {} if table.finds_data else dict(untrained_costs(table, changes))

    def write() -> None:
        text = as_markdown(table, results, changes, command, untrained)
        results.path.parent.mkdir(parents=True, exist_ok=True)
        atomically(results.path.with_suffix(".md"), lambda path: path.write_text(text))

    write()
    trains = table.finds_data or arguments.data is not None
    if trains:
        # First the runs that do not start from another run, then the others.
        for has_start in (False, True):
            wave = [cell for cell in cells if (cell.row.needs is not None) == has_start]
            missing = [cell for cell in wave if (cell.row.name, cell.seed) not in results]
            if has_start:
                missing = [c for c in missing if (c.row.needs or "", c.seed) in results]
            for cell, summary in train_cells(missing, arguments.parallel, deadline):
                results.add(cell.row.name, cell.seed, summary, cell.options)
                write()
    print(results.path.with_suffix(".md").read_text())
    unfinished = [cell for cell in cells if (cell.row.name, cell.seed) not in results]
    if unfinished and trains:
        print(
            f"{len(unfinished)} of {len(cells)} runs are not finished; the same command continues "
            "them"
        )


def untrained_costs(table: Table, changes: dict[str, Any]) -> Iterator[tuple[str, Cost]]:
    """Yield the name of each row and its cost for one image before training."""
    for row in table.rows:
        options = load_recipe(row.recipe)
        torch.manual_seed(0)
        network = build_network(options, num_classes=table.classes)
        yield row.name, cost(network, changes.get("image_size", options.data.image_size))


if __name__ == "__main__":
    run_command(main)
