"""A rule of one's own: edges whose gradient has been large on average are real.

    python examples/own_rule.py

Trains the classifier of examples/digits.py with it, and with rules that come along. Takes a few
seconds on two cores.
"""

import torch
from digits import DigitClassifier, load, train
from torch import Tensor

from dnw_graph import Rule
from dnw_graph.wiring import Candidates, Forget, RuleState, top_k


class Loudest(Rule):
    """Ranks candidates by the mean magnitude of their gradients, the last ones counting most.

    Args:
        memory: Weight of the past in that mean.
    """

    timed = True  # it has to be told of steps, though it needs no more than their being done

    def __init__(self, memory: float = 0.95) -> None:
        self.memory = memory

    def init_state(self, candidates: Candidates) -> RuleState:
        """Begin with the initial weights, small enough to be forgotten soon."""
        return {"loudness": 1e-3 * candidates.weight.abs()}

    def select(self, candidates: Candidates) -> Tensor:
        """Return the ids of the real edges."""
        return top_k(candidates.state["loudness"], candidates.num_edges)

    def after_step(self, candidates: Candidates, grad: Tensor | None, forget: Forget) -> None:
        """Average."""
        if grad is not None:
            candidates.state["loudness"].lerp_(grad.abs(), 1 - self.memory)


def main() -> None:
    """Compare it with others at the same budget."""
    images, labels = load()
    for name, rule in {"loudest": Loudest(), "dnw": "dnw", "random": "random"}.items():
        torch.manual_seed(0)
        print(f"\nrule {name}")
        train(DigitClassifier(rule, num_edges=600), images, labels, epochs=5)


if __name__ == "__main__":
    main()
