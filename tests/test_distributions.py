import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import keras_sparseopt as kso
from keras_sparseopt.distributions import exact_counts

SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 64), st.integers(1, 64)),
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 64), st.integers(1, 64)),
    ),
    min_size=1,
    max_size=8,
)


def erk_oracle(shapes, sparsity):
    """Bisection on ε of the clipped budget, instead of solving and re-solving."""
    n = [math.prod(s) for s in shapes]
    raw = [sum(s) / math.prod(s) for s in shapes]
    low, high = 0.0, 1e9
    for _ in range(300):
        epsilon = (low + high) / 2
        total = sum(min(1, epsilon * r) * k for r, k in zip(raw, n))
        low, high = (epsilon, high) if total < (1 - sparsity) * sum(n) else (low, epsilon)
    return [1 - min(1, low * r) for r in raw]


@given(SHAPES, st.floats(0.01, 0.995))
@settings(max_examples=100, deadline=None)
def test_erk_equals_the_oracle_and_keeps_the_budget(shapes, sparsity):
    result = kso.erk(shapes, sparsity)
    np.testing.assert_allclose(result, erk_oracle(shapes, sparsity), atol=1e-6)
    n = np.array([math.prod(s) for s in shapes])
    assert abs(((1 - np.array(result)) * n).sum() - (1 - sparsity) * n.sum()) < 1e-6 * n.sum()
    assert all(-1e-9 <= s < 1 for s in result)


@given(SHAPES, st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_exact_counts_are_within_one_weight_and_sum_exactly(shapes, sparsity):
    n = [math.prod(s) for s in shapes]
    assume(round((1 - sparsity) * sum(n)) >= len(n))  # fewer are refused
    sparsities = kso.erk(shapes, sparsity)
    counts = exact_counts(shapes, sparsities, sparsity)
    assert all(abs(c - (1 - s) * k) <= 1 + 1e-5 for c, s, k in zip(counts, sparsities, n))
    if all((1 - s) * k >= 1 for s, k in zip(sparsities, n)):
        assert sum(counts) == round((1 - sparsity) * sum(n))


def test_er_ignores_the_window():
    small, large = kso.er([(3, 3, 8, 8), (3, 3, 32, 32)], 0.9)
    # densities in the ratio of (in + out)/(in · out): 16/64 to 64/1024
    assert (1 - small) / (1 - large) == pytest.approx((16 / 64) / (64 / 1024))


def test_uniform():
    assert kso.uniform([(2, 3), (4, 5)], 0.7) == [0.7, 0.7]
