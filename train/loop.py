"""The training loop: set up a run, train, evaluate, and write the run folder."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.fabric import seed_everything
from torch import Tensor, nn

from dnw_graph import cost
from dnw_graph.analysis import HistoryWriter, real_edges
from train.checkpoint import Checkpoints
from train.curves import Curves, check_curves
from train.data import Source, make_batches, open_source
from train.interrupt import Interrupted, Interrupts
from train.learner import LOOK_EVERY, Learner, NotFiniteError
from train.lock import RunLock
from train.meter import EpochMeter
from train.metrics import as_line, evaluations_of, progress, show
from train.options import Options
from train.previous import check_resume, with_auto_resume
from train.process_group import ProcessGroup, make_fabric
from train.provenance import how_to_run
from train.report.page import report_of
from train.run import RunConfig, RunFolder
from train.start import begin_from, check_network, check_new, default_folder


@dataclass(frozen=True)
class Session:
    """What a run uses while it is trained by this command, and does not save.

    Attributes:
        processes: The processes of the run.
        lock: The lock on the run folder.
        interrupts: Records signals; active during :meth:`Training.fit`.
    """

    processes: ProcessGroup
    lock: RunLock
    interrupts: Interrupts


def start_training(options: Options, interrupts: Interrupts | None = None) -> "Training":
    """Begin a run, or continue one if ``--resume`` is set or ``--auto-resume`` finds one.

    Args:
        options: Options of the run.
        interrupts: Records signals. If None, a new object that is active during
            :meth:`Training.fit`.

    Raises:
        ValueError: If options, device, data or folders keep the run from starting.
    """
    if options.run.resume is None and options.run.out is None:
        options = options.replace(out=default_folder(options))
    fabric = make_fabric(options.run.device, options.run.precision, many=True)
    fabric.launch()
    processes = ProcessGroup(fabric)
    # No other run writes to the folder from here on, so all processes read the same content.
    lock = RunLock(Path(options.run.resume or str(options.run.out)))
    if processes.first and lock.folder.is_dir():
        lock.acquire()
    interrupts = interrupts or Interrupts(patient=processes.size > 1)
    try:
        processes.wait()
        options = with_auto_resume(options).resolved()
        check_curves(options)
        start = Training.begin if options.run.resume is None else Training.resume
        return start(options, Session(processes, lock, interrupts))
    except BaseException:
        lock.release()
        raise


class Training:
    """A training run; made by :meth:`begin`, :meth:`resume`, or :func:`start_training`.

    Args:
        config: The configuration of the run.
        model: The network, with the weights it starts from.
        source: The images.
        session: The processes of the run, the lock on its folder, and its signals.

    Attributes:
        learner: The network and its optimizer.
        epoch: Number of epochs done.
        done: Number of steps done in the current epoch.
        rows: The metrics of each epoch.

    Raises:
        ValueError: If there are too few images, or a batch cannot be divided among processes.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        source: Source,
        session: Session,
    ) -> None:
        self.config, self.options, self.lock = config, config.options, session.lock
        processes = session.processes
        self.processes, self.device = processes, processes.fabric.device
        self.folder = RunFolder(str(self.options.run.out))
        self.images = source.fingerprint()
        self.batches = make_batches(
            replace(source, augmentation=config.augmentation),
            image_size=self.options.data.image_size,
            batch_size=self.options.optimization.batch_size,
            seed=self.options.run.seed,
            workers=self.options.data.workers,
            device=self.device,
            rank=processes.rank,
            world_size=processes.size,
        )
        self.batches.check()
        self.learner = Learner(config, model, processes.fabric, processes, self.batches.steps)
        self.history = HistoryWriter(self.folder.path, self.plain_model, self.batches.steps)
        self.checkpoints = Checkpoints(self.folder.path)
        self.curves = Curves(self.folder.path, config)
        self.interrupts = session.interrupts
        self.saved_at = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.epoch = self.done = 0
        self.meter = EpochMeter(len(config.classes), self.device, {})

    @classmethod
    def begin(cls, options: Options, session: Session) -> "Training":
        """Begin a new run in ``options.run.out``, and write its first files.

        Raises:
            ValueError: If options, data or folders keep the run from starting.
        """
        folder = check_new(options, check_network(options), session.processes.first)
        session.processes.wait()  # from here on the folder may change
        source = open_source(**options.data.source())
        stored = options.replace(out=str(folder.path), overwrite=False)
        config = RunConfig.of(stored, source)
        seed_everything(options.run.seed, verbose=False)
        model = config.build()
        begin_from(model, options.run, config.classes)
        cost(model, options.data.image_size)  # raises ValueError if an image is too small
        training = cls(config, model, source, session)
        training.meter = training._new_meter()
        training._write_first_files(options.run.overwrite)
        return training

    @classmethod
    def resume(cls, options: Options, session: Session) -> "Training":
        """Continue the run in ``options.run.resume`` from its last checkpoint.

        Raises:
            ValueError: If the options or the images are not those of the run, or it has no
                checkpoint.
        """
        check_network(options)
        previous = check_resume(options)
        session.processes.wait()  # from here on the folder may change
        source = open_source(**options.data.source())
        previous.check_images(source)
        stored = options.replace(resume=None, out=str(previous.folder.path), overwrite=False)
        config = RunConfig.of(stored, source)
        seed_everything(options.run.seed, verbose=False)
        training = cls(config, config.build(), source, session)
        training.load_state_dict(previous.state)
        unfinished = training.epoch < options.optimization.epochs
        if session.processes.first and unfinished and config.options != previous.config.options:
            training.folder.save_config(config)
        return training

    @property
    def plain_model(self) -> nn.Module:
        """The network without wrappers."""
        return self.learner.plain_model

    def _write_first_files(self, overwrite: bool) -> None:
        """Write configuration, initial weights and checkpoint of a new run."""
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
        """Return the state that the rest of the run depends on."""
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
        """Restore a state returned by :meth:`state_dict`.

        Raises:
            ValueError: If the state is not one of this run.
        """
        try:
            self.learner.load_state_dict(state)
            self.epoch, self.done, self.rows = state["epoch"], state["done"], state["rows"]
            self.meter.load_state_dict(state["meter"], self.processes.rank)
            self.batches.bad.paths.update(state["bad_images"])
            self.curves.run_id = state["wandb"]
        except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{self.checkpoints.path} belongs to another run "
                f"({' '.join(str(error).split()[:20])})"
            ) from error

    def fit(self) -> dict[str, Any]:
        """Train to the end, and return the summary.

        Raises:
            Interrupted: If a signal stopped the run, after its state was saved.
            ValueError: If the loss is not finite, an image cannot be read, or another process took
                over the folder.
        """
        epochs = self.options.optimization.epochs
        if self.epoch == epochs and self.processes.first:
            print(f"{self.folder.path} is already finished: {epochs} of {epochs} epochs")
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
        """Write the summary of a run after its last epoch, and return it."""
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
        """Train to the end of the epoch, evaluate, and save weights, metrics and a checkpoint.

        Raises:
            Interrupted: If a signal stopped the run, after its state was saved.
            ValueError: If the loss is not finite, or an image cannot be read.
        """
        try:
            self._pause()
            self._train()
            row = self._row()
        except NotFiniteError as error:
            raise ValueError(f"{error}; {self._advice()}") from None
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

    def _advice(self) -> str:
        """Return what to do after a loss, gradient or weight that is not finite."""
        clips = self.options.optimization.clip_grad_norm is not None
        changes = "a lower --lr" if clips else "a lower --lr, or with --clip-grad-norm,"
        return (
            f"{self.folder.path} still holds the earlier results. Start again with {changes} and "
            "another --out or --overwrite"
        )

    @property
    def best(self) -> dict[str, Any]:
        """The metrics of the epoch with the highest top-1; of several, the last."""
        return max(self.rows, key=lambda row: (row["top1"], row["epoch"]))

    def checkpoint(self) -> None:
        """Save the state of the run.

        Raises:
            NotFiniteError: If a weight is not finite.
            ValueError: If the processes have different real edges.
            OSError: If it could not be written; earlier checkpoints remain.
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
        """Merge the bad images that the processes have found."""
        for paths in self.processes.gather(self.batches.bad.paths):
            self.batches.bad.paths.update(paths)

    def _pause(self) -> None:
        """Save a checkpoint between steps if one is due, and stop if there was a signal."""
        run = self.options.run
        by_steps = bool(
            self.done and run.checkpoint_every and self.done % run.checkpoint_every == 0
        )
        by_time = time.monotonic() - self.saved_at > 60 * run.checkpoint_minutes
        signal, save = self.processes.largest(self.interrupts.received, int(by_steps or by_time))
        if signal or save:
            self.checkpoint()
        if signal:
            self._stop(signal)

    def _stop(self, signal: int) -> None:
        """Raise Interrupted with a message that says how to continue."""
        raise Interrupted(
            signal,
            f"{self.folder.path} is saved at step {self.done:,} of {self.batches.steps:,} in epoch "
            f"{self.epoch + 1}; continue with: {how_to_run('imagenet')} --resume "
            f"{self.folder.path}",
        )

    def _train(self) -> None:
        """Do the remaining steps of the epoch."""
        meter, steps = self.meter, self.batches.steps
        self.learner.plain_model.train()
        previous = time.perf_counter()
        title = f"epoch {self.epoch + 1}/{self.options.optimization.epochs}"
        with progress(title, steps * self.batches.batch_size, self.processes.first) as bar:
            bar.update(self.done * self.batches.batch_size)
            for images, labels in self.batches.train(self.epoch, self.done):
                start = time.perf_counter()
                images, labels = images.to(self.device), labels.to(self.device)
                step = self.learner.step(images, labels)
                meter.evaluations.update(evaluations_of(self.plain_model))
                now = time.perf_counter()
                meter.seconds["stepping"] += now - start
                meter.seconds["training"] += now - previous
                previous = now
                meter.update(step, labels)
                self.done += 1
                self._record()
                self._pause()
                bar.update(self.batches.batch_size)
                if self.done % LOOK_EVERY == 0 and not bar.disable and self.processes.size == 1:
                    show(bar, meter.loss, meter.accuracy, meter.changed(self.plain_model))

    def _record(self) -> None:
        """Record changes of the wiring every ``history_every`` steps within an epoch."""
        interval = self.options.run.history_every
        epoch_goes_on = self.done < self.batches.steps
        if self.processes.first and interval and self.done % interval == 0 and epoch_goes_on:
            self.lock.check()
            self.history.record(self.learner.steps)

    def _row(self) -> dict[str, Any]:
        """Evaluate the network, and return the metrics of the epoch."""
        start, meter = time.perf_counter(), self.meter
        self.learner.check_weights()  # before they are written to a file
        fit = self.options.optimization
        if self.epoch + 1 == fit.epochs:
            self.learner.recalibrate(self.batches, fit.epochs, fit.recalibrate)
        validation = self.learner.measure(self._validation)
        self._gather_bad_images()
        if self.processes.first:
            self.lock.check()
            self.history.record((self.epoch + 1) * self.batches.steps)
        seconds = meter.seconds["training"]
        return {
            "epoch": self.epoch + 1,
            "lr": self.learner.lr,
            **meter.row(self.batches.steps),
            **validation,
            "edges_changed": meter.changed(self.plain_model),
            "bad_images": self.batches.bad.count,
            "images_per_second": self.batches.steps * self.batches.batch_size / seconds,
            "seconds": seconds + time.perf_counter() - start,
            "seconds_training": seconds,
            "seconds_stepping": meter.seconds["stepping"],
        }

    def _validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the validation batches; stop if there was a signal."""
        for batch in self.batches.validation():
            if self.interrupts.received:
                if self.processes.size == 1:  # a checkpoint needs all processes at the same point
                    self.checkpoint()
                self._stop(self.interrupts.received)
            yield batch

    def summary(self) -> dict[str, Any]:
        """Return the result of a finished run."""
        last, best = self.rows[-1], self.best
        costs = cost(self.plain_model, self.options.data.image_size)
        averages = {name: value for name, value in last.items() if name.startswith("ema_top")}
        return {
            "top1": last["top1"],
            "top5": last["top5"],
            **averages,
            "best_top1": best["top1"],
            "best_epoch": best["epoch"],
            "best_chosen_on": self.config.split,
            "epochs": self.epoch,
            "parameters": costs.parameters,
            "macs": costs.macs,
            "real_edges": costs.real_edges,
            "candidate_edges": costs.candidate_edges,
            "dead_nodes": costs.dead_nodes,
            "unreachable_nodes": costs.unreachable_nodes,
            "bad_images": self.batches.bad.count,
            "seconds": sum(row["seconds"] for row in self.rows),
            "device": str(self.device),
            "images_per_second": len(self.rows)
            / sum(1 / row["images_per_second"] for row in self.rows),
        }
