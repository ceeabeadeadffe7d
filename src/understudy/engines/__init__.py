"""Engines write samples: requests in, samples out."""

from __future__ import annotations

from collections.abc import Mapping

from understudy.engines.base import Engine, Generates, Probe
from understudy.engines.hf.engine import HFEngine
from understudy.engines.sections import HF, EngineSection, EngineSetup
from understudy.engines.vllm.settings import VLLM

ENGINES: Mapping[str, type[EngineSection]] = {"hf": HF, "vllm": VLLM}
"""`rollout.type` in a recipe -> its section."""

__all__ = ["ENGINES", "HF", "VLLM", "Engine", "EngineSection", "EngineSetup", "Generates", "HFEngine", "Probe"]
