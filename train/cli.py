"""Turns flags and recipes into options, and errors into one line."""

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from train.options import Options


def parse_options(
    args: Sequence[str], prog: str, description: str, default: Options | None = None
) -> Options:
    """Return the options that flags and ``--recipe FILE`` give; a flag overrides the recipe.

    Args:
        args: The flags.
        prog: What the command is called.
        description: What it does, for ``--help``.
        default: What is not given.

    Raises:
        ValueError: A recipe that cannot be read, or has an unknown key.
        SystemExit: Unknown or malformed flags, after printing why; or ``--help``.
    """
    rest, recipe = list(args), []
    while "--recipe" in rest:
        at = rest.index("--recipe")
        if at + 1 == len(rest):
            raise ValueError("--recipe needs a file")
        recipe += recipe_flags(Path(rest[at + 1]))
        del rest[at : at + 2]
    return tyro.cli(
        Options,
        args=[*recipe, *rest],
        prog=prog,
        description=f"{description}\n\n--recipe FILE reads options from YAML; flags override it.",
        default=default or Options(),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def recipe_flags(path: Path) -> list[str]:
    """Return a YAML recipe ``{option: value}`` as flags.

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
    known = list(Options().flat())
    flags = []
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"recipe {path}: unknown key {key!r}{hint} (known: {', '.join(known)})"
            )
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def run_command(command: Callable[[], Any]) -> None:
    """Run a command; print an error that a user can mend as one line, and exit with status 2."""
    try:
        command()
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # what reads the output has seen enough
        sys.stderr.close()
        sys.exit(0)


def differences(one: Options, other: Options) -> dict[str, tuple[Any, Any]]:
    """Return the options in which two differ, with both values."""
    ours, theirs = one.flat(), other.flat()
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
