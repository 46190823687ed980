"""Parse flags and recipes into options, and print errors as one line."""

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
    """Return the options set by flags, by ``--recipe FILE`` and by ``--resume RUN``.

    Flags override recipes, and recipes override the options of the resumed run.

    Args:
        args: The flags.
        prog: Name of the command.
        description: Description of the command, for ``--help``.
        defaults: Returns the default options of a model.

    Raises:
        ValueError: If a recipe cannot be read or has an unknown key, or ``--resume`` does not name
            a run folder.
        SystemExit: If a flag is unknown or malformed, after printing why; or for ``--help``.
    """
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", type=Path, action="append", default=[])
    first.add_argument("--resume")
    first.add_argument("--graph")
    early, rest = first.parse_known_args(args)
    rest += [] if early.graph is None else [f"--graph={early.graph}"]
    recipes = [(path, read_recipe(path)) for path in map(_find_recipe, early.recipe)]
    resume = [values.pop("resume") for _, values in recipes if "resume" in values]
    resume += [early.resume] if early.resume is not None else []
    graphs = [values["graph"] for _, values in recipes if "graph" in values]
    graphs += [] if early.graph is None else [early.graph]
    graph = graphs[-1] if graphs else Options().network.graph
    options = defaults(graph) if graph in list_models() else Options()
    if resume:
        options = options.replace(resume=resume[-1])  # raises ValueError if it is empty
        options = RunFolder(resume[-1]).load_config().options.replace(resume=resume[-1])

    description += (
        f"\n\nModels: {', '.join(list_models())}.\n\n--recipe FILE reads options from a YAML file "
        "or from a recipe of train/recipes, by name; flags override it."
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
            raise ValueError(f"recipe {path} has the error above") from error
    return parse(rest)


def _find_recipe(path: Path) -> Path:
    """Return the path of a built-in recipe if this is the name of one, else the path itself."""
    builtin = Path(__file__).parent / "recipes" / f"{path}.yaml"
    return builtin if builtin.is_file() and not path.exists() else path


def read_recipe(path: Path) -> dict[str, Any]:
    """Return a YAML recipe ``{option: value}``.

    Raises:
        ValueError: If there is no such file, it is not a mapping, or a key is not an option; the
            message suggests the nearest option.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        builtin = sorted(p.stem for p in (Path(__file__).parent / "recipes").glob("*.yaml"))
        raise ValueError(
            f"there is no recipe {path}; the built-in ones are: {', '.join(builtin)}"
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
    """Return the options of a built-in recipe.

    Raises:
        ValueError: If there is no recipe of that name.
    """
    return parse_options([f"--recipe={name}"], "", "")


def as_flags(values: dict[str, Any]) -> list[str]:
    """Return options as flags, so that recipes and flags are checked and converted alike."""
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags


def as_text(name: str, value: Any) -> str:
    """Return a result as readable text: accuracies as percentages, digits in groups."""
    if "top" in name:
        return f"{value:.2%}"
    if isinstance(value, float):
        return f"{value:,.1f}" if value > 10 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


_FIRST = os.environ.get("RANK", "") in ("", "0")
"""Whether this is the first process that torchrun started, or the only process."""


def run_command(command: Callable[[], Any]) -> None:
    """Run a command; print errors that a user can fix as one line, and exit with status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may not be valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command()
    except BrokenPipeError:  # the reader of the output was closed
        sys.stderr.close()
        sys.exit(0)
    except ConnectionError as error:
        if _FIRST:  # the other processes would repeat the message
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):  # not an extra that is missing
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as interrupt:
        if _FIRST:
            print(interrupt, file=sys.stderr)
        sys.exit(128 + interrupt.signal)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)
