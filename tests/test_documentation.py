"""The code in README and docs runs, and the examples do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITHOUT_CODE = {ROOT / "docs/README.md", ROOT / "docs/design.md"}

WARNINGS = (
    "error::UserWarning",
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:`isinstance(treespec, LeafSpec)` is deprecated",
)
"""Of the code on pages, those of Lightning are ignored."""


@pytest.mark.parametrize("page", sorted({*PAGES} - WITHOUT_CODE), ids=lambda page: page.name)
def test_code_blocks_run_in_order(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks, f"{page.name} has no code"
    script = "\n".join(blocks)
    done = subprocess.run(
        [sys.executable, *(f"-W{warning}" for warning in WARNINGS), "-c", script],
        cwd=tmp_path,  # some write files
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    pages = {page.name for page in PAGES if page.parent.name == "docs"} - {"README.md"}
    assert set(re.findall(r"^\| \[(.+?)\]", index, flags=re.MULTILINE)) == pages


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_digits_example_learns() -> None:
    done = subprocess.run(
        [sys.executable, "examples/digits.py", "--epochs", "12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    accuracies = [float(a) for a in re.findall(r"([\d.]+)%\s+\d+\n", done.stdout)]
    assert len(accuracies) == 12
    assert max(accuracies) > 85
    assert "real edges from block" in done.stdout


def test_a_rule_of_ones_own_learns_as_well() -> None:
    done = subprocess.run(
        [sys.executable, "examples/own_rule.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    last = re.findall(r"^ +5 .*?([\d.]+)% +\d+$", done.stdout, flags=re.MULTILINE)
    assert len(last) == 3
    assert min(map(float, last)) > 70


def example(*args: str) -> str:
    """Return what an example prints."""
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def accuracies(printed: str) -> list[float]:
    """Return the test accuracies that the examples' training prints, epoch by epoch."""
    return [float(a) for a in re.findall(r"^ +\d+ .*?([\d.]+)% +\d+$", printed, flags=re.MULTILINE)]


def test_a_perceptron_is_a_graph_in_three_steps() -> None:
    out = example("examples/perceptron.py")
    assert float(re.findall(r"largest difference .*: (.*)", out)[0]) < 1e-6
    assert "after step 2 the outputs hold  0.000,  0.000" in out


def test_a_small_world_learns_under_every_schedule() -> None:
    out = example("examples/small_world.py", "--epochs", "1")
    assert re.findall(r"^(\w+): Topology", out, flags=re.MULTILINE) == [
        "static",
        "discrete",
        "continuous",
    ]
    assert len(accuracies(out)) == 3
    assert min(accuracies(out)) > 20


def test_a_recurrent_graph_reads_digits_row_by_row() -> None:
    assert accuracies(example("examples/recurrent_digits.py"))[-1] > 90


def test_an_edited_wiring_is_trained_on() -> None:
    out = example("examples/edit_wiring.py")
    first, second = out.split("\nwithout")
    assert len(accuracies(first)) == 6
    assert accuracies(second)[-1] > 85
    assert re.search(r"^ \d+ hidden nodes, with [\d,]+ edges", second)


def test_generators_are_compared_on_any_ten_classes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, number in (("train", 8), ("test", 3)):
        for label in range(10):
            folder = tmp_path / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = generator.integers(25 * label, 25 * label + 30, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    options = ["--images", "80", "--epochs", "2", "--seeds", "2"]
    rows = example("examples/search_generators.py", "--data", str(tmp_path), *options).splitlines()
    assert len(rows) == 2 + 8
    assert all(" | 640 | " in row for row in rows[2:])
