import os

import keras
import numpy as np
import pytest
from helpers import array, correct_oracle
from keras import layers

import keras_sparseopt as kso
from keras_sparseopt.models.kernels import kernels_of
from keras_sparseopt.models.topology import KeepZeros


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
    return {w.topology.name: w.topology.num_active() for w in kso.sparse_weights(model)}


def names(model):
    return [weight.topology.name for weight in kso.sparse_weights(model)]


def test_works_in_place_and_keeps_the_weights():
    model = convnet()
    layers_before, before = list(model.layers), [array(w) for w in model.weights]
    x = np.random.rand(2, 8, 8, 3).astype("float32")
    expected = array(model(x))
    assert kso.sparsify(model, 0.8) is model and model.layers == layers_before
    for weight, old in zip(model.weights, before):
        mask = array(weight.topology.mask) if hasattr(weight, "topology") else True
        assert np.array_equal(array(weight), np.where(mask, old, 0))
    assert len(kso.sparse_weights(model)) == 3 and len(kso.sparse_layers(model)) == 3
    model = convnet()
    for weight, old in zip(model.weights, before):
        weight.assign(old)
    np.testing.assert_array_equal(array(kso.sparsify(model, 0.0)(x)), expected)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.957])
@pytest.mark.parametrize("distribution", ["er", "erk"])
def test_total_is_exact_and_layers_within_one_weight(distribution, sparsity):
    model = kso.sparsify(convnet(), sparsity, distribution)
    shapes = [tuple(weight.shape) for weight in kso.sparse_weights(model)]
    sizes = [int(np.prod(s)) for s in shapes]
    shares = getattr(kso, distribution)(shapes, sparsity)
    for count, share, size in zip(active(model).values(), shares, sizes):
        assert abs(count - (1 - share) * size) <= 1
    assert sum(active(model).values()) == round((1 - sparsity) * sum(sizes))


def test_uniform_leaves_the_first_convolution_dense():
    model = kso.sparsify(convnet(), 0.9, "uniform")
    assert names(model) == ["middle", "head"]
    for weight in kso.sparse_weights(model):
        assert weight.topology.num_active() == round(0.1 * np.prod(weight.shape))


def test_dict_distribution():
    model = kso.sparsify(convnet(), None, {"middle": 0.75})
    assert active(model) == {"middle": 288}
    model = kso.sparsify(convnet(), None, {"s*": 0.5, "head/*": 0.9, "head": 0.8})
    assert active(model) == {"stem": 108, "head": 288}  # the last rule counts


@pytest.mark.parametrize(
    "exclude, left",
    [
        ("head", ["stem", "middle"]),
        ("*e*", []),
        (["st*", "head"], ["middle"]),
        (layers.Conv2D, ["head"]),
        (lambda layer: layer.name == "stem", ["middle", "head"]),
        ([layers.Dense, lambda layer: layer.name == "stem"], ["middle"]),
        ("*/kernel", []),
        ("stem/*", ["middle", "head"]),
    ],
)
def test_exclude(exclude, left):
    if not left:
        with pytest.raises(ValueError, match="Nothing is left to mask"):
            kso.sparsify(convnet(), 0.5, exclude=exclude)
        return
    model = kso.sparsify(convnet(), 0.5, exclude=exclude)
    assert names(model) == left
    sizes = sum(int(np.prod(weight.shape)) for weight in kso.sparse_weights(model))
    assert sum(active(model).values()) == round(0.5 * sizes)  # excluded: outside the budget


def test_masks_depend_on_seed_and_position_only():
    first, again, other = (
        [array(w.topology.mask) for w in kso.sparse_weights(kso.sparsify(convnet(), 0.8, seed=s))]
        for s in (1, 1, 2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other))


def corrected(model):
    weights = kso.sparse_weights(kso.sparsify(model, 0.5))
    return {w.topology.name: w.topology.skew_correction for w in weights}


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


class Block(keras.layers.Layer):
    def __init__(self, units):
        super().__init__()
        self.last = layers.Dense(units, name="last")
        self.norm = layers.LayerNormalization()
        self.first = layers.Dense(units, name="first")

    def call(self, x):
        x = self.last(keras.ops.relu(self.first(x)))
        return self.norm(x)


