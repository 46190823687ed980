"""The GPU kernels of the node function, on machines without a GPU: interpreted, and compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton, which GPU kernels need, is not installed")

CASES = [  # nodes, images, height, width, stride, groups
    (4, 3, 9, 14, 2, 1),
    (3, 4, 6, 6, 1, 4),
    (1, 3, 61, 70, 1, 1),  # more pixels than one program sums up
]


def compare() -> None:
    """Raise where an interpreted kernel differs from that for CPUs."""
    from dnw_graph.node import _triton, fused
    from tests.conftest import relative_error

    for nodes, batch, height, width, stride, groups in CASES:
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2.0**-7)):
            for given in (False, True) if batch * height < 100 else (False,):
                torch.manual_seed(0)
                x = (torch.randn(nodes, batch, height, width) + 0.5).to(dtype)
                inputs = x, torch.randn(nodes), torch.randn(nodes), torch.randn(nodes, 3, 3)
                upstream = torch.randn(fused.shape(x, stride)).to(dtype)
                found = []
                for way in (fused, _triton):
                    torch.manual_seed(1)
                    mean, rstd = torch.randn(nodes, groups), torch.rand(nodes, groups) + 0.5
                    z, again = torch.empty_like(upstream), torch.empty_like(upstream)
                    way.forward(*inputs, mean, rstd, z, stride, 1e-3, given)
                    grads = [torch.empty_like(t) for t in inputs]
                    way.backward(upstream, *inputs, mean, rstd, *grads, again, stride, given)
                    found.append([z, again, mean, rstd, *grads])
                for ours, expected in zip(found[1], found[0], strict=True):
                    error = relative_error(ours.float(), expected.float())
                    assert error < bound, (nodes, dtype, given, error)


def test_interpreted_kernels_equal_those_for_cpus() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.dnw_graph.test_triton"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "equal" in done.stdout


MAPS = {"x", "grad", "z", "dx"}
SIZES = {"n", "group_size", "B", "H", "W", "Ho", "Wo", "G", "stride"}
FIXED = {"BLOCK": 1024, "TURNS": 8}


@pytest.mark.parametrize("maps", ["*fp32", "*bf16", "*fp16"])
@pytest.mark.parametrize(
    "name", ["_sums", "_apply", "_backward_sums", "_backward_apply", "_correlate"]
)
def test_kernels_compile_for_a_gpu_that_is_not_there(name: str, maps: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dnw_graph.node import _triton

    kernel = getattr(_triton, name)
    signature = {
        arg: "constexpr"
        if arg in FIXED
        else maps
        if arg in MAPS
        else "i32"
        if arg in SIZES
        else "*fp32"
        for arg in kernel.arg_names
    }
    fixed = {arg: FIXED[arg] for arg in kernel.arg_names if arg in FIXED}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert ".visible .entry" in compiled.asm["ptx"]


if __name__ == "__main__":
    compare()
    print("equal")
