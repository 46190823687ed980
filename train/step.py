"""Loss and gradients of one step, and the cause if they are not finite."""

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
    """The results of a step: mean loss, logits ``[B, classes]``, and norm of the gradient."""

    loss: Tensor
    logits: Tensor
    grad_norm: Tensor


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed PyTorch for a step, from seed, step and rank only.

    So checkpoints need no random state, and a resumed run draws the same random numbers.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


class Gradients:
    """Computes loss and gradients of a batch, in micro-batches that fit into memory.

    Args:
        fabric: Lightning Fabric, already launched.
        model: The network as wrapped by Fabric.
        plain_model: The network without wrappers.
        normalize: Normalisation of the images.
        fit: Options for label smoothing, mixing, micro-batches and clipping.
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
        options = [(v2.MixUp, fit.mixup), (v2.CutMix, fit.cutmix)]
        transforms = [mix(alpha=alpha, num_classes=num_classes) for mix, alpha in options if alpha]
        self.mix = v2.RandomChoice(transforms) if transforms else None

    def __call__(self, images: Tensor, labels: Tensor) -> Step:
        """Return the results of a step, and store the gradients, optionally clipped, in parameters.

        Args:
            images: This process' part of the batch ``[B, 3, H, W]``, uint8, on the device.
            labels: Their labels ``[B]``.
        """
        number = self._number_of_parts(len(images))
        parts = list(zip(images.tensor_split(number), labels.tensor_split(number), strict=True))
        losses, logits = [], []
        for i, (part_images, part_labels) in enumerate(parts):
            is_last = i == len(parts) - 1
            with self.fabric.no_backward_sync(self.model, enabled=not is_last):
                loss, out = self._loss(part_images, part_labels)
                share = loss * (len(part_images) / len(images))
                self.fabric.backward(share + penalty(self.plain_model) if is_last else share)
            losses.append(share.detach())
            logits.append(out.detach())
        return Step(torch.stack(losses).sum(), torch.cat(logits), self._norm())

    def size_that_fits(self, images: Tensor, labels: Tensor) -> int | None:
        """Return a number of images whose gradients fit into memory, if those of a batch do not.

        Tries a half of the images of a part, a quarter, and so on.

        Returns:
            The number, or None if not even one image fits.
        """
        size = min(len(images), self.fit.micro_batch_size or len(images))
        while size > 1:
            size //= 2
            self.plain_model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            try:
                with self.fabric.no_backward_sync(self.model):  # other processes do not take part
                    self.fabric.backward(self._loss(images[:size], labels[:size])[0])
            except torch.OutOfMemoryError:
                continue
            return size
        return None

    def _number_of_parts(self, images: int) -> int:
        """Return the number of micro-batches, which is the same on all processes.

        Args:
            images: Images of the batch that could be read.

        Raises:
            ValueError: If there are fewer images than micro-batches.
        """
        total = self.fit.batch_size // self.fabric.world_size
        number = -(-total // (self.fit.micro_batch_size or total))
        if images < number:
            raise ValueError(
                f"only {images} of {total} images of a batch could be read, fewer than its "
                f"{number} parts of --micro-batch-size"
            )
        return number

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss of images, and their logits."""
        inputs, targets = self.normalize(images), labels
        if self.mix is not None:
            inputs, targets = self.mix(inputs, labels)
            targets = targets.to(inputs.dtype)
        logits: Tensor = self.model(inputs)
        smoothing = self.fit.label_smoothing
        return F.cross_entropy(logits, targets, label_smoothing=smoothing), logits

    def _norm(self) -> Tensor:
        """Clip the gradient if ``clip_grad_norm`` is set, and return its norm before that."""
        parameters = [p for p in self.plain_model.parameters() if p.grad is not None]
        if self.fit.clip_grad_norm:
            return nn.utils.clip_grad_norm_(parameters, self.fit.clip_grad_norm)
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def why_not_finite(model: nn.Module, inputs: Tensor, step: Step) -> str:
    """Return a message that names the first non-finite parameter or module output, if any.

    Args:
        model: The network with the weights of the step, in training mode.
        inputs: The normalised images of the step.
        step: The results of the step.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the weights {name} are not finite"
    with _collect_not_finite(model) as modules, torch.no_grad():
        model(inputs)
    if modules:
        name, kind = modules[0]
        return f"the first output that is not finite is that of {name or 'the network'} ({kind})"
    return f"all outputs are finite, and the loss is {float(step.loss):.3g}"


@contextmanager
def _collect_not_finite(model: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Collect names and types of modules whose outputs are not finite, in order of execution."""
    modules: list[tuple[str, str]] = []

    def make_hook(name: str, kind: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                modules.append((name, kind))

        return hook

    handles = [
        module.register_forward_hook(make_hook(name, type(module).__name__))
        for name, module in model.named_modules()
    ]
    try:
        yield modules
    finally:
        for handle in handles:
            handle.remove()
