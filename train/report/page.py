"""Puts a report together: one HTML file with everything in it."""

import json
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from dnw_graph.analysis import similarity
from train.files import atomically
from train.report.collect import RunData, statistic
from train.report.pack import compressed
from train.run import RunConfig, Weights

COMPARED = 3  # pairs of random wirings behind a comparison


def write_report(
    runs: Sequence[str | Path], out: str | Path, *, weights: Weights = "last", random: int = 10
) -> list[str]:
    """Write one HTML file about runs, which opens without a network.

    Args:
        runs: Run folders; the wirings of the first two are compared.
        out: The file.
        weights: Which weights of the runs.
        random: How many random wirings to compare each graph with, 2 or more.

    Returns:
        What was left out, and why.

    Raises:
        ValueError: No run has a configuration and weights that can be read, fewer than two random
            wirings, or plotly is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError('reports need plotly: pip install "dnw-graph[report]"') from error
    found, unread = [], []
    for run in runs:
        try:
            found.append(RunData(run, weights, random))
        except ValueError as error:
            if len(runs) == 1:
                raise
            unread.append(f"{run}: {error}")
    if not found:
        raise ValueError(f"none of the runs can be read: {'; '.join(unread)}")
    found[0].notes += unread
    values = {"runs": [run.values for run in found], "compared": _compared(found)}
    own = files("train.report")
    text = Template((own / "page.html").read_text(encoding="utf-8")).substitute(
        style=(own / "page.css").read_text(encoding="utf-8"),
        script=(own / "page.js").read_text(encoding="utf-8"),
        plotly=_in_script(compressed(get_plotlyjs().encode())),
        values=_in_script(values),
        packs=_in_script([run.pack.text() for run in found]),
    )
    path = Path(out)
    atomically(path, lambda half: half.write_text(text, encoding="utf-8"))
    return [f"{run.folder.path}: {note}" for run in found for note in run.notes]


def _in_script(values: Any) -> str:
    """Return JSON that cannot end the script it stands in, whatever text is in it."""
    text = json.dumps(values, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _compared(found: Sequence[RunData]) -> list[dict[str, Any]]:
    """Compare the graphs of the first two runs, those that have the same blocks."""
    if len(found) < 2:
        return []
    first, second, rows = found[0], found[1], []
    for name, graph in first.graphs.items():
        if name not in second.graphs:
            second.notes.append(f"the comparison of {name}: there is no such graph")
            continue
        try:
            alike = similarity(graph, second.graphs[name], random=COMPARED)
        except ValueError as error:
            second.notes.append(f"the comparison of {name}: {error}")
            continue
        rows.append(
            {
                "name": name,
                "jaccard": statistic(alike.jaccard),
                "matched": statistic(alike.matched),
            }
        )
    return rows


def report_of(run: str | Path, config: RunConfig) -> None:
    """Write the report of a run that has ended, or say why there is none."""
    out = Path(run) / "report.html"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write_report([run], out)
    except (ValueError, OSError) as error:
        print(f"no report of {config.options.network.graph}: {' '.join(str(error).split())}")
    else:
        print(f"{out}: curves, cost, and the wiring to look at")
