import numpy as np
import pytest

from ldm.evaluation.statistics import bootstrap, wilson


def test_wilson_against_published_values():
    """Newcombe 1998, table I, method 3."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [low <= 0.3 <= high for low, high in (bootstrap(rng.random(40) < 0.3, 500) for _ in range(300))]
    assert 0.90 < np.mean(hits) < 0.98


def test_the_bootstrap_is_repeatable_and_certain_of_equal_values():
    assert bootstrap([0.5] * 8) == (0.5, 0.5)
    assert bootstrap([0.1, 0.4, 0.8]) == bootstrap([0.1, 0.4, 0.8])
