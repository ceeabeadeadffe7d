"""Serves a teacher over HTTP: exact scores at any temperature, in binary, from one copy of the weights."""

from __future__ import annotations

from understudy.serve.scorer import Refusal, Scorer
from understudy.serve.server import Settings, run

__all__ = ["Refusal", "Scorer", "Settings", "run"]
