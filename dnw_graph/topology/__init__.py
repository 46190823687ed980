"""Which edges may exist: validated, immutable candidate graphs without parameters."""

from dnw_graph.topology.topology import Block, Role, Topology

__all__ = ["Block", "Role", "Topology"]
