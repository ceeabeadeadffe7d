"""Engines write samples: requests in, samples out."""

from __future__ import annotations

from understudy.engines.base import Engine, Generates, Weights
from understudy.engines.hf.copied import CopyEngine
from understudy.engines.hf.engine import HFEngine
from understudy.engines.probe import Probe
from understudy.engines.sections import ENGINES, HF, VLLM, EngineSection, EngineSetup

__all__ = [
    "ENGINES",
    "HF",
    "VLLM",
    "CopyEngine",
    "Engine",
    "EngineSection",
    "EngineSetup",
    "Generates",
    "HFEngine",
    "Probe",
    "Weights",
]
