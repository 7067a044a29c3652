import keras
import numpy as np
import pytest
from helpers import array
from keras import layers

import keras_sparseopt as kso


def convnet(name="net"):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, name="stem")(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.Activation("relu")(x)
    x = layers.ZeroPadding2D()(x)
    x = layers.Conv2D(16, 3, name="middle", activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    x = layers.Dense(10, name="head")(x)
    return keras.Model(inputs, x, name=name)


def active(model):
    return {x.name: int(array(x.kernel_mask).sum()) for x in kso.sparse_layers(model)}


def names(model):
    return [x.name for x in kso.sparse_layers(model)]


def test_weights_are_kept_and_the_original_is_untouched():
    dense = convnet()
    before = [array(w) for w in dense.weights]
    model = kso.sparsify(dense, 0.8)
    assert all(np.array_equal(a, array(b)) for a, b in zip(before, dense.weights))
    for layer in kso.sparse_layers(model):
        kernel = array(dense.get_layer(layer.name).kernel)
        assert np.array_equal(array(layer.kernel), kernel * array(layer.kernel_mask))
        assert np.array_equal(array(layer.bias), array(dense.get_layer(layer.name).bias))
    x = np.random.rand(2, 8, 8, 3).astype("float32")
    np.testing.assert_array_equal(array(kso.sparsify(dense, 0.0)(x)), array(dense(x)))


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.957])
@pytest.mark.parametrize("distribution", ["er", "erk"])
def test_total_is_exact_and_layers_within_one_weight(distribution, sparsity):
    dense = convnet()
    model = kso.sparsify(dense, sparsity, distribution)
    shapes = [tuple(x.kernel.shape) for x in kso.sparse_layers(model)]
    sizes = [int(np.prod(s)) for s in shapes]
    shares = getattr(kso, distribution)(shapes, sparsity)
    for count, share, size in zip(active(model).values(), shares, sizes):
        assert abs(count - (1 - share) * size) <= 1
    assert sum(active(model).values()) == round((1 - sparsity) * sum(sizes))


def test_uniform_leaves_the_first_convolution_dense():
    model = kso.sparsify(convnet(), 0.9, "uniform")
    assert names(model) == ["middle", "head"]
    for layer in kso.sparse_layers(model):
        size = int(np.prod(layer.kernel.shape))
        assert active(model)[layer.name] == round(0.1 * size)


def test_dict_distribution():
    model = kso.sparsify(convnet(), None, {"middle": 0.75})
    assert active(model) == {"middle": 288}
    assert type(model.get_layer("head")) is layers.Dense


@pytest.mark.parametrize(
    "exclude, left",
    [
        ("head", ["stem", "middle"]),
        ("*e*", []),
        (["st*", "head"], ["middle"]),
        (layers.Conv2D, ["head"]),
        (lambda layer: layer.name == "stem", ["middle", "head"]),
        ([layers.Dense, lambda layer: layer.name == "stem"], ["middle"]),
    ],
)
def test_exclude(exclude, left):
    if not left:
        with pytest.raises(ValueError, match="No layer is left to mask"):
            kso.sparsify(convnet(), 0.5, exclude=exclude)
        return
    model = kso.sparsify(convnet(), 0.5, exclude=exclude)
    assert names(model) == left
    sizes = sum(int(np.prod(x.kernel.shape)) for x in kso.sparse_layers(model))
    assert sum(active(model).values()) == round(0.5 * sizes)  # excluded: outside the budget


def test_masks_depend_on_seed_and_position_only():
    dense = convnet()
    first, again, other = (kso.sparsify(dense, 0.8, seed=s) for s in (1, 1, 2))
    for a, b, c in zip(*map(kso.sparse_layers, (first, again, other))):
        assert np.array_equal(array(a.kernel_mask), array(b.kernel_mask))
        assert not np.array_equal(array(a.kernel_mask), array(c.kernel_mask))


def corrected(model):
    return {x.name: x.skew_correction for x in kso.sparse_layers(kso.sparsify(model, 0.5))}


