"""Write one HTML file about runs: ``python -m train.report RUN [RUN …]``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from train.cli import run_command
from train.report.page import write_report
from train.run import Weights


@dataclass(frozen=True)
class Arguments:
    """Write one HTML file about runs: curves, cost, and the wiring to look at."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders; the first two are compared."""
    out: Path | None = None
    """File to write; report.html in the first run folder unless given."""
    weights: Weights = "last"
    """Which weights of the runs."""
    random: int = 10
    """Random wirings to compare each graph with, 2 or more."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    given = tyro.cli(Arguments, args=args, prog="python -m train.report", description=__doc__)
    if not given.runs:
        raise ValueError("no run given: python -m train.report RUN")
    out = given.out or Path(given.runs[0]) / "report.html"
    for note in write_report(given.runs, out, weights=given.weights, random=given.random):
        print(f"left out: {note}")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
