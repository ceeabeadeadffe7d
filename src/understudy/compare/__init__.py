"""Compares runs of one recipe that differ only in the varied keys."""

from __future__ import annotations
