"""Analysis of learned wirings: measures, history, comparison, figures."""

from dnw_graph.analysis.history import (
    History,
    HistoryWriter,
    Record,
    WiringHistory,
    load_history,
    real_edges,
)
from dnw_graph.analysis.measures import (
    STATISTICS,
    BlockPair,
    DeadNodes,
    Measures,
    Statistic,
    betweenness,
    block_pairs,
    measure,
    small_worldness,
)
from dnw_graph.analysis.scales import Scale, Scales, scales
from dnw_graph.analysis.similarity import Similarity, jaccard, similarity
from dnw_graph.analysis.structure import Structure, structure_of

__all__ = [
    "STATISTICS",
    "BlockPair",
    "DeadNodes",
    "History",
    "HistoryWriter",
    "Measures",
    "Record",
    "Scale",
    "Scales",
    "Similarity",
    "Statistic",
    "Structure",
    "WiringHistory",
    "betweenness",
    "block_pairs",
    "jaccard",
    "load_history",
    "measure",
    "real_edges",
    "scales",
    "similarity",
    "small_worldness",
    "structure_of",
]
