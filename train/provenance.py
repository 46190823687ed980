"""Where a result comes from: versions, machine, commit."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("dnw-graph", "torch", "torchvision", "torch-geometric", "lightning", "numba")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(device: str = "cpu") -> str:
    """Return the GPU, or the processor and how many threads are used, in one line."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return (
        f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads"
    )


def commit() -> str:
    """Return the commit of the code, with a "+" if it was changed since; "" outside a clone."""
    found = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return f"{found}+" if found and changed else found


def folder_name() -> str:
    """Return a name for folders of runs that are to be of one commit: its hash, or "unknown"."""
    return commit().rstrip("+") or "unknown"


def _git(*args: str) -> str:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


_start = "python -m train."


def started_by(console: str) -> None:
    """Note that commands are run by a console command, which is given their names."""
    global _start
    _start = f"{console} "


def how_to_run(command: str) -> str:
    """Return how to run a command, in the way in which this one was started."""
    return f"{_start}{command}"
