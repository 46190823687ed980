"""Turns flags and recipes into options, and errors into one line."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from train.options import Options, check_names
from train.run import RunFolder


def parse_options(args: Sequence[str], prog: str, description: str) -> Options:
    """Return the options that flags give; they override ``--recipe FILE``, and it ``--resume RUN``.

    Args:
        args: The flags.
        prog: What the command is called.
        description: What it does, for ``--help``.

    Raises:
        ValueError: A recipe that cannot be read, or has an unknown key; not a run folder.
        SystemExit: Unknown or malformed flags, after printing why; or ``--help``.
    """
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", type=Path, action="append", default=[])
    first.add_argument("--resume")
    found, rest = first.parse_known_args(args)
    recipes = [(path, read_recipe(path)) for path in found.recipe]
    resume = found.resume
    for _, values in recipes:
        resume = resume or values.pop("resume", None)
    options = RunFolder(resume).load_config().options if resume else Options()
    options = dataclasses.replace(options, run=dataclasses.replace(options.run, resume=resume))

    description += "\n\n--recipe FILE reads options from YAML; flags override it."

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
            f"there is no recipe {path}; those that come along are in train/recipes: "
            f"{', '.join(ours)}"
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


def run_command(command: Callable[[], Any]) -> None:
    """Run a command; print an error that a user can mend as one line, and exit with status 2."""
    try:
        command()
    except BrokenPipeError:  # what reads the output has seen enough
        sys.stderr.close()
        sys.exit(0)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
