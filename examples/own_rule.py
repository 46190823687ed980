"""A custom rule: the edges with the largest average gradient are real.

    python examples/own_rule.py

Trains the classifier of examples/digits.py with this rule and with two built-in ones. The example
takes a few seconds on two cores.
"""

import torch
from digits import DigitClassifier, load, train
from torch import Tensor

from dnw_graph import Rule
from dnw_graph.wiring import Candidates, Forget, RuleState, top_k


class Loudest(Rule):
    """Rank candidates by a moving average of the magnitude of their gradients.

    Args:
        memory: Decay factor of the moving average.
    """

    timed = True  # training without attach() is an error

    def __init__(self, memory: float = 0.95) -> None:
        self.memory = memory

    def init_state(self, candidates: Candidates) -> RuleState:
        """Return the initial averages: the magnitudes of the weights, scaled to decay quickly."""
        return {"loudness": 1e-3 * candidates.weight.abs()}

    def select(self, candidates: Candidates) -> Tensor:
        """Return the ids of the real edges."""
        return top_k(candidates.state["loudness"], candidates.num_edges)

    def after_step(self, candidates: Candidates, grad: Tensor | None, forget: Forget) -> None:
        """Update the averages."""
        if grad is not None:
            candidates.state["loudness"].lerp_(grad.abs(), 1 - self.memory)


def main() -> None:
    """Compare the rule with others at the same budget."""
    images, labels = load()
    for name, rule in {"loudest": Loudest(), "dnw": "dnw", "random": "random"}.items():
        torch.manual_seed(0)
        print(f"\nrule {name}")
        train(DigitClassifier(rule, num_edges=600), images, labels, epochs=5)


if __name__ == "__main__":
    main()
