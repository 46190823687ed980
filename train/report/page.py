"""Write a report: one self-contained HTML file."""

import json
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from dnw_graph.analysis import similarity
from train.choices import Weights
from train.files import atomically
from train.report.collect import RunData, statistic
from train.report.pack import compressed
from train.run import RunConfig

COMPARED = 3  # pairs of random wirings in a comparison


def write_report(
    runs: Sequence[str | Path], out: str | Path, *, weights: Weights = "last", random: int = 10
) -> list[str]:
    """Write an HTML report on runs that opens offline.

    Args:
        runs: Run folders; the wirings of the first two are compared.
        out: The file.
        weights: Which weights of the runs to use.
        random: Number of random wirings to compare each graph with, 2 or more.

    Returns:
        Notes on what was left out, and why.

    Raises:
        ValueError: If no run has a readable configuration and weights, there are fewer than two
            random wirings, or plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError('reports need plotly: pip install "dnw-graph[report]"') from error
    reports, errors = [], []
    for run in runs:
        try:
            reports.append(RunData(run, weights, random))
        except ValueError as error:
            if len(runs) == 1:
                raise
            errors.append(f"{run}: {error}")
    if not reports:
        raise ValueError(f"none of the runs can be read: {'; '.join(errors)}")
    reports[0].notes += errors
    values = {"runs": [run.values for run in reports], "compared": _compared(reports)}
    package = files("train.report")
    text = Template((package / "page.html").read_text(encoding="utf-8")).substitute(
        style=(package / "page.css").read_text(encoding="utf-8"),
        script=(package / "page.js").read_text(encoding="utf-8"),
        plotly=_in_script(compressed(get_plotlyjs().encode())),
        values=_in_script(values),
        packs=_in_script([run.pack.text() for run in reports]),
    )
    path = Path(out)
    atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return [f"{run.folder.path}: {note}" for run in reports for note in run.notes]


def _in_script(values: Any) -> str:
    """Return JSON that cannot end the script element around it, regardless of its text."""
    text = json.dumps(values, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _compared(reports: Sequence[RunData]) -> list[dict[str, Any]]:
    """Return similarities of the graphs of the first two runs that have the same blocks."""
    if len(reports) < 2:
        return []
    first, second, rows = reports[0], reports[1], []
    for name, graph in first.graphs.items():
        if name not in second.graphs:
            second.notes.append(f"the comparison of {name}: this run has no such graph")
            continue
        try:
            similarities = similarity(graph, second.graphs[name], random=COMPARED)
        except ValueError as error:
            second.notes.append(f"the comparison of {name}: {error}")
            continue
        rows.append(
            {
                "name": name,
                "jaccard": statistic(similarities.jaccard),
                "matched": statistic(similarities.matched),
            }
        )
    return rows


def report_of(run: str | Path, config: RunConfig) -> None:
    """Write the report of a finished run, or print why it could not be written."""
    out = Path(run) / "report.html"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write_report([run], out)
    except (ValueError, OSError) as error:
        print(f"no report on {config.options.network.graph}: {' '.join(str(error).split())}")
    else:
        print(f"{out}: report with curves, cost, and the wiring")
