"""Express a perceptron of three layers as a graph in three time steps (Figure 1 of the paper).

    python examples/perceptron.py

Copies the weights of a perceptron to the edges of a graph, runs both, and prints the states of the
output nodes after each step.
"""

from itertools import pairwise

import torch
from torch import nn

from dnw_graph import NeuralGraph, Topology


def main() -> None:
    """Show that perceptron and graph have the same outputs."""
    torch.manual_seed(0)
    sizes = [4, 5, 3, 2]
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
    perceptron = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    topology = Topology.layered(sizes, skip=False)
    graph = NeuralGraph(
        topology, rule="complete", node="relu", schedule="discrete(steps=3, read='every')"
    )
    with torch.no_grad():  # edges are sorted by target, then source, as in the rows of the matrices
        graph.weight.copy_(torch.cat([layer.weight.flatten() for layer in layers]))

    x = torch.randn(6, 4)
    with torch.no_grad():
        expected, steps = perceptron(x), graph(x)
    print(f"{topology}: {topology.num_nodes} nodes, {topology.num_candidates} edges")
    for step in range(3):
        outputs = ", ".join(f"{value:6.3f}" for value in steps[0, step].tolist())
        print(f"after step {step + 1} the outputs hold {outputs}")
    print("the perceptron outputs      " + ", ".join(f"{v:6.3f}" for v in expected[0].tolist()))
    print(f"largest difference over {len(x)} inputs: {(steps[:, -1] - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
