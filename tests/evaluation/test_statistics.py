import numpy as np
import pytest
from scipy import stats

from evaluation.statistics import mean_interval, share_interval, wilson


def test_wilson_against_published_values_and_scipy():
    """Newcombe 1998, table I, method 3."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(15, 148) == pytest.approx(stats.binomtest(15, 148).proportion_ci(method="wilson"))
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("concepts", [6, 24])
@pytest.mark.parametrize("share", [0.5, 0.75, 0.95])
@pytest.mark.parametrize("alike", [0.1, 0.5])  # correlation of a concept's images
def test_intervals_of_shares_cover_as_often_as_they_say(concepts: int, share: float, alike: float):
    rng = np.random.default_rng(0)
    a, b = share * (1 / alike - 1), (1 - share) * (1 / alike - 1)
    drawn = rng.binomial(4, rng.beta(a, b, (1000, concepts))) / 4
    found = np.array([share_interval(values) for values in drawn])
    assert 0.94 < np.mean((found[:, 0] <= share) & (share <= found[:, 1])) < 0.995
    if concepts == 24:
        assert (found[:, 1] - found[:, 0]).mean() < 0.4


def test_intervals_of_few_and_of_equal_values():
    assert share_interval([1.0, 1.0]) == (0.0, 1.0) and mean_interval([0.1], -1.0, 1.0) == (-1.0, 1.0)
    low, high = share_interval([1.0] * 6)
    assert 0.4 < low < 0.6 and high == 1.0
    assert mean_interval([0.5] * 8, 0.0, 1.0) == (0.5, 0.5)
    half = 4.303 * 0.5 / 3**0.5  # Student's quantile of two degrees of freedom
    assert mean_interval([0.0, 0.5, 1.0], -9, 9) == pytest.approx((0.5 - half, 0.5 + half), rel=3e-4)
    assert mean_interval([0.0, 0.0, 1.0], 0.0, 1.0) == (0.0, 1.0)  # stays within what is possible
