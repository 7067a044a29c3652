"""Networks without dead neurons compute the same with fewer weights."""

import keras
import numpy as np
import pytest
from helpers import array
from keras import layers

import keras_sparseopt as kso


def kill(layer, *neurons):
    """No inputs any more."""
    kernel = array(layer.kernel).copy()
    kernel[..., list(neurons)] = 0
    layer.kernel.assign(kernel)


def unread(reader, *neurons):
    kernel = array(reader.kernel).copy()
    kernel[..., list(neurons), :] = 0
    reader.kernel.assign(kernel)


def sequential(shape, *parts, seed=0):
    """All weights, of normalizations too, as after a training."""
    model = keras.Sequential([keras.Input(shape), *parts])
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        value = rng.normal(size=variable.shape)
        variable.assign(np.abs(value) + 0.1 if "variance" in variable.path else value)
    return model


def same(model, compacted, shape):
    x = np.random.default_rng(1).normal(size=(3, *shape)).astype("float32")
    expected = array(model(x))
    np.testing.assert_allclose(
        array(compacted.model(x)), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    assert not np.allclose(expected, expected[:1])


def test_dense_layers_lose_dead_and_unread_neurons():
    model = sequential(
        (6,), layers.Dense(8, name="a"), layers.BatchNormalization(), layers.ReLU(),
        layers.Dense(7, "tanh", name="b"), layers.Dropout(0.5),
        layers.Dense(5, use_bias=False, name="c"), layers.Dense(3, "softmax", name="d"),
    )  # fmt: skip
    a, b, c, d = (model.get_layer(name) for name in "abcd")
    kill(a, 1, 4)
    unread(b, 0)
    kill(b, 6)
    kill(c, 2)  # without a bias: its output is 0
    kill(d, 0)  # an output stays
    before = [array(v) for v in model.weights]
    found = kso.compact(model)
    assert found.removed == {"a": (8, 5), "b": (7, 6), "c": (5, 4)}
    same(model, found, (6,))
    ((name, (number, why)),) = found.kept.items()
    assert (name, number) == ("d", 1) and "may mix neurons" in why
    assert all(np.array_equal(x, array(y)) for x, y in zip(before, model.weights))
    assert found.weights == (model.count_params(), found.model.count_params())
    assert "a: 8 → 5" in str(found) and type(found.model) is keras.Sequential
    assert found.model.get_layer("c").use_bias  # b's constant went into it


def test_what_only_unread_neurons_read_goes_too():
    model = sequential((4,), *(layers.Dense(5, "relu", name=n) for n in "abc"), layers.Dense(2))
    unread(model.layers[3], 2)
    kernel = array(model.get_layer("c").kernel).copy()
    kernel[1, [0, 1, 3, 4]] = 0  # only the unread neuron reads b's second
    model.get_layer("c").kernel.assign(kernel)
    kernel = array(model.get_layer("b").kernel).copy()
    kernel[3, [0, 2, 3, 4]] = 0
    model.get_layer("b").kernel.assign(kernel)
    found = kso.compact(model)
    assert found.removed == {"a": (5, 4), "b": (5, 4), "c": (5, 4)}
    same(model, found, (4,))


def test_convolutions():
    model = sequential(
        (9, 9, 3),
        layers.Conv2D(6, 3, padding="same", name="a"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(),
        layers.Conv2D(7, 3, name="b"),  # no padding: takes the constants of a
        layers.BatchNormalization(name="norm_b"),
        layers.Activation("relu"),
        layers.Conv2D(5, 3, padding="same", activation="relu", name="c"),
        layers.MaxPooling2D(2),
        layers.SpatialDropout2D(0.1),
        layers.Flatten(),
        layers.LeakyReLU(),
        layers.Dense(4, name="head"),
    )
    kill(model.get_layer("a"), 0, 3)
    kill(model.get_layer("b"), 1, 2)  # read behind zero padding
    for name, values in (("norm_b", (-3.0, 3.0)),):  # one is cut off by the ReLU, one is not
        gamma, beta, mean, variance = (array(v).copy() for v in model.get_layer(name).weights)
        beta[[1, 2]], mean[[1, 2]] = values, 0
        model.get_layer(name).set_weights([gamma, beta, mean, variance])
    bias = array(model.get_layer("b").bias).copy()
    bias[[1, 2]] = 0
    model.get_layer("b").bias.assign(bias)
    kill(model.get_layer("c"), 4)
    found = kso.compact(model)
    assert found.removed == {"a": (6, 4), "b": (7, 6), "c": (5, 4)}
    assert found.kept == {"b": (1, "zero padding comes after them")}
    same(model, found, (9, 9, 3))


def test_depthwise_and_pooling():
    model = sequential(
        (8, 8, 3),
        layers.Conv2D(6, 1, name="a"),
        layers.DepthwiseConv2D(3, name="depthwise"),
        layers.BatchNormalization(),
        layers.ReLU(6.0),
        layers.Conv2D(8, 1, activation="relu", name="b"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(3, name="head"),
    )
    kill(model.get_layer("a"), 5)
    kill(model.get_layer("b"), 0, 1)
    unread(model.get_layer("b"), 2)
    found = kso.compact(model)
    assert found.removed == {"a": (6, 4), "b": (8, 6)}
    assert found.model.get_layer("depthwise").kernel.shape == (3, 3, 4, 1)
    same(model, found, (8, 8, 3))


def residual():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, padding="same", name="stem")(inputs)
    y = layers.ReLU()(layers.Conv2D(5, 3, padding="same", name="inner")(x))
    x = layers.Add(name="sum")([x, layers.Conv2D(4, 3, padding="same", name="outer")(y)])
    shared = layers.Conv2D(4, 1, name="shared")
    x = layers.GlobalAveragePooling2D()(shared(shared(x)))
    return keras.Model(inputs, [layers.Dense(2, name="one")(x), layers.Dense(3, name="two")(x)])


def test_what_is_tied_stays_and_says_why():
    model = residual()
    for name in ("stem", "outer", "shared", "one"):
        kill(model.get_layer(name), 0)
    kill(model.get_layer("inner"), 0, 1)
    found = kso.compact(model)
    assert found.removed == {"inner": (5, 3)}
    assert {name: number for name, (number, _) in found.kept.items()} == {
        "stem": 1, "outer": 1, "shared": 1, "one": 1,
    }  # fmt: skip
    assert "'sum' (Add) reads it" in found.kept["outer"][1]
    assert "more than once" in found.kept["shared"][1]
    assert "an output" in found.kept["one"][1]
    x = np.random.default_rng(1).normal(size=(3, 6, 6, 3)).astype("float32")
    for value, expected in zip(found.model(x), model(x)):
        np.testing.assert_allclose(array(value), array(expected), atol=1e-5)


def test_a_layer_keeps_one_neuron():
    model = sequential((4,), layers.Dense(3, "relu", name="a"), layers.Dense(2))
    kill(model.get_layer("a"), 0, 1, 2)
    found = kso.compact(model, inputs=np.ones((2, 4), "float32"))
    assert found.removed == {"a": (3, 1)}


def test_after_training_with_ablation():
    keras.utils.set_random_seed(0)
    parts = [layers.Dense(48, use_bias=False), layers.BatchNormalization(), layers.ReLU()]
    model = keras.Sequential([keras.Input((16,)), *parts, kso.SparseDense(32, sparsity=0.8)])
    model.add(layers.Dense(3, name="head"))
    kso.sparsify(model, 0.9, structure=kso.ConstantFanIn(), exclude=["head"])
    model.compile(kso.SparseOpt("sgd"), "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 16)), rng.normal(size=(64, 3))
    srigl = kso.SRigL(2, 0.3, min_salient=0.9, layers=["dense*"])
    model.fit(x, y, batch_size=8, epochs=4, verbose=0, callbacks=[srigl])
    found = kso.compact(model)
    assert found.removed and found.weights[1] < found.weights[0]
    same(model, found, (16,))
    assert kso.sparse_weights(model) and not kso.sparse_weights(found.model)


def test_wrong_models():
    with pytest.raises(TypeError, match="`model` must be a Keras model"):
        kso.compact("model")

    class Own(keras.Model):
        def build(self, shape):
            self.dense = layers.Dense(2)
            self.dense.build(shape)

        def call(self, x):
            return self.dense(x)

    own = Own()
    own.build((None, 3))
    with pytest.raises(ValueError, match="must be a Functional or Sequential model.*Received: Own"):
        kso.compact(own)


@pytest.mark.parametrize("is_dead", [True, False])
def test_why_a_layer_keeps_one_neuron(is_dead):
    """All are dead, or nobody reads them."""
    model = sequential((4,), layers.Dense(3, "relu", name="a"), layers.Dense(2, name="head"))
    kill(model.get_layer("a"), *(range(3) if is_dead else ()))
    if not is_dead:
        head = model.get_layer("head")
        head.kernel.assign(0 * head.kernel)
    found = kso.compact(model)
    assert found.removed == {"a": (3, 1)}
    dead = {"a": (1, "a layer has one neuron at least")}
    assert found.kept == (dead if is_dead else {"head": (2, "it is an output")})
