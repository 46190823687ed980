"""Continuous time: states follow a differential equation."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from dnw_graph.schedule._time import InTime, start, update
from dnw_graph.schedule.base import SCHEDULES, ForwardPass, outputs_of, parts_of


@SCHEDULES.register("continuous")
class Continuous(InTime):
    r"""``dZ / dt = f(A Z(t), t)`` for ``t`` from 0 to ``t1``, read at the end (section 2.3).

    :math:`Z(0) = X` on the inputs and 0 elsewhere, an augmented neural ODE. It is solved by
    torchdiffeq with fixed real edges, in float32 inside autocast. The number of evaluations of the
    graph is in :attr:`NeuralGraph.evaluations`. Batch norm updates its statistics at each
    evaluation, so ``norm="instance"`` is more suitable.

    Args:
        method: A solver of torchdiffeq; the default is Dormand and Prince's, of order 5.
        rtol: Relative tolerance of adaptive solvers.
        atol: Absolute tolerance of adaptive solvers.
        t1: Time at the end.
        step_size: Step size of fixed-step solvers; None for a single step.
        adjoint: Whether to compute gradients by solving the adjoint equation backward, which needs
            memory for one evaluation only, instead of through the solver.
        max_evaluations: Largest number of evaluations of the graph in the forward pass, and in the
            backward pass.
        rectified: Whether to clip the solver's states at 0 at each evaluation of the graph, as in
            the published implementation, whose ReLU works in place; its checkpoints need this.

    Raises:
        ValueError: If the method is unknown or a number is out of range; on a forward or backward
            pass, if it takes more than ``max_evaluations`` or states are not finite.
    """

    def __init__(
        self,
        method: str = "dopri5",
        rtol: float = 1e-3,
        atol: float = 1e-3,
        t1: float = 1.0,
        step_size: float | None = None,
        adjoint: bool = False,
        max_evaluations: int = 1000,
        rectified: bool = False,
    ) -> None:
        numbers = {"rtol": rtol, "atol": atol, "t1": t1, "max_evaluations": max_evaluations}
        if step_size is not None:
            numbers["step_size"] = step_size
        for name, value in numbers.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        for name, flag in (("adjoint", adjoint), ("rectified", rectified)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be True or False, got {flag!r}")
        if not isinstance(max_evaluations, int):
            raise ValueError(f"max_evaluations must be a whole number, got {max_evaluations!r}")
        if adjoint and rectified:
            raise ValueError(
                "rectified=True changes states in place, which the adjoint equation does not "
                "support: pass adjoint=False"
            )
        if method == "scipy_solver" and not adjoint:
            raise ValueError(
                "method 'scipy_solver' works outside PyTorch, which loses gradients: pass "
                "adjoint=True"
            )
        self.rectified = rectified
        self.rtol, self.atol, self.t1, self.method = rtol, atol, t1, method
        self.adjoint, self.max_evaluations = adjoint, max_evaluations
        self.options = {} if step_size is None else {"step_size": step_size}
        ends = torch.tensor([0.0, t1], device="cpu")
        try:  # so that torchdiffeq rejects an unknown method or option now
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*[Uu]nexpected arguments.*")
                self._solve(False, lambda t, z: z, torch.zeros(1, device="cpu"), ends)
        except (ValueError, TypeError, UserWarning) as error:
            raise ValueError(f"continuous time with method {method!r}: {error}") from error

    @override
    def run(self, forward_pass: ForwardPass, frames: Sequence[Tensor]) -> list[Tensor]:
        (x,) = frames
        if self.adjoint and forward_pass.wiring.slot is not None:
            raise ValueError(
                "the adjoint does not compute gradients of sampled edges: pass adjoint=False, or "
                "use another rule"
            )
        with torch.autocast(x.device.type, enabled=False):
            x = x.float() if x.dtype != torch.float64 else x
            states = torch.cat(start(forward_pass, parts_of(forward_pass.topology, x)))
            ends = torch.tensor([0.0, self.t1], dtype=x.dtype, device=x.device)
            derivative = _Derivative(forward_pass, self)
            if not states.numel():  # no images
                return [outputs_of(forward_pass.topology, derivative.by_block(states))]
            with derivative.counting("forward"):
                if self.adjoint:
                    parameters = tuple(p for p in derivative.parameters() if p.requires_grad)
                    solution = self._solve(
                        True, derivative, states, ends, adjoint_params=parameters
                    )
                else:
                    solution = self._solve(False, derivative, states, ends)
        return [outputs_of(forward_pass.topology, derivative.by_block(solution[-1]))]

    def _solve(self, adjoint: bool, *args: Any, **kwargs: Any) -> Any:
        torchdiffeq = _import_torchdiffeq()
        solver = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        settings = {"rtol": self.rtol, "atol": self.atol, "method": self.method}
        try:
            return solver(*args, **settings, options=self.options or None, **kwargs)
        except AssertionError as error:  # torchdiffeq: a step underflows, or a state is not finite
            raise ValueError(
                f"the solver cannot continue ({error}): states or their derivatives are not finite "
                "or grow without bound; lower the learning rate, or use norms with a larger eps"
            ) from error

    @override
    def firings(self, evaluations: Mapping[str, int]) -> int:
        return evaluations["forward"]


def _import_torchdiffeq() -> Any:
    """Import torchdiffeq, only here because it imports SciPy.

    It creates tensors when it is imported, which must not depend on where it is first used.
    """
    with torch.device("cpu"), torch.inference_mode(False):
        import torchdiffeq
    return torchdiffeq


class _Derivative(nn.Module):
    """The right-hand side ``f(A Z, t)``.

    It holds the weights as a parameter and splits them at each evaluation, since the adjoint
    computes gradients of parameters of the right-hand side only.
    """

    def __init__(self, forward_pass: ForwardPass, schedule: Continuous) -> None:
        super().__init__()
        self._forward_pass, self._schedule, self._phase = forward_pass, schedule, "backward"
        self._aggregate = None if schedule.adjoint else forward_pass.aggregator()
        self.weight = forward_pass.weight
        self.functions = nn.ModuleList([*forward_pass.nodes, *forward_pass.messages])
        forward_pass.evaluations.update(forward=0, backward=0)

    @contextmanager
    def counting(self, phase: str) -> Iterator[None]:
        """Count evaluations inside the context under ``phase`` instead of ``"backward"``."""
        self._phase = phase
        try:
            yield
        finally:
            self._phase = "backward"

    def by_block(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return the states of each block."""
        blocks = self._forward_pass.topology.blocks
        return states.split([len(block.nodes) for block in blocks])

    def forward(self, t: Tensor, states: Tensor) -> Tensor:
        """Return the derivative of the states of all nodes ``[V, *features]``."""
        forward_pass, schedule, time = self._forward_pass, self._schedule, float(t.detach())
        counts = forward_pass.evaluations
        counts[self._phase] += 1
        if counts[self._phase] > schedule.max_evaluations:
            largest = float(states.detach().abs().max())
            tolerance = "rtol" if schedule.rtol * largest >= schedule.atol else "atol"
            raise ValueError(
                f"the solver needed more than {schedule.max_evaluations} evaluations "
                f"({self._phase}, at time {time:.3g} of {schedule.t1:g}, states up to "
                f"{largest:.3g}): loosen {tolerance}, now {getattr(schedule, tolerance):g}, which "
                "allows most of the error, or raise max_evaluations"
            )
        if schedule.rectified:
            states.relu_()  # in place, since the solver continues from these
        aggregate = self._aggregate or forward_pass.aggregator()
        return torch.cat(update(forward_pass, aggregate, self.by_block(states), time))
