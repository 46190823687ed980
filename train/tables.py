"""Reproduce a table of the paper, or train a study of this project's own.

    python -m train.tables 2 --data DIR --seeds 5
    python -m train.tables 3                      # only what it costs; with --data, accuracy too
    python -m train.tables resnet18 --data DIR

Trains every cell that is missing, and writes results/table2.csv and results/table2.md. Stopped at
any point, it goes on with the same command.
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
from train.loop import Training
from train.metrics import as_line
from train.options import Options
from train.results import Results, as_markdown
from train.run import RunFolder, build_network
from train.table_rows import TABLES, Row, Table


@dataclass(frozen=True)
class Arguments:
    """Train the cells of a table of the paper that are missing, and write the table."""

    table: Annotated[Literal["1", "2", "3", "4", "resnet18"], tyro.conf.Positional]
    """Number of the paper's table, or a study of this project's own."""
    data: str | None = None
    """Folder of images, as for train.cifar10 (tables 1 and 2) and train.imagenet (the others)."""
    preset: Literal["full", "smoke"] = "full"
    """smoke takes minutes, for 2 seeds: 3 epochs on 5,000 images, measured on 2,000, less for table
    1, where nothing else is said."""
    seeds: int | None = None
    """Runs of each row; the table's number unless given (5, 5, 1, 1, 2)."""
    rows: tuple[str, ...] = ()
    """Rows to train, by name; those of the paper unless given."""
    epochs: int | None = None
    """Epochs of each run; the paper's unless given."""
    train_images: int | None = None
    """Training images to use, as many of each class; all unless given."""
    validation_images: int | None = None
    """Images to measure on, likewise."""
    batch_size: int | None = None
    """Images a step; the paper's unless given."""
    image_size: int | None = None
    """Height and width the network sees, in pixels; the paper's unless given."""
    precision: Literal["32", "bf16"] = "32"
    """Bits of activations, as for training."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: a GPU if there is one."""
    parallel: int = 1
    """Runs at a time, on the same device; on a CPU they share its cores."""
    time_budget: float = math.inf
    """Minutes after which runs stop at the end of an epoch, to be continued."""
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
    """Return the cells of a table, in the order in which they are trained.

    Raises:
        ValueError: An unknown row, numbers out of range, or a rule that would never act.
    """
    known = {row.name: row for row in table.rows}
    for name in args.rows:
        if name not in known:
            raise ValueError(
                f"unknown row {name!r} of table {args.table} (known: {', '.join(known)})"
            )
    if not args.time_budget >= 0:  # not a number is neither
        raise ValueError(f"time-budget must be 0 minutes or more, got {args.time_budget}")
    usual = 2 if args.preset == "smoke" else table.seeds
    seeds = usual if args.seeds is None else args.seeds
    for name, value in (("seeds", seeds), ("parallel", args.parallel)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    chosen = [row for row in table.rows if row.name in args.rows or (not args.rows and row.usual)]
    needed = {row.needs for row in chosen}
    chosen = [row for row in table.rows if row in chosen or row.name in needed]
    changes = cut(args)
    place = Path(args.runs) / f"{stem(args)}{suffix(changes)}"
    cells = []
    for seed, row in itertools.product(range(seeds), chosen):
        given: dict[str, Any] = {"seed": seed, "data": args.data, "device": args.device}
        given["out"] = str(place / f"{row.name}-seed{seed}")
        if row.needs:
            given["from_run"] = str(place / f"{row.needs}-seed{seed}")
        recipe = load_recipe(row.recipe)
        if "epochs" in changes:
            warmup = recipe.optimization.warmup_epochs
            given["warmup_epochs"] = max(0, min(warmup, changes["epochs"] - 1))
        given |= row.smoke if args.preset == "smoke" else {}
        cells.append(Cell(row, recipe.replace(**changes, **given)))
    for cell in cells[: len(chosen)]:
        _check_acts(cell)
    return cells


def _check_acts(cell: Cell) -> None:
    """Raise a ``ValueError`` if the rule of a row would never act, as far as can be told."""
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
    return ValueError(
        f"row {row.name} would not be what it is called ({warning}): train longer or on more "
        "images, or leave the row out"
    )


def cut(args: Arguments) -> dict[str, Any]:
    """Return the options in which runs differ from the paper's."""
    smoke = TABLES[args.table].smoke if args.preset == "smoke" else {}
    names = ("epochs", "train_images", "validation_images", "batch_size", "image_size")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    precision = {"precision": args.precision} if args.precision != "32" else {}
    return {**smoke, **given, **precision}


def stem(args: Arguments) -> str:
    """Return what the files of a table are called."""
    return f"table{args.table}" if args.table.isdigit() else args.table


def suffix(changes: dict[str, Any]) -> str:
    """Return what tells the files of a cut-down table from those of the full one."""
    short = {"epochs": "e", "train_images": "n", "validation_images": "v"}
    short |= {"batch_size": "b", "image_size": "s"}
    return "".join(f"-{short.get(name, '')}{value}" for name, value in changes.items())


_stopping: Interrupts | None = None
"""Of a process that trains cells for another one."""


def _begin_worker(threads: int) -> None:
    """Set up a process that trains cells: it stops when it is told to, or when it is left alone."""
    global _stopping
    torch.set_num_threads(threads)
    _stopping = stop_with_parent()


def train_cell(cell: Cell, deadline: float) -> dict[str, Any] | None:
    """Train one cell, or go on with it, and return its summary; None where time ran out.

    Args:
        cell: The cell.
        deadline: In seconds of :func:`time.time`.

    Raises:
        Interrupted: A signal asked it to stop; it saved before.
        ValueError: Its folder holds a run of other options, or its rule would never act.
    """
    folder, options = cell.folder, cell.options
    if _stopping is not None and _stopping.received:
        raise Interrupted(_stopping.received, f"{folder.path.name} was not begun")
    if Checkpoints(folder.path):
        past = folder.load_config().options
        free = {"data": past.data.data, "device": past.run.device, "out": past.run.out}
        apart = past.differences(options.resolved().replace(**free))
        if apart.keys() - {"overwrite"}:
            raise ValueError(
                f"{folder.path} is a run of other options ({', '.join(apart)}); move it away"
            )
        given = {"data": options.data.data or past.data.data, "device": options.run.device}
        options = past.replace(resume=str(folder.path), **given)
    else:
        options = options.replace(overwrite=folder.path.exists())
    epochs = options.optimization.epochs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", NeverActsWarning)
            training = Training(options, _stopping)
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
    """Train cells, several at a time if asked to, and yield those that are finished."""
    if parallel == 1:
        for cell in cells:
            summary = train_cell(cell, deadline)
            if summary is not None:
                yield cell, summary
        return
    threads = max(1, torch.get_num_threads() // parallel)  # more than cores would wait in turn
    with (
        Interrupts(patient=True) as interrupts,
        ProcessPoolExecutor(
            parallel, get_context("spawn"), initializer=_begin_worker, initargs=(threads,)
        ) as pool,
    ):
        futures = {pool.submit(train_cell, cell, deadline): cell for cell in cells}
        left = set(futures)
        try:
            while left:
                done, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    summary = future.result()
                    if summary is not None:
                        yield futures[future], summary
                if interrupts.received:
                    raise Interrupted(
                        interrupts.received, "every run is saved; the same command goes on"
                    )
        except BaseException:  # what runs saves and stops, what waits is not begun
            for process in active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    given = tyro.cli(Arguments, args=args, prog="python -m train.tables", description=__doc__)
    table, changes = TABLES[given.table], cut(given)
    cells, deadline = plan(given, table), time.time() + 60 * given.time_budget
    results = Results(Path(given.results) / f"{stem(given)}{suffix(changes)}.csv")
    command = "python -m train.tables " + " ".join(sys.argv[1:] if args is None else args)
    untrained = {} if table.finds_data else dict(untrained_costs(table, changes))

    def write() -> None:
        text = as_markdown(table, results, changes, command, untrained)
        results.path.parent.mkdir(parents=True, exist_ok=True)
        atomically(results.path.with_suffix(".md"), lambda path: path.write_text(text))

    write()
    trains = table.finds_data or given.data is not None
    if trains:
        # Runs that others start from come before these; otherwise seed by seed.
        for needing in (False, True):
            wave = [cell for cell in cells if (cell.row.needs is not None) == needing]
            missing = [cell for cell in wave if (cell.row.name, cell.seed) not in results]
            if needing:
                missing = [c for c in missing if (c.row.needs or "", c.seed) in results]
            for cell, summary in train_cells(missing, given.parallel, deadline):
                results.add(cell.row.name, cell.seed, summary, cell.options)
                write()
    print(results.path.with_suffix(".md").read_text())
    left = [cell for cell in cells if (cell.row.name, cell.seed) not in results]
    if left and trains:
        print(f"{len(left)} of {len(cells)} runs are left; the same command goes on with them")


def untrained_costs(table: Table, changes: dict[str, Any]) -> Iterator[tuple[str, Cost]]:
    """Yield what each row costs for one image before it is trained."""
    for row in table.rows:
        options = load_recipe(row.recipe)
        torch.manual_seed(0)
        network = build_network(options, num_classes=table.classes)
        yield row.name, cost(network, changes.get("image_size", options.data.image_size))


if __name__ == "__main__":
    run_command(main)
