"""Results of many runs: a CSV file with one line per run, and a table made from it."""

import csv
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dnw_graph import Cost
from train.files import atomically
from train.options import Options
from train.provenance import commit, machine, versions
from train.table_rows import Row, Table

COLUMNS = (
    *("row", "seed", "accuracy", "top5", "epochs", "parameters", "macs", "seconds"),
    *("train_images", "image_size", "precision", "commit", "versions", "machine"),
)


class Results:
    """The finished runs of a table, in a CSV file that is written after each run.

    Args:
        path: The file; it need not exist.

    Raises:
        ValueError: If the file does not hold results, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, str]] = []
        if path.exists():
            fields, self.lines = _read(path)
            if fields != COLUMNS:
                raise ValueError(
                    f"the columns of {path} are not those of results ({', '.join(COLUMNS)}); move "
                    "it away, or choose another folder with --results"
                )

            self._check()

    def _check(self) -> None:
        """Raise ValueError if a line does not describe a finished run, or a run has two lines."""
        cells = set()
        for number, line in enumerate(self.lines, start=2):
            try:
                cell = line["row"], int(line["seed"])
                for name in ("accuracy", "top5", "parameters", "macs", "seconds"):
                    float(line[name])
                json.loads(line["versions"])
            except (TypeError, ValueError, KeyError) as error:
                raise ValueError(
                    f"line {number} of {self.path} is damaged ({error}): remove it, and the result "
                    "is read from its run folder again"
                ) from error
            if cell in cells:
                raise ValueError(
                    f"{self.path} has two lines of run {cell[0]} with seed {cell[1]}; remove one"
                )
            cells.add(cell)

    def __contains__(self, cell: tuple[str, int]) -> bool:
        return any((line["row"], int(line["seed"])) == cell for line in self.lines)

    def of(self, row: str) -> list[dict[str, str]]:
        """Return the runs of a row."""
        return [line for line in self.lines if line["row"] == row]

    def add(self, row: str, seed: int, summary: Mapping[str, Any], options: Options) -> None:
        """Add a finished run, and write the file."""
        line = {
            "row": row,
            "seed": seed,
            "accuracy": f"{100 * summary['top1']:.2f}",
            "top5": f"{100 * summary['top5']:.2f}",
            "epochs": summary["epochs"],
            "parameters": summary["parameters"],
            "macs": summary["macs"],
            "seconds": f"{summary['seconds']:.0f}",
            "train_images": options.data.train_images or "",
            "image_size": options.data.image_size,
            "precision": options.run.precision,
            "commit": commit(),
            "versions": json.dumps(versions()),
            "machine": machine(summary["device"]),
        }
        self.lines.append({name: str(value) for name, value in line.items()})
        self.lines.sort(key=lambda line: (line["row"], int(line["seed"])))

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(self.lines)

        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomically(self.path, write)


def _read(path: Path) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """Return the columns and lines of a CSV file."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            return tuple(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file ({error}); move it away") from error


def as_markdown(
    table: Table,
    results: Results,
    changes: Mapping[str, Any],
    command: str,
    untrained: Mapping[str, Cost],
) -> str:
    """Return a table in Markdown, with the measured results and those of the paper.

    Args:
        table: The table of the paper.
        results: The measured results.
        changes: Options in which runs differ from the paper's.
        command: The command line.
        untrained: Costs of rows before training, by name.
    """
    title = f"# {table.title}"
    if changes:
        options = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in changes.items())
        title += f", reduced: {options} (in full: {table.epochs} epochs)"
    lines = [title, "", f"`{command}`", ""]
    metric = "top-1 / top-5, %" if table.top5 else "top-1, %"
    cells = [["row", metric, "n", "paper", "parameters", "MACs", "paper's cost"]]
    cells.append(["---"] * len(cells[0]))
    for row in table.rows:
        runs = results.of(row.name)
        if runs or row.usual:
            cells.append(_line(row, runs, untrained.get(row.name), table.top5))
    for quoted in table.quoted:
        costs = ", ".join(filter(None, (quoted.parameters, quoted.macs)))
        accuracy = f"{quoted.accuracy} ({quoted.source})"
        cells.append([quoted.title, "", "", accuracy, "", "", costs])
    if not any(row.paper for row in table.rows):
        cells = [[*row[:3], *row[4:]] for row in cells]
    if not any(row.paper_cost for row in table.rows):
        cells = [row[:-1] for row in cells]
    lines += [f"| {' | '.join(row)} |" for row in cells]
    lines += ["", *_notes(table, results)]
    return "\n".join(lines) + "\n"


def _line(row: Row, runs: list[dict[str, str]], untrained: Cost | None, top5: bool) -> list[str]:
    """Return the cells of a row."""
    names = ["accuracy", "top5"] if top5 else ["accuracy"]
    accuracy = " / ".join(_spread([float(run[name]) for run in runs]) for name in names)
    accuracy = accuracy if runs else "not run"
    costs = ["", ""]
    if runs:
        costs = [_mean(runs, name) for name in ("parameters", "macs")]
    elif untrained:
        costs = [f"{untrained.parameters:,} *", f"{untrained.macs:,} *"]
    paper = row.paper or "not in it"
    return [row.title, accuracy, str(len(runs)), paper, *costs, row.paper_cost]


def _spread(values: list[float]) -> str:
    """Return mean and standard deviation as text."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def _mean(runs: list[dict[str, str]], name: str) -> str:
    """Return the mean of a column as text."""
    return f"{statistics.mean(int(run[name]) for run in runs):,.0f}"


def _notes(table: Table, results: Results) -> list[str]:
    """Return the text below a table."""
    lines = [
        "Accuracy is measured after the last epoch on images that were not trained on, mean ± "
        "standard deviation over n seeds; MACs are multiply-adds per image."
    ]
    lines += table.notes
    if any(row.usual and not results.of(row.name) for row in table.rows) and not table.finds_data:
        lines.append(
            f"\\* before training, with {table.classes} classes; a learned wiring has other dead "
            "nodes after training."
        )
    for name in ("machine", "commit"):
        values = sorted({line[name] for line in results.lines} - {""})
        if values:
            lines.append(f"{name.capitalize()}: {'; '.join(values)}.")
    for text in sorted({line["versions"] for line in results.lines}):
        packages = ", ".join(f"{k} {v}" for k, v in json.loads(text).items())
        lines.append(f"Versions: {packages}.")
    if results.lines:
        hours = sum(float(line["seconds"]) for line in results.lines) / 3600
        lines.append(f"Training took {hours:.2f} hours in total.")
    return ["\n\n".join(lines)]
