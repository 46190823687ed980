"""Networks inside wrappers: compiled, averaged, or trained by several processes."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_COMPILED = "_orig_mod"
_MODULE = "module."
_AVERAGED = "n_averaged"


def check_network(model: Any) -> None:
    """Raise TypeError if a network is not a module."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(
            f"expected a network, which is a torch.nn.Module such as a NeuralGraph, got {kind}"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside any wrappers, or the network itself.

    Wrappers are the result of ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``,
    ``AveragedModel``, and the modules that Lightning Fabric sets up.

    Raises:
        TypeError: If the network is not a module.
    """
    check_network(model)
    while True:
        inner: Any = getattr(model, _COMPILED, None)
        wraps = isinstance(model, DataParallel | DistributedDataParallel | AveragedModel)
        if inner is None and (wraps or type(model).__name__ == "_FabricModule"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def unwrapped_names(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the ``state_dict`` of a wrapped network, with the names of the network itself.

    Args:
        state: The state. If an earlier version saved it, it may lack fingerprints of topologies.
        expected: State of the network itself, if known; its names may begin with ``module.``.
    """
    expected = expected or {}
    fingerprints = {n: v for n, v in expected.items() if n.split(".")[-1] == "fingerprint"}
    depth = min(map(_depth, expected), default=0)
    tensors = {
        ".".join(part for part in name.split(".") if part != _COMPILED): value
        for name, value in state.items()
    }
    while True:
        inner = {name: value for name, value in tensors.items() if name != _AVERAGED}
        if not inner or min(map(_depth, inner)) <= depth:
            return fingerprints | {_current(name, expected): v for name, v in inner.items()}
        tensors = {name.removeprefix(_MODULE): value for name, value in inner.items()}


def _current(name: str, expected: Collection[str]) -> str:
    """Return the current name of a tensor if expected; selectors were once named ``choice``."""
    current = ".".join("selector" if part == "choice" else part for part in name.split("."))
    return current if name not in expected and current in expected else name


def _depth(name: str) -> int:
    """Return how many times a name begins with ``module.``."""
    depth = 0
    while name.startswith(_MODULE, depth * len(_MODULE)):
        depth += 1
    return depth
