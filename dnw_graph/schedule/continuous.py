"""States follow a differential equation."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

from dnw_graph.schedule._time import InTime, start, update
from dnw_graph.schedule.base import SCHEDULES, ForwardPass, outputs_of, parts_of


@SCHEDULES.register("continuous")
class Continuous(InTime):
    r"""``dZ / dt = f(A Z(t), t)`` for ``t`` from 0 to ``t1``, read out at the end (section 2.3).

    :math:`Z(0) = X` on the inputs and 0 elsewhere, an augmented neural ODE. Solved by torchdiffeq
    with the real edges fixed, in float32 inside autocast. How often the graph was evaluated is in
    :attr:`NeuralGraph.evaluations`; normalisation over a batch updates its statistics each time, so
    ``norm="instance"`` suits it better.

    Args:
        method: A solver of torchdiffeq; the default is Dormand and Prince's, of order 5.
        rtol: Relative tolerance of adaptive solvers.
        atol: Absolute tolerance.
        t1: Time at the end.
        step_size: Of solvers with a fixed step; one step unless given.
        adjoint: Whether gradients come from the adjoint equation, solved backward, in memory for
            one evaluation, rather than through the solver.
        rectified: Whether the solver's states are clipped at 0 each time the graph is evaluated on
            them, as in the published implementation, whose ReLU works in place; its checkpoints
            need it.
        max_evaluations: Evaluations of the graph, forward and backward each, after which it gives
            up.

    Raises:
        ValueError: Another method, or a number out of range; on a forward or backward pass, more
            evaluations than ``max_evaluations``, or states that are not finite.
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
            raise ValueError("rectified=True changes states behind the adjoint equation's back")
        if method == "scipy_solver" and not adjoint:
            raise ValueError(
                "method 'scipy_solver' works outside PyTorch, which loses gradients: give "
                "adjoint=True"
            )
        self.rectified = rectified
        self.rtol, self.atol, self.t1, self.method = rtol, atol, t1, method
        self.adjoint, self.max_evaluations = adjoint, max_evaluations
        self.options = {} if step_size is None else {"step_size": step_size}
        ends = torch.tensor([0.0, t1], device="cpu")
        try:  # what torchdiffeq does not know, or does not take, it says now
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*[Uu]nexpected arguments.*")
                self._solve(odeint, lambda t, z: z, torch.zeros(1, device="cpu"), ends)
        except (ValueError, TypeError, UserWarning) as error:
            raise ValueError(f"continuous time with method {method!r}: {error}") from error

    def run(self, forward_pass: ForwardPass, frames: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`Schedule.run`."""
        (x,) = frames
        if self.adjoint and forward_pass.wiring.slot is not None:
            raise ValueError(
                "the adjoint gives no gradients to edges that are sampled: take adjoint=False, or "
                "another rule"
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
                    held = tuple(p for p in derivative.parameters() if p.requires_grad)
                    found = self._solve(
                        odeint_adjoint, derivative, states, ends, adjoint_params=held
                    )
                else:
                    found = self._solve(odeint, derivative, states, ends)
        return [outputs_of(forward_pass.topology, derivative.by_block(found[-1]))]

    def _solve(self, solver: Any, *args: Any, **more: Any) -> Any:
        given = {"rtol": self.rtol, "atol": self.atol, "method": self.method}
        try:
            return solver(*args, **given, options=self.options or None, **more)
        except AssertionError as error:  # how torchdiffeq says that it is lost
            raise ValueError(
                f"the solver found no way on ({error}): states or their derivatives are not finite "
                "or grow without bound; lower the learning rate, or give norms a larger eps"
            ) from error

    def firings(self, evaluations: Mapping[str, int]) -> int:
        """See :meth:`Schedule.firings`."""
        return evaluations["forward"]


class _Derivative(nn.Module):
    """The right-hand side ``f(A Z, t)``.

    It holds the weights as a parameter and splits them at each evaluation: the adjoint gives
    gradients to parameters of the right-hand side, and to nothing else that it uses.
    """

    def __init__(self, forward_pass: ForwardPass, schedule: Continuous) -> None:
        super().__init__()
        self._flow, self._schedule, self._phase = forward_pass, schedule, "backward"
        self._pull = None if schedule.adjoint else forward_pass.aggregator()
        self.weight = forward_pass.weight
        self.functions = nn.ModuleList([*forward_pass.nodes, *forward_pass.messages])
        forward_pass.evaluations.update(forward=0, backward=0)

    @contextmanager
    def counting(self, phase: str) -> Iterator[None]:
        """Count evaluations as those of a phase; as backward ones elsewhere."""
        self._phase = phase
        try:
            yield
        finally:
            self._phase = "backward"

    def by_block(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return the states of each block."""
        return states.split([len(block.nodes) for block in self._flow.topology.blocks])

    def forward(self, t: Tensor, states: Tensor) -> Tensor:
        """Return the derivative of the states of all nodes ``[V, *features]``."""
        counts, schedule, now = self._flow.evaluations, self._schedule, float(t.detach())
        counts[self._phase] += 1
        if counts[self._phase] > schedule.max_evaluations:
            largest = float(states.detach().abs().max())
            looser = "rtol" if schedule.rtol * largest >= schedule.atol else "atol"
            raise ValueError(
                f"the solver needed more than {schedule.max_evaluations} evaluations "
                f"({self._phase}, at time {now:.3g} of {schedule.t1:g}, states up to "
                f"{largest:.3g}): loosen {looser}, now {getattr(schedule, looser):g}, which "
                "allows most of the error, or raise max_evaluations"
            )
        if schedule.rectified:
            states.relu_()  # the solver goes on from these
        aggregate = self._pull or self._flow.aggregator()
        return torch.cat(update(self._flow, aggregate, self.by_block(states), now))
