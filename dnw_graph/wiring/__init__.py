"""Which edges exist now: rules that choose the real edges from the candidate weights."""

from dnw_graph.wiring.base import (
    RULES,
    Candidates,
    Forget,
    Moment,
    NeverActsWarning,
    Rule,
    RuleState,
)
from dnw_graph.wiring.choice import Choice, Wired, choices, whole
from dnw_graph.wiring.complete import Complete
from dnw_graph.wiring.constant_fan_in import ConstantFanIn
from dnw_graph.wiring.dnw import DNW, NoUpdate
from dnw_graph.wiring.dnw_factored import DNWFactored
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
from dnw_graph.wiring.training import attach, inherit, penalty
from dnw_graph.wiring.wiring import Wiring

__all__ = [
    "DNW",
    "GSE",
    "RULES",
    "SET",
    "SRSTE",
    "Candidates",
    "Choice",
    "Complete",
    "ConstantFanIn",
    "DNWFactored",
    "FineTune",
    "Forget",
    "L1Anneal",
    "Lottery",
    "Moment",
    "NOfM",
    "NeverActsWarning",
    "NoUpdate",
    "Random",
    "RigL",
    "Rule",
    "RuleState",
    "Sampler",
    "SoftThreshold",
    "TargetedDropout",
    "TopKAST",
    "Wired",
    "Wiring",
    "attach",
    "choices",
    "inherit",
    "penalty",
    "top_k",
    "whole",
]
