"""Edit a learned wiring with networkx and continue training.

    python examples/edit_wiring.py

Learns a wiring on handwritten digits, removes hidden nodes that few paths go through, adds an edge
from each remaining hidden node to every output, and trains the new graph. The example takes a few
seconds on two cores.
"""

import networkx as nx
import torch
from digits import DigitClassifier, load, train

from dnw_graph import cost, edited


def main() -> None:
    """Learn a wiring, edit it, and train it further."""
    torch.manual_seed(0)
    images, labels = load()
    model = DigitClassifier("dnw", num_edges=600)
    train(model, images, labels, epochs=6)
    print(cost(model, image_size=8))

    wiring = model.graph.to_networkx()
    centrality = nx.betweenness_centrality(wiring)
    hidden = [v for v, role in wiring.nodes(data="role") if role == "hidden"]
    weakest = sorted(hidden, key=lambda v: centrality[v])[: len(hidden) // 3]
    wiring.remove_nodes_from(weakest)
    outputs = [v for v, role in wiring.nodes(data="role") if role == "output"]
    wiring.add_edges_from((u, v) for u in hidden if u in wiring for v in outputs)
    model.graph = edited(model.graph, wiring)

    print(f"\nwithout {len(weakest)} hidden nodes, with {wiring.number_of_edges()} edges")
    print(cost(model, image_size=8))
    train(model, images, labels, epochs=3)


if __name__ == "__main__":
    main()
