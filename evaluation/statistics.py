"""Shares with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Z95 = 1.959964


def wilson(successes: float, count: float, quantile: float = Z95) -> tuple[float, float]:
    """95 % interval of a share from independent trials (Wilson 1927); (0, 1) of no trials."""
    if count == 0:
        return 0.0, 1.0
    share = successes / count
    middle = (share + quantile**2 / (2 * count)) / (1 + quantile**2 / count)
    spread = np.sqrt(share * (1 - share) / count + quantile**2 / (4 * count**2))
    half = quantile / (1 + quantile**2 / count) * spread
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def share_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean of shares in 0..1, one for each concept: pictures of one concept are not independent.

    Wilson's interval with the number of independent trials that would vary as much, p (1 - p) / Var(mean) (Korn and
    Graubard 1998), and Student's quantile. Where all values are alike, that number is the number of concepts. It
    holds near 0 and 1, too, where the mean's own interval and the bootstrap's are far too narrow.
    (0, 1) of fewer than three values.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 3:
        return 0.0, 1.0
    mean, variance = values.mean(), values.var(ddof=1) / len(values)
    trials = mean * (1 - mean) / variance if variance > 0 else len(values)
    return wilson(mean * trials, trials, _student(len(values) - 1))


def mean_interval(values: Sequence[float] | np.ndarray, lowest: float, highest: float) -> tuple[float, float]:
    """95 % interval of a mean by Student's t, within what is possible; all of that for fewer than three values."""
    values = np.asarray(values, dtype=float)
    if len(values) < 3:
        return lowest, highest
    half = _student(len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return max(lowest, float(values.mean() - half)), min(highest, float(values.mean() + half))


def _student(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, from two degrees of freedom (Abramowitz and Stegun, 26.7.5)."""
    z = Z95
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
