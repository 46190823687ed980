"""Discrete time: all nodes fire at every step, as in a recurrent network."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from dnw_graph.schedule._time import InTime, padded, start, update
from dnw_graph.schedule.base import SCHEDULES, ForwardPass, RecurrentState, outputs_of, parts_of
from dnw_graph.topology import Topology

Input = Literal["start", "held", "new"]
Read = Literal["end", "every"]


@SCHEDULES.register("discrete")
class Discrete(InTime):
    r"""``Z(l + 1) = f(A Z(l), l)`` for ``l`` from 0, read at ``Z(L)`` (section 2.3).

    The input ``X`` of the graph is either the initial state of the input nodes,
    :math:`Z_{V_0}(0) = X`, or added to their inputs at each step:
    :math:`Z(l + 1) = f(A Z(l) + X(l + 1), l)` with :math:`Z_{V_0}(0) = f(X(0), 0)`. If it is the
    same at every step, input nodes have no parents, and there are as many steps as the longest path
    has edges, the outputs are those of a static graph.

    Args:
        steps: Number of steps ``L``; information moves along one edge per step.
        input: ``"start"``: the input is the initial state. ``"held"``: the same input is added at
            every step. ``"new"``: the input is a sequence ``[B, T, inputs, *features]`` of up to
            ``L + 1`` frames, one per step, followed by zeros. If a state is passed, the number of
            steps is the number of frames, and frame ``l`` is added in step ``l``.
        read: ``"end"`` to return the last outputs, or ``"every"`` to return those of all steps
            ``[B, L, outputs, *features]``.

    Raises:
        ValueError: If ``steps`` is below 1 or another argument is unknown, or if after ``steps`` no
            information from the input remains at an output.
    """

    carries_state = True

    def __init__(self, steps: int = 5, input: Input = "start", read: Read = "end") -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number, 1 or more, got {steps!r}")
        for name, value, choices in (("input", input, Input), ("read", read, Read)):
            if value not in get_args(choices):
                words = ", ".join(get_args(choices))
                raise ValueError(f"unknown {name} {value!r} (known: {words})")
        self.steps, self.input, self.read = steps, input, read
        self.takes_sequence, self.gives_sequence = input == "new", read == "every"
        self._checked: set[tuple[Topology, int]] = set()

    @override
    def check(self, topology: Topology) -> None:
        super().check(topology)
        if self.allows_constant_outputs:
            return
        distant = topology.outputs[topology.distance[topology.outputs] > self.steps]
        if len(distant):
            needed = int(topology.distance[topology.outputs].max())
            raise ValueError(
                f"in {self.steps} steps nothing reaches output {topology.describe(distant)} from "
                f"an input; pass steps={needed} or more"
            )
        if self.input == "start" and not self.gives_sequence:
            ends = topology.walks_from_inputs(self.steps)
            missing = topology.outputs[~torch.isin(topology.outputs, ends)]
            if len(missing):
                raise ValueError(
                    f"after {self.steps} steps no information from the input remains at output "
                    f"{topology.describe(missing)}: it moves along one edge per step, and no path "
                    f"from an input has {self.steps} edges; pass other steps, or input='held'"
                )

    @override
    def run(self, forward_pass: ForwardPass, frames: Sequence[Tensor]) -> list[Tensor]:
        """Return the states of the output nodes, at the end or after every step.

        Raises:
            ValueError: If a sequence has more frames than ``steps + 1``, or no information from it
                remains at an output.
        """
        if forward_pass.state is not None:
            return self._continue(forward_pass, frames, forward_pass.state)
        topology, aggregate = forward_pass.topology, forward_pass.aggregator()
        features = frames[0].shape[2:]
        if len(frames) > self.steps + 1:
            raise ValueError(
                f"a sequence of {len(frames)} frames does not fit in {self.steps} steps; pass "
                f"steps={len(frames) - 1} or more"
            )
        self._check_frames(topology, len(frames))
        inputs = [parts_of(topology, frame) for frame in frames]
        first = inputs[0]
        if self.input != "start":
            blocks = topology.blocks
            first = {
                i: padded(forward_pass.fire(blocks[i], part, 0.0), features)
                for i, part in first.items()
            }
        states, outputs = start(forward_pass, first), []
        for step in range(self.steps):
            x = inputs[0] if self.input == "held" else None
            if self.input == "new" and step + 1 < len(inputs):
                x = inputs[step + 1]
            states = update(forward_pass, aggregate, states, float(step), x)
            if self.gives_sequence or step + 1 == self.steps:
                outputs.append(outputs_of(topology, states))
        return outputs

    def _continue(
        self, forward_pass: ForwardPass, frames: Sequence[Tensor], state: RecurrentState
    ) -> list[Tensor]:
        """Return the outputs of steps that start from ``state``, which is updated."""
        topology, aggregate = forward_pass.topology, forward_pass.aggregator()
        inputs = [parts_of(topology, frame) for frame in frames]
        states, outputs = list(state.states), []
        if self.input == "start":
            states = [inputs[0].get(i, z) for i, z in enumerate(states)]
        steps = len(frames) if self.input == "new" else self.steps
        active_steps = steps if state.lengths is None else min(steps, int(state.lengths.max()))
        for step in range(active_steps):
            x = inputs[min(step, len(inputs) - 1)] if self.input != "start" else None
            # The first frame counts as time 0, as without a state.
            t = float(max(state.step + step - (self.input != "start"), 0))
            new = update(forward_pass, aggregate, states, t, x)
            if state.lengths is not None:
                active = (step < state.lengths).view(1, -1, *[1] * (new[0].dim() - 2))
                new = [torch.where(active, z, old) for z, old in zip(new, states, strict=True)]
            states = new
            if self.gives_sequence or step + 1 == active_steps:
                outputs.append(outputs_of(topology, states))
        if self.gives_sequence:  # all sequences have ended, so states do not change
            outputs += outputs[-1:] * (steps - active_steps)
        state.states, state.step = states, state.step + steps
        return outputs

    def _check_frames(self, topology: Topology, frames: int) -> None:
        """Raise ValueError if no frame of a sequence reaches an output in the last step."""
        if self.input != "new" or self.gives_sequence or self.allows_constant_outputs:
            return
        if (topology, frames) in self._checked:
            return
        for frame in range(frames):
            ends = topology.walks_from_inputs(self.steps - frame)
            if bool(torch.isin(topology.outputs, ends).any()):
                self._checked.add((topology, frames))
                return
        raise ValueError(
            f"after {self.steps} steps no information from a sequence of {frames} frames remains "
            "at any output: it moves along one edge per step; pass "
            f"steps={frames - 1 + (topology.depth or 1)}, or longer sequences"
        )

    @override
    def firings(self, evaluations: Mapping[str, int]) -> int:
        return self.steps