def test_correction_only_where_a_normalization_follows():
    assert corrected(convnet()) == {"stem": True, "middle": False, "head": False}


def test_normalization_is_found_through_what_passes_channels_on():
    inputs = keras.Input((8, 8, 4))
    a = layers.Conv2D(4, 3, padding="same", name="a", activation="relu")(inputs)
    b = layers.Conv2D(4, 3, padding="same", name="b")(inputs)
    x = layers.Dropout(0.1)(keras.ops.relu(a + b))
    x = layers.Concatenate()([layers.AveragePooling2D(2)(x), layers.MaxPooling2D(2)(x)])
    x = layers.GroupNormalization(2)(x)
    x = layers.Conv2D(4, 1, name="c")(x)
    x = layers.DepthwiseConv2D(3, name="stops")(x)
    x = layers.BatchNormalization()(x)
    x = layers.Flatten()(x)
    x = layers.Dense(6, name="d")(x)
    x = layers.Reshape((2, 3))(x)
    x = layers.LayerNormalization()(x)
    model = keras.Model(inputs, layers.Dense(1, name="e")(x))
    assert corrected(model) == {"a": True, "b": True, "c": False, "d": True, "e": False}


def test_normalization_is_found_across_nested_models():
    inner_in = keras.Input((6, 6, 3))
    inner = keras.Model(inner_in, layers.Conv2D(4, 3, name="inside")(inner_in), name="inner")
    after = keras.Sequential([keras.Input((4, 4, 4)), layers.BatchNormalization()], name="after")
    inputs = keras.Input((6, 6, 3))
    x = layers.Flatten()(after(inner(inputs)))
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    assert corrected(model) == {"inside": True, "head": False}
    sparse = kso.sparsify(model, 0.0)
    x = np.random.rand(2, 6, 6, 3).astype("float32")
    np.testing.assert_array_equal(array(sparse(x)), array(model(x)))


def test_shared_layers_stay_shared():
    shared = layers.Dense(5, name="shared")
    a, b = keras.Input((5,)), keras.Input((5,))
    model = keras.Model([a, b], layers.Add()([shared(a), shared(shared(b))]))
    sparse = kso.sparsify(model, 0.0)
    assert names(sparse) == ["shared"]
    x = [np.random.rand(3, 5).astype("float32") for _ in range(2)]
    np.testing.assert_array_equal(array(sparse(x)), array(model(x)))


def test_nested_sequential_and_frozen_layers():
    body = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="a"), layers.Dense(4)])
    body.layers[0].trainable = False
    model = keras.Sequential([keras.Input((4,)), body, layers.Dense(2, name="c")])
    sparse = kso.sparsify(model, 0.0)
    frozen = {x.name: x.trainable for x in kso.sparse_layers(sparse)}
    assert frozen["a"] is False and frozen["c"] is True
    x = np.random.rand(3, 4).astype("float32")
    np.testing.assert_array_equal(array(sparse(x)), array(model(x)))


def test_all_convertible_layers_and_what_stays_dense():
    inputs = keras.Input((16, 4))
    x = layers.Conv1D(8, 3, padding="causal", name="conv1d")(inputs)
    x = layers.EinsumDense("abc,cd->abd", (None, 8), name="einsum")(x)
    x = layers.MultiHeadAttention(2, 4)(x, x)
    x = layers.TimeDistributed(layers.Dense(8))(x)
    x = layers.Reshape((4, 4, 8, 1))(x)
    x = layers.Conv3D(2, 2, name="conv3d")(x)
    x = layers.Flatten()(x)
    model = keras.Model(inputs, layers.Dense(3, name="dense")(x))
    sparse = kso.sparsify(model, 0.5)
    assert names(sparse) == ["conv1d", "einsum", "conv3d", "dense"]
    same = kso.sparsify(model, 0.0)
    x = np.random.rand(2, 16, 4).astype("float32")
    np.testing.assert_allclose(array(same(x)), array(model(x)), rtol=1e-6, atol=1e-6)


