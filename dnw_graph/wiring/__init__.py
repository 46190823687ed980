"""Rules that choose which candidate edges are real."""

from dnw_graph._deprecated import renamed
from dnw_graph.wiring.base import (
    RULES,
    Candidates,
    Forget,
    NeverActsWarning,
    Rule,
    RuleState,
    TrainingProgress,
)
from dnw_graph.wiring.complete import Complete
from dnw_graph.wiring.constant_fan_in import ConstantFanIn
from dnw_graph.wiring.dnw import DNW, NoUpdate
from dnw_graph.wiring.dnw_factored import DNWFactored
from dnw_graph.wiring.edge_selector import (
    CandidateModule,
    EdgeSelector,
    SelectorOwner,
    selectors,
    whole,
)
from dnw_graph.wiring.fixed import FineTune, Lottery, Random
from dnw_graph.wiring.gse import GSE
from dnw_graph.wiring.l1_anneal import L1Anneal
from dnw_graph.wiring.n_of_m import NOfM
from dnw_graph.wiring.rewire import SET, RigL
from dnw_graph.wiring.sampling import Sampler
from dnw_graph.wiring.select import top_k
from dnw_graph.wiring.soft_threshold import SoftThreshold
from dnw_graph.wiring.sr_ste import SRSTE
from dnw_graph.wiring.targeted_dropout import TargetedDropout
from dnw_graph.wiring.top_kast import TopKAST
from dnw_graph.wiring.training import Attachment, attach, inherit, penalty
from dnw_graph.wiring.wiring import Wiring

__all__ = [
    "DNW",
    "GSE",
    "RULES",
    "SET",
    "SRSTE",
    "Attachment",
    "CandidateModule",
    "Candidates",
    "Complete",
    "ConstantFanIn",
    "DNWFactored",
    "EdgeSelector",
    "FineTune",
    "Forget",
    "L1Anneal",
    "Lottery",
    "NOfM",
    "NeverActsWarning",
    "NoUpdate",
    "Random",
    "RigL",
    "Rule",
    "RuleState",
    "Sampler",
    "SelectorOwner",
    "SoftThreshold",
    "TargetedDropout",
    "TopKAST",
    "TrainingProgress",
    "Wiring",
    "attach",
    "inherit",
    "penalty",
    "selectors",
    "top_k",
    "whole",
]

__getattr__ = renamed(
    __name__,
    {
        "Choice": "EdgeSelector",
        "Moment": "TrainingProgress",
        "Wired": "CandidateModule",
        "choices": "selectors",
    },
)
