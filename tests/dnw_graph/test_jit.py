"""Kernels and the threads of PyTorch."""

import os
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


COMPUTE = """
import sys

import torch

from dnw_graph import NeuralGraph, Topology, attach, freeze

found = {}
dag = Topology.random_dag("erdos_renyi", 20, 3, 2, p=0.4)
for name, topology in (("blocks", Topology.layered([6, 9, 5])), ("dag", dag)):
    for node in ("norm_relu_conv", "relu_conv", "relu"):
        for rule in ("dnw", "gse(every=2)"):
            torch.manual_seed(0)
            graph = NeuralGraph(topology, rule=rule, num_edges=18, node=node)
            optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
            attach(graph, optimizer, total_steps=4)
            x = torch.randn(2, topology.num_inputs, 5, 5)
            for _ in range(4):
                optimizer.zero_grad()
                graph(x).square().mean().backward()
                optimizer.step()
            found[f"{name}, {node}, {rule}"] = graph.eval()(x).detach()
            found[f"{name}, {node}, {rule}, frozen"] = freeze(graph)(x)
try:
    NeuralGraph(topology, num_edges=4, backend="sparse")
except ValueError as error:
    print(error)
torch.save(found, sys.argv[1])
"""


def test_without_a_compiler_everything_runs_but_the_sparse_backend(tmp_path: Path) -> None:
    outputs = {}
    for value in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", COMPUTE, str(tmp_path / value)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "NUMBA_DISABLE_JIT": value},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said = "NUMBA_DISABLE_JIT=1 disables: unset that variable" in done.stdout
        assert said == (value == "1")
        outputs[value] = torch.load(tmp_path / value)
    assert outputs["0"].keys() == outputs["1"].keys()
    for name, expected in outputs["0"].items():
        torch.testing.assert_close(outputs["1"][name], expected, rtol=1e-3, atol=1e-4, msg=name)
