"""How long choosing the real edges takes: the k largest of 8.65 million weights.

    python benchmarks/selection.py [--repeats 25]

The ways take turns in one process; all choose from the same weights.
"""

import argparse
import platform
import statistics
import time

import numpy as np
import torch

from dnw_graph.wiring import top_k

SIZE = 8_650_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, numpy {np.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, {SIZE:,} float32 weights\n"
    )
    print("| real edges | this project, ms | partition, ms | torch.topk, ms | torch.sort, ms |")
    print("| --- | --- | --- | --- | --- |")
    weight = torch.randn(SIZE)
    for share in (0.01, 0.05, 0.2):
        k = int(share * SIZE)
        ways = {
            "ours": lambda k=k: top_k(weight, k),
            "partition": lambda k=k: np.partition(weight.abs().numpy(), SIZE - k),
            "topk": lambda k=k: weight.abs().topk(k, sorted=False),
            "sort": lambda: weight.abs().sort(),
        }
        seen: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.repeats + 1):
            for name, run in ways.items():
                if name in ("topk", "sort") and turn > 5:
                    continue
                start = time.perf_counter()
                run()
                if turn:
                    seen[name].append((time.perf_counter() - start) * 1e3)
        cells = [f"{statistics.median(t):.1f} ({min(t):.1f}-{max(t):.1f})" for t in seen.values()]
        print(f"| {k:,} ({share:.0%}) | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