def test_a_compiled_model_stays_compiled_and_the_copy_is_not():
    dense = convnet()
    dense.compile("sgd", "mse")
    model = kso.sparsify(dense, 0.5)
    assert dense.compiled and dense.optimizer is not None and not model.compiled


def test_sparsifying_again_leaves_sparse_layers():
    once = kso.sparsify(convnet(), 0.5, exclude="head")
    twice = kso.sparsify(once, None, {"head": 0.5})
    assert set(active(twice)) == {"stem", "middle", "head"}
    for a, b in zip(kso.sparse_layers(once), kso.sparse_layers(twice)):
        assert np.array_equal(array(a.kernel_mask), array(b.kernel_mask))


def test_adapted_normalization_keeps_its_statistics():
    norm = layers.Normalization()
    norm.adapt(np.random.rand(50, 4) * 7)
    model = keras.Sequential([keras.Input((4,)), norm, layers.Dense(3)])
    x = np.random.rand(3, 4).astype("float32")
    np.testing.assert_array_equal(array(kso.sparsify(model, 0.0)(x)), array(model(x)))


def test_strip_gives_plain_layers_with_the_same_outputs():
    model = kso.sparsify(convnet(), 0.8)
    plain = kso.strip(model)
    assert not kso.sparse_layers(plain)
    kinds = [type(plain.get_layer(name)) for name in ("stem", "middle", "head")]
    assert kinds == [layers.Conv2D, layers.Conv2D, layers.Dense]
    x = np.random.rand(2, 8, 8, 3).astype("float32")
    np.testing.assert_allclose(array(plain(x)), array(model(x)), atol=1e-6)


def test_set_mask_keeps_survivors_and_zeroes_the_rest():
    layer = kso.SparseDense(4, sparsity=0.5, seed=0)
    layer.build((None, 6))
    kernel, old = array(layer.kernel), array(layer.kernel_mask)
    new = np.random.default_rng(0).random((6, 4)) < 0.5
    kso.set_mask(layer, new)
    assert np.array_equal(array(layer.kernel_mask), new)
    assert np.array_equal(array(layer.kernel), kernel * (old & new))


def test_masks_from_zeros():
    dense = convnet()
    kernel = array(dense.get_layer("middle").kernel)
    kernel[..., :4] = 0.0
    dense.get_layer("middle").kernel.assign(kernel)
    model = kso.sparsify(dense, 0.0)
    sparsities = kso.masks_from_zeros(model)
    assert sparsities == {"stem": 0.0, "middle": 0.25, "head": 0.0}
    assert np.array_equal(array(model.get_layer("middle").kernel_mask), kernel != 0)


BACKEND = keras.backend.backend()
APPLICATIONS = [
    "ResNet50",
    "ResNet50V2",
    "MobileNetV2",
    "MobileNetV3Small",
    "EfficientNetB0",
    "DenseNet121",
    "VGG16",
    "Xception",
    "ConvNeXtTiny",
]


# On JAX the rest only costs time: eager calls compile every operation.
@pytest.mark.parametrize(
    "name", APPLICATIONS if BACKEND == "tensorflow" else ["VGG16", "MobileNetV2"]
)
def test_keras_applications_convert(name):
    size = 32 if name == "VGG16" else 96
    dense = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10)
    rng = np.random.default_rng(0)
    for w in dense.weights:  # so that normalizations and scales are not the identity
        if len(w.shape) == 1 and "seed" not in w.path:
            w.assign(rng.uniform(0.5, 1.5, w.shape))
    x = rng.random((1, size, size, 3)).astype("float32") * 255
    expected = array(dense(x, training=False))
    result = array(kso.sparsify(dense, 0.0)(x, training=False))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    rows = [
        r for r in kso.layer_costs(kso.sparsify(dense, 0.9)) if r["skew_correction"] is not None
    ]
    weights = sum(r["weights"] for r in rows)
    assert sum(r["active_weights"] for r in rows) == round(0.1 * weights)
    # Xception keeps most of its weights in separable convolutions, which stay dense.
    share = 0.04 if name == "Xception" else 0.5
    assert weights > share * sum(int(np.prod(w.shape)) for w in dense.trainable_weights)
