"""Graphs whose candidates are few of the pairs take memory for their edges, never V²."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import resource
from benchmarks.scaling import large, make_step

size = large()
assert size.topology.num_candidates == 5_000_000
assert not any(block.complete for block in size.topology.blocks[1:])
make_step(size, "cpu")()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # kilobytes
"""


def test_a_hundred_thousand_nodes_and_five_million_candidates_fit() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 1e6 * 0.5 < int(done.stdout) < 1e6 * 8
