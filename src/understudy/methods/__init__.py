"""The methods, one file each. To add one: write the file, list it here and in the tests' table of cases."""

from __future__ import annotations

from understudy.methods.aopd import AOPD
from understudy.methods.base import Acceptance, Method, Rewards, RolloutPlan, Uses
from understudy.methods.eopd import EOPD
from understudy.methods.gkd import GKD
from understudy.methods.gopd import GOPD
from understudy.methods.grpo import DAPO, GRPO, DrGRPO
from understudy.methods.kdrl import KDRL
from understudy.methods.opd import OPD
from understudy.methods.ovd import OVD
from understudy.methods.phases import Phases
from understudy.methods.reopold import REOPOLD
from understudy.methods.sft import SFT
from understudy.methods.topd import TOPD
from understudy.methods.topk import TopK
from understudy.methods.topk_tail import TopKTail
from understudy.methods.tropd import TrOPD

METHODS: dict[str, type[Method]] = {
    "opd": OPD,
    "gkd": GKD,
    "topk": TopK,
    "topk_tail": TopKTail,
    "gopd": GOPD,
    "reopold": REOPOLD,
    "eopd": EOPD,
    "aopd": AOPD,
    "tropd": TrOPD,
    "topd": TOPD,
    "ovd": OVD,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "kdrl": KDRL,
    "sft": SFT,
    "phases": Phases,
}

REFUSED: dict[str, str] = {
    "k1_loss": "the sampled value log S(y) - log T(y) has no teacher in its gradient: differentiated directly, its "
    "expected gradient is zero whatever the teacher says; use 'opd', which takes the log-ratio as a reward",
}

__all__ = [
    "AOPD",
    "DAPO",
    "EOPD",
    "GKD",
    "GOPD",
    "GRPO",
    "KDRL",
    "METHODS",
    "OPD",
    "OVD",
    "REFUSED",
    "REOPOLD",
    "SFT",
    "TOPD",
    "Acceptance",
    "DrGRPO",
    "Method",
    "Phases",
    "Rewards",
    "RolloutPlan",
    "TopK",
    "TopKTail",
    "TrOPD",
    "Uses",
]