def test_inside_of_layers_the_order_of_calls_decides():
    """Not the order in which the layers were made."""
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2, name="head")(Block(4)(inputs)))
    found = corrected(model)
    assert {name.split("/")[-1]: value for name, value in found.items()} == {
        "first": False, "last": True, "head": False,
    }  # fmt: skip

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.head, self.block = layers.Dense(2, name="head"), Block(4)

        def call(self, x):
            return self.head(self.block(x))

    net = Net()
    net(np.ones((2, 4), "float32"))
    found = corrected(net)
    assert {name.split("/")[-1]: value for name, value in found.items()} == {
        "first": False, "last": True, "head": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "rules, expected",
    [
        (True, {"stem", "middle", "head"}),
        (False, set()),
        ("head", {"head"}),
        ([layers.Conv2D], {"stem", "middle"}),
    ],
)
def test_the_user_says_what_is_corrected(rules, expected):
    weights = kso.sparse_weights(kso.sparsify(convnet(), 0.5, skew_correction=rules))
    assert {w.topology.name for w in weights if w.topology.skew_correction} == expected


def test_shared_layers_are_masked_once():
    shared = layers.Dense(5, name="shared")
    a, b = keras.Input((5,)), keras.Input((5,))
    model = keras.Model([a, b], layers.Add()([shared(a), shared(shared(b))]))
    x = [np.random.rand(3, 5).astype("float32") for _ in range(2)]
    expected = array(model(x))
    kso.sparsify(model, 0.0)
    assert names(model) == ["shared"]
    np.testing.assert_array_equal(array(model(x)), expected)


def test_frozen_weights_stay_dense_unless_included():
    def make():
        body = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="a"), layers.Dense(4)])
        body.layers[0].trainable = False
        return keras.Sequential([keras.Input((4,)), body, layers.Dense(2, name="c")])

    model = kso.sparsify(make(), 0.5)
    assert len(names(model)) == 2 and not any(name.endswith("a") for name in names(model))
    rows = {row["name"]: row["dense_because"] for row in kso.layer_costs(model)}
    assert rows["a"] == "frozen"
    assert len(names(kso.sparsify(make(), 0.5, include="a"))) == 3


def every_kind():
    inputs = keras.Input((16, 4))
    x = layers.Conv1D(8, 3, padding="causal", name="conv1d")(inputs)
    x = layers.EinsumDense("abc,cd->abd", (None, 8), name="einsum")(x)
    x = layers.SeparableConv1D(8, 3, padding="same", name="separable")(x)
    x = layers.Conv1DTranspose(8, 3, padding="same", name="transposed")(x)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True), name="both")(x)
    x = layers.RNN([layers.GRUCell(4), layers.SimpleRNNCell(8)], return_sequences=True)(x)
    x = layers.TimeDistributed(layers.Dense(8, name="inner"), name="distributed")(x)
    x = layers.Reshape((4, 4, 8, 1))(x)
    x = layers.Conv3D(2, 2, name="conv3d")(x)
    x = layers.Reshape((3, 3, 14))(x)
    x = layers.DepthwiseConv2D(2, padding="same", name="depthwise")(x)
    x = layers.Conv2D(14, 2, groups=14, padding="same", name="grouped")(x)
    x = layers.Flatten()(x)
    return keras.Model(inputs, layers.Dense(3, name="dense")(x))


def test_every_kind_of_kernel_is_masked():
    model = every_kind()
    kernels = [w for w in model.weights if "kernel" in w.name]
    kso.sparsify(model, 0.5)
    dense = {w.path for w in kernels if not hasattr(w, "topology")}
    assert dense == {"separable/depthwise_kernel", "depthwise/kernel", "grouped/kernel"}
    assert len(kso.sparse_weights(model)) == len(kernels) - 3
    assert not any(hasattr(w, "topology") for w in model.weights if "kernel" not in w.name)
    included = kso.sparsify(every_kind(), 0.5, include=["depthwise", "grouped", "separable"])
    assert len(kso.sparse_weights(included)) == len(kernels)


