"""Loss and gradients of one step, and what is wrong where they are not finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torchvision.transforms import v2

from dnw_graph import penalty
from train.metrics import Normalize
from train.options import OptimizationOptions


class Step(NamedTuple):
    """What came of a step: mean loss, logits ``[B, classes]``, and the norm of the gradient."""

    loss: Tensor
    logits: Tensor
    grad_norm: Tensor


def seed_step(seed: int, step: int, rank: int) -> None:
    """Let the random numbers of a step depend on seed, step and process alone.

    So there is no state of them to keep, and a run that is resumed anywhere draws the same.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


class Gradients:
    """Computes loss and gradients of a batch, in parts that fit into memory.

    Args:
        fabric: Where and how it runs.
        model: The network as Fabric wraps it.
        plain_model: The network itself.
        normalize: From bytes to what it takes.
        fit: Label smoothing, mixing, parts, clipping.
        num_classes: Number of classes.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: Any,
        plain_model: nn.Module,
        normalize: Normalize,
        fit: OptimizationOptions,
        num_classes: int,
    ) -> None:
        self.fabric, self.model, self.plain_model = fabric, model, plain_model
        self.normalize, self.fit = normalize, fit
        mixes = [(v2.MixUp, fit.mixup), (v2.CutMix, fit.cutmix)]
        wanted = [mix(alpha=alpha, num_classes=num_classes) for mix, alpha in mixes if alpha]
        self.mix = v2.RandomChoice(wanted) if wanted else None

    def __call__(self, images: Tensor, labels: Tensor) -> Step:
        """Leave the gradients in the parameters, clipped if asked to.

        Args:
            images: This process' part of the batch ``[B, 3, H, W]``, uint8, on the device.
            labels: Their labels ``[B]``.
        """
        number = self._number_of_parts(len(images))
        parts = list(zip(images.tensor_split(number), labels.tensor_split(number), strict=True))
        losses, logits = [], []
        for i, (some, theirs) in enumerate(parts):
            last = i == len(parts) - 1
            with self.fabric.no_backward_sync(self.model, enabled=not last):
                loss, out = self._loss(some, theirs)
                share = loss * (len(some) / len(images))
                self.fabric.backward(share + penalty(self.plain_model) if last else share)
            losses.append(share.detach())
            logits.append(out.detach())
        return Step(torch.stack(losses).sum(), torch.cat(logits), self._norm())

    def _number_of_parts(self, images: int) -> int:
        """Return into how many parts a batch goes: as many on each process, whatever was bad.

        Raises:
            ValueError: Fewer images are left than parts.
        """
        whole = self.fit.batch_size // self.fabric.world_size
        number = -(-whole // (self.fit.micro_batch_size or whole))
        if images < number:
            raise ValueError(
                f"{images} of {whole} images of a batch could be read, fewer than the {number} "
                "parts that --micro-batch-size makes of it"
            )
        return number

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = self.normalize(images), labels
        if self.mix is not None:
            inputs, targets = self.mix(inputs, labels)
            targets = targets.to(inputs.dtype)
        logits: Tensor = self.model(inputs)
        smoothing = self.fit.label_smoothing
        return F.cross_entropy(logits, targets, label_smoothing=smoothing), logits

    def _norm(self) -> Tensor:
        """Return the norm of the gradient, before it is clipped."""
        parameters = [p for p in self.plain_model.parameters() if p.grad is not None]
        if self.fit.clip_grad_norm:
            return nn.utils.clip_grad_norm_(parameters, self.fit.clip_grad_norm)
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def why_not_finite(model: nn.Module, inputs: Tensor, step: Step) -> str:
    """Return what is not finite first: a parameter, a module's output, or else the gradient.

    Args:
        model: The network as it was in the step, in training mode.
        inputs: What it was given.
        step: What came of it.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the weights {name} are not finite"
    with _first_output(model) as found, torch.no_grad():
        model(inputs)
    if found:
        name, kind = found[0]
        return f"the first output that is not finite is that of {name or 'the network'} ({kind})"
    return f"every output is finite, the loss is {float(step.loss):.3g}"


@contextmanager
def _first_output(model: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Collect the modules whose outputs are not finite, in the order in which they come."""
    found: list[tuple[str, str]] = []

    def look(name: str, kind: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append((name, kind))

        return hook

    handles = [
        module.register_forward_hook(look(name, type(module).__name__))
        for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
