"""Runs that are stopped, killed, or lose what they wrote, and go on."""

import errno
import hashlib
import logging
import os
import pickle
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.kills import command, differences, environment, kill
from dnw_graph import load_frozen
from dnw_graph.analysis import load_history
from tests.conftest import BUDGETED
from train.checkpoint import KEPT, Checkpoints
from train.data import cache
from train.imagenet import resume, train
from train.import_allenai import read_checkpoint
from train.interrupt import Interrupted
from train.learner import NotFiniteError
from train.loop import Training, start_training
from train.options import Options
from train.run import RunFolder

SMALL = {
    "graph": "mbv1_dnw",
    "width": 0.1,
    "data": "digits",
    "image_size": 16,
    "batch_size": 64,
    "train_images": 330,
    "validation_images": 100,
    "lr": 0.05,
    "epochs": 2,
    "device": "cpu",
    "report": False,
}


TINY = {"graph": "tiny_static", "width": None, "image_size": 8}


def options(out: Path, **changes: object) -> Options:
    return Options.from_flat({**SMALL, "out": str(out), **changes})


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "complete"
    train(options(out, **TINY, rule="complete", epochs=1))
    return out


def stop_after(training: Training, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run be asked to stop in some step, as by a signal."""
    step = training.learner.step

    def counted(*args: torch.Tensor) -> object:
        if training.learner.steps + 1 == steps:
            training.interrupts.received = signal.SIGTERM
        return step(*args)

    monkeypatch.setattr(training.learner, "step", counted)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM: .* continue with: .*--resume"):
        training.fit()


@pytest.mark.parametrize("rule", BUDGETED)
def test_any_rule_goes_on_within_an_epoch(
    rule: str, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, object] = {**TINY, "rule": rule, "history_every": 2}
    if rule in ("lottery", "fine_tune"):
        given["from_run"] = str(complete)
    summary = train(options(tmp_path / "whole", **given))
    stop_after(start_training(options(tmp_path / "stopped", **given)), 3, monkeypatch)
    torch.manual_seed(999)
    assert Checkpoints(tmp_path / "stopped").load()["done"] == 3
    resumed = resume(tmp_path / "stopped")
    assert resumed["top1"] == summary["top1"]
    assert differences(tmp_path / "whole", tmp_path / "stopped") == []


def test_everything_that_may_be_switched_on_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        **{"mixup": 0.4, "cutmix": 1.0, "ema_decay": 0.9, "clip_grad_norm": 0.5},
        **{"micro_batch_size": 25, "label_smoothing": 0.1, "warmup_epochs": 1},
    }
    train(options(tmp_path / "whole", **given))
    stop_after(start_training(options(tmp_path / "stopped", **given)), 7, monkeypatch)
    assert Checkpoints(tmp_path / "stopped").load()["done"] == 2
    resume(tmp_path / "stopped")
    assert differences(tmp_path / "whole", tmp_path / "stopped") == []
    ours, theirs = (RunFolder(tmp_path / n).load_weights("ema") for n in ("whole", "stopped"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_that_is_stopped_while_it_measures_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"recalibrate": 2, "epochs": 1}
    train(options(tmp_path / "whole", **given))
    training = start_training(options(tmp_path / "stopped", **given))
    measure = training.learner.measure

    def interrupted(*args: object) -> object:
        training.interrupts.received = signal.SIGINT
        return measure(*args)

    monkeypatch.setattr(training.learner, "measure", interrupted)
    with pytest.raises(Interrupted, match="saved at step 5 of 5 in epoch 1"):
        training.fit()
    assert not (tmp_path / "stopped" / "last.safetensors").exists()
    resume(tmp_path / "stopped")
    assert differences(tmp_path / "whole", tmp_path / "stopped") == []


def test_a_signal_between_epochs_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = start_training(options(tmp_path / "run", **TINY))
    save = training.folder.save_metrics

    def signalled(rows: Sequence[Mapping[str, object]]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        save(rows)

    monkeypatch.setattr(training.folder, "save_metrics", signalled)
    with pytest.raises(Interrupted, match=r"saved at step 0 of 5 in epoch 2; continue with"):
        training.fit()
    assert resume(tmp_path / "run")["epochs"] == 2


def test_a_run_killed_three_times_ends_as_if_never_killed(tmp_path: Path) -> None:
    killed = kill(tmp_path, "rigl(every=4)", 0, random.Random(0), times=3)
    assert len(killed.resumed_from) == 3
    assert killed.differences == []


def started(folder: Path, *args: str) -> "subprocess.Popen[str]":
    """Start a long run, and wait until its first step is near."""
    given = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k != "report"]
    flags = [*given, "--epochs=500", "--no-report", f"--out={folder}", *args]
    process = subprocess.Popen(
        command(*flags),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not Checkpoints(folder):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(number: int, status: int, tmp_path: Path) -> None:
    process = started(tmp_path / "run")
    time.sleep(1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    told = errors.splitlines()[-1]
    assert told.startswith(f"stopped by {signal.Signals(number).name}: {tmp_path / 'run'} is saved")
    assert told.endswith(f"continue with: python -m train.imagenet --resume {tmp_path / 'run'}")
    assert Checkpoints(tmp_path / "run").load()["steps"] > 0


def test_a_second_signal_ends_a_run_at_once(tmp_path: Path) -> None:
    process = started(tmp_path / "run", "--image-size=224", "--batch-size=330")  # long steps
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - began < 2
    assert process.returncode == 143
    assert Checkpoints(tmp_path / "run").load()["steps"] == 0


def test_the_same_command_begins_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"auto_resume": True, "epochs": 1}
    stop_after(start_training(options(tmp_path / "run", **given)), 2, monkeypatch)
    again = start_training(options(tmp_path / "run", **given))
    assert again.done == 2
    again.fit()
    assert train(options(tmp_path / "run", **given))["epochs"] == 1  # finished, and left alone
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        checkpoint.unlink()
    with pytest.raises(ValueError, match="exists"):  # it has weights, so it is not begun again
        train(options(tmp_path / "run", **given))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    try:
        done = subprocess.run(asked, capture_output=True, text=True).returncode
    except FileNotFoundError:
        done = 1
    if done:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path, leave: int) -> None:
    status = os.statvfs(disk)
    free = status.f_bavail * status.f_frsize
    (disk / "filling").write_bytes(bytes(max(0, free - leave)))


def test_a_full_disk_leaves_the_checkpoint_before(disk: Path) -> None:
    small = {"graph": "mbv1", "width": 0.25}
    training = start_training(options(disk / "run", **small))
    training.advance()
    kept = {p: p.read_bytes() for p in (disk / "run" / "checkpoints").iterdir()}
    fill(disk, leave=100_000)
    with pytest.raises(OSError, match=r"could not be written .*No space left.* is still there"):
        training.advance()
    assert {p: p.read_bytes() for p in (disk / "run" / "checkpoints").iterdir()} == kept
    (disk / "filling").unlink()
    assert resume(disk / "run")["epochs"] == 2


def test_a_checkpoint_that_does_not_fit_is_not_half_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"steps": 1}, 1)

    def full(path: Path, data: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.save({"steps": 2}, 2)
    monkeypatch.undo()
    assert len(list(checkpoints.path.iterdir())) == 1
    assert checkpoints.load() == {"steps": 1}


@pytest.mark.parametrize("damage", ["cut short", "one bit"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (3, 6):
        checkpoints.save({"weights": torch.full((100,), step), "steps": step}, step)
    newest = max(checkpoints.path.iterdir())
    data = bytearray(newest.read_bytes())
    if damage == "one bit":
        data[len(data) // 2] ^= 4
    newest.write_bytes(data if damage == "one bit" else data[:-10])
    with caplog.at_level(logging.WARNING):
        assert checkpoints.load()["steps"] == 3
    assert (
        f"{newest} is damaged: its content does not match its checksum; resuming from the"
        in caplog.text
    )
    checkpoints.save({"steps": 5}, 5)  # what lies in the run's future is no longer wanted
    assert [int(p.name[:10]) for p in sorted(checkpoints.path.iterdir())] == [3, 5]
    for path in checkpoints.path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot be resumed: \S+0000000005-\w+.pt is damaged"):
        checkpoints.load()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(options(tmp_path / "whole"))
    stop_after(start_training(options(tmp_path / "run", checkpoint_every=2)), 7, monkeypatch)
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])
    resume(tmp_path / "run")
    assert "resuming from the earlier checkpoint" in caplog.text
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_a_run_with_a_damaged_history_is_resumed(tmp_path: Path) -> None:
    training = start_training(options(tmp_path / "run", **TINY))
    training.advance()
    first = tmp_path / "run" / "history" / "0000000000.npz"
    first.write_bytes(first.read_bytes()[:50])
    resume(tmp_path / "run")
    first.unlink()
    steps = next(iter(load_history(tmp_path / "run").values())).steps
    assert steps == [training.batches.steps, 2 * training.batches.steps]
    start_training(options(tmp_path / "run", **TINY, overwrite=True))


def test_few_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert not checkpoints
    with pytest.raises(ValueError, match="stopped before its first checkpoint"):
        checkpoints.load()
    for step in range(0, 50, 10):
        checkpoints.save({"steps": step}, step)
        (checkpoints.path / f".{step}.half").touch()  # of a process that was killed
    assert len(list(checkpoints.path.glob("*.pt"))) == KEPT
    assert len(list(checkpoints.path.glob(".*"))) == 1
    assert checkpoints.load()["steps"] == 40


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("boom",))


def checkpoint_bomb(place: Path, data: bytes) -> None:
    checkpoints = Checkpoints(place)
    checkpoints.save({}, 1)
    next(checkpoints.path.iterdir()).unlink()
    name = hashlib.sha256(data).hexdigest()[:16]
    (checkpoints.path / f"0000000001-{name}.pt").write_bytes(data)
    checkpoints.load()


def weights_bomb(place: Path, data: bytes) -> None:
    (place / "last.safetensors").write_bytes(data)
    RunFolder(place).load_weights("last")


def frozen_bomb(place: Path, data: bytes) -> None:
    (place / "frozen.safetensors").write_bytes(data)
    load_frozen(place / "frozen.safetensors")


def import_bomb(place: Path, data: bytes) -> None:
    (place / "best.pt").write_bytes(data)
    read_checkpoint(place / "best.pt")


def history_bomb(place: Path, data: bytes) -> None:
    (place / "history").mkdir()
    (place / "history" / "0000000000.npz").write_bytes(data)
    load_history(place)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize(
    "read", [checkpoint_bomb, weights_bomb, frozen_bomb, import_bomb, history_bomb]
)
def test_no_file_executes_code(
    read: Callable[[Path, bytes], None],
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if kind == "pickle":
        data = pickle.dumps(Bomb())
    else:
        torch.save({"model": Bomb()}, tmp_path / "bomb")
        data = (tmp_path / "bomb").read_bytes()
    with pytest.raises(ValueError, match=r"damaged|executing code|no frozen|cannot be read"):
        read(tmp_path, data)
    assert "boom" not in capsys.readouterr().out


def test_a_hostile_cache_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DNW_CACHE", str(tmp_path / "cache"))
    image = tmp_path / "image.png"
    image.write_bytes(b"whatever")
    entry = cache.pictures_entry([image])
    cache.keep(entry, [torch.zeros(3, 2, 2, dtype=torch.uint8)])
    assert cache.find(entry) is not None
    next((tmp_path / "cache").iterdir()).write_bytes(pickle.dumps(Bomb()))
    assert cache.find(entry) is None
    assert "boom" not in capsys.readouterr().out


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    training = start_training(options(tmp_path / "run"))
    before = Checkpoints(tmp_path / "run").load()["steps"]
    with torch.no_grad():
        next(iter(training.plain_model.parameters()))[0] = torch.inf
    with pytest.raises(NotFiniteError, match=r"the weights \S+ are not finite"):
        training.checkpoint()
    assert Checkpoints(tmp_path / "run").load()["steps"] == before