@pytest.mark.filterwarnings("ignore:Only .* have a mask")
def test_other_weights_by_include():
    class Position(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(shape[1], 4), name="table")
            self.state = self.add_weight(shape=(3, 4), name="kernel_of_mine")

        def call(self, x):
            return x + self.table + keras.ops.sum(self.state)

    def make():
        inputs = keras.Input((5,), dtype="int32")
        x = Position(name="position")(layers.Embedding(10, 4, name="words")(inputs))
        x = layers.LayerNormalization(name="norm")(x)
        return keras.Model(inputs, layers.Dense(2, name="head")(x))

    assert names(kso.sparsify(make(), 0.5)) == ["position/kernel_of_mine", "head"]
    model = kso.sparsify(make(), 0.5, include=["words", "position/table"])
    assert names(model) == [
        "words/embeddings", "position/table", "position/kernel_of_mine", "head",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="`include` must name weights that can be masked"):
        kso.sparsify(make(), 0.5, include="norm")


@pytest.mark.parametrize(
    "make, shape, axes, seen",
    [
        (lambda: layers.Conv2DTranspose(5, 3), (1, 4, 4, 2), (2,), (3, 3, 2, 5)),
        (lambda: layers.LSTM(3), (1, 4, 2), (1,), (2, 12)),
        (lambda: layers.EinsumDense("abc,cde->abde", (None, 3, 4)), (1, 5, 8), (1, 2), (8, 12)),
        (lambda: layers.EinsumDense("abde,dec->abc", (None, 6)), (1, 5, 3, 4), (2,), (12, 6)),
        (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (1, 5, 5, 4), (2, 3), (3, 3, 1, 8)),
        (lambda: layers.SeparableConv2D(6, 3), (1, 5, 5, 4), (3,), (1, 1, 4, 6)),
        (lambda: layers.ConvLSTM2D(3, 2), (1, 4, 5, 5, 2), (3,), (2, 2, 2, 12)),
        (lambda: layers.Conv2D(6, 3, groups=2), (1, 5, 5, 4), (3,), (3, 3, 2, 6)),
    ],
)
def test_axes_and_the_correction_of_each_kind(make, shape, axes, seen):
    """Neuron axes by hand; the correction against a loop; what ER and ERK see."""
    model = keras.Sequential([keras.Input(shape[1:]), make()])
    kernel = next(
        k for k in kernels_of(model)
        if k.variable.name == ("pointwise_kernel" if "Separable" in type(k.layer).__name__
                               else "kernel")
    )  # fmt: skip
    assert kernel.neuron_axes == axes and kernel.shape == seen
    weight = kernel.variable
    kso.sparsify(model, None, {weight.path: 0.6}, include=weight, skew_correction=True)
    mask, before = array(weight.topology.mask), array(weight)
    gradient = np.random.default_rng(0).normal(size=mask.shape).astype("float32")
    kso.SparseOpt(keras.optimizers.SGD(1.0)).apply(
        [keras.ops.convert_to_tensor(gradient)], [weight]
    )
    expected = correct_oracle(gradient, mask, axes)
    np.testing.assert_allclose(before - array(weight), expected, rtol=1e-4, atol=1e-6)


def test_sparsifying_again_adds_masks():
    model = kso.sparsify(convnet(), 0.5, exclude="head")
    before = {w.topology.name: array(w.topology.mask) for w in kso.sparse_weights(model)}
    kso.sparsify(model, None, {"head": 0.5})
    assert set(active(model)) == {"stem", "middle", "head"}
    for weight in kso.sparse_weights(model)[:2]:
        assert np.array_equal(array(weight.topology.mask), before[weight.topology.name])


def test_adapted_preprocessing_and_lambdas_stay_as_they_are():
    norm, buckets = layers.Normalization(), layers.Discretization(num_bins=3)
    norm.adapt(np.random.rand(50, 4) * 7)
    buckets.adapt(np.random.rand(50))
    inputs = keras.Input((4,))
    x = layers.Dense(3)(layers.Lambda(lambda x: x * 2, output_shape=(4,))(norm(inputs)))
    numbers = layers.Lambda(lambda x: keras.ops.cast(x, "float32"), output_shape=(4,))
    x = layers.Concatenate()([x, numbers(buckets(inputs))])
    model = keras.Model(inputs, layers.Dense(2)(x))
    x = np.random.rand(3, 4).astype("float32")
    expected = array(model(x))
    np.testing.assert_array_equal(array(kso.sparsify(model, 0.0)(x)), expected)
    assert len(buckets.bin_boundaries) == 2


