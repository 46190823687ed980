"""Which edges may exist: validated, immutable candidate graphs without parameters."""

from dnw_graph.topology.exchange import read_graph, write_graph
from dnw_graph.topology.role import Role
from dnw_graph.topology.topology import Block, Topology

__all__ = ["Block", "Role", "Topology", "read_graph", "write_graph"]
