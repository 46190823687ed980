"""The contract of a node function."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from dnw_graph._registry import Registry


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A node function in evaluation, ``Z = K * max(a n(I) + b, 0)``, or parts of it.

    Attributes:
        scale: ``a [V]``, with what batch norm has learned; 1 unless given.
        shift: ``b [V]``; 0 unless given.
        eps: Of instance norm, whose ``n`` has statistics of each map; none unless given.
        relu: Whether there is the maximum.
        filters: ``K [V, 3, 3]``, padding 1; none unless given.
        stride: Of the filters.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    eps: float | None = None
    relu: bool = False
    filters: Tensor | None = None
    stride: int = 1


class NodeFunction(nn.Module):
    """Computes the states of a number of nodes from their inputs, each node apart.

    Args:
        num_nodes: How many nodes.
        stride: Pixels between the outputs; a function that does not move over pixels takes 1 only.

    Raises:
        ValueError: A stride that the function cannot have.
    """

    #: Multiply-adds per node and output pixel, without normalisation; None if unknown.
    macs_per_pixel: int | None = None
    #: ``1 / rms(f(I))`` for inputs of mean 0 and deviation 1, by which weights may be drawn.
    gain: float = 1.0
    #: Parameters per node, without normalisation; None for all parameters that the module has.
    parameters_per_node: int | None = None

    def __init__(self, num_nodes: int, stride: int = 1) -> None:
        super().__init__()
        self.num_nodes, self.stride = num_nodes, stride

    @abstractmethod
    def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
        """Return the states ``Z``, and leave the inputs as they are.

        Args:
            x: Inputs ``I`` of the nodes ``[num_nodes, B, H, W]``, node-major.
            t: The time; 0 in a static graph.

        Returns:
            States ``[num_nodes, B, ceil(H / stride), ceil(W / stride)]``, node-major.
        """

    def formula(self, t: float = 0.0) -> Formula | None:
        """Return what it computes in evaluation, for :func:`dnw_graph.freeze`; None if unknown."""
        return None

    def extra_repr(self) -> str:
        """Show the number of nodes, and the stride if there is one."""
        return f"{self.num_nodes}" + (f", stride={self.stride}" if self.stride != 1 else "")


NodeFactory = Callable[..., nn.Module]
"""Called as ``factory(num_nodes)``, or ``factory(num_nodes, stride=s)`` where ``s`` is not 1.

A class that requires no argument, such as ``torch.nn.GELU``, is called without a number, unless an
argument of its is called ``num_nodes``.
"""


class WithoutTime(nn.Module):
    """A node function that takes no time.

    Args:
        function: Called with the inputs alone.
    """

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name in ("macs_per_pixel", "parameters_per_node", "gain"):
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))

    def formula(self, t: float = 0.0) -> Formula | None:
        """Return what the function says that it computes, or what is known of PyTorch's."""
        if type(self.function) is nn.ReLU:
            return Formula(relu=True)
        if type(self.function) is nn.Identity:
            return Formula()
        own: Any = getattr(self.function, "formula", None)
        return own(t) if own else None

    def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
        """Return the states ``Z`` of the inputs ``I``, at any time."""
        states: Tensor = self.function(x)
        return states


NODES: Registry[type[NodeFunction]] = Registry("node function")


def make_node(node: str | NodeFactory, num_nodes: int, stride: int = 1) -> nn.Module:
    """Build the node function of one block.

    Args:
        node: A name, a class, or anything that returns a module when called with a number of
            nodes, such as ``functools.partial(NormReluConv, norm="instance")``. The module is
            called with inputs and time, or with inputs alone where it takes one argument.
        num_nodes: Number of nodes of the block.
        stride: Pixels between the outputs.

    Raises:
        ValueError: No node function has that name; the message lists those there are.
        TypeError: Not a name and not something to call; a module is for one block only.
    """
    if isinstance(node, str):
        node = NODES[node]
    if isinstance(node, nn.Module) or not callable(node):
        raise TypeError(
            f"a node function is a name ({', '.join(NODES)}) or is called with a number of nodes "
            f"to build one a block, got {node!r}"
        )
    options = {} if stride == 1 else {"stride": stride}
    numbers = [num_nodes] if _takes_number(node) else []
    try:
        made = node(*numbers, **options)
    except TypeError as error:
        asked = ", ".join([*map(str, numbers), *(f"{k}={v}" for k, v in options.items())])
        raise TypeError(
            f"node function {node!r} cannot be called with ({asked}): {error}"
        ) from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"node function {node!r} must build an nn.Module, got {made!r}")
    return made if _takes_time(made) else WithoutTime(made)


def _takes_number(factory: NodeFactory) -> bool:
    """Return whether a factory takes a number of nodes."""
    if getattr(factory, "__init__", None) is nn.Module.__init__:  # a class without a constructor
        return False
    try:
        parameters = list(signature(factory).parameters.values())
    except (TypeError, ValueError):  # a builtin, for example
        return True
    return any(
        p.kind is p.VAR_POSITIONAL
        or (p.kind in _POSITIONAL and (p.default is p.empty or p.name == "num_nodes"))
        for p in parameters
    )


def _takes_time(module: nn.Module) -> bool:
    """Return whether a module can be called with inputs and a time."""
    try:
        signature(module.forward).bind(None, 0.0)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
