"""Kernels and the threads of PyTorch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import torch

torch.set_num_threads(1)
from dnw_graph import NeuralGraph, Topology

graph = NeuralGraph(Topology.layered([8, 8, 8]), num_edges=20)
graph(torch.randn(2, 8, 4, 4)).sum().backward()
print(torch.get_num_threads())
"""


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="this machine gives PyTorch one thread")
def test_kernels_leave_the_number_of_threads_as_it_was() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.stdout == "1\n", done.stderr[-2000:]
