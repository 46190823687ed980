"""All nodes fire at every step: a recurrent network."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from dnw_graph.schedule._time import InTime, padded, start, update
from dnw_graph.schedule.base import SCHEDULES, ForwardPass, RecurrentState, outputs_of, parts_of
from dnw_graph.topology import Topology

Input = Literal["start", "held", "new"]
Read = Literal["end", "every"]


@SCHEDULES.register("discrete")
class Discrete(InTime):
    r"""``Z(l + 1) = f(A Z(l), l)`` for ``l`` from 0, read out at ``Z(L)`` (section 2.3).

    What the graph is given may be the states of its inputs at the start,
    :math:`Z_{V_0}(0) = X`, or flow into them: :math:`Z(l + 1) = f(A Z(l) + X(l + 1), l)` on the
    inputs, where :math:`Z_{V_0}(0) = f(X(0), 0)`. If it is the same at every step, inputs have no
    parents, and there are as many steps as the longest path has edges, the outputs are those of a
    static graph.

    Args:
        steps: ``L``; the information in a state goes along one edge a step.
        input: ``"start"``; ``"held"``, the same flows in at every step; ``"new"``, a sequence
            ``[B, T, inputs, *features]`` of up to ``L + 1`` does, one a step, and nothing after
            its end. Where states are handed in, there are as many steps as frames, each of which
            flows into the states before it.
        read: ``"end"``; or ``"every"`` step, and the outputs are ``[B, L, outputs, *features]``.

    Raises:
        ValueError: No steps, or another word; steps after which nothing of the input is left at an
            output.
    """

    carries_state = True

    def __init__(self, steps: int = 5, input: Input = "start", read: Read = "end") -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number, 1 or more, got {steps!r}")
        for name, value, known in (("input", input, Input), ("read", read, Read)):
            if value not in get_args(known):
                words = ", ".join(get_args(known))
                raise ValueError(f"unknown {name} {value!r} (known: {words})")
        self.steps, self.input, self.read = steps, input, read
        self.takes_sequence, self.gives_sequence = input == "new", read == "every"
        self._checked: set[tuple[Topology, int]] = set()

    def check(self, topology: Topology) -> None:
        """See :meth:`Schedule.check`."""
        super().check(topology)
        far = topology.outputs[topology.distance[topology.outputs] > self.steps]
        if len(far):
            needed = int(topology.distance[topology.outputs].max())
            raise ValueError(
                f"in {self.steps} steps nothing reaches output {topology.describe(far)} from an "
                f"input; give {needed} steps or more"
            )
        if self.input == "start" and not self.gives_sequence:
            ends = topology.walks_from_inputs(self.steps)
            gone = topology.outputs[~torch.isin(topology.outputs, ends)]
            if len(gone):
                raise ValueError(
                    f"after {self.steps} steps nothing of the input is left at output "
                    f"{topology.describe(gone)}: it goes along one edge a step, and no path from "
                    f"an input has {self.steps} edges; give other steps, or input='held'"
                )

    def run(self, forward_pass: ForwardPass, frames: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`Schedule.run`.

        Raises:
            ValueError: A sequence with more than one frame a step.
        """
        if forward_pass.state is not None:
            return self._go_on(forward_pass, frames, forward_pass.state)
        topology, aggregate, features = (
            forward_pass.topology,
            forward_pass.aggregator(),
            frames[0].shape[2:],
        )
        if len(frames) > self.steps + 1:
            raise ValueError(
                f"a sequence of {len(frames)} does not flow in within {self.steps} steps; give "
                f"{len(frames) - 1} steps or more"
            )
        self._check_frames(topology, len(frames))
        given = [parts_of(topology, frame) for frame in frames]
        first = given[0]
        if self.input != "start":
            blocks = topology.blocks
            first = {
                i: padded(forward_pass.fire(blocks[i], x, 0.0), features) for i, x in first.items()
            }
        states, outputs = start(forward_pass, first), []
        for step in range(self.steps):
            now = given[0] if self.input == "held" else None
            if self.input == "new" and step + 1 < len(given):
                now = given[step + 1]
            states = update(forward_pass, aggregate, states, float(step), now)
            if self.gives_sequence or step + 1 == self.steps:
                outputs.append(outputs_of(topology, states))
        return outputs

    def _go_on(
        self, forward_pass: ForwardPass, frames: Sequence[Tensor], state: RecurrentState
    ) -> list[Tensor]:
        """Begin with states handed in, and hand on those at the end."""
        topology, aggregate = forward_pass.topology, forward_pass.aggregator()
        given = [parts_of(topology, frame) for frame in frames]
        states, outputs = list(state.states), []
        if self.input == "start":
            states = [given[0].get(i, z) for i, z in enumerate(states)]
        steps = len(frames) if self.input == "new" else self.steps
        until = steps if state.lengths is None else min(steps, int(state.lengths.max()))
        for step in range(until):
            now = given[min(step, len(given) - 1)] if self.input != "start" else None
            # Of time, the first frame of a sequence is the start, as where no states are given.
            t = float(max(state.step + step - (self.input != "start"), 0))
            new = update(forward_pass, aggregate, states, t, now)
            if state.lengths is not None:
                goes = (step < state.lengths).view(1, -1, *[1] * (new[0].dim() - 2))
                new = [torch.where(goes, z, old) for z, old in zip(new, states, strict=True)]
            states = new
            if self.gives_sequence or step + 1 == until:
                outputs.append(outputs_of(topology, states))
        if self.gives_sequence:  # all sequences have ended, so nothing changes any more
            outputs += outputs[-1:] * (steps - until)
        state.states, state.step = states, state.step + steps
        return outputs

    def _check_frames(self, topology: Topology, frames: int) -> None:
        """Raise where no frame of a sequence reaches an output by the last step."""
        if self.input != "new" or self.gives_sequence or (topology, frames) in self._checked:
            return
        for frame in range(frames):
            ends = topology.walks_from_inputs(self.steps - frame)
            if bool(torch.isin(topology.outputs, ends).any()):
                self._checked.add((topology, frames))
                return
        raise ValueError(
            f"after {self.steps} steps nothing of a sequence of {frames} is left at any output: it "
            f"goes along one edge a step; give steps={frames - 1 + (topology.depth or 1)}, or "
            "longer sequences"
        )

    def firings(self, evaluations: Mapping[str, int]) -> int:
        """See :meth:`Schedule.firings`."""
        return self.steps
