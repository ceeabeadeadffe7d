"""The methods, each one file. To add one: write the file, name it here, add it to the tests' table of cases."""

from __future__ import annotations

from .base import Method, RolloutPlan
from .gkd import GKD
from .opd import OPD
from .sft import SFT
from .topk import TopK

METHODS: dict[str, type[Method]] = {"opd": OPD, "gkd": GKD, "topk": TopK, "sft": SFT}

REFUSED: dict[str, str] = {
    "k1_loss": "the sampled value log S(y) - log T(y) has no teacher in its gradient: differentiated directly, its "
    "expected gradient is zero whatever the teacher says; use 'opd', which takes the log-ratio as a reward",
}

__all__ = ["GKD", "METHODS", "OPD", "REFUSED", "SFT", "Method", "RolloutPlan", "TopK"]
