"""What is checked before a run."""

from __future__ import annotations

from understudy.recipe.doctor.examine import Build, examine, examine_parts, judges_of
from understudy.recipe.doctor.findings import Finding, errors_of, refuse, show, show_briefly, verdict, write_findings
from understudy.recipe.doctor.parts import Healthy
from understudy.recipe.doctor.static import before_loading

__all__ = [
    "Build",
    "Finding",
    "Healthy",
    "before_loading",
    "errors_of",
    "examine",
    "examine_parts",
    "judges_of",
    "refuse",
    "show",
    "show_briefly",
    "verdict",
    "write_findings",
]