def test_a_mostly_dense_model_is_told():
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.DepthwiseConv2D(5, depth_multiplier=9), layers.Flatten()]
    )
    model.add(layers.Dense(1))
    model.layers[-1].trainable = False
    model.add(layers.Dense(1))
    with pytest.warns(UserWarning, match=r"Only 0.1% of the weights .*depthwise.*frozen"):
        kso.sparsify(model, 0.0)


def test_own_constraints_are_kept():
    def make():
        constraint = keras.constraints.MaxNorm(0.5, axis=0)
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [keras.Input((8,)), layers.Dense(6, kernel_constraint=constraint, name="d")]
        )

    x, y = np.random.rand(16, 8).astype("float32"), np.random.rand(16, 6)
    for optimizer in (keras.optimizers.SGD(5.0), kso.SparseOpt(keras.optimizers.SGD(5.0))):
        model = kso.sparsify(make(), 0.5)
        model.compile(optimizer, "mse")
        model.fit(x, y, verbose=0)
        (weight,) = kso.sparse_weights(model)
        assert not array(weight)[~array(weight.topology.mask)].any()
        assert 0.3 < np.linalg.norm(array(weight), axis=0).max() < 0.5001
        kso.strip(model)
        assert isinstance(weight.constraint, keras.constraints.MaxNorm)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lion"])
def test_a_foreign_optimizer_does_not_let_zeros_grow(optimizer):
    model = kso.sparsify(every_kind(), 0.8)
    model.compile(optimizer, "mse")
    x, y = np.random.rand(8, 16, 4).astype("float32"), np.random.rand(8, 3)
    before = [array(weight) for weight in kso.sparse_weights(model)]
    model.fit(x, y, epochs=2, verbose=0)
    after = [array(weight) for weight in kso.sparse_weights(model)]
    for weight, value in zip(kso.sparse_weights(model), after):
        assert not value[~array(weight.topology.mask)].any()
    assert any(not np.array_equal(a, b) for a, b in zip(before, after))


def test_sparse_opt_does_not_pay_for_the_constraint(monkeypatch):
    """It lets pass what a SparseOpt has made: nothing is masked twice."""
    given, made = [], []
    original = KeepZeros.__call__

    def look(self, w):
        given.append(keras.ops.convert_to_tensor(w))
        made.append(original(self, given[-1]))
        return made[-1]

    monkeypatch.setattr(KeepZeros, "__call__", look)
    model = kso.sparsify(convnet(), 0.8)
    model.compile(kso.SparseOpt("sgd"), "mse")
    model.fit(np.random.rand(4, 8, 8, 3), np.random.rand(4, 10), verbose=0)
    assert given and all(a is b for a, b in zip(given, made))
    assert isinstance(kso.sparse_weights(model)[0].constraint, KeepZeros)


def test_strip_lets_go_in_place():
    model = kso.sparsify(every_kind(), 0.8)
    x = np.random.rand(2, 16, 4).astype("float32")
    expected = array(model(x))
    assert kso.strip(model) is model and not kso.sparse_weights(model)
    assert all(w.constraint is None and not hasattr(w, "topology") for w in model.weights)
    np.testing.assert_array_equal(array(model(x)), expected)
    model.compile("sgd", "mse")
    model.fit(x, np.random.rand(2, 3), verbose=0)


def test_strip_makes_layers_plain_wherever_they_lie():
    inner = kso.SparseDense(6, sparsity=0.5, kernel_initializer="sparse_he_normal")

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv = kso.SparseConv1D(4, 2, sparsity=0.5)
            self.inner = layers.TimeDistributed(inner)

        def call(self, x):
            return self.inner(self.conv(x))

    net, x = Net(), np.random.rand(2, 6, 3).astype("float32")
    net(x)
    expected = array(net(x))
    kso.strip(net)
    assert type(inner) is layers.Dense and type(net.conv) is layers.Conv1D
    assert type(inner.kernel_initializer) is keras.initializers.HeNormal
    assert not kso.sparse_weights(net) and len(net.weights) == 4
    np.testing.assert_allclose(array(net(x)), expected, atol=1e-6)
    assert "sparsity" not in inner.get_config()
    net.compile("sgd", "mse")
    net.fit(x, np.zeros((2, 5, 6)), verbose=0)


