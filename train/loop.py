"""The training loop: set everything up, fit, measure, leave a run folder."""

import math
import time
from collections import Counter
from functools import cached_property
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import seed_everything
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchmetrics import MeanMetric

from dnw_graph import attach, cost, penalty
from dnw_graph.analysis import HistoryWriter, real_edges
from train.data import open_source
from train.metrics import (
    Normalize,
    accuracy_metric,
    as_line,
    edges_changed,
    evaluate,
    evaluations_of,
    progress,
    show,
)
from train.options import Options
from train.report.page import report_of
from train.run import RunConfig, RunFolder
from train.setup import (
    check_network,
    check_new,
    check_resume,
    default_folder,
    make_batches,
    make_fabric,
    make_schedule,
)
from train.start import inherit, network_weights

LOOK_EVERY = 10
"""Steps between looks at the loss, for which a GPU has to be waited for."""


class Training:
    """One training run, ready to start: whatever can be wrong was noticed on the way here.

    Args:
        options: What to train, on what, how.

    Attributes:
        plain_model: The network itself, without what is wrapped around it.

    Raises:
        ValueError: Anything about options, device, data or folders that keeps it from starting.
    """

    def __init__(self, options: Options) -> None:
        if options.run.resume is None and options.run.out is None:
            options = options.replace(out=default_folder(options))
        options = options.resolved()
        run = options.run
        self.fabric = make_fabric(run.device, run.precision)
        network = check_network(options)
        past = check_resume(options)
        self.folder = past.folder if past else check_new(options, network)
        given = options.data
        source = open_source(
            given.data,
            dataset=given.dataset,
            train_images=given.train_images,
            validation_images=given.validation_images,
        )
        if past:
            past.check_images(source)
        options = options.replace(resume=None, out=str(self.folder.path))
        self.config = RunConfig.of(options, source)
        self.options, self.images = self.config.options, source.fingerprint()
        self.batches = make_batches(source, self.config, self.fabric.device)
        self.batches.check()
        seed_everything(run.seed, verbose=False)
        model = self.config.build()
        if run.init and not past:
            model.load_state_dict(network_weights(RunFolder(run.init), model), strict=False)
        if run.from_run and not past:
            inherit(model, run.from_run, self.config.classes)
        if not past:
            cost(model, options.data.image_size)  # an image that does not fit is noticed here
        self.normalize = Normalize(self.config).to(self.fabric.device)
        fit = options.optimization
        optimizer = torch.optim.SGD(
            model.parameters(), lr=fit.lr, momentum=fit.momentum, weight_decay=fit.weight_decay
        )
        self.plain_model = model
        if run.compile:
            on_gpu = self.fabric.device.type == "cuda"
            compiled: Any = torch.compile(model, mode="reduce-overhead" if on_gpu else "default")
            model = compiled
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        attach(self.plain_model, optimizer, total_steps=fit.epochs * self.batches.steps)
        self.schedule = make_schedule(optimizer, fit, self.batches.steps)
        self.rows: list[dict[str, Any]] = []
        self.epoch = 0
        self.history = HistoryWriter(self.folder.path, model, self.batches.steps)
        if past:
            self.load_state_dict(past.state)
            if self.epoch < fit.epochs and self.options != past.config.options:
                self.folder.save_config(self.config)
        else:
            self.folder.create(self.config, run.overwrite)
            self.folder.save_weights("initial", self.plain_model, self.config)
            self.history.record(0)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        return {
            "model": self.plain_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "options": self.options.flat(),
            "images": self.images,
            "epoch": self.epoch,
            "rows": self.rows,
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where :meth:`state_dict` was called.

        Raises:
            ValueError: The state is not one of this run.
        """
        try:
            self.plain_model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.epoch, self.rows = state["epoch"], state["rows"]
            torch.set_rng_state(state["random"])
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self.folder.path / 'resume.pt'} is not the state of this run "
                f"({' '.join(str(error).split()[:20])})"
            ) from error

    def fit(self) -> dict[str, Any]:
        """Train to the end, and return the summary."""
        epochs = self.options.optimization.epochs
        if self.epoch == epochs:
            print(f"{self.folder.path} is finished already: {epochs} of {epochs} epochs")
        while self.epoch < epochs:
            self.advance()
            print(as_line(self.rows[-1], epochs))
        return self.finish()

    def finish(self) -> dict[str, Any]:
        """Write the summary of a run that has had its last epoch, and return it."""
        summary = self.summary()
        self.folder.save_summary(summary)
        if self.options.run.report:
            report_of(self.folder.path, self.config)
        return summary

    def advance(self) -> None:
        """Train one more epoch, and save all there is to know of it."""
        row = self.train_epoch()
        self.epoch += 1
        self.rows.append(row)
        for name, value in row.items():
            self.curves.add_scalar(name, value, self.epoch)
        self.curves.flush()
        self.save()

    @cached_property
    def curves(self) -> SummaryWriter:
        """The curves for TensorBoard; those past the present epoch are dropped."""
        return SummaryWriter(self.folder.path / "tensorboard", purge_step=self.epoch)

    @property
    def best(self) -> dict[str, Any]:
        """The metrics of the epoch with the highest top-1, the last of equals."""
        return max(self.rows, key=lambda row: (row["top1"], row["epoch"]))

    def save(self) -> None:
        """Write weights, metrics, and the state to resume from, last."""
        self.folder.save_weights("last", self.plain_model, self.config)
        if self.rows[-1] is self.best:
            self.folder.save_weights("best", self.plain_model, self.config)
        self.folder.save_metrics(self.rows)
        self.folder.save_state(self.state_dict())

    def train_epoch(self) -> dict[str, Any]:
        """Fit one epoch, measure, and return a line of metrics."""
        start = time.perf_counter()
        device = self.fabric.device
        before = real_edges(self.plain_model)
        loss_mean = MeanMetric(nan_strategy="disable").to(device)
        accuracy = accuracy_metric(1, len(self.config.classes)).to(device)
        stepping, evaluations = 0.0, Counter[str]()
        self.model.train()
        title = f"epoch {self.epoch + 1}/{self.options.optimization.epochs}"
        with progress(title, self.batches.steps * self.batches.batch_size) as bar:
            for step, (images, labels) in enumerate(self.batches.train(self.epoch), start=1):
                began = time.perf_counter()
                loss, logits = self.step(images.to(device), labels.to(device))
                evaluations.update(evaluations_of(self.plain_model))
                every = self.options.run.history_every
                if every and step % every == 0 and step < self.batches.steps:
                    self.history.record(self.epoch * self.batches.steps + step)
                stepping += time.perf_counter() - began
                loss_mean.update(loss.detach())
                accuracy.update(logits.detach(), labels.to(device))
                bar.update(len(images))
                if step % LOOK_EVERY == 0 or step == self.batches.steps:
                    self.check_loss(float(loss_mean.compute()), step)
                    if not bar.disable:
                        show(bar, loss_mean, accuracy, before, self.plain_model)
        trained = time.perf_counter() - start
        if self.epoch + 1 == self.options.optimization.epochs:
            self.recalibrate(self.options.optimization.recalibrate)
        measured = evaluate(
            self.model, self.normalize, self.batches.validation(), len(self.config.classes)
        )
        self.check_loss(measured["loss"], self.batches.steps)
        self.history.record((self.epoch + 1) * self.batches.steps)
        return {
            "epoch": self.epoch + 1,
            "lr": self.last_lr,
            "train_loss": float(loss_mean.compute()),
            "train_top1": float(accuracy.compute()),
            **measured,
            "edges_changed": edges_changed(before, real_edges(self.plain_model)),
            **{name: count / self.batches.steps for name, count in evaluations.items()},
            "images_per_second": self.batches.steps * self.batches.batch_size / trained,
            "seconds": time.perf_counter() - start,
            "seconds_training": trained,
            "seconds_stepping": stepping,
        }

    def recalibrate(self, number: int) -> None:
        """Take normalisation statistics anew, over some batches, of the network as it is now."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not number or not norms:
            return
        self.model.eval()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches alike
            norm.train()
        epoch = self.options.optimization.epochs  # none that was trained on
        with torch.no_grad():
            for images, _ in islice(self.batches.train(epoch), number):
                self.model(self.normalize(images.to(self.fabric.device)))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.model.train()

    def check_loss(self, loss: float, step: int) -> None:
        """Raise a ``ValueError`` where the mean loss up to a step is not finite."""
        if not math.isfinite(loss):
            kept = f"the {self.epoch} epochs before are kept" if self.epoch else "nothing is kept"
            raise ValueError(
                f"the loss is {loss} in epoch {self.epoch + 1} by step {step}, at a learning rate "
                f"of {self.last_lr:.3g}; {kept} in {self.folder.path}. Start again with a lower "
                "--lr, and another --out or --overwrite"
            )

    def step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Do one step of the optimizer, and return loss and logits."""
        self.last_lr: float = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad(set_to_none=True)
        logits: Tensor = self.model(self.normalize(images))
        smoothing = self.options.optimization.label_smoothing
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        self.fabric.backward(loss + penalty(self.plain_model))
        self.optimizer.step()
        self.schedule.step()
        return loss, logits

    def summary(self) -> dict[str, Any]:
        """Return the result of a finished run."""
        last, best = self.rows[-1], self.best
        counted = cost(self.plain_model, self.options.data.image_size)
        return {
            "top1": last["top1"],
            "top5": last["top5"],
            "best_top1": best["top1"],
            "best_epoch": best["epoch"],
            "best_chosen_on": self.config.split,
            "epochs": self.epoch,
            "parameters": counted.parameters,
            "macs": counted.macs,
            "real_edges": counted.real_edges,
            "candidate_edges": counted.candidate_edges,
            "dead_nodes": counted.dead_nodes,
            "unneeded_nodes": counted.unneeded_nodes,
            "seconds": sum(row["seconds"] for row in self.rows),
            "device": str(self.fabric.device),
            "images_per_second": len(self.rows)
            / sum(1 / row["images_per_second"] for row in self.rows),
        }
