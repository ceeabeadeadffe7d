"""The report of a run: one HTML page that says whether the student got better, and why."""

from __future__ import annotations

from pathlib import Path


def write_report(run_dir: Path, *, baseline: Path | None = None) -> Path:
    """Writes RUN/report.html and returns its path; see `understudy.report.page.write_report`."""
    from understudy.report import page

    return page.write_report(run_dir, baseline=baseline)
