"""The training loop: set everything up, fit, measure, leave a run folder."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric, seed_everything
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from dnw_graph import NeuralGraph, cost
from train.cli import differences
from train.data import Batches, Source, open_source
from train.options import Options
from train.run import RunConfig, RunFolder

FREE_ON_RESUME = {"data", "workers", "device", "resume", "out", "overwrite"}
"""Options that may differ from those of the run that is continued."""


class Training:
    """One training run, ready to start: whatever can be wrong was noticed on the way here.

    Args:
        options: What to train, on what, how.

    Raises:
        ValueError: Anything about options, device, data or folders that keeps it from starting.
    """

    def __init__(self, options: Options) -> None:
        self.fabric = make_fabric(options.run.device, options.run.precision)
        resumed = RunFolder(options.run.resume) if options.run.resume else None
        state = check_resume(resumed, options) if resumed else None
        if options.run.init:
            RunFolder(options.run.init).load_config()
        seed_everything(options.run.seed, verbose=False)
        folder = Path(options.run.out or default_folder(options))
        if resumed is None and folder.exists() and not options.run.overwrite:
            RunFolder.create(folder, overwrite=False)  # says why not, before data are read
        source = open_source(options.data.data)
        self.options, self.config = options, RunConfig.of(options, source)
        if resumed:
            check_classes(resumed, source)
        self.batches = make_batches(source, options, self.fabric.device)
        self.total_steps = options.optimization.epochs * self.batches.steps
        model = self.config.build()
        if options.run.init:
            initialize(model, RunFolder(options.run.init))
        image_size = options.data.image_size
        cost(model, image_size)  # an image that does not fit is noticed here
        self.normalize = Normalize(self.config).to(self.fabric.device)
        fit = options.optimization
        optimizer = torch.optim.SGD(
            model.parameters(), lr=fit.lr, momentum=fit.momentum, weight_decay=fit.weight_decay
        )
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.total_steps)
        self.rows: list[dict[str, Any]] = []
        self.best = 0.0
        self.epoch = 0
        if resumed is not None and state is not None:
            self.folder = resumed
            self.load_state_dict(state)
        else:
            self.folder = RunFolder.create(folder, options.run.overwrite)
            self.folder.save_config(self.config)
            self.folder.save_weights("initial", self.plain_model, self.config)

    @property
    def plain_model(self) -> nn.Module:
        """The network itself, without what Fabric wraps around it."""
        module: nn.Module = self.model.module
        return module

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        return {
            "model": self.plain_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "rows": self.rows,
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where :meth:`state_dict` was called."""
        self.plain_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.best, self.rows = state["epoch"], state["best"], state["rows"]
        torch.set_rng_state(state["random"])

    def fit(self) -> dict[str, Any]:
        """Train to the end, and return the summary."""
        while self.epoch < self.options.optimization.epochs:
            self.advance()
        summary = self.summary()
        self.folder.save_summary(summary)
        return summary

    def advance(self) -> None:
        """Train one more epoch, and save all there is to know of it."""
        row = self.train_epoch()
        self.epoch += 1
        self.rows.append(row)
        with SummaryWriter(self.folder.path / "tensorboard", purge_step=self.epoch) as writer:
            for name, value in row.items():
                writer.add_scalar(name, value, self.epoch)
        self.save()

    def save(self) -> None:
        """Write weights, metrics, and the state to resume from, last."""
        self.folder.save_weights("last", self.plain_model, self.config)
        if self.rows[-1]["top1"] >= self.best:
            self.best = self.rows[-1]["top1"]
            self.folder.save_weights("best", self.plain_model, self.config)
        self.folder.save_metrics(self.rows)
        self.folder.save_state(self.state_dict())

    def train_epoch(self) -> dict[str, Any]:
        """Fit one epoch, measure, and return a line of metrics."""
        start = time.perf_counter()
        device = self.fabric.device
        before = masks(self.plain_model)
        loss_mean = MeanMetric().to(device)
        accuracy = accuracy_metric(1, len(self.config.classes)).to(device)
        stepping = 0.0
        self.model.train()
        title = f"epoch {self.epoch + 1}/{self.options.optimization.epochs}"
        with progress(title, self.batches.steps * self.batches.batch_size) as bar:
            for step, (images, labels) in enumerate(self.batches.train(self.epoch), start=1):
                began = time.perf_counter()
                loss, logits = self.step(images.to(device), labels.to(device))
                stepping += time.perf_counter() - began
                loss_mean.update(loss.detach())
                accuracy.update(logits.detach(), labels.to(device))
                bar.update(len(images))
                if not bar.disable and (step % 10 == 0 or step == self.batches.steps):
                    show(bar, loss_mean, accuracy, before, self.plain_model)
        trained = time.perf_counter() - start
        measured = evaluate(
            self.model, self.normalize, self.batches.validation(), len(self.config.classes)
        )
        now = masks(self.plain_model)
        return {
            "epoch": self.epoch + 1,
            "lr": self.schedule.get_last_lr()[0],
            "train_loss": float(loss_mean.compute()),
            "train_top1": float(accuracy.compute()),
            **measured,
            "edges_changed": edges_changed(before, now),
            "images_per_second": self.batches.steps * self.batches.batch_size / trained,
            "seconds": time.perf_counter() - start,
            "seconds_training": trained,
            "seconds_stepping": stepping,
        }

    def step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Do one step of the optimizer, and return loss and logits."""
        logits: Tensor = self.model(self.normalize(images))
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        return loss, logits

    def summary(self) -> dict[str, Any]:
        """Return the result of a finished run."""
        last = self.rows[-1]
        best = max(self.rows, key=lambda row: (row["top1"], row["epoch"]))
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
            "seconds": sum(row["seconds"] for row in self.rows),
            "images_per_second": len(self.rows)
            / sum(1 / row["images_per_second"] for row in self.rows),
        }


class Normalize(nn.Module):
    """Turns bytes ``[B, 3, H, W]`` into floats of mean 0 and deviation 1, on the device."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(config.mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(config.std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalised images."""
        return (images - self.mean) / self.std


