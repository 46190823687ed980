"""Turns flags and recipes into options, and errors into one line."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
import yaml

from models import list_models
from train.interrupt import Interrupted
from train.options import Options, check_names
from train.run import RunFolder


def parse_options(
    args: Sequence[str],
    prog: str,
    description: str,
    defaults: Callable[[str], Options] = lambda _: Options(),
) -> Options:
    """Return the options that flags give; they override ``--recipe FILE``, and it ``--resume RUN``.

    Args:
        args: The flags.
        prog: What the command is called.
        description: What it does, for ``--help``.
        defaults: Returns the options of a model where nothing else is said.

    Raises:
        ValueError: A recipe that cannot be read, or has an unknown key; not a run folder.
        SystemExit: Unknown or malformed flags, after printing why; or ``--help``.
    """
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", type=Path, action="append", default=[])
    first.add_argument("--resume")
    first.add_argument("--graph")
    found, rest = first.parse_known_args(args)
    rest += [] if found.graph is None else [f"--graph={found.graph}"]
    recipes = [(path, read_recipe(path)) for path in map(_find_recipe, found.recipe)]
    resume = [values.pop("resume") for _, values in recipes if "resume" in values]
    resume += [found.resume] if found.resume is not None else []
    graphs = [values["graph"] for _, values in recipes if "graph" in values]
    graphs += [] if found.graph is None else [found.graph]
    graph = graphs[-1] if graphs else Options().network.graph
    options = defaults(graph) if graph in list_models() else Options()
    if resume:
        options = options.replace(resume=resume[-1])  # says so if it is empty
        options = RunFolder(resume[-1]).load_config().options.replace(resume=resume[-1])

    description += (
        f"\n\nModels: {', '.join(list_models())}.\n\n--recipe FILE reads options from YAML, or "
        "names a recipe of train/recipes; flags override it."
    )

    def parse(flags: Sequence[str]) -> Options:
        return tyro.cli(
            Options,
            args=flags,
            prog=prog,
            description=description,
            default=options,
            config=(tyro.conf.OmitArgPrefixes,),
        )

    for path, values in recipes:
        try:
            options = parse(as_flags(values))
        except SystemExit as error:
            raise ValueError(f"recipe {path} has the mistake above") from error
    return parse(rest)


def _find_recipe(path: Path) -> Path:
    """Return one of the recipes that come along if its name is given, else the path."""
    ours = Path(__file__).parent / "recipes" / f"{path}.yaml"
    return ours if ours.is_file() and not path.exists() else path


def read_recipe(path: Path) -> dict[str, Any]:
    """Return a YAML recipe ``{option: value}``.

    Raises:
        ValueError: No such file, not a mapping, or a key that is no option; the message shows the
            nearest one.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        ours = sorted(p.stem for p in (Path(__file__).parent / "recipes").glob("*.yaml"))
        raise ValueError(
            f"there is no recipe {path}; those that come along: {', '.join(ours)}"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} must be a mapping from options to values")
    try:
        check_names(values)
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from None
    return values


def load_recipe(name: str) -> Options:
    """Return the options of a recipe that comes along.

    Raises:
        ValueError: There is none of that name.
    """
    return parse_options([f"--recipe={name}"], "", "")


def as_flags(values: dict[str, Any]) -> list[str]:
    """Return options as flags, so that both are checked and converted by the same rules."""
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags


def as_text(name: str, value: Any) -> str:
    """Return a result as people read it: shares of images as percentages, digits in groups."""
    if "top" in name:
        return f"{value:.2%}"
    if isinstance(value, float):
        return f"{value:,.1f}" if value > 10 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


_FIRST = os.environ.get("RANK", "") in ("", "0")
"""Whether this is the first of the processes that torchrun started, or the only one."""


def run_command(command: Callable[[], Any]) -> None:
    """Run a command; print an error that a user can mend as one line, and exit with status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command()
    except BrokenPipeError:  # what reads the output has seen enough
        sys.stderr.close()
        sys.exit(0)
    except ConnectionError as error:
        if _FIRST:  # the others are gone because of the first, which has said why
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        if _FIRST:
            print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)
