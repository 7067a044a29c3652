import keras
import numpy as np
import pytest
from helpers import array, correct_oracle, drop_and_grow_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import keras_sparseopt as kso
from keras_sparseopt import masks


def test_drop_and_grow_by_hand():
    # weight   .9   -.1   .5   0    0    -.3   0    0
    # mask      1     1    1   0    0     1    0    0
    # score     0    .2    0  .1   .7    .6    0   .7
    weights = np.array([0.9, -0.1, 0.5, 0, 0, -0.3, 0, 0], "float32")
    mask = np.array([1, 1, 1, 0, 0, 1, 0, 0], bool)
    scores = np.array([0, 0.2, 0, 0.1, 0.7, 0.6, 0, 0.7], "float32")
    expected = {
        0: [1, 1, 1, 0, 0, 1, 0, 0],
        1: [1, 0, 1, 0, 1, 1, 0, 0],  # −.1 goes; of the two .7 the first grows
        2: [1, 0, 1, 0, 1, 0, 0, 1],  # −.3 goes too; both .7 grow
        3: [1, 0, 0, 0, 1, 1, 0, 1],  # −.3 is dropped and grows again with .6
        4: [0, 1, 0, 0, 1, 1, 0, 1],  # everything goes; the four best scores grow
    }
    for num_update, new in expected.items():
        result = array(kso.drop_and_grow(weights, mask, scores, num_update))
        assert result.tolist() == np.array(new, bool).tolist(), num_update


def test_just_dropped_weight_may_grow_again():
    weights = np.array([3.0, 1.0, 0.0], "float32")
    scores = np.array([0.0, 9.0, 1.0], "float32")
    mask = np.array([True, True, False])
    assert array(kso.drop_and_grow(weights, mask, scores, 1)).tolist() == [True, True, False]


VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, -1e-30, 3e38, np.inf, np.nan, 2.0])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_drop_and_grow_equals_the_oracle(draw):
    shape = draw.draw(st.sampled_from([(1,), (7,), (3, 4), (2, 2, 3, 4)]))
    floats = hnp.arrays("float32", shape, elements=VALUES)
    weights, scores = draw.draw(floats), draw.draw(floats)
    mask = draw.draw(hnp.arrays(bool, shape))
    num_update = draw.draw(st.integers(0, int(mask.sum())))
    new = array(kso.drop_and_grow(weights, mask, scores, num_update))
    assert new.sum() == mask.sum()
    assert np.array_equal(new, drop_and_grow_oracle(weights, mask, scores, num_update))


def test_drop_and_grow_large_with_many_ties():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=50_000).round(1).astype("float32")
    scores = np.maximum(rng.normal(size=50_000), 0).round(1).astype("float32")
    mask = rng.random(50_000) < 0.1
    new = array(kso.drop_and_grow(weights, mask, scores, int(mask.sum()) // 3))
    expected = drop_and_grow_oracle(weights, mask, scores, int(mask.sum()) // 3)
    assert np.array_equal(new, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_drop_and_grow_ranks_low_precision_in_float32(dtype):
    rng = np.random.default_rng(0)
    weights, scores = (keras.ops.cast(rng.normal(size=99), dtype) for _ in range(2))
    mask = rng.random(99) < 0.3
    new = array(kso.drop_and_grow(weights, mask, scores, 9))
    w, s = (array(keras.ops.cast(x, "float32")) for x in (weights, scores))
    assert np.array_equal(new, drop_and_grow_oracle(w, mask, s, 9))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_correction_equals_the_oracle(draw):
    shape, axes = draw.draw(
        st.sampled_from([((5, 3), (1,)), ((2, 2, 3, 4), (3,)), ((4, 2, 3), (1, 2)), ((4, 3), (0,))])
    )
    mask = draw.draw(hnp.arrays(bool, shape))  # empty neurons and empty layers included
    gradient = np.random.default_rng(0).normal(size=shape)
    result = array(masks.correction(mask, axes)) * np.where(mask, gradient, 0)
    np.testing.assert_allclose(result, correct_oracle(gradient, mask, axes), rtol=2e-6, atol=0)


@given(st.integers(1, 64), st.integers(1, 8), st.integers(0, 64))
@settings(max_examples=40, deadline=None)
def test_correction_of_equal_fan_ins_is_exactly_one(fan_in, neurons, active):
    mask = np.zeros((fan_in, neurons), bool)
    mask[: min(active, fan_in)] = True
    expected = 1.0 if mask.any() else 0.0
    assert (array(masks.correction(mask, (1,))) == expected).all()


def test_masked_is_zero_even_where_values_are_not_finite():
    values = np.array([1.0, np.nan, np.inf], "float32")
    result = array(
        masks.masked(keras.ops.convert_to_tensor(values), np.array([True, False, False]))
    )
    assert result.tolist() == [1.0, 0.0, 0.0]


@given(st.integers(1, 500), st.floats(0, 0.999))
@settings(max_examples=100, deadline=None)
def test_random_mask_is_exact_and_reproducible(size, sparsity):
    mask = masks.random_mask((size, 3), sparsity, seed=4)
    assert mask.sum() == max(1, round((1 - sparsity) * (size * 3)))
    assert np.array_equal(mask, masks.random_mask((size, 3), sparsity, seed=4))


def test_random_mask_is_uniform_over_positions():
    hits = sum(masks.random_mask((20,), 0.75, seed).astype(int) for seed in range(2000))
    # 5 of 20 active: each position 500 times ± 5 · √(2000 · ¼ · ¾)
    assert (abs(hits - 500) < 97).all()
