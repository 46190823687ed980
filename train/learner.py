"""A network, its optimizer, and one step of them."""

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
from train.process_group import ProcessGroup
from train.run import RunConfig
from train.setup import make_schedule
from train.step import Gradients, Step, seed_step, why_not_finite

LOOK_EVERY = 10
"""Steps between looks at what a GPU computed, for which it has to be waited for."""


class NotFiniteError(ValueError):
    """A loss, a gradient or a weight is not finite; the message says which, and when."""


class Learner:
    """What learns in a training run.

    Args:
        config: What is trained, how.
        model: The network.
        fabric: Launched.
        processes: Those that train it.
        steps_per_epoch: Of the training.

    Attributes:
        plain_model: The network itself, without what is wrapped around it.
        steps: Steps of the optimizer done.
        lr: Learning rate of the last of them.
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
        self.normalize = Normalize(config).to(fabric.device)
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
        # Where shares of images differ, others may be done with theirs: no process waits here.
        self.evaluated: Any = self.run if processes.size > 1 else wrapped
        attach(model, self.optimizer, total_steps=fit.epochs * steps_per_epoch, restart=True)
        self.schedule = make_schedule(self.optimizer, fit, steps_per_epoch)
        self.average = averaged(model, fit.ema_decay) if fit.ema_decay else None
        self.gradients = Gradients(fabric, wrapped, model, self.normalize, fit, self.num_classes)
        self.steps, self.lr = 0, 0.0
        self._first_bad = torch.full((), -1, device=fabric.device)

    def step(self, images: Tensor, labels: Tensor) -> Step:
        """Do one step of the optimizer, and return what came of it.

        Args:
            images: This process' part of the batch ``[B, 3, H, W]``, uint8, on the device.
            labels: Their labels ``[B]``.

        Raises:
            NotFiniteError: On a CPU before weights change; on a GPU every few steps.
        """
        self.lr = self.optimizer.param_groups[0]["lr"]
        seed_step(self.seed, self.steps, self.processes.rank)
        self.optimizer.zero_grad(set_to_none=True)
        step = self.gradients(images, labels)
        self.steps += 1
        finite = step.loss.isfinite() & step.grad_norm.isfinite()
        self._first_bad = torch.where((self._first_bad < 0) & ~finite, self.steps, self._first_bad)
        if self.fabric.device.type == "cpu" or self.steps % LOOK_EVERY == 0:
            self._look(step, images)
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.plain_model)
        return step

    def _look(self, step: Step, images: Tensor) -> None:
        bad = int(self._first_bad)
        if bad >= 0:
            why = why_not_finite(self.plain_model, self.normalize(images), step)
            told = f"the loss is {float(step.loss):.3g}"
            if step.loss.isfinite():
                told = f"the norm of the gradient is {float(step.grad_norm):.3g}"
            raise NotFiniteError(f"{told} {self._when(bad)}: {why}")

    def _when(self, step: int) -> str:
        epoch, within = divmod(step - 1, self.per_epoch)
        return (
            f"in epoch {epoch + 1} at step {within + 1} ({step} in all), at a learning rate of "
            f"{self.lr:.3g}"
        )

    def check_weights(self) -> None:
        """Raise a :class:`NotFiniteError` where weights are not to be kept."""
        for name, parameter in self.plain_model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise NotFiniteError(f"the weights {name} are not finite {self._when(self.steps)}")

    def measure(self, batches: Any) -> dict[str, float]:
        """Return loss, top-1 and top-5 on images, and those of the average as ``ema_…``.

        Args:
            batches: Returns images and labels each time it is called.

        Raises:
            NotFiniteError: A loss that is not finite.
        """
        networks = {"": self.evaluated}
        if self.average is not None:
            networks["ema_"] = self.average.module
        found: dict[str, float] = {}
        for prefix, network in networks.items():
            self.processes.share_statistics(network)
            with self.fabric.autocast():
                measured = evaluate(network, self.normalize, batches(), self.num_classes)
            found |= {f"{prefix}{name}": value for name, value in measured.items()}
        if not torch.tensor(found["loss"]).isfinite():
            raise NotFiniteError(
                f"the loss on the validation images is {found['loss']} {self._when(self.steps)}"
            )
        return found

    def recalibrate(self, batches: Batches | ResidentBatches, epoch: int, number: int) -> None:
        """Take normalisation statistics anew, over some batches, of the network as it is now.

        Args:
            batches: The images.
            epoch: Whose order of images is used: one that nothing was trained on.
            number: Of batches.
        """
        kind = nn.modules.batchnorm._BatchNorm
        norms = [m for m in self.plain_model.modules() if isinstance(m, kind)]
        if not number or not norms:
            return
        self.plain_model.eval()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches alike
            norm.train()
        with torch.no_grad(), self.fabric.autocast():
            for images, _ in islice(batches.train(epoch), number):
                self.run(self.normalize(images.to(self.fabric.device)))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.plain_model.train()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next steps depend on."""
        state = {
            "model": self.plain_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "steps": self.steps,
            "lr": self.lr,
        }
        return state if self.average is None else {**state, "average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called."""
        self.plain_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.steps, self.lr = state["steps"], state["lr"]
        if self.average is not None:
            self.average.load_state_dict(state["average"])
