"""Evaluation: sample, grade, estimate with intervals, save."""

from __future__ import annotations
