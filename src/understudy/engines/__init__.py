"""Engines write samples: requests in, samples out."""

from __future__ import annotations

from understudy.engines.base import Engine, Generates, Probe, Weights
from understudy.engines.hf.engine import HFEngine
from understudy.engines.sections import ENGINES, HF, VLLM, EngineSection, EngineSetup

__all__ = [
    "ENGINES",
    "HF",
    "VLLM",
    "Engine",
    "EngineSection",
    "EngineSetup",
    "Generates",
    "HFEngine",
    "Probe",
    "Weights",
]
