import keras
import numpy as np
import pytest
from helpers import array

import keras_sparseopt as kso

LAYERS = {
    "dense": (lambda **k: kso.SparseDense(6, **k), (4, 10)),
    "conv1d causal": (lambda **k: kso.SparseConv1D(6, 3, padding="causal", **k), (4, 9, 5)),
    "conv2d": (lambda **k: kso.SparseConv2D(6, 3, strides=2, activation="relu", **k), (4, 9, 9, 5)),
    "conv2d grouped": (lambda **k: kso.SparseConv2D(6, 3, groups=2, **k), (4, 7, 7, 4)),
    "conv3d": (lambda **k: kso.SparseConv3D(6, 2, **k), (4, 5, 5, 5, 3)),
    "einsum": (
        lambda **k: kso.SparseEinsumDense("abc,cde->abde", (None, 3, 4), bias_axes="de", **k),
        (4, 5, 8),
    ),
    "einsum output projection": (
        lambda **k: kso.SparseEinsumDense("abde,dec->abc", (None, 6), **k),
        (4, 5, 3, 4),
    ),
    "einsum ellipsis": (lambda **k: kso.SparseEinsumDense("...x,xy->...y", 7, **k), (4, 5, 8)),
}
CASES = pytest.mark.parametrize("name", LAYERS)


def build(name, **kwargs):
    make, shape = LAYERS[name]
    layer = make(**kwargs)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    layer(x)
    return layer, x


def dense_twin(layer, x):
    base = type(layer).__mro__[2]
    config = layer.get_config()
    for extra in ("sparsity", "seed", "skew_correction", "structure"):
        del config[extra]
    twin = base.from_config(config)
    twin(x)
    twin.kernel.assign(array(layer.kernel) * array(layer.kernel_mask))
    if twin.bias is not None:
        twin.bias.assign(array(layer.bias))
    return twin


@CASES
def test_mask_is_exact_and_reproducible(name):
    layer, x = build(name, sparsity=0.7, seed=3)
    size = array(layer.kernel).size
    mask = array(layer.kernel_mask)
    assert mask.dtype == bool and mask.shape == tuple(layer.kernel.shape)
    assert mask.sum() == round(0.3 * size)
    assert layer.sparsity == 1 - mask.sum() / size
    again, _ = build(name, sparsity=0.7, seed=3)
    assert np.array_equal(mask, array(again.kernel_mask))
    other, _ = build(name, sparsity=0.7, seed=4)
    assert not np.array_equal(mask, array(other.kernel_mask))


@CASES
def test_forward_is_the_masked_kernel_exactly(name):
    layer, x = build(name, sparsity=0.7, seed=3)
    dirty = array(layer.kernel) + 1.0  # weights at inactive positions must not matter
    layer.kernel.assign(dirty)
    assert np.array_equal(array(layer(x)), array(dense_twin(layer, x)(x)))


def gradient(layer, x):
    """d sum(y · r) / d kernel, on any backend."""
    r = np.random.default_rng(1).normal(size=tuple(layer(x).shape)).astype("float32")
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = keras.ops.sum(layer(x) * r)
        return array(tape.gradient(value, layer.kernel.value))
    if keras.backend.backend() == "torch":
        layer.zero_grad()
        keras.ops.sum(layer(x) * keras.ops.convert_to_tensor(r)).backward()
        return array(layer.kernel.value.grad)
    import jax

    def value(kernel):
        variables = [kernel if v is layer.kernel else v.value for v in layer.trainable_variables]
        fixed = [v.value for v in layer.non_trainable_variables]
        return keras.ops.sum(layer.stateless_call(variables, fixed, x)[0] * r)

    return array(jax.grad(value)(layer.kernel.value))


@CASES
def test_gradient_is_the_dense_one(name):
    layer, x = build(name, sparsity=0.7, seed=3)
    expected = gradient(dense_twin(layer, x), x)
    assert np.abs(expected[~array(layer.kernel_mask)]).max() > 0.01
    np.testing.assert_allclose(gradient(layer, x), expected, rtol=1e-5, atol=1e-5)