def make_fabric(device: str, precision: str) -> Fabric:
    """Return Lightning Fabric on a device.

    Raises:
        ValueError: The device is not there.
    """
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device == "auto":
        device = "cuda:0" if len(there) > 1 else "cpu"
    wanted = "cuda:0" if device == "cuda" else device
    if wanted not in there:
        raise ValueError(f"--device {device} is not there; this machine has {', '.join(there)}")
    kind, _, index = wanted.partition(":")
    return Fabric(
        accelerator=kind,
        devices=[int(index)] if index else 1,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
    )


def make_batches(source: Source, options: Options, device: torch.device) -> Batches:
    """Return the batches of a run."""
    return Batches(
        source,
        image_size=options.data.image_size,
        batch_size=options.optimization.batch_size,
        seed=options.run.seed,
        workers=options.data.workers,
        on_cpu=device.type == "cpu",
    )


def default_folder(options: Options) -> str:
    """Return the run folder of options that name none."""
    network = options.network
    rule = f"-{network.rule}" if network.rule else ""
    return f"runs/{network.graph}{rule}-{network.width}-seed{options.run.seed}"


def check_resume(folder: RunFolder, options: Options) -> dict[str, Any]:
    """Return the state of a run to be continued.

    Raises:
        ValueError: The run is of other options, or has nothing to resume.
    """
    theirs = folder.load_config().options
    apart = {k: v for k, v in differences(options, theirs).items() if k not in FREE_ON_RESUME}
    if apart:
        listed = ", ".join(
            f"{k} {theirs!r} (asked: {ours!r})" for k, (ours, theirs) in apart.items()
        )
        raise ValueError(
            f"{folder.path} was trained with {listed}; resume with its own options (just "
            f"--resume {folder.path}), or start a new run from it with --init {folder.path}"
        )
    return folder.load_state()


def check_classes(folder: RunFolder, source: Source) -> None:
    """Raise where the images have other classes than the run that is continued."""
    theirs = folder.load_config().classes
    if theirs != source.classes:
        raise ValueError(
            f"{folder.path} was trained on {len(theirs)} classes ({', '.join(theirs[:3])}, …), "
            f"the data have {len(source.classes)} ({', '.join(source.classes[:3])}, …)"
        )


def initialize(model: nn.Module, folder: RunFolder) -> None:
    """Copy the trained network of a run, all but its classifier.

    Raises:
        ValueError: The run's network is another one.
    """
    theirs, ours = folder.load_weights("last"), model.state_dict()
    taken = {k: v for k, v in theirs.items() if not k.startswith("classifier.")}
    kept = {k for k in ours if k.startswith("classifier.")}
    apart = sorted((taken.keys() | kept) ^ ours.keys())
    apart += [k for k in taken if k in ours and taken[k].shape != ours[k].shape]
    if apart:
        network = folder.load_config().options.network
        raise ValueError(
            f"--init {folder.path} is {network.graph} at width {network.width}, another network "
            f"than the one to train (they differ at {', '.join(apart[:3])}); give the same "
            "--graph, --rule and --stem-stride"
        )
    model.load_state_dict(taken, strict=False)


def evaluate(
    model: nn.Module,
    normalize: Normalize,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
) -> dict[str, float]:
    """Return loss, top-1 and top-5 (top-n for fewer classes) of a network in evaluation mode.

    Args:
        model: From normalised images to logits.
        normalize: From bytes to what the network takes; its device is used.
        batches: Images ``[B, 3, H, W]``, uint8, and labels ``[B]``.
        num_classes: Number of classes.
    """
    device = normalize.mean.device
    loss = MeanMetric().to(device)
    top1, top5 = (accuracy_metric(k, num_classes).to(device) for k in (1, 5))
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for images, labels in batches:
            logits, labels = model(normalize(images.to(device))), labels.to(device)
            loss.update(F.cross_entropy(logits.float(), labels), len(labels))
            top1.update(logits, labels)
            top5.update(logits, labels)
    model.train(was_training)
    return {
        "loss": float(loss.compute()),
        "top1": float(top1.compute()),
        "top5": float(top5.compute()),
    }


def accuracy_metric(k: int, num_classes: int) -> Metric:
    """Return the share of images with the right class among the first ``k``."""
    return MulticlassAccuracy(
        num_classes, top_k=min(k, num_classes), average="micro", validate_args=False
    )


def masks(model: nn.Module) -> list[Tensor]:
    """Return which candidates are real, graph by graph."""
    return [m.wiring().mask for m in model.modules() if isinstance(m, NeuralGraph)]


def edges_changed(before: list[Tensor], now: list[Tensor]) -> int:
    """Return how many edges became real that were not."""
    return sum(int((new & ~old).sum()) for old, new in zip(before, now, strict=True))


def progress(title: str, images: int) -> "tqdm[Any]":
    """Return a progress bar in images."""
    return tqdm(total=images, desc=title, unit=" images", leave=False, disable=None)


def show(
    bar: "tqdm[Any]", loss: MeanMetric, accuracy: Metric, before: list[Tensor], model: nn.Module
) -> None:
    """Write the state of an epoch beside its progress bar."""
    changed = edges_changed(before, masks(model))
    bar.set_postfix_str(
        f"loss {float(loss.compute()):.3f}, top-1 {float(accuracy.compute()):.1%}, "
        f"edges changed {changed:,}"
    )
