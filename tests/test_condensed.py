"""Layers that multiply without their zeros: the same outputs, wherever they lie."""

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from helpers import array, compiled
from keras import layers

import keras_sparseopt as kso
from keras_sparseopt.deployment.condensed import CondensedDense

KINDS = {
    "dense": lambda: (layers.Dense(7, "relu"), (5,)),
    "dense of rank 3": lambda: (layers.Dense(7, use_bias=False), (3, 5)),
    "query": lambda: (layers.EinsumDense("abc,cde->abde", (3, 2, 4), bias_axes="de"), (3, 5)),
    "output": lambda: (layers.EinsumDense("abcd,cde->abe", (3, 6), bias_axes="e"), (3, 2, 5)),
    "ellipsis": lambda: (layers.EinsumDense("...x,xy->...y", (3, 6), activation="tanh"), (3, 5)),
    "turned": lambda: (layers.EinsumDense("abc,dc->adb", (6, 3)), (3, 5)),
    "two axes": lambda: (layers.EinsumDense("abc,ecb->ae", (6,), bias_axes="e"), (3, 5)),
    "convolution": lambda: (layers.Conv2D(7, 1, activation="relu"), (2, 3, 5)),
    "convolution of rank 1": lambda: (layers.Conv1D(7, 1), (4, 5)),
}
OTHERS = {
    "3×3": lambda: (layers.Conv2D(7, 3), (4, 4, 5)),
    "stride": lambda: (layers.Conv2D(7, 1, 2), (4, 4, 5)),
    "groups": lambda: (layers.Conv2D(6, 1, groups=2), (4, 4, 4)),
    "channels": lambda: (layers.EinsumDense("abc,bcd->abd", (3, 6)), (3, 5)),  # a kernel per b
    "embedding": lambda: (layers.TimeDistributed(layers.GRU(4)), (3, 2, 5)),
}


