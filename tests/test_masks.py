import keras
import numpy as np
import pytest
from helpers import array, correct_oracle, drop_and_grow_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import ops

import keras_sparseopt as kso
from keras_sparseopt import distributions, masks


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
    count = masks.num_active(size * 3, sparsity)
    mask = masks.random_mask((size, 3), count, seed=4)
    assert mask.sum() == max(1, round((1 - sparsity) * (size * 3)))
    assert np.array_equal(mask, masks.random_mask((size, 3), count, seed=4))


def test_random_mask_is_uniform_over_positions():
    hits = sum(masks.random_mask((20,), 5, seed).astype(int) for seed in range(2000))
    # 5 of 20 active: each position 500 times ± 5 · √(2000 · ¼ · ¾)
    assert (abs(hits - 500) < 97).all()


# ---------------------------------------------------------------------- the largest kernels

FAN_IN, NEURONS = 46_341, 46_340  # 2 147 441 940 weights, just below the limit


@pytest.mark.parametrize("kind", ["dense", "one dense neuron", "random"])
def test_the_correction_does_not_overflow_below_the_limit(kind, monkeypatch):
    """With mocked counts: such a kernel would not fit into memory."""
    assert FAN_IN * NEURONS <= masks.MAX_KERNEL_SIZE < (FAN_IN + 1) * (NEURONS + 1)
    counts = np.full((1, NEURONS), FAN_IN, "int32")
    if kind == "one dense neuron":
        counts[0, 1:] = 0
    elif kind == "random":
        counts = np.random.default_rng(0).integers(0, FAN_IN + 1, (1, NEURONS)).astype("int32")
    monkeypatch.setattr(masks, "neuron_counts", lambda mask, axes: ops.convert_to_tensor(counts))
    exact = np.sqrt(counts.astype("float64") * NEURONS / counts.sum(dtype="int64"))
    scale = array(masks.correction(None, (1,)))
    np.testing.assert_allclose(scale, exact, rtol=1e-6)


def test_counts_are_int32_by_type():
    mask = keras.KerasTensor((FAN_IN, NEURONS), "bool")
    counts = masks.neuron_counts(mask, (1,))
    assert counts.dtype == "int32" and counts.shape == (1, NEURONS)
    assert masks.MAX_KERNEL_SIZE == np.iinfo("int32").max


def test_larger_kernels_are_refused_before_anything_is_allocated():
    layer = kso.SparseDense(2**16, name="huge")
    with pytest.raises(ValueError, match=r"at most 2147483647 weights.*\(32768, 65536\).*'huge'"):
        layer.build((None, 2**15))
    assert not layer.weights


def test_many_large_kernels_together_may_exceed_the_limit():
    shapes = [(40_000, 40_000)] * 5
    counts = distributions.exact_counts(shapes, distributions.erk(shapes, 0.9), 0.9)
    assert sum(counts) == 800_000_000
