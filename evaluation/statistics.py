"""95 % confidence intervals of shares and means, and tables that show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

UPPER = 0.975  # the quantile that bounds a two-sided interval of 95 %
Values = Sequence[float] | np.ndarray


def wilson(successes: float, count: float, quantile: float = float(stats.norm.ppf(UPPER))) -> tuple[float, float]:
    """Return the interval of a share of `count` independent trials (Wilson 1927); (0, 1) of no trials.

    `scipy.stats.binomtest` has it for whole numbers only, and `share_interval` needs an effective count.
    """
    if count == 0:
        return 0.0, 1.0
    share = successes / count
    middle = (share + quantile**2 / (2 * count)) / (1 + quantile**2 / count)
    spread = np.sqrt(share * (1 - share) / count + quantile**2 / (4 * count**2))
    half = quantile / (1 + quantile**2 / count) * spread
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def share_interval(values: Values) -> tuple[float, float]:
    """Return the interval of a mean of shares, one for each concept: images of one concept are not independent.

    Wilson's interval with the number of independent trials that would vary as much, p (1 - p) / Var(mean) (Korn and
    Graubard 1998; the number of concepts where all are alike), and Student's quantile. It holds near 0 and 1, too,
    where the mean's own interval and the bootstrap's are far too narrow. (0, 1) of fewer than three values.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 3:
        return 0.0, 1.0
    mean, variance = values.mean(), values.var(ddof=1) / len(values)
    trials = mean * (1 - mean) / variance if variance > 0 else len(values)
    return wilson(mean * trials, trials, float(stats.t.ppf(UPPER, len(values) - 1)))


def mean_interval(values: Values, lowest: float, highest: float) -> tuple[float, float]:
    """Return Student's interval of a mean, cut to lowest..highest; all of that for fewer than three values."""
    values = np.asarray(values, dtype=float)
    if len(values) < 3:
        return lowest, highest
    half = stats.t.ppf(UPPER, len(values) - 1) * stats.sem(values)
    return max(lowest, float(values.mean() - half)), min(highest, float(values.mean() + half))


def share(values: np.ndarray) -> str:
    """Return the mean of shares, one for each concept, with its interval."""
    low, high = share_interval(values)
    return f"{values.mean():.2f} ({low:.2f}–{high:.2f})"


def difference(values: np.ndarray) -> str:
    """Return the mean of differences of shares, one for each concept, with its interval."""
    low, high = mean_interval(values, -1.0, 1.0)
    return f"{values.mean():+.2f} ({low:+.2f} to {high:+.2f})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
