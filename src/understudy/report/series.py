"""Long curves made short enough to draw, without losing a peak, a dip or a gap."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from understudy.report.read import Series

MAX_POINTS = 600
"""Points of one drawn curve: about two per pixel of a chart's width."""
SMOOTH_FROM = 100
"""Shorter curves are drawn as they are; longer ones get a running mean over 1/40 of their length."""
SMOOTH_SHARE = 40


def thin(values: NDArray[np.float64], max_points: int = MAX_POINTS) -> NDArray[np.int64]:
    """Ascending indices of at most `max_points` + 2 values: both ends, and of each bucket min, max and a NaN."""
    size = len(values)
    if size <= max_points:
        return np.arange(size)
    keep = {0, size - 1}
    edges = np.linspace(0, size, max_points // 3 + 1).astype(int)
    for start, end in pairwise(edges.tolist()):
        bucket = values[start:end]
        missing = np.isnan(bucket)
        if missing.any():
            keep.add(start + int(missing.argmax()))
        if not missing.all():
            keep.update((start + int(np.nanargmin(bucket)), start + int(np.nanargmax(bucket))))
    return np.array(sorted(keep), dtype=np.int64)


def smooth_window(size: int) -> int:
    """How many points a running mean takes, odd; 1: none."""
    return size // SMOOTH_SHARE | 1 if size >= SMOOTH_FROM else 1


def smoothed(series: Series, max_points: int = MAX_POINTS) -> Series:
    """Centred means over `smooth_window` points, over fewer at both ends, at most `max_points` of them.

    A NaN is left out of its neighbours' means and stays a gap itself.
    """
    size = len(series.values)
    half = smooth_window(size) // 2
    index = np.unique(np.linspace(0, size - 1, min(size, max_points)).round().astype(np.int64))
    means = np.full(len(index), np.nan)
    for row, at in enumerate(index):
        if not np.isnan(series.values[at]):
            means[row] = np.nanmean(series.values[max(0, at - half) : at + half + 1])
    return Series(series.steps[index], means)


def thinned(series: Series) -> Series:
    index = thin(series.values)
    return Series(series.steps[index], series.values[index])