def test_neuron_axes():
    expected = {
        "dense": (1,),
        "conv1d causal": (2,),
        "conv2d": (3,),
        "conv2d grouped": (3,),
        "conv3d": (4,),
        "einsum": (1, 2),  # "cde": d and e are in the output
        "einsum output projection": (2,),  # "dec": only c is
        "einsum ellipsis": (1,),
    }
    for name, axes in expected.items():
        layer, _ = build(name, sparsity=0.5, seed=0)
        assert layer.kernel.topology.neuron_axes == axes, name
        rest = tuple(a for a in range(len(layer.kernel.shape)) if a not in axes)
        by_hand = 1 - array(layer.kernel_mask).mean(axis=rest)
        np.testing.assert_allclose(layer.neuron_sparsity, by_hand)


@CASES
def test_config_round_trip(name):
    layer, _ = build(name, sparsity=0.7, seed=3, skew_correction=False)
    config = layer.get_config()
    assert (config["sparsity"], config["seed"], config["skew_correction"]) == (0.7, 3, False)
    assert type(layer).from_config(config).get_config() == config


def test_unseeded_masks_follow_the_global_seed():
    keras.utils.set_random_seed(5)
    first, second = (build("dense", sparsity=0.5)[0] for _ in range(2))
    assert not np.array_equal(array(first.kernel_mask), array(second.kernel_mask))
    keras.utils.set_random_seed(5)
    again = build("dense", sparsity=0.5)[0]
    assert np.array_equal(array(first.kernel_mask), array(again.kernel_mask))


def test_at_least_one_weight_stays():
    layer = kso.SparseDense(2, sparsity=0.999)
    layer.build((None, 3))
    assert array(layer.kernel_mask).sum() == 1


def test_dense_by_default():
    layer, _ = build("dense")
    assert layer.sparsity == 0.0 and array(layer.kernel_mask).all()


@pytest.mark.parametrize("name", ["dense", "conv2d grouped", "einsum"])
def test_sparse_he_normal_uses_the_actual_fan_in(name):
    make = {
        "dense": lambda **k: kso.SparseDense(2000, **k),
        "conv2d grouped": lambda **k: kso.SparseConv2D(400, 3, groups=2, **k),
        "einsum": lambda **k: kso.SparseEinsumDense("abc,cde->abde", (None, 20, 100), **k),
    }[name]
    shape = {"dense": (1, 300), "conv2d grouped": (1, 9, 9, 200), "einsum": (1, 2, 400)}[name]
    layer = make(sparsity=0.9, seed=0, kernel_initializer="sparse_he_normal")
    layer(np.zeros(shape, "float32"))
    kernel, mask = array(layer.kernel), array(layer.kernel_mask)
    neuron_axes = layer.kernel.topology.neuron_axes
    rest = tuple(a for a in range(mask.ndim) if a not in neuron_axes)
    counts = mask.sum(axis=rest, keepdims=True)
    standardized = (kernel / np.sqrt(2 / np.maximum(counts, 1)))[mask]
    assert standardized.std() == pytest.approx(1, abs=0.02)
    # and for few- and many-weight neurons alike
    many = np.broadcast_to(counts > np.median(counts), mask.shape)
    scaled = kernel / np.sqrt(2 / np.maximum(counts, 1))
    assert scaled[mask & many].std() == pytest.approx(scaled[mask & ~many].std(), rel=0.05)


def test_sparse_he_normal_has_a_name():
    layer = kso.SparseConv2D(
        4, 3, (1, 1), "same", None, (1, 1), 1, None, False, "sparse_he_normal", sparsity=0.5
    )
    assert type(layer.kernel_initializer) is kso.SparseHeNormal
    copy = kso.SparseConv2D.from_config(layer.get_config())
    assert type(copy.kernel_initializer) is kso.SparseHeNormal


def test_sparse_he_normal_in_a_plain_layer_is_he_normal():
    plain, sparse = (
        keras.layers.Dense(5, kernel_initializer=initializer)
        for initializer in (keras.initializers.HeNormal(seed=1), kso.SparseHeNormal(seed=1))
    )
    plain.build((None, 7)), sparse.build((None, 7))
    assert np.array_equal(array(plain.kernel), array(sparse.kernel))


def test_mixed_precision_computes_in_low_precision_and_keeps_float32_weights():
    layer = kso.SparseDense(4, sparsity=0.5, dtype="mixed_bfloat16")
    y = layer(np.ones((2, 8), "float32"))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert layer.kernel.dtype == "float32" and layer.kernel_mask.dtype == "bool"


def test_training_argument_is_accepted_as_in_keras():
    layer = kso.SparseDense(4)
    assert layer(np.ones((2, 8), "float32"), training=True).shape == (2, 4)
