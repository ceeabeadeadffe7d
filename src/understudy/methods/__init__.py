"""The methods, each one file. To add one: write the file, name it here, add it to the tests' table of cases."""

from __future__ import annotations

from .aopd import AOPD
from .base import Acceptance, Method, Rewards, RolloutPlan
from .eopd import EOPD
from .gkd import GKD
from .gopd import GOPD
from .grpo import DAPO, GRPO, DrGRPO
from .kdrl import KDRL
from .opd import OPD
from .ovd import OVD
from .phases import Phases
from .reopold import REOPOLD
from .sft import SFT
from .topk import TopK
from .tropd import TrOPD

METHODS: dict[str, type[Method]] = {
    "opd": OPD,
    "gkd": GKD,
    "topk": TopK,
    "gopd": GOPD,
    "reopold": REOPOLD,
    "eopd": EOPD,
    "aopd": AOPD,
    "tropd": TrOPD,
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
    "Acceptance",
    "DrGRPO",
    "Method",
    "Phases",
    "Rewards",
    "RolloutPlan",
    "TopK",
    "TrOPD",
]
