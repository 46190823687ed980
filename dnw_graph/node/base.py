"""The interface of a node function."""

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
        scale: ``a [V]``, including the statistics of batch norm; None for 1.
        shift: ``b [V]``; None for 0.
        eps: ``eps`` of instance norm, where ``n`` uses the statistics of each map; None for no
            instance norm.
        relu: Whether to take the maximum with 0.
        filters: ``K [V, 3, 3]``, padding 1; None for no filters.
        stride: Stride of the filters.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    eps: float | None = None
    relu: bool = False
    filters: Tensor | None = None
    stride: int = 1


class NodeFunction(nn.Module):
    """Computes the states of a number of nodes from their inputs, each node separately.

    Args:
        num_nodes: Number of nodes.
        stride: Distance between outputs in pixels; must be 1 unless the function filters maps.

    Raises:
        ValueError: If the function does not support the stride.
    """

    #: Multiply-adds per node and output pixel, without normalisation; None if unknown.
    macs_per_pixel: int | None = None
    #: ``1 / rms(f(I))`` for inputs with mean 0 and standard deviation 1, for scaling weights.
    gain: float = 1.0
    #: Parameters per node, without normalisation; None to count all parameters of the module.
    parameters_per_node: int | None = None

    def __init__(self, num_nodes: int, stride: int = 1) -> None:
        super().__init__()
        self.num_nodes, self.stride = num_nodes, stride

    @abstractmethod
    def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
        """Return the states ``Z`` without changing the inputs.

        Args:
            x: Inputs ``I`` of the nodes ``[num_nodes, B, H, W]``, node-major.
            t: The time; 0 in a static graph.

        Returns:
            States ``[num_nodes, B, ceil(H / stride), ceil(W / stride)]``, node-major.
        """

    def formula(self, t: float = 0.0) -> Formula | None:
        """Return the formula used in evaluation, for :func:`dnw_graph.freeze`; None if unknown."""
        return None

    def extra_repr(self) -> str:
        """Show the number of nodes, and the stride if it is not 1."""
        return f"{self.num_nodes}" + (f", stride={self.stride}" if self.stride != 1 else "")


NodeFactory = Callable[..., nn.Module]
"""Called as ``factory(num_nodes)``, or ``factory(num_nodes, stride=s)`` if ``s`` is not 1.

A class without required arguments, such as ``torch.nn.GELU``, is called without a number, unless
one of its arguments is named ``num_nodes``.
"""


class WithoutTime(nn.Module):
    """Wraps a module that does not take the time as an argument.

    Args:
        function: The module, called with the inputs alone.
    """

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name in ("macs_per_pixel", "parameters_per_node", "gain"):
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))

    def formula(self, t: float = 0.0) -> Formula | None:
        """Return the formula of the wrapped module; None if unknown."""
        if type(self.function) is nn.ReLU:
            return Formula(relu=True)
        if type(self.function) is nn.Identity:
            return Formula()
        formula: Any = getattr(self.function, "formula", None)
        return formula(t) if formula else None

    def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
        """Return the states ``Z`` for inputs ``I``; the time is ignored."""
        states: Tensor = self.function(x)
        return states


def depthwise_conv(num_nodes: int, stride: int) -> nn.Conv2d:
    """Return one 3x3 filter per node, with padding 1.

    Raises:
        ValueError: If ``stride`` is below 1.
    """
    if stride < 1:
        raise ValueError(f"stride must be 1 or more, got {stride}")
    return nn.Conv2d(num_nodes, num_nodes, 3, stride, padding=1, groups=num_nodes, bias=False)


NODES: Registry[type[NodeFunction]] = Registry("node function")


def make_node(node: str | NodeFactory, num_nodes: int, stride: int = 1) -> nn.Module:
    """Return a new node function for one block.

    Args:
        node: A name, a class, or a callable that returns a module for a number of nodes, such as
            ``functools.partial(NormReluConv, norm="instance")``. The module is called with inputs
            and time, or with inputs alone if it takes one argument.
        num_nodes: Number of nodes of the block.
        stride: Distance between outputs in pixels.

    Raises:
        ValueError: If the name is unknown; the message lists the known names.
        TypeError: If ``node`` is neither a name nor callable, or is a module, which could serve
            only one block; or if it does not return a module.
    """
    if isinstance(node, str):
        node = NODES[node]
    if isinstance(node, nn.Module) or not callable(node):
        raise TypeError(
            f"node function must be a name ({', '.join(NODES)}) or a callable that builds one "
            f"module per block from a number of nodes, got {node!r}"
        )
    options = {} if stride == 1 else {"stride": stride}
    numbers = [num_nodes] if _takes_number(node) else []
    try:
        module = node(*numbers, **options)
    except TypeError as error:
        arguments = ", ".join([*map(str, numbers), *(f"{k}={v}" for k, v in options.items())])
        raise TypeError(
            f"node function {node!r} cannot be called with ({arguments}): {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise TypeError(f"node function {node!r} must build an nn.Module, got {module!r}")
    return module if _takes_time(module) else WithoutTime(module)


def _takes_number(factory: NodeFactory) -> bool:
    """Return whether a factory is to be called with a number of nodes."""
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
