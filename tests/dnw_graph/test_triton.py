"""The GPU kernels, on machines without a GPU: interpreted, and compiled."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dnw_graph import NeuralGraph, Topology
from tests.conftest import ready, relative_error

triton = pytest.importorskip("triton", reason="Triton, which GPU kernels need, is not installed")

MAPS = [  # nodes, images, height, width, stride, groups
    (4, 3, 9, 14, 2, 1),
    (3, 4, 6, 6, 1, 4),
    (1, 3, 15, 14, 1, 1),  # more pixels than one program sums up
    (3, 2, 1, 1, 1, 1),
    (2, 2, 5, 1, 2, 2),
    (2, 0, 4, 4, 1, 1),
]
TYPES = [  # of maps, of parameters
    (torch.float32, torch.float32, 1e-5),
    (torch.bfloat16, torch.float32, 2.0**-7),
    (torch.float16, torch.float32, 2.0**-9),
    (torch.float64, torch.float64, 1e-12),
]


def compare_node_functions() -> None:
    """Raise where an interpreted kernel differs from that for CPUs."""
    from dnw_graph.node import _triton, fused

    _triton._PIXELS, _triton._TURNS = 64, 2  # interpreted quickly
    cases = [(MAPS[0], types) for types in TYPES] + [(maps, TYPES[0]) for maps in MAPS[1:]]
    for (nodes, batch, height, width, stride, groups), (dtype, parameters, bound) in cases:
        for given in (False, True):
            torch.manual_seed(0)
            x = (torch.randn(nodes, batch, height, width) + 0.5).to(dtype)
            sizes = (nodes,), (nodes,), (nodes, 3, 3)
            inputs = x, *(torch.randn(size, dtype=parameters) for size in sizes)
            upstream = torch.randn(fused.shape(x, stride)).to(dtype)
            results = []
            for way in (fused, _triton):
                # There are no CPU kernels for float16: its values are computed in float32.
                on_cpu = way is fused and dtype == torch.float16
                maps = torch.float32 if on_cpu else dtype
                torch.manual_seed(1)
                mean = torch.randn(nodes, groups, dtype=parameters)
                rstd = torch.rand(nodes, groups, dtype=parameters) + 0.5
                z, again = torch.empty_like(upstream, dtype=maps), torch.empty_like(upstream)
                again = again.to(maps)
                tensors = inputs[0].to(maps), *inputs[1:]
                way.forward(*tensors, mean, rstd, z, stride, 1e-3, given)
                grads = [torch.empty_like(t) for t in tensors]
                way.backward(upstream.to(maps), *tensors, mean, rstd, *grads, again, stride, given)
                statistics = [mean, rstd] if batch else []
                results.append([z, again, *statistics, *grads])
            for actual, expected in zip(results[1], results[0], strict=True):
                error = relative_error(actual.double(), expected.double())
                case = nodes, batch, height, width, stride, dtype, given, actual.shape
                assert error < bound, (case, error)


def compare_sums() -> None:
    """Raise where an operator of the sparse backend differs from that for CPUs."""
    from dnw_graph.aggregation import _kernels, _triton

    _triton._COLUMNS = 64  # interpreted quickly
    torch.manual_seed(0)
    # Blocks of 3, 2 and 4 nodes; node 7 has no edge.
    pairs = [(u, v) for v in range(3, 9) for u in range(5) if (u < 3 or v > 4) and v != 7]
    pairs = [pair for pair in pairs if torch.rand(1) < 0.7]
    source, target = torch.tensor(pairs).t()
    ptr = torch.searchsorted(target.contiguous(), torch.arange(10))
    first, last = int(ptr[5]), int(ptr[9])
    edges = torch.arange(len(source))
    for features, (dtype, weights, bound) in product(((2,), (0,), (3, 7, 5), (2, 9, 9)), TYPES):
        weight = torch.randn(len(source), dtype=weights)
        states = [torch.randn(n, *features).to(dtype) for n in (3, 2)]
        grads = [torch.randn(n, *features).to(dtype) for n in (2, 4)]
        results = []
        for way in (_kernels, _triton):
            on_cpu = way is _kernels and dtype == torch.float16
            z = [x.float() if on_cpu else x for x in states]
            g = [x.float() if on_cpu else x for x in grads]
            to_states, to_weight = z[0].new_empty(z[0].shape), torch.zeros_like(weight)
            order = way.by_source(source, ptr)
            way.push(weight[order[2]], *order[:2], [0, 3], [3, 5], g, to_states)
            way.dots(to_weight, *order, [0, 3], z[0], [3, 5], g)
            block, part = [5, 9], weight[first:last].clone()
            results.append(
                [
                    way.gather(weight, source, ptr, block, [0, 3], z),
                    *way.spread(weight, source, ptr, block, [0, 3], [3, 2], g[1]),
                    way.correlate(part, edges, source, ptr, [*block, first], [0, 3], z, g[1]),
                    *order,
                    to_states,
                    to_weight,
                ]
            )
        for number, (actual, expected) in enumerate(zip(results[1], results[0], strict=True)):
            error = relative_error(actual.double(), expected.double())
            assert actual.shape == expected.shape, (number, features, dtype)
            assert error < bound, (number, features, dtype, error)


def compare_graphs() -> None:
    """Raise where whole graphs differ if they use the kernels for GPUs."""
    from dnw_graph.aggregation import _kernels, _triton

    torch.manual_seed(0)
    chosen = torch.rand(16, 16).triu(1) > 0.7
    chosen[:, :2], chosen[0, 14:] = False, True
    irregular = Topology.from_edges(chosen.nonzero().t(), inputs=[0, 1], outputs=[14, 15])
    cases = [
        (irregular, "static", "dnw"),
        (irregular, "static", "rigl(every=2)"),
        (Topology.layered([4, 6, 3]), "static", "dnw"),
        (Topology.recurrent(3, 7, 2), "discrete(steps=3)", "gse(every=2)"),
    ]
    names = "gather", "spread", "correlate", "by_source", "push", "dots"
    kernels = {name: getattr(_triton, name) for name in names}
    for topology, schedule, rule in cases:
        k = topology.num_candidates // 2
        graph = NeuralGraph(
            topology, num_edges=k, rule=rule, schedule=schedule, node="relu", backend="sparse"
        ).double()
        x = torch.randn(3, topology.num_inputs, dtype=torch.float64, requires_grad=True)
        ready(graph)
        inputs = [x, *graph.parameters()]
        # A hook on a node function, so that the whole graph is not one CPU kernel.
        graph.nodes[0].register_forward_hook(lambda *_: None)
        results = []
        for replacement in (nullcontext(), patch.multiple(_kernels, **kernels)):
            with (
                replacement,
                patch("dnw_graph.schedule.static._sums", _block_by_block),
            ):
                y = graph(x)
                results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        for actual, expected in zip(results[1], results[0], strict=True):
            assert relative_error(actual, expected) < 1e-12, (schedule, rule, actual.shape)


def _block_by_block(forward_pass: Any, like: Tensor) -> Any:
    from dnw_graph.schedule.static import _Sums

    return _Sums(forward_pass)


def compare_large() -> None:
    """Raise if elements beyond 2^31 are not found (pages that are not touched take no memory)."""
    from dnw_graph.aggregation import _triton

    columns, nodes = 1 << 16, (1 << 15) + 2
    rows = torch.empty(nodes, columns, dtype=torch.bfloat16)
    rows[-1] = 1.0
    weight, index = torch.tensor([3.0]), torch.tensor([nodes - 1])
    ptr = torch.tensor([0] * (nodes - 1) + [0, 1])
    out = torch.empty(1, columns)
    _triton.push(weight, ptr, index, [nodes - 1, nodes], [0], [rows], out)
    assert (out == 3).all()
    found = torch.zeros(1)
    position = torch.zeros(1, dtype=torch.int64)
    block = [nodes - 1, nodes]
    _triton.dots(found, ptr, index, position, block, out, [0], [rows])
    assert float(found) == 3 * columns


CHECKS = {
    "node functions": compare_node_functions,
    "sums": compare_sums,
    "graphs": compare_graphs,
    "large": compare_large,
}


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted_kernels_equal_those_for_cpus(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.dnw_graph.test_triton", name],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"{name}: equal" in done.stdout


NODE_KERNELS = "_sums", "_apply", "_backward_sums", "_backward_apply", "_correlate"
KERNELS = [("node", name) for name in NODE_KERNELS]
KERNELS += [("aggregation", name) for name in ("_sums", "_products")]
ELEMENTS = {"x", "grad", "z", "dx", "rows", "nodes", "out"}
INTEGERS = {"ptr", "index", "position"}
SIZES = {
    "node": {"n", "group_size", "B", "H", "W", "Ho", "Wo", "G", "stride"},
    "aggregation": {"first", "base", "offset", "columns", "parts"},
}


def compiled(folder: str, name: str, elements: str, capability: int) -> dict[str, str]:
    """Return the code of a kernel at each stage, compiled for a GPU."""
    from triton import language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dnw_graph.aggregation import _triton as sums
    from dnw_graph.node import _triton as node

    kernel = getattr({"node": node, "aggregation": sums}[folder], name)
    total, wide = (tl.float64, "*fp64") if elements == "*fp64" else (tl.float32, "*fp32")
    constants = {"BLOCK": 1024, "TURNS": 8, "TOTAL": total}
    fixed = {arg: constants[arg] for arg in kernel.arg_names if arg in constants}

    def kind(arg: str) -> str:
        if arg in fixed:
            return "constexpr"
        if arg in ELEMENTS:
            return elements
        return "*i64" if arg in INTEGERS else "i32" if arg in SIZES[folder] else wide

    signature = {arg: kind(arg) for arg in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    code: dict[str, str] = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
    return code


@pytest.mark.parametrize(
    ("elements", "capability"), [("*fp32", 90), ("*bf16", 100), ("*fp16", 80), ("*fp64", 90)]
)
@pytest.mark.parametrize(("folder", "name"), KERNELS, ids=[f"{f}{n}" for f, n in KERNELS])
def test_kernels_compile_for_gpus(folder: str, name: str, elements: str, capability: int) -> None:
    ptx = compiled(folder, name, elements, capability)["ptx"]
    assert f".target sm_{capability}" in ptx
    assert ".visible .entry" in ptx


@pytest.mark.parametrize(("folder", "name"), KERNELS, ids=[f"{f}{n}" for f, n in KERNELS])
def test_addresses_are_computed_in_64_bits(folder: str, name: str) -> None:
    """Check the offsets of all pointers, except constants, for tensors beyond 2^31 elements."""
    code = compiled(folder, name, "*fp32", 90)["ttir"]
    offsets = re.findall(r"tt\.addptr %\S+, (%\S+) : \S+, (\S+)", code)
    assert offsets
    narrow = [o for o, kind in offsets if "i64" not in kind and not re.match(r"%c\d", o)]
    assert not narrow, code


if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
    print(f"{sys.argv[1]}: equal")