def network(make, seed=0, zeros=0.8):
    layer, shape = make()
    model = keras.Sequential([keras.Input(shape), layer])
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        value = rng.normal(size=variable.shape)
        if len(variable.shape) > 1:
            value *= rng.random(variable.shape) >= zeros
        variable.assign(value)
    return model, rng.normal(size=(2, *shape)).astype("float32")


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_same_without_the_zeros(kind):
    model, x = network(KINDS[kind])
    kernel = array(model.layers[0].kernel)
    condensed = kso.condense(model, batch_size=2, min_speedup=0)
    (layer,), (row,) = condensed.model.layers, condensed.layers
    assert type(layer) is CondensedDense and not row["stays_dense"]
    np.testing.assert_allclose(array(condensed.model(x)), array(model(x)), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(array(model(0 * x)), array(model(x)))
    # by hand: as many entries as the largest fan-in, in fours, and none of them lost
    np.testing.assert_array_equal(array(layer.kernel), kernel)
    assert np.count_nonzero(array(layer.values)) == np.count_nonzero(kernel)
    fan_in, neurons = layer.values.shape
    assert fan_in == layer.fan_in_entries and fan_in % 4 == 0
    assert row["rows"] == [x.size * neurons // kernel.size]


@hypothesis.given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 9), st.floats(0.5, 1))
@hypothesis.settings(max_examples=30, deadline=None)
def test_any_matrix_is_kept(seed, inputs, neurons, zeros):
    from keras_sparseopt.deployment.condensed import _condensed

    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(inputs, neurons)) * (rng.random((inputs, neurons)) >= zeros)
    indices, values = _condensed(matrix)
    again = np.zeros_like(matrix)
    np.add.at(again, (indices, np.arange(neurons)), values)
    np.testing.assert_array_equal(again, matrix)
    fan_in = np.count_nonzero(matrix, axis=0).max()
    assert len(values) == 4 * max(1, -(-fan_in // 4))


@pytest.mark.parametrize("kind", OTHERS)
def test_what_cannot_be_condensed_says_why(kind):
    model, x = network(OTHERS[kind])
    condensed = kso.condense(model, min_speedup=0)
    assert condensed.layers and all(row["stays_dense"] for row in condensed.layers)
    assert "stays dense: " in str(condensed) and "0 layers condensed" in str(condensed)
    np.testing.assert_array_equal(array(condensed.model(x)), array(model(x)))


class Block(layers.Layer):
    """A layer with layers inside, as Keras Hub's are."""

    def build(self, shape):
        self.attention = layers.MultiHeadAttention(2, 4, name="attention")
        self.attention.build(shape, shape)
        self.wide = layers.Dense(32, "relu", name="wide")
        self.wide.build(shape)
        self.back = layers.Dense(shape[-1], name="back")
        self.back.build((*shape[:-1], 32))

    def call(self, x):
        return x + self.back(self.wide(self.attention(x, x)))


def large_network():
    inputs = keras.Input((6, 8))
    x = Block(name="block")(inputs)
    nested = keras.Sequential([keras.Input((6, 8)), layers.Dense(16, name="nested")])
    x = layers.LayerNormalization()(nested(x))
    shared = layers.Dense(16, name="shared")
    x = shared(layers.ReLU()(shared(x)))
    x = kso.SparseDense(12, sparsity=0.8, name="owned")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(3, "softmax", name="head")(x))


def test_a_whole_model_and_its_files(tmp_path):
    model = kso.sparsify(large_network(), 0.8)
    compiled(model, kso.SparseOpt("sgd"))
    before = [array(v) for v in model.weights]
    x = np.random.default_rng(0).normal(size=(3, 6, 8)).astype("float32")
    expected = array(model(x))
    found = kso.condense(model, batch_size=3, min_speedup=0, inputs=None)
    condensed = found.model
    names = [row["name"] for row in found.layers if not row["stays_dense"]]
    assert {"wide", "back", "nested", "shared", "owned", "query", "attention_output"} <= {*names}
    assert {row["name"]: row["rows"] for row in found.layers}["wide"] == [18]
    assert {row["name"]: row["rows"] for row in found.layers}["shared"] == [18, 18]
    assert str(found).endswith("bytes of weights")
    # what was given is as it was
    assert model.compiled and type(model.get_layer("shared")) is layers.Dense
    assert kso.sparse_weights(model)
    assert all(np.array_equal(a, array(b)) for a, b in zip(before, model.weights))

    def same(other, inputs=x):
        wanted = array(model(inputs))
        np.testing.assert_allclose(array(other(inputs)), wanted, rtol=1e-5, atol=1e-6)

    same(condensed)
    same(condensed, x[:1])  # for any batch
    np.testing.assert_allclose(condensed.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-6)
    assert not kso.sparse_weights(condensed) and not condensed.compiled
    inner = [v for v in condensed.get_layer("shared").weights]
    assert not any(v.trainable for v in inner)
    # what lies on the graph stays condensed; what lies in another layer becomes what it was
    custom = {"Block": Block}
    condensed.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras", custom)
    same(loaded)
    assert type(loaded.get_layer("shared")) is CondensedDense
    assert type(loaded.get_layer("block").wide) is layers.Dense
    with keras.saving.custom_object_scope(custom):
        again = kso.condense(loaded, min_speedup=0).model
        kso.save_packed(condensed, tmp_path / "m.ksp")
        same(kso.load_packed(tmp_path / "m.ksp"))
    same(again)
    assert isinstance(again.get_layer("block").wide, CondensedDense)


@pytest.mark.backend("tensorflow")
def test_it_can_be_exported(tmp_path):
    import tensorflow as tf

    model = kso.sparsify(large_network(), 0.8)
    condensed = kso.condense(model, min_speedup=0).model
    condensed.export(tmp_path / "served", verbose=False)
    x = np.random.default_rng(0).normal(size=(3, 6, 8)).astype("float32")
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(array(served.serve(x)), array(model(x)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="must be as it was before `condense`.*shared"):
        kso.export_tflite(condensed, tmp_path / "m.tflite", inputs=x)


class InList(layers.Layer):
    """Keras names what lies in a list by its class."""

    def build(self, shape):
        self.parts = [layers.Dense(shape[-1]), layers.Dense(shape[-1])]
        for part in self.parts:
            part.build(shape)

    def call(self, x):
        for part in self.parts:
            x = part(inputs=x)
        return x


class Twice(layers.Wrapper):
    def call(self, x):
        return self.layer(self.layer(x))


class WithConfig(keras.Model):
    """A functional model with a config of its own, as Keras Hub's backbones are."""

    def __init__(self, width, **options):
        inputs = keras.Input((5,))
        super().__init__(inputs, layers.Dense(width, name="inner")(inputs), **options)
        self.width = width

    def get_config(self):
        return {"width": self.width, "name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.Sequential([keras.Input((5,)), InList()]),
        lambda: keras.Sequential([keras.Input((5,)), Twice(layers.Dense(5))]),
        lambda: WithConfig(7),
        lambda: keras.Sequential([keras.Input((5,)), WithConfig(7)]),
    ],
)
def test_what_lies_in_other_things_comes_back_as_it_was(make, tmp_path):
    model = make()
    kso.strip(kso.sparsify(model, 0.8, "uniform"))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5)).astype("float32")
    found = kso.condense(model, min_speedup=0)
    assert found.layers and not any(row["stays_dense"] for row in found.layers)
    found.model.save(tmp_path / "m.keras")
    custom = {kind.__name__: kind for kind in (InList, Twice, WithConfig)}
    loaded = keras.models.load_model(tmp_path / "m.keras", custom)
    for other in (found.model, loaded):
        np.testing.assert_allclose(array(other(x)), array(model(x)), rtol=1e-5, atol=1e-6)
    assert layers.Dense in map(type, loaded._flatten_layers())


