"""The report of a run: one HTML page that says whether the student got better, and why."""

from __future__ import annotations