@pytest.mark.parametrize("kind", ["attached", "sparse by construction"])
def test_set_mask_keeps_survivors_and_zeroes_the_rest(kind):
    layer = kso.SparseDense(4, sparsity=0.5, seed=0)
    layer.build((None, 6))
    target = layer
    if kind == "attached":
        model = kso.sparsify(keras.Sequential([keras.Input((6,)), layers.Dense(4)]), 0.5)
        (target,) = kso.sparse_weights(model)
        layer = model.layers[0]
    topology = kso.sparse_weights(layer)[0].topology
    kernel, old = array(layer.kernel), array(topology.mask)
    new = np.random.default_rng(0).random((6, 4)) < 0.5
    kso.set_mask(target, new)
    assert np.array_equal(array(topology.mask), new)
    assert np.array_equal(array(layer.kernel), kernel * (old & new))


def sparsities_of(model):
    topologies = [variable.topology for variable in kso.sparse_weights(model)]
    return {topology.name: topology.sparsity for topology in topologies}


def test_masks_from_zeros():
    model = convnet()
    kernel = array(model.get_layer("middle").kernel)
    kernel[..., :4] = 0.0
    model.get_layer("middle").kernel.assign(kernel)
    model.get_layer("head").kernel.assign(np.zeros((144, 10)))  # not trained yet
    assert kso.masks_from_zeros(model) is model
    assert sparsities_of(model) == {"stem": 0.0, "middle": 0.25, "head": 0.0}
    weight = model.get_layer("middle").kernel
    assert np.array_equal(array(weight.topology.mask), kernel != 0)
    weight.assign(np.where(np.arange(16) < 8, 0.0, kernel))
    assert sparsities_of(kso.masks_from_zeros(model))["middle"] == 0.5
    model = kso.masks_from_zeros(convnet(), exclude="head")
    assert sparsities_of(model) == {"stem": 0.0, "middle": 0.0}


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


# The rest only costs time on others: on JAX, eager calls compile every operation.
@pytest.mark.parametrize("name", APPLICATIONS if BACKEND == "tensorflow" else ["MobileNetV2"])
def test_keras_applications_become_sparse(name):
    size = 32 if name == "VGG16" else 96
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10)
    kso.sparsify(model, 0.9)
    rows = kso.layer_costs(model)
    masked = [row for row in rows if row["skew_correction"] is not None]
    weights = sum(row["weights"] for row in masked)
    assert sum(row["active_weights"] for row in masked) == round(0.1 * weights)
    assert all(row["dense_because"] == "depthwise" for row in rows if row not in masked)
    assert weights > 0.9 * sum(int(np.prod(w.shape)) for w in model.trainable_weights)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_what_feeds_a_normalization_is_the_same_on_all_backends(name, monkeypatch):
    """Their position embeddings take no length that is unknown (JAX), or above 16."""
    monkeypatch.setenv("KAGGLEHUB_CACHE", os.devnull)
    models = pytest.importorskip("keras_hub", exc_type=ImportError).models
    sizes = dict(
        vocabulary_size=20, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16,
        max_sequence_length=16,
    )  # fmt: skip
    model = {"bert": models.BertBackbone, "gpt2": models.GPT2Backbone}[name](**sizes)
    kso.sparsify(model, 0.5)
    corrected = [w.topology.name for w in kso.sparse_weights(model) if w.topology.skew_correction]
    attention = {"bert": "self_attention_layer", "gpt2": "self_attention"}[name]
    assert corrected == [
        f"transformer_layer_0/{attention}/attention_output",
        "transformer_layer_0/feedforward_output_dense",
    ]


def test_sizes_are_tried_until_a_model_takes_one():
    """A valid convolution of width 9, stride 2, twice: eight positions are too few."""

    class Inner(layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = layers.LayerNormalization()  # held before what feeds it
            self.first, self.second = (layers.Conv1D(4, 9, strides=2) for _ in range(2))

        def build(self, shape):
            self.first.build(shape)
            self.second.build((*shape[:-1], 4))
            self.norm.build((*shape[:-1], 4))

        def call(self, x):
            return self.norm(self.second(self.first(x)))

    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, layers.Dense(2)(Inner()(inputs)))
    kso.sparsify(model, 0.5)
    first, second = kso.sparse_weights(model)[:2]
    assert (first.topology.skew_correction, second.topology.skew_correction) == (False, True)