@pytest.mark.filterwarnings("ignore:Only .* have a mask")
def test_masks_of_inputs_go_on(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(9, 6, mask_zero=True),
            layers.Dense(8, name="dense"),
            layers.GlobalAveragePooling1D(),
        ]
    )
    kso.sparsify(model, 0.8)
    x = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])
    condensed = kso.condense(model, inputs=x, min_speedup=0).model
    condensed.save(tmp_path / "m.keras")
    for other in (condensed, keras.models.load_model(tmp_path / "m.keras")):
        assert type(other.get_layer("dense")) is CondensedDense
        np.testing.assert_allclose(array(other(x)), array(model(x)), rtol=1e-5, atol=1e-6)


def test_inputs_of_another_width_are_an_error():
    model, _ = network(KINDS["dense"])
    layer = kso.condense(model, min_speedup=0).model.layers[0]
    for width in (4, 10):
        with pytest.raises(ValueError, match="must fit a kernel of shape .5, 7.*Received"):
            layer(np.ones((2, width), "float32"))


class Tied(layers.Layer):
    def build(self, shape):
        self.dense = layers.Dense(3)
        self.dense.build(shape)

    def call(self, x):
        return keras.ops.matmul(self.dense(x), keras.ops.transpose(self.dense.kernel))


def test_a_kernel_that_others_read_is_there():
    model = keras.Sequential([keras.Input((5,)), Tied()])
    kso.sparsify(model, 0.8)
    x = np.random.default_rng(0).normal(size=(2, 5)).astype("float32")
    found = kso.condense(model, min_speedup=0)
    assert not found.layers[0]["stays_dense"]
    np.testing.assert_allclose(array(found.model(x)), array(model(x)), rtol=1e-5, atol=1e-6)


def test_a_copy_that_computes_something_else_is_an_error(monkeypatch):
    from keras_sparseopt.deployment import condensed

    model, _ = network(KINDS["dense"])
    product = condensed._multiply
    monkeypatch.setattr(condensed, "_multiply", lambda *arrays: -product(*arrays))
    with pytest.raises(ValueError, match="does not compute what the model does"):
        kso.condense(model, min_speedup=0)


def test_only_what_becomes_faster_is_condensed():
    model, x = network(KINDS["dense"])
    found = kso.condense(model, min_speedup=1e9)
    (row,) = found.layers
    assert row["stays_dense"] == "not faster" and row["dense_ms"] > 0 and row["condensed_ms"] > 0
    assert type(found.model.layers[0]) is layers.Dense
    model, x = network(KINDS["dense"], zeros=0.2)
    (row,) = kso.condense(model, min_speedup=0).layers
    assert row["stays_dense"] == "no more than half of it is 0" and row["dense_ms"] is None


def test_half_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model, x = network(KINDS["query"])
    condensed = kso.condense(model, min_speedup=0).model
    outputs = condensed(x)
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    np.testing.assert_allclose(array(outputs), array(model(x)), rtol=0.03, atol=0.03)


def test_scipy_matrices():
    model = kso.sparsify(large_network(), 0.8)
    matrices = kso.csr_matrices(model)
    head = model.get_layer("head")
    np.testing.assert_array_equal(matrices["head"].toarray(), array(head.kernel).T)
    query = array(model.get_layer("block").attention.query_dense.kernel)
    np.testing.assert_array_equal(matrices["query"].toarray(), query.reshape(8, 8).T)
    assert (
        matrices["owned"].nnz
        == kso.sparse_weights(model.get_layer("owned"))[0].topology.num_active()
    )


def test_scipy_matrices_of_one_name_and_of_none():
    model = keras.Sequential([keras.Input((5,)), InList(), InList()])
    for part in model.layers:
        for layer in part.parts:
            layer.name = "ff"
    kso.sparsify(model, 0.8)
    assert len(kso.csr_matrices(model)) == 4
    with pytest.raises(ValueError, match="as they were before `condense`"):
        kso.csr_matrices(kso.condense(network(KINDS["dense"])[0], min_speedup=0).model)


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 1.5}, {"min_speedup": -1}, {"min_speedup": "2"}]
)
def test_wrong_arguments(options):
    model, _ = network(KINDS["dense"])
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
        kso.condense(model, **options)


def test_wrong_models():
    with pytest.raises(TypeError, match="`model` must be a Keras model"):
        kso.condense("model")

    class Own(keras.Model):
        def __init__(self, width):
            super().__init__()
            self.dense = layers.Dense(width)

        def call(self, x):
            return self.dense(x)

    own = Own(3)
    own(np.ones((1, 4), "float32"))
    with pytest.raises(ValueError, match="`inputs` must be given"):
        kso.condense(own)
    with pytest.raises(ValueError, match="save and load"):
        kso.condense(own, inputs=np.ones((1, 4), "float32"))
