"""Describe how a result was produced: versions, machine, commit."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("dnw-graph", "torch", "torchvision", "torch-geometric", "lightning", "numba")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results."""
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def machine(device: str = "cpu") -> str:
    """Return the name of the GPU, or of the processor with the number of threads, in one line."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return (
        f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads"
    )


def commit() -> str:
    """Return the commit, with a "+" if files besides results were changed; "" outside a clone."""
    hash = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return f"{hash}+" if hash and changed else hash


def folder_name() -> str:
    """Return the hash of the commit, or "unknown", as a name for folders of its runs."""
    return commit().rstrip("+") or "unknown"


def _git(*args: str) -> str:
    """Return the output of a git command; empty outside a clone or if the command fails."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        process = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return process.stdout.strip()


def _processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


_prefix = "python -m train."


def started_by(console: str) -> None:
    """Make :func:`how_to_run` return commands that start with this console command."""
    global _prefix
    _prefix = f"{console} "


def how_to_run(command: str) -> str:
    """Return the command line of a command, in the form in which this one was started."""
    return f"{_prefix}{command}"
