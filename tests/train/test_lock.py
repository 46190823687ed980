"""Two processes in one run folder: one trains, the other is told."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import train.lock
import train.loop
from tests.train.test_resume import SMALL, TINY
from train.checkpoint import Checkpoints
from train.imagenet import train as fit
from train.lock import LOCK, OWNER, RunLock
from train.loop import start_training
from train.options import Options
from train.run import RunFolder

ROOT = Path(__file__).parents[2]


def options(out: Path, **changes: object) -> Options:
    return Options.from_flat({**SMALL, **TINY, "out": str(out), "epochs": 3, **changes})


def resumed(run: Path) -> Options:
    return Options.from_flat({"resume": str(run)}, RunFolder(run).load_config().options)


HOLD = """
import sys, time
from pathlib import Path
from train.lock import RunLock
try:
    lock = RunLock(Path(sys.argv[1]))
    lock.acquire()
except ValueError as error:
    print(error, flush=True)
    sys.exit(2)
print("owner", flush=True)
time.sleep(float(sys.argv[2]))
"""

Holder = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def holder() -> Iterator[Holder]:
    """Return a function that starts a process which locks a folder, and tells how it went."""
    processes = []

    def start(folder: Path, seconds: float = 60) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_second_process_is_told_who_trains(tmp_path: Path, holder: Holder) -> None:
    run = tmp_path / "run"
    start_training(options(run)).lock.release()
    first = holder(run)
    assert said(first) == "owner"
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    message = rf"run is in use by process {first.pid} on \S+ since 20.*: wait for it, stop it"
    others = resumed(run), options(run, overwrite=True), options(run, auto_resume=True)
    for other in others:
        with pytest.raises(ValueError, match=message):
            start_training(other)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_died_leaves_no_lock(
    tmp_path: Path, holder: Holder, number: signal.Signals
) -> None:
    first = holder(tmp_path)
    assert said(first) == "owner"
    first.send_signal(number)
    first.wait()
    assert (tmp_path / OWNER).exists()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.check()
    assert said(holder(tmp_path)).startswith(f"{tmp_path} is in use by process {os.getpid()}")


def test_the_folder_is_free_after_training_and_after_a_failure(
    tmp_path: Path, holder: Holder
) -> None:
    run = tmp_path / "run"
    fit(options(run, epochs=1))
    assert not {LOCK, OWNER} & {p.name for p in run.iterdir()}
    first = holder(run, 0)
    assert said(first) == "owner"
    first.wait()  # until then it holds the lock
    with pytest.raises(ValueError, match="there is no such folder"):
        start_training(options(run, overwrite=True, data="nowhere"))
    assert said(holder(run, 0)) == "owner"


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_the_one_that_comes_later_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    run = tmp_path / "run"
    stopped = start_training(options(run))
    stopped.advance()
    monkeypatch.setattr(train.lock, "_open_files", {})  # as in another process
    newer = start_training(resumed(run))
    newer.fit()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 3
    with pytest.raises(ValueError, match="run was taken over by another process, which has ended"):
        stopped.advance()
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_one_that_was_taken_over_stops_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    run = tmp_path / "run"
    stopped = start_training(options(run, history_every=1, checkpoint_every=1))
    stopped.advance()
    monkeypatch.setattr(train.lock, "_open_files", {})
    newer = start_training(resumed(run))
    newer.advance()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(
        ValueError, match=r"run was taken over by process \d+ on .*; this process stops"
    ):
        stopped.advance()
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    stopped.lock.release()  # which takes nothing from the newer one
    newer.advance()
    assert Checkpoints(run).load()["epoch"] == 3


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system cannot stop processes")
def test_a_stopped_process_keeps_the_folder(tmp_path: Path, holder: Holder) -> None:
    first = holder(tmp_path)
    assert said(first) == "owner"
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(ValueError, match=f"is in use by process {first.pid}"):
        RunLock(tmp_path).acquire()
    first.send_signal(signal.SIGCONT)
    first.kill()
    first.wait()
    RunLock(tmp_path).acquire()


def test_of_many_that_start_at_once_one_trains(tmp_path: Path, holder: Holder) -> None:
    found = [said(process) for process in [holder(tmp_path, 5) for _ in range(6)]]
    assert found.count("owner") == 1
    assert sum("is in use by process" in line for line in found) == 5


def test_locks_are_handed_on_without_a_gap(tmp_path: Path) -> None:
    for _ in range(50):
        lock = RunLock(tmp_path)
        lock.acquire()
        again = RunLock(tmp_path)  # of the same process, such as a run that is resumed in it
        again.acquire()
        with pytest.raises(ValueError, match="was taken over"):
            lock.check()
        lock.release()
        again.check()
        again.release()
    assert not list(tmp_path.iterdir())


def test_two_commands_in_one_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | TINY).items()]
    flags = [f for f in flags if "report" not in f and "width" not in f] + ["--no-report"]
    command = [sys.executable, "-m", "train.imagenet", *flags, "--epochs=500", f"--out={run}"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not (run / "metrics.csv").exists():
            assert first.poll() is None
            time.sleep(0.1)
        resume = [sys.executable, "-m", "train.imagenet", f"--resume={run}"]
        second = subprocess.run(resume, cwd=ROOT, capture_output=True, text=True)
        assert second.returncode == 2
        assert f"error: {run} is in use by process {first.pid} on " in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()


def test_a_folder_that_was_removed_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = RunLock(folder)
    lock.acquire()
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="run was removed during training"):
        lock.check()
    lock.release()


def test_a_forked_process_takes_no_lock_away(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from train.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
if os.fork() == 0:
    sys.exit()
os.wait()
lock.check()
print(sorted(os.listdir(sys.argv[1])))
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{[LOCK, OWNER]}\n", done.stderr


def test_an_owner_that_cannot_be_read_is_no_takeover(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    text = (tmp_path / OWNER).read_text()
    (tmp_path / OWNER).write_text(text[:10])
    lock.check()
    (tmp_path / OWNER).write_text(text)
    lock.release()


def test_a_run_that_began_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: Holder
) -> None:
    run, open_source = tmp_path / "run", train.loop.open_source

    def begun_meanwhile(**kwargs: object) -> object:
        run.mkdir()
        assert said(holder(run)) == "owner"
        return open_source(**kwargs)

    monkeypatch.setattr(train.loop, "open_source", begun_meanwhile)
    with pytest.raises(ValueError, match="run is in use by process"):
        start_training(options(run, overwrite=True))
    assert sorted(p.name for p in run.iterdir()) == [LOCK, OWNER]


def test_a_run_is_read_after_its_folder_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    start_training(options(run)).lock.release()
    order = []
    acquire, load = RunLock.acquire, Checkpoints.load
    monkeypatch.setattr(RunLock, "acquire", lambda self: order.append("lock") or acquire(self))
    monkeypatch.setattr(Checkpoints, "load", lambda self: order.append("read") or load(self))
    start_training(resumed(run)).lock.release()
    assert order == ["lock", "read"]
