"""Measure the selection of the real edges: the k largest of 8.65 million weights.

    python -m benchmarks.selection [--repeats 9]

All methods take turns in one process, with the same weights.
"""

from dataclasses import dataclass

import numpy as np
import torch
import tyro

from benchmarks.measure import alternate, machine
from dnw_graph.wiring import top_k

SIZE = 8_650_000


@dataclass(frozen=True)
class Arguments:
    """Time the selection of the real edges."""

    repeats: int = 9
    """Number of timed rounds."""


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m benchmarks.selection")
    torch.manual_seed(0)
    weight = torch.randn(SIZE)
    print(f"{machine('cpu')}, {SIZE:,} float32 weights\n")
    print("| real edges | this project, ms | partition, ms | torch.topk, ms | torch.sort, ms |")
    print("| --- | --- | --- | --- | --- |")
    for share in (0.01, 0.05, 0.2):
        k = int(share * SIZE)
        methods = {
            "project": lambda k=k: top_k(weight, k),
            "partition": lambda k=k: np.partition(weight.abs().numpy(), SIZE - k),
            "topk": lambda k=k: weight.abs().topk(k, sorted=False),
            "sort": lambda: weight.abs().sort(),
        }
        times = alternate(methods, args.repeats, "cpu")
        print(f"| {k:,} ({share:.0%}) | {' | '.join(map(str, times.values()))} |")


if __name__ == "__main__":
    main()
