"""The training loop: set everything up, fit, measure, leave a run folder."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.fabric import seed_everything
from torch import Tensor, nn

from dnw_graph import cost
from dnw_graph.analysis import HistoryWriter, real_edges
from train.checkpoint import Checkpoints
from train.curves import Curves, check_curves
from train.data import open_source
from train.interrupt import Interrupted, Interrupts
from train.learner import LOOK_EVERY, Learner, NotFiniteError
from train.lock import RunLock
from train.meter import EpochMeter
from train.metrics import as_line, evaluations_of, progress, show
from train.options import Options
from train.process_group import ProcessGroup, make_fabric
from train.provenance import how_to_run
from train.report.page import report_of
from train.run import RunConfig
from train.setup import (
    check_network,
    check_new,
    check_resume,
    default_folder,
    go_on,
    make_batches,
)
from train.start import begin_from


class Training:
    """One training run, ready to start: whatever can be wrong was noticed on the way here.

    Args:
        options: What to train, on what, how.
        interrupts: Notes signals; one of its own, while it fits, unless given.

    Attributes:
        learner: The network, and what fits it.
        epoch: Epochs done.
        done: Steps done of the present one.
        rows: The metrics of each epoch.

    Raises:
        ValueError: Anything about options, device, data or folders that keeps it from starting.
    """

    def __init__(self, options: Options, interrupts: Interrupts | None = None) -> None:
        if options.run.resume is None and options.run.out is None:
            options = options.replace(out=default_folder(options))
        fabric = make_fabric(options.run.device, options.run.precision, many=True)
        fabric.launch()
        self.processes, self.device = ProcessGroup(fabric), fabric.device
        # Nobody else writes to the folder from here on, so all processes see the same in it.
        self.lock = RunLock(Path(options.run.resume or str(options.run.out)))
        if self.processes.first and self.lock.folder.is_dir():
            self.lock.acquire()
        self.processes.wait()
        options = go_on(options).resolved()
        check_curves(options)
        network = check_network(options)
        past = check_resume(options)
        self.folder = past.folder if past else check_new(options, network, self.processes.first)
        self.processes.wait()  # from here on the folder may change
        source = open_source(**options.data.source())
        if past:
            past.check_images(source)
        overwrite, out = options.run.overwrite, str(self.folder.path)
        options = options.replace(resume=None, out=out, overwrite=False)
        self.config = RunConfig.of(options, source)
        self.options, self.images = self.config.options, source.fingerprint()
        self.batches = make_batches(
            source, self.config, self.device, self.processes.rank, self.processes.size
        )
        self.batches.check()
        seed_everything(options.run.seed, verbose=False)
        model = self.config.build()
        if not past:
            begin_from(model, options.run, self.config.classes)
            cost(model, options.data.image_size)  # an image that does not fit is noticed here
        self.learner = Learner(self.config, model, fabric, self.processes, self.batches.steps)
        self.history = HistoryWriter(self.folder.path, self.plain_model, self.batches.steps)
        self.checkpoints = Checkpoints(self.folder.path)
        self.curves = Curves(self.folder.path, self.config)
        self.interrupts = interrupts or Interrupts(patient=self.processes.size > 1)
        self.saved_at = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.epoch = self.done = 0
        if past:
            self.meter = EpochMeter(len(self.config.classes), self.device, {})
            self.load_state_dict(past.state)
            unfinished = self.epoch < options.optimization.epochs
            if self.processes.first and unfinished and self.options != past.config.options:
                self.folder.save_config(self.config)
        else:
            self.meter = self._new_meter()
            self._begin(overwrite)

    @property
    def plain_model(self) -> nn.Module:
        """The network itself, without what is wrapped around it."""
        return self.learner.plain_model

    def _begin(self, overwrite: bool) -> None:
        if self.processes.first:
            if not self.lock.is_held:
                self.folder.path.mkdir(parents=True, exist_ok=True)
                self.lock.acquire()
            self.folder.create(self.config, overwrite)
            self.folder.save_weights("initial", self.plain_model, self.config)
            self.history.record(0)
        self.checkpoint()

    def _new_meter(self) -> EpochMeter:
        return EpochMeter(len(self.config.classes), self.device, real_edges(self.plain_model))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        return {
            **self.learner.state_dict(),
            "options": self.options.flat(),
            "images": self.images,
            "epoch": self.epoch,
            "done": self.done,
            "meter": self.meter.state_dict(),
            "rows": self.rows,
            "bad_images": self.batches.bad.paths,
            "wandb": self.curves.run_id,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where :meth:`state_dict` was called.

        Raises:
            ValueError: The state is not one of this run.
        """
        try:
            self.learner.load_state_dict(state)
            self.epoch, self.done, self.rows = state["epoch"], state["done"], state["rows"]
            self.meter.load_state_dict(state["meter"], self.processes.rank)
            self.batches.bad.paths.update(state["bad_images"])
            self.curves.run_id = state["wandb"]
        except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{self.checkpoints.path} is not of this run ({' '.join(str(error).split()[:20])})"
            ) from error

    def fit(self) -> dict[str, Any]:
        """Train to the end, and return the summary.

        Raises:
            Interrupted: A signal asked it to stop; it saved before.
            ValueError: A loss that is not finite, an image that cannot be read, or another process
                that took over the folder.
        """
        epochs = self.options.optimization.epochs
        if self.epoch == epochs and self.processes.first:
            print(f"{self.folder.path} is finished already: {epochs} of {epochs} epochs")
        with self.interrupts:
            try:
                while self.epoch < epochs:
                    self.advance()
                    if self.processes.first:
                        print(as_line(self.rows[-1], epochs), flush=True)
                return self.finish()
            finally:
                self.lock.release()

    def finish(self) -> dict[str, Any]:
        """Write the summary of a run that has had its last epoch, and return it."""
        summary = self.summary()
        if self.processes.first:
            self.lock.check()
            self.folder.save_summary(summary)
            if self.options.run.report:
                report_of(self.folder.path, self.config)
            self.curves.close()
        self.processes.wait()
        return summary

    def advance(self) -> None:
        """Train to the end of the epoch, measure, and save all there is to know of it.

        Raises:
            Interrupted: A signal asked it to stop; it saved before.
            ValueError: A loss that is not finite, or an image that cannot be read.
        """
        try:
            self._pause()
            self._train()
            row = self._row()
        except NotFiniteError as error:
            raise ValueError(f"{error}; {self._kept()}") from None
        self.rows.append(row)
        self.epoch, self.done = self.epoch + 1, 0
        self.meter = self._new_meter()
        if self.processes.first:
            self.lock.check()
            self.curves.add(row)
            self.folder.save_weights("last", self.plain_model, self.config)
            if row is self.best:
                self.folder.save_weights("best", self.plain_model, self.config)
            if self.learner.average is not None:
                self.folder.save_weights("ema", self.learner.average.module, self.config)
            self.folder.save_metrics(self.rows)
        self.checkpoint()

    def _kept(self) -> str:
        cut = self.options.optimization.clip_grad_norm is not None
        ways = "a lower --lr" if cut else "a lower --lr, or with --clip-grad-norm,"
        return (
            f"{self.folder.path} keeps what came before. Start again with {ways} and another --out "
            "or --overwrite"
        )

    @property
    def best(self) -> dict[str, Any]:
        """The metrics of the epoch with the highest top-1, the last of equals."""
        return max(self.rows, key=lambda row: (row["top1"], row["epoch"]))

    def checkpoint(self) -> None:
        """Save what is needed to go on from here.

        Raises:
            NotFiniteError: The weights are not to be kept.
            ValueError: Processes have other real edges.
            OSError: It could not be written; the checkpoints before are still there.
        """
        self.learner.check_weights()
        self.processes.check_wiring(self.plain_model, self.learner.steps)
        self._gather_bad_images()
        with self.meter.summed():
            if self.processes.first:
                self.lock.check()
                self.checkpoints.save(self.state_dict(), self.learner.steps)
        self.saved_at = time.monotonic()

    def _gather_bad_images(self) -> None:
        """Let every process know of the bad images that any has found."""
        for paths in self.processes.gather(self.batches.bad.paths):
            self.batches.bad.paths.update(paths)

    def _pause(self) -> None:
        """Save between steps where it is time, and stop where a signal asked for it."""
        run = self.options.run
        due = bool(self.done and run.checkpoint_every and self.done % run.checkpoint_every == 0)
        late = time.monotonic() - self.saved_at > 60 * run.checkpoint_minutes
        stop, save = self.processes.largest(self.interrupts.received, int(due or late))
        if stop or save:
            self.checkpoint()
        if stop:
            self._stop(stop)

    def _stop(self, signal: int) -> None:
        raise Interrupted(
            signal,
            f"{self.folder.path} is saved at step {self.done:,} of {self.batches.steps:,} in epoch "
            f"{self.epoch + 1}; go on with: {how_to_run('imagenet')} --resume {self.folder.path}",
        )

    def _train(self) -> None:
        """Do the steps that are left of the epoch."""
        meter, steps = self.meter, self.batches.steps
        self.learner.plain_model.train()
        before = time.perf_counter()
        title = f"epoch {self.epoch + 1}/{self.options.optimization.epochs}"
        with progress(title, steps * self.batches.batch_size, self.processes.first) as bar:
            bar.update(self.done * self.batches.batch_size)
            for images, labels in self.batches.train(self.epoch, self.done):
                began = time.perf_counter()
                images, labels = images.to(self.device), labels.to(self.device)
                step = self.learner.step(images, labels)
                meter.evaluations.update(evaluations_of(self.plain_model))
                now = time.perf_counter()
                meter.seconds["stepping"] += now - began
                meter.seconds["training"] += now - before
                before = now
                meter.update(step, labels)
                self.done += 1
                self._record()
                self._pause()
                bar.update(self.batches.batch_size)
                if self.done % LOOK_EVERY == 0 and not bar.disable and self.processes.size == 1:
                    show(bar, meter.loss, meter.accuracy, meter.changed(self.plain_model))

    def _record(self) -> None:
        """Write what changed in the wiring, where it is time within an epoch."""
        every = self.options.run.history_every
        within = self.done < self.batches.steps
        if self.processes.first and every and self.done % every == 0 and within:
            self.lock.check()
            self.history.record(self.learner.steps)

    def _row(self) -> dict[str, Any]:
        """Measure, and return a line of metrics."""
        began, meter = time.perf_counter(), self.meter
        self.learner.check_weights()  # before they are written anywhere
        fit = self.options.optimization
        if self.epoch + 1 == fit.epochs:
            self.learner.recalibrate(self.batches, fit.epochs, fit.recalibrate)
        measured = self.learner.measure(self._validation)
        self._gather_bad_images()
        if self.processes.first:
            self.lock.check()
            self.history.record((self.epoch + 1) * self.batches.steps)
        trained = meter.seconds["training"]
        return {
            "epoch": self.epoch + 1,
            "lr": self.learner.lr,
            **meter.row(self.batches.steps),
            **measured,
            "edges_changed": meter.changed(self.plain_model),
            "bad_images": self.batches.bad.count,
            "images_per_second": self.batches.steps * self.batches.batch_size / trained,
            "seconds": trained + time.perf_counter() - began,
            "seconds_training": trained,
            "seconds_stepping": meter.seconds["stepping"],
        }

    def _validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the validation images; stop where a signal asks for it."""
        for batch in self.batches.validation():
            if self.interrupts.received:
                if self.processes.size == 1:  # others may be done, and agree on nothing
                    self.checkpoint()
                self._stop(self.interrupts.received)
            yield batch

    def summary(self) -> dict[str, Any]:
        """Return the result of a finished run."""
        last, best = self.rows[-1], self.best
        counted = cost(self.plain_model, self.options.data.image_size)
        averages = {name: value for name, value in last.items() if name.startswith("ema_top")}
        return {
            "top1": last["top1"],
            "top5": last["top5"],
            **averages,
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
            "bad_images": self.batches.bad.count,
            "seconds": sum(row["seconds"] for row in self.rows),
            "device": str(self.device),
            "images_per_second": len(self.rows)
            / sum(1 / row["images_per_second"] for row in self.rows),
        }
