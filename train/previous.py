"""Find and check the run that a command continues."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint import Checkpoints
from train.data import Source
from train.options import Options
from train.process_group import restarted
from train.run import RunConfig, RunFolder
from train.start import check_classes, differences_as_text

FREE_ON_RESUME = {
    *("data", "validation_data", "workers", "bad_images", "device", "resume", "auto_resume"),
    *("checkpoint_every", "checkpoint_minutes", "report", "wandb"),
}
"""Options that may differ from those of the run that is continued."""


def with_auto_resume(options: Options) -> Options:
    """Return options that continue the run in ``--out``, if ``--auto-resume`` or torchrun asks to.

    This lets a cluster or torchrun repeat a command unchanged. If there is no such run, the options
    are returned unchanged; if it stopped before its first checkpoint, they overwrite it.
    """
    run = options.run
    if run.resume is not None or not (run.auto_resume or restarted()):
        return options
    assert run.out is not None
    if not Path(run.out).exists():
        return options
    if Checkpoints(run.out):
        return options.replace(resume=run.out, overwrite=False)
    weights = (Path(run.out) / f"{name}.safetensors" for name in ("last", "best"))
    if any(path.exists() for path in weights):  # trained weights are not overwritten
        return options
    return options.replace(overwrite=True)  # it stopped before its first checkpoint


@dataclass(frozen=True)
class PreviousRun:
    """The folder, configuration and state of a run to continue."""

    folder: RunFolder
    config: RunConfig
    state: dict[str, Any]

    def check_images(self, source: Source) -> None:
        """Raise ValueError if images are not those of the run."""
        check_classes(self.folder, self.config.classes, source.classes)
        fingerprint = self.state.get("images")
        if fingerprint != source.fingerprint():
            raise ValueError(
                f"{self.folder.path} was trained on other images ({fingerprint}; now "
                f"{source.fingerprint()}): order and learning rate would change. Resume with the "
                "original images, or start a new run from its network with "
                f"--init {self.folder.path}"
            )


def check_resume(options: Options) -> PreviousRun:
    """Return the run that ``--resume`` names.

    Raises:
        ValueError: If the options of the run differ, or it has no checkpoint.
    """
    folder = RunFolder(str(options.run.resume))
    config, state = folder.load_config(), Checkpoints(folder.path).load()
    edits = _differences(Options.from_flat(state.get("options", {})), config.options)
    if edits.keys() - {"init", "out"}:
        raise ValueError(
            f"{folder.path}/config.yaml was changed after training began: "
            f"{differences_as_text(edits)}; a run continues with its original options, so undo the "
            "change"
        )
    changes = _differences(config.options, options)
    if changes.keys() & {"out", "overwrite"}:
        raise ValueError(
            f"{folder.path} is continued in place: use --resume without --out and --overwrite"
        )
    if changes:
        raise ValueError(
            f"{folder.path} was trained with {differences_as_text(changes)}; resume without "
            f"changing options (only --resume {folder.path}), or start a new run from its network "
            f"with --init {folder.path}"
        )
    return PreviousRun(folder, config, state)


def _differences(before: Options, after: Options) -> dict[str, tuple[Any, Any]]:
    """Return the options that differ although they may not, with both values."""
    differences = before.differences(after)
    return {name: both for name, both in differences.items() if name not in FREE_ON_RESUME}
