"""Compare memory layouts, dense and sparse, for one 14x14 graph of MobileNetV1-DNW x0.225.

This measurement was made before the library was written and does not import it. The graph has 256
inputs, six target blocks of 512 nodes, and k = 72,991 real of 4,718,592 candidate edges. The node
function (batch norm, ReLU, 3x3 per node) and the aggregation (I = A Z with its gradients to the
states and to every candidate weight) are timed separately, each forward and backward.

    python benchmarks/layout_spike.py [--device cuda] [--batch-size 16] [--repeats 7]
"""

import argparse
from collections.abc import Callable

import numba
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import alternate, machine

INPUTS, WIDTH, LAYERS, SIDE, EDGES = 256, 512, 6, 14, 72_991


@numba.njit(parallel=True, fastmath={"contract", "reassoc"})
def _sparse_product(ptr, col, val, z, out, tile):  # out[v] = sum_e val[e] * z[col[e]]
    for t in numba.prange((z.shape[1] + tile - 1) // tile):
        a, b = t * tile, min(t * tile + tile, z.shape[1])
        for v in range(len(ptr) - 1):
            row, e = out[v, a:b], ptr[v]
            for n in range(b - a):
                row[n] = 0
            while e + 4 <= ptr[v + 1]:  # four messages per pass over the row
                w0, w1, w2, w3 = val[e], val[e + 1], val[e + 2], val[e + 3]
                z0, z1 = z[col[e], a:b], z[col[e + 1], a:b]
                z2, z3 = z[col[e + 2], a:b], z[col[e + 3], a:b]
                for n in range(b - a):
                    row[n] += w0 * z0[n] + w1 * z1[n] + w2 * z2[n] + w3 * z3[n]
                e += 4
            while e < ptr[v + 1]:
                w0, z0 = val[e], z[col[e], a:b]
                for n in range(b - a):
                    row[n] += w0 * z0[n]
                e += 1


def wiring() -> list[Tensor]:
    """Return a random matrix [targets, sources] per block, with EDGES nonzero entries in total."""
    shapes = [(WIDTH, INPUTS + WIDTH * j) for j in range(LAYERS)]
    total = sum(r * c for r, c in shapes)
    flat = torch.zeros(total)
    flat[torch.randperm(total)[:EDGES]] = torch.randn(EDGES)
    return [m.view(s) for m, s in zip(flat.split([r * c for r, c in shapes]), shapes, strict=True)]


def node_functions(batch: int, device: str) -> dict[str, Callable[[], object]]:
    """Return norm, ReLU and 3x3 of one hidden block, forward and backward, by layout."""
    filters = torch.randn(WIDTH, 1, 3, 3, device=device, requires_grad=True)
    gamma = torch.ones(WIDTH, device=device, requires_grad=True)
    beta = torch.zeros(WIDTH, device=device, requires_grad=True)
    nchw = torch.randn(batch, WIDTH, SIDE, SIDE, device=device, requires_grad=True)
    last = nchw.detach().to(memory_format=torch.channels_last).requires_grad_()
    major = nchw.detach().transpose(0, 1).contiguous().requires_grad_()
    grad = torch.randn_like(nchw)
    grads = grad, grad.to(memory_format=torch.channels_last), grad.transpose(0, 1).contiguous()

    def conv(x: Tensor) -> Tensor:
        x = F.relu(F.batch_norm(x, None, None, gamma, beta, True))
        return F.conv2d(x, filters, padding=1, groups=WIDTH)

    def normed(x: Tensor) -> Tensor:
        flat = F.batch_norm(x.view(1, WIDTH, -1), None, None, gamma, beta, True)
        return F.relu(flat).view_as(x)

    def major_conv2d(x: Tensor) -> Tensor:
        x = F.conv2d(normed(x).transpose(0, 1), filters, padding=1, groups=WIDTH)
        return x.transpose(0, 1).contiguous()

    def major_conv3d(x: Tensor) -> Tensor:
        x = normed(x).unsqueeze(0)
        return F.conv3d(x, filters.unsqueeze(2), padding=(0, 1, 1), groups=WIDTH).squeeze(0)

    def major_shifts(x: Tensor) -> Tensor:
        x, out = F.pad(normed(x), (1, 1, 1, 1)), torch.zeros((), device=device)
        for i in range(9):
            dy, dx = divmod(i, 3)
            tap = filters[:, 0, dy, dx].view(-1, 1, 1, 1)
            out = torch.addcmul(out, tap, x[..., dy : dy + SIDE, dx : dx + SIDE])
        return out

    def step(f: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(x), (x, filters, gamma, beta), g)

    return {
        "[B, V, H, W] (contiguous NCHW)": step(conv, nchw, grads[0]),
        "[B, H, W, V] (channels-last)": step(conv, last, grads[1]),
        "[V, B, H, W] (node-major), conv2d of a transpose": step(major_conv2d, major, grads[2]),
        "[V, B, H, W] (node-major), conv3d": step(major_conv3d, major, grads[2]),
        "[V, B, H, W] (node-major), nine shifted adds": step(major_shifts, major, grads[2]),
    }


def aggregations(batch: int, device: str) -> dict[str, dict[str, Callable[[], object]]]:
    """Return all six products I = A Z and their gradients, by layout and density."""
    matrices = [m.to(device) for m in wiring()]
    csr = [m.to_sparse_csr() for m in matrices]
    csr_t = [m.t().contiguous().to_sparse_csr() for m in matrices]
    pixels = batch * SIDE * SIDE
    major = torch.randn(INPUTS + WIDTH * LAYERS, pixels, device=device)
    last = torch.randn(pixels, INPUTS + WIDTH * LAYERS, device=device)
    d_major = torch.randn(WIDTH, pixels, device=device)
    d_last = torch.randn(pixels, WIDTH, device=device)
    rows = [m.shape[1] for m in matrices]

    def loop(f: Callable[[int, int], object]) -> Callable[[], object]:
        return lambda: [f(j, s) for j, s in enumerate(rows)]

    def numba_product(
        sparse: list[Tensor], source: Callable[[int], Tensor]
    ) -> Callable[[], object]:
        packed = [
            (a.crow_indices().numpy(), a.col_indices().int().numpy(), a.values().numpy())
            for a in sparse
        ]

        def run() -> None:
            for j, (ptr, col, val) in enumerate(packed):
                out = torch.empty(len(ptr) - 1, pixels)
                _sparse_product(ptr, col, val, source(j).numpy(), out.numpy(), 256)

        return run

    table: dict[str, dict[str, Callable[[], object]]] = {
        "node-major, dense": {
            "forward": loop(lambda j, s: matrices[j] @ major[:s]),
            "to states": loop(lambda j, _: matrices[j].t() @ d_major),
            "to candidates": loop(lambda _, s: d_major @ major[:s].t()),
        },
        "channels-last, dense": {
            "forward": loop(lambda j, s: last[:, :s] @ matrices[j].t()),
            "to states": loop(lambda j, _: d_last @ matrices[j]),
            "to candidates": loop(lambda _, s: d_last.t() @ last[:, :s]),
        },
        "node-major, sparse (torch CSR)": {
            "forward": loop(lambda j, s: csr[j] @ major[:s]),
            "to states": loop(lambda j, _: csr_t[j] @ d_major),
        },
        "channels-last, sparse (torch CSR)": {
            "forward": loop(lambda j, s: (csr[j] @ last[:, :s].t()).t()),
            "to states": loop(lambda j, _: (csr_t[j] @ d_last.t()).t()),
        },
    }
    if device == "cpu":
        table["node-major, sparse (Numba)"] = {
            "forward": numba_product(csr, lambda j: major[: rows[j]]),
            "to states": numba_product(csr_t, lambda _: d_major),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)

    print(f"{machine(args.device)}, batch {args.batch_size}, float32")
    print(
        "\n| node function of one block, forward and backward | ms, median (range) |\n| --- | --- |"
    )
    nodes = alternate(node_functions(args.batch_size, args.device), args.repeats, args.device)
    for name, timing in nodes.items():
        print(f"| {name} | {timing} |")
    parts = aggregations(args.batch_size, args.device)
    flat = {f"{n}/{p}": run for n, row in parts.items() for p, run in row.items()}
    times = alternate(flat, args.repeats, args.device)
    print("\n| aggregation of the whole graph, ms | forward | to states | to candidates |")
    print("| --- | --- | --- | --- |")
    for name in parts:
        keys = [f"{name}/{part}" for part in ("forward", "to states", "to candidates")]
        cells = [str(times.get(key, "")) for key in keys]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
