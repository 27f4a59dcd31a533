"""Intervals over sequences, against scipy's bootstrap; what experts are worth, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from mxd_lens.analysis.intervals import increase_interval, interval, worth

rng = np.random.default_rng(0)


@pytest.mark.parametrize("n", [8, 64])
def test_intervals_are_scipys(n):
    tokens = rng.integers(50, 128, n).astype(float)
    before, after = rng.gamma(3.0, 1.0, (2, n)) * tokens

    def mean(after, before, tokens, axis=-1):
        return (after - before).sum(axis) / tokens.sum(axis)

    expected = bootstrap(
        (after, before, tokens), mean, paired=True, method="percentile", n_resamples=9999
    ).confidence_interval
    found = interval(lambda a, b, n: (a - b) / n, after, before, tokens)
    width = expected.high - expected.low
    assert found == pytest.approx([*expected], abs=0.05 * width)
    assert found == interval(lambda a, b, n: (a - b) / n, after, before, tokens)


def test_of_a_single_sequence_there_is_none():
    assert interval(lambda a: a, np.ones(1)) is None


def test_a_pair_is_surer_than_either():
    """Sequences differ more than layers do: the same sequences are drawn for both."""
    tokens = np.full(32, 100.0)
    one = rng.gamma(3.0, 30.0, 32)
    other = one - rng.normal(1.0, 0.1, 32)
    low, high = interval(lambda a, b, n: (a - b) / n, one, other, tokens)
    alone = interval(lambda a, n: a / n, one, tokens)
    assert low < 0.01 < high and high - low < 0.01 * (alone[1] - alone[0])


def test_worth_is_what_the_control_loses_beyond_the_layer():
    sequences = {"tokens": [10, 20, 30], "ce_original": [1.0, 2.0, 3.0]}
    layer = {"ce_increase": 6 / 60, "sequences": {**sequences, "ce_replaced": [3.0, 4.0, 5.0]}}
    control = {"ce_increase": 18 / 60, "sequences": {**sequences, "ce_replaced": [6.0, 8.0, 10.0]}}
    value, (low, high) = worth([layer], [control])
    assert value == pytest.approx(12 / 60)
    assert 5 / 30 <= low < value < high <= 3 / 10
    control["sequences"]["ce_original"] = [1.0, 2.0, 4.0]
    assert worth([layer], [control]) == (None, None)


def test_of_several_seeds_the_means_are_compared():
    rng = np.random.default_rng(3)
    tokens, original = np.full(20, 7.0), rng.normal(3, 0.1, 20) * 7

    def row(lost: float) -> dict[str, Any]:
        replaced = original + 7 * (lost + rng.normal(0, 0.01, 20))
        return {
            "ce_increase": (replaced - original).sum() / tokens.sum(),
            "sequences": {
                "ce_replaced": replaced.tolist(),
                "ce_original": original.tolist(),
                "tokens": tokens.tolist(),
            },
        }

    layers, controls = [row(0.02), row(0.04)], [row(0.1), row(0.2), row(0.3)]
    mean = np.mean([layer["ce_increase"] for layer in layers])
    merged = np.mean([layer["sequences"]["ce_replaced"] for layer in layers], axis=0)
    expected = interval(lambda lost, n: lost / n, merged - original, tokens)
    found = increase_interval(layers)
    assert found == pytest.approx(expected) and found[0] < mean < found[1]
    value, (low, high) = worth(layers, controls)
    assert value == pytest.approx(np.mean([control["ce_increase"] for control in controls]) - mean)
    assert low < value < high
    layers[1]["sequences"]["tokens"] = [8.0] * 20
    assert increase_interval(layers) is None and worth(layers, controls) == (None, None)
