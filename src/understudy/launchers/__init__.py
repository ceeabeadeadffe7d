"""Launchers start the processes of a run on several machines."""

from __future__ import annotations

from collections.abc import Mapping

from understudy.launchers.section import Ray, Roles

LAUNCHERS: Mapping[str, type[Ray]] = {"ray": Ray}
"""`launcher.type` in a recipe -> its section."""

__all__ = ["LAUNCHERS", "Ray", "Roles"]
