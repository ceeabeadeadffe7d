"""A teacher as a service: exact scores at any temperature, as binary, from one copy of the weights."""

from __future__ import annotations

from understudy.serve.scorer import Refusal, Scorer
from understudy.serve.server import Running, check_installed, load, run, serve_beside
from understudy.serve.settings import Settings

__all__ = ["Refusal", "Running", "Scorer", "Settings", "check_installed", "load", "run", "serve_beside"]
