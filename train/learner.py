"""A network with its optimizer, and one training step."""

import math
import re
from itertools import islice
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from dnw_graph import attach
from dnw_graph.node import synchronize_norms
from train.average import averaged
from train.data import Batches, ResidentBatches
from train.metrics import Normalize, evaluate
from train.options import OptimizationOptions
from train.process_group import ProcessGroup
from train.run import RunConfig
from train.step import Gradients, Step, seed_step, why_not_finite

LOOK_EVERY = 10
"""Steps between checks of the results of a GPU, since each check waits for the GPU."""


class NotFiniteError(ValueError):
    """A loss, a gradient or a weight is not finite; the message names it and the step."""


class Learner:
    """A network, its optimizer, learning rate schedule and moving average in a training run.

    Args:
        config: The configuration of the run.
        model: The network.
        fabric: Lightning Fabric, already launched.
        processes: The processes of the run.
        steps_per_epoch: Training steps per epoch.

    Attributes:
        plain_model: The network without wrappers.
        steps: Number of optimizer steps done.
        lr: Learning rate of the last step.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        fabric: Fabric,
        processes: ProcessGroup,
        steps_per_epoch: int,
    ) -> None:
        run, fit = config.options.run, config.options.optimization
        self.fabric, self.processes, self.per_epoch = fabric, processes, steps_per_epoch
        self.seed, self.num_classes = run.seed, len(config.classes)
        if run.sync_norms and processes.size > 1:
            model = synchronize_norms(model)
        self.normalize = Normalize(config.mean, config.std).to(fabric.device)
        if run.precision == "64":
            model, self.normalize = model.double(), self.normalize.double()
        self.plain_model = model
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=fit.lr, momentum=fit.momentum, weight_decay=fit.weight_decay
        )
        self.run: Any = model
        if run.compile:
            on_gpu = fabric.device.type == "cuda"
            self.run = torch.compile(model, mode="reduce-overhead" if on_gpu else "default")
        wrapped: Any = fabric.setup_module(self.run)
        # Processes may have different numbers of images, so evaluation must not synchronise them.
        self.evaluated: Any = self.run if processes.size > 1 else wrapped
        attach(model, self.optimizer, total_steps=fit.epochs * steps_per_epoch, restart=True)
        self.schedule = make_schedule(self.optimizer, fit, steps_per_epoch)
        self.average = averaged(model, fit.ema_decay) if fit.ema_decay else None
        self.gradients = Gradients(fabric, wrapped, model, self.normalize, fit, self.num_classes)
        self.steps, self.lr = 0, 0.0
        self._first_bad = torch.full((), -1, device=fabric.device)

    def step(self, images: Tensor, labels: Tensor) -> Step:
        """Do one optimizer step, and return its results.

        Args:
            images: This process' part of the batch ``[B, 3, H, W]``, uint8, on the device.
            labels: Their labels ``[B]``.

        Raises:
            NotFiniteError: If the loss or the gradient is not finite. Checked before the weights
                change on a CPU, and every few steps on a GPU.
            torch.OutOfMemoryError: If the memory does not suffice; the message says how many images
                at a time would fit.
        """
        self.lr = self.optimizer.param_groups[0]["lr"]
        seed_step(self.seed, self.steps, self.processes.rank)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            step = self.gradients(images, labels)
        except torch.OutOfMemoryError as error:
            size = self.gradients.size_that_fits(images, labels)
            advice = "not even one image fits: use a smaller network or --image-size"
            if size is not None:
                advice = f"{size} images at a time fit: use --micro-batch-size {size}"
            message = f"{str(error).splitlines()[0]} Of the batch, {advice}"
            raise torch.OutOfMemoryError(message + _about_fragments(str(error))) from None
        self.steps += 1
        finite = step.loss.isfinite() & step.grad_norm.isfinite()
        self._first_bad = torch.where((self._first_bad < 0) & ~finite, self.steps, self._first_bad)
        if self.fabric.device.type == "cpu" or self.steps % LOOK_EVERY == 0:
            self._check_finite(step, images)
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.plain_model)
        return step

    def _check_finite(self, step: Step, images: Tensor) -> None:
        """Raise NotFiniteError if a step so far had a loss or a gradient that is not finite."""
        first_bad = int(self._first_bad)
        if first_bad >= 0:
            reason = why_not_finite(self.plain_model, self.normalize(images), step)
            problem = f"the loss is {float(step.loss):.3g}"
            if step.loss.isfinite():
                problem = f"the norm of the gradient is {float(step.grad_norm):.3g}"
            raise NotFiniteError(f"{problem} {self._when(first_bad)}: {reason}")

    def _when(self, step: int) -> str:
        """Return epoch, step and learning rate as text, for error messages."""
        epoch, step_in_epoch = divmod(step - 1, self.per_epoch)
        return (
            f"in epoch {epoch + 1} at step {step_in_epoch + 1} ({step} in total), at a learning "
            f"rate of {self.lr:.3g}"
        )

    def check_weights(self) -> None:
        """Raise NotFiniteError if a weight is not finite."""
        for name, parameter in self.plain_model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise NotFiniteError(f"the weights {name} are not finite {self._when(self.steps)}")

    def measure(self, batches: Any) -> dict[str, float]:
        """Return loss, top-1 and top-5 on images, and those of the moving average as ``ema_…``.

        Args:
            batches: Function that returns an iterable of images and labels.

        Raises:
            NotFiniteError: If the loss is not finite.
        """
        networks = {"": self.evaluated}
        if self.average is not None:
            networks["ema_"] = self.average.module
        results: dict[str, float] = {}
        for prefix, network in networks.items():
            self.processes.share_statistics(network)
            with self.fabric.autocast():
                metrics = evaluate(network, self.normalize, batches(), self.num_classes)
            results |= {f"{prefix}{name}": value for name, value in metrics.items()}
        if not torch.tensor(results["loss"]).isfinite():
            raise NotFiniteError(
                f"the loss on the validation images is {results['loss']} {self._when(self.steps)}"
            )
        return results

    def recalibrate(self, batches: Batches | ResidentBatches, epoch: int, number: int) -> None:
        """Recompute the normalisation statistics of the current network over some batches.

        Args:
            batches: The images.
            epoch: Epoch whose order of images is used, one that was not trained on.
            number: Number of batches; 0 leaves the statistics unchanged.
        """
        kind = nn.modules.batchnorm._BatchNorm
        norms = [m for m in self.plain_model.modules() if isinstance(m, kind)]
        if not number or not norms:
            return
        self.plain_model.eval()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # average all batches equally
            norm.train()
        with torch.no_grad(), self.fabric.autocast():
            for images, _ in islice(batches.train(epoch), number):
                self.run(self.normalize(images.to(self.fabric.device)))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.plain_model.train()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next steps depend on."""
        state = {
            "model": self.plain_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "steps": self.steps,
            "lr": self.lr,
        }
        return state if self.average is None else {**state, "average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state returned by :meth:`state_dict`."""
        self.plain_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.steps, self.lr = state["steps"], state["lr"]
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def _about_fragments(error: str) -> str:
    """Return advice if much of a GPU's memory is held by PyTorch in pieces that are too small."""
    unused = re.search(r"([\d.]+ GiB) is reserved by PyTorch but unallocated", error)
    if unused is None:
        return ""
    setting = "the environment variable PYTORCH_ALLOC_CONF=expandable_segments:True"
    return f". {unused[1]} more are free, but not in one piece: {setting} may help"


def make_schedule(
    optimizer: torch.optim.Optimizer, fit: OptimizationOptions, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the learning rate schedule: a linear warm-up, then the decay.

    Args:
        optimizer: The optimizer whose learning rate is set before each step.
        fit: Number of epochs, warm-up epochs, and kind of decay.
        steps: Steps per epoch.
    """
    warmup, total = fit.warmup_epochs * steps, fit.epochs * steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if fit.lr_schedule == "steps":
            return 0.1 ** (int(step >= total / 2) + int(step >= 3 * total / 4))
        return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
