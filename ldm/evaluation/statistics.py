"""Shares with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Z95 = 1.959964


def wilson(successes: float, count: int) -> tuple[float, float]:
    """95 % interval of a share from independent trials (Wilson 1927); (0, 1) of no trials."""
    if count == 0:
        return 0.0, 1.0
    share = successes / count
    middle = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * np.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def bootstrap(values: Sequence[float] | np.ndarray, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean by drawing the entries anew (percentiles).

    Give one value for each concept, not for each picture: pictures of one concept are not independent.
    """
    values = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
