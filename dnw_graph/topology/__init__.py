"""Which edges may exist: validated, immutable candidate graphs without parameters."""

from dnw_graph.topology.files import read_graph, write_graph
from dnw_graph.topology.grouping import Grouping, by_role
from dnw_graph.topology.role import Role
from dnw_graph.topology.topology import Block, Topology

__all__ = ["Block", "Grouping", "Role", "Topology", "by_role", "read_graph", "write_graph"]
