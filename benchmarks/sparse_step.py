"""Compare a training step of a sparse network with one of the same network when dense.

    python -m benchmarks.sparse_step [--model resnet50] [--image-size 224] [--batch-size 16]

All candidates take turns in one process, on the same images, with SGD, momentum and weight decay.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
import tyro
from torch import nn

from benchmarks.measure import alternate, machine
from dnw_graph import attach, sparsify


@dataclass(frozen=True)
class Arguments:
    """Time a training step of a sparse network."""

    model: str = "resnet50"
    """Name of a torchvision model."""
    density: float = 0.1
    """Fraction of real weights."""
    rules: tuple[str, ...] = ("dnw", "random", "rigl")
    """Rules to time."""
    image_size: int = 224
    """Height and width, in pixels."""
    batch_size: int = 16
    """Images per step."""
    channels_last: bool = False
    """Memory format of weights and images."""
    device: str = "cpu"
    """cpu or cuda."""
    repeats: int = 5
    """Number of timed rounds."""


def make_step(args: Arguments, rule: str | None) -> Callable[[], object]:
    """Return a function that runs one training step."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(args.model)
    if rule is not None:
        sparsify(model, args.density, rule=rule)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    labels = torch.randint(0, 1000, (args.batch_size,), device=args.device)
    model = model.to(args.device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    attach(model, optimizer, total_steps=1_000_000)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m benchmarks.sparse_step", description=__doc__)
    steps = {"dense": make_step(args, None)}
    steps |= {rule: make_step(args, rule) for rule in args.rules}
    times = alternate(steps, args.repeats, args.device)
    layout = ", channels_last" if args.channels_last else ""
    print(
        f"{machine(args.device)}, {args.model}, density {args.density}, batch {args.batch_size}, "
        f"{args.image_size} pixels{layout}\n"
    )
    print("| step | ms, median (range) | of dense |")
    print("| --- | --- | --- |")
    for name, timing in times.items():
        print(f"| {name} | {timing} | {timing.median / times['dense'].median:.2f} |")


if __name__ == "__main__":
    main()
