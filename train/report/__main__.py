"""Write an HTML report on runs: ``python -m train.report RUN [RUN …]``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from train.choices import Weights
from train.cli import run_command


@dataclass(frozen=True)
class Arguments:
    """Write an HTML report on runs: curves, cost, and the wiring."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders; the first two are compared."""
    out: Path | None = None
    """File to write; by default, report.html in the first run folder."""
    weights: Weights = "last"
    """Which weights of the runs."""
    random: int = 10
    """Number of random wirings to compare each graph with, 2 or more."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = tyro.cli(Arguments, args=args, prog="python -m train.report", description=__doc__)
    if not arguments.runs:
        raise ValueError("no run: use python -m train.report RUN")
    from train.report.page import write_report

    out = arguments.out or Path(arguments.runs[0]) / "report.html"
    for note in write_report(
        arguments.runs, out, weights=arguments.weights, random=arguments.random
    ):
        print(f"left out: {note}")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
