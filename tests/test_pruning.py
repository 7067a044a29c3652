"""`prune` of trained models, against sorting in NumPy and sums of squares by one-hot kernels."""

import warnings

import keras
import numpy as np
import pytest
from helpers import array, assert_invariants, data, loss, masks_of
from keras import layers

import keras_sparseopt as kso


def trained(compile_with=None):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((12,)), layers.Dense(16, "relu", name="a"), layers.Dense(3, name="b")]
    )
    model.compile(compile_with or keras.optimizers.Adam(0.01), loss())
    model.fit(*data(), epochs=2, verbose=0)
    return model


def largest(values, number):
    chosen = np.zeros(values.size, bool)
    chosen[np.argsort(-values.ravel(), kind="stable")[:number]] = True
    return chosen.reshape(values.shape)


def kernels(model):
    return [array(layer.kernel) for layer in model.layers]


@pytest.mark.parametrize("distribution", ["erk", "er", "uniform", {"a": 0.9, "b": 0.5}])
def test_the_largest_weights_of_each_layer_stay(distribution):
    model = trained()
    before = kernels(model)
    shares = distribution
    if isinstance(distribution, str):
        solved = getattr(kso, distribution)([k.shape for k in before], 0.75)
        shares = dict(zip("ab", solved))
    assert kso.prune(model, 0.75, distribution=distribution) is model
    for name, old, new, mask in zip("ab", before, kernels(model), masks_of(model)):
        assert abs(mask.sum() - (1 - shares[name]) * mask.size) <= 1
        assert np.array_equal(mask, largest(np.abs(old), mask.sum()))
        assert np.array_equal(new, old * mask)
    if not isinstance(distribution, dict):
        assert sum(m.sum() for m in masks_of(model)) == round(0.25 * (12 * 16 + 16 * 3))


def test_global_ranks_all_layers_together():
    model = trained()
    a, b = kernels(model)
    model.get_layer("b").kernel.assign(10 * b)
    kso.prune(model, 0.7, scope="global")
    together = largest(np.abs(np.concatenate([a.ravel(), 10 * b.ravel()])), round(0.3 * 240))
    assert np.array_equal(np.concatenate([m.ravel() for m in masks_of(model)]), together)
    assert masks_of(model)[1].mean() > 0.8


@pytest.mark.parametrize(
    "structure",
    [kso.NM(2, 4), kso.Block(4, 1), kso.Block(2, 16, balanced=True), kso.ConstantFanIn()],
)
def test_structures_choose_by_sums(structure):
    model = trained()
    before = kernels(model)[0]
    sparsity = 0.5 if isinstance(structure, kso.NM) else 0.75
    kso.prune(model, sparsity, structure=structure, exclude="b")
    (mask,) = masks_of(model)
    magnitudes = np.abs(before)
    if isinstance(structure, kso.NM):
        groups = magnitudes.reshape(3, 4, 16)
        expected = (np.argsort(np.argsort(-groups, axis=1), axis=1) < 2).reshape(12, 16)
    elif structure == kso.Block(4, 1):
        tiles = magnitudes.reshape(3, 4, 16).sum(axis=1)
        expected = np.repeat(largest(tiles, 12), 4, axis=0)
    elif isinstance(structure, kso.Block):
        tiles = magnitudes.reshape(6, 2, 16).sum(axis=(1, 2))
        expected = np.repeat(largest(tiles, 2), 2)[:, None] * np.ones(16, bool)
    else:
        expected = np.argsort(np.argsort(-magnitudes, axis=0), axis=0) < 3
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize("inner", [None, "adam"])
def test_training_goes_on(inner):
    model = trained()
    if inner is not None:  # compiled, built and without a mask so far
        model.compile(kso.SparseOpt(inner), loss())
        with pytest.warns(UserWarning, match="found no sparse weight"):
            model.optimizer.build(model.trainable_variables)
    kso.prune(model, 0.8)
    before = masks_of(model)
    if inner is None:
        model.compile(kso.SparseOpt("adam"), loss())
    model.fit(*data(), epochs=3, verbose=0, callbacks=[kso.RigL(1, end_step=100)])
    assert [mask.sum() for mask in masks_of(model)] == [mask.sum() for mask in before]
    assert not all(np.array_equal(a, b) for a, b in zip(masks_of(model), before))
    assert_invariants(model)


def test_a_pruned_model_is_better_than_a_random_part_of_it():
    x, y = data(256)
    model = trained()
    model.fit(x, y, epochs=60, verbose=0)
    whole = model.evaluate(x, y, verbose=0)
    weights = model.get_weights()

    def cost(make_sparse):
        kso.strip(model).set_weights(weights)
        make_sparse()
        model.compile("sgd", loss())
        return model.evaluate(x, y, verbose=0)

    with pytest.warns(UserWarning, match="seems to be trained"):
        random = cost(lambda: kso.sparsify(model, 0.5))
    magnitude = cost(lambda: kso.prune(model, 0.5))
    wanda = cost(lambda: kso.prune(model, 0.5, "wanda", x, verbose=0))
    assert whole < magnitude < random and whole < wanda < random


# ---------------------------------------------------------------------- wanda

LAYERS = {
    "dense": ((5, 6), lambda: layers.Dense(4)),
    "heads": ((5, 6), lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3))),
    "from heads": ((5, 2, 3), lambda: layers.EinsumDense("abde,dec->abc", (None, 4))),
    "ellipsis": ((2, 3, 6), lambda: layers.EinsumDense("...c,cd->...d", (2, 3, 4))),
    "each its own": ((3, 6), lambda: layers.EinsumDense("abc,bcd->abd", (3, 4))),
    "1D": ((9, 4), lambda: layers.Conv1D(6, 3, strides=2)),
    "causal": ((9, 4), lambda: layers.Conv1D(6, 3, padding="causal", dilation_rate=2)),
    "same": ((7, 8, 4), lambda: layers.Conv2D(6, (3, 2), strides=2, padding="same")),
    "dilated": ((9, 8, 4), lambda: layers.Conv2D(6, 3, padding="same", dilation_rate=(2, 3))),
    "groups": ((6, 6, 4), lambda: layers.Conv2D(6, 3, groups=2)),
    "3D": ((4, 5, 4, 2), lambda: layers.Conv3D(3, 2, strides=(1, 2, 1), padding="same")),
}


def norms_by_one_hot_kernels(layer, x):
    """Σ over the layer's outputs for x², with a kernel that is 1 in one place: √ for each place."""
    kernel = array(layer.kernel)
    found = np.empty(kernel.shape)
    for place in np.ndindex(*kernel.shape):
        one = np.zeros_like(kernel)
        one[place] = 1
        layer.kernel.assign(one)
        found[place] = np.sqrt(array(layer(x * x)).astype("float64").sum())
    layer.kernel.assign(kernel)
    return found


@pytest.mark.parametrize("kind", LAYERS)
def test_wanda_scores_weights_by_what_they_are_multiplied_with(kind):
    shape, make = LAYERS[kind]
    if kind == "groups" and keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow has no kernel for groups on a CPU")
    keras.utils.set_random_seed(0)
    inputs = keras.Input(shape)
    layer = make()
    model = keras.Model(inputs, layer(inputs))
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(40, *shape)) * rng.lognormal(size=shape[-1])).astype("float32")
    scores = np.abs(array(layer.kernel)) * norms_by_one_hot_kernels(layer, x)
    kso.prune(model, 0.6, "wanda", x, distribution={"*": 0.6}, verbose=0)
    mask = masks_of(model)[0]
    topology = kso.sparse_weights(model)[0].topology
    axes = tuple(a for a in range(mask.ndim) if a not in topology.neuron_axes)
    number = max(1, round(0.4 * np.prod([mask.shape[a] for a in axes])))
    moved = np.moveaxis(scores, axes, range(len(axes))).reshape(-1, *_rest(mask.shape, axes))
    expected = np.argsort(np.argsort(-moved, axis=0), axis=0) < number
    found = np.moveaxis(mask, axes, range(len(axes))).reshape(expected.shape)
    assert np.array_equal(found, expected)
    assert topology.structure == kso.ConstantFanIn()


def _rest(shape, axes):
    return [size for axis, size in enumerate(shape) if axis not in axes]


def calibration_data(kind, x):
    y = np.zeros(len(x))
    if kind == "tuple":
        return x, y
    if kind == "generator":
        return ((x[i : i + 7], y[i : i + 7]) for i in range(0, len(x), 7))
    if kind == "data set":
        tf = pytest.importorskip("tensorflow")
        return tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    if kind == "loader":
        torch = pytest.importorskip("torch")
        pairs = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
        return torch.utils.data.DataLoader(pairs, 16)
    if kind == "PyDataset":

        class Data(keras.utils.PyDataset):
            def __len__(self):
                return -(-len(x) // 10)

            def __getitem__(self, i):
                return x[10 * i : 10 * i + 10], y[10 * i : 10 * i + 10]

        return Data()
    return x


@pytest.mark.parametrize("kind", ["tuple", "generator", "data set", "loader", "PyDataset"])
def test_wanda_takes_examples_as_keras_does(kind):
    x, _ = data(50)
    x[:, 0] *= 1000
    model, other = trained(), trained()
    kso.prune(model, 0.75, "wanda", x, verbose=0)
    kso.prune(other, 0.75, "wanda", calibration_data(kind, x), verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(masks_of(model), masks_of(other)))
    assert masks_of(model)[0][0].all()  # the input that is largest


def test_wanda_of_several_inputs_and_shared_layers(capsys):
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    shared = layers.Dense(8, name="shared")
    x = layers.concatenate([shared(a), shared(b)])
    model = keras.Model({"a": a, "b": b}, layers.Dense(2, name="head")(x))
    rng = np.random.default_rng(0)
    given = {name: rng.normal(size=(6, 4)).astype("float32") for name in "ab"}
    norms = np.sqrt(sum((given[name] ** 2).sum(axis=0) for name in "ab"))
    scores = np.abs(array(shared.kernel)) * norms[:, None]
    kso.prune(model, 0.5, "wanda", given, structure=kso.Unstructured(), distribution="uniform")
    assert np.array_equal(masks_of(model)[0], largest(scores, 16))
    assert "batch" in capsys.readouterr().out  # a progress bar
    other = keras.models.clone_model(model)
    kso.prune(kso.strip(other), 0.5, "wanda", given, verbose=0)
    assert capsys.readouterr().out == ""


@pytest.mark.exhaustive
def test_wanda_of_a_language_model():
    keras_hub = pytest.importorskip("keras_hub", exc_type=ImportError)
    model = keras_hub.models.GPT2Backbone(
        vocabulary_size=50, num_layers=2, num_heads=2, hidden_dim=16, intermediate_dim=32,
        max_sequence_length=10, dropout=0.0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    tokens = {
        "token_ids": rng.integers(0, 50, (8, 10)),
        "padding_mask": np.ones((8, 10), "int32"),
    }
    kso.prune(model, 0.5, "wanda", tokens, distribution="uniform", verbose=0)
    weights = kso.sparse_weights(model)
    assert len(weights) == 2 * 6
    for weight in weights:
        by_neuron = weight.topology.neuron_sparsity
        assert np.array_equal(by_neuron, np.full(by_neuron.shape, 0.5))


# ---------------------------------------------------------------------- what cannot be

WRONG = {
    "method": (lambda m: kso.prune(m, 0.5, "random"), '`method` must be "magnitude" or "wanda"'),
    "scope": (lambda m: kso.prune(m, 0.5, scope="all"), '`scope` must be "layer" or "global"'),
    "sparsity": (lambda m: kso.prune(m, 50), r"`sparsity` must be in \[0, 1\)"),
    "no data": (lambda m: kso.prune(m, 0.5, "wanda"), '`data` must be given for "wanda"'),
    "data": (lambda m: kso.prune(m, 0.5, data=1), '`data` is not for "magnitude"'),
    "kind of data": (lambda m: kso.prune(m, 0.5, "wanda", 3, verbose=0), "`data` must be an array"),
    "no values": (
        lambda m: kso.prune(m, 0.5, "wanda", np.zeros((4, 12)), verbose=0),
        "nothing for .*a/kernel",
    ),
    "both": (
        lambda m: kso.prune(m, 0.5, scope="global", distribution="er"),
        "`distribution` has no place",
    ),
    "structure": (lambda m: kso.prune(m, 0.8, structure=kso.NM(2, 4)), "NM"),
    "all left out": (lambda m: kso.prune(m, 0.5, exclude=["a", "b"]), "Nothing is left to mask"),
    "verbose": (lambda m: kso.prune(m, 0.5, verbose=2), "`verbose` must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_change_nothing(case):
    model = trained()
    before = model.get_weights()
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call(model)
    assert not kso.sparse_weights(model)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights()))
    assert "call" not in vars(model.get_layer("a"))


def test_masks_that_are_there_and_values_that_are_none():
    model = trained()
    model.get_layer("a").kernel.assign(np.full((12, 16), np.inf))
    with pytest.raises(ValueError, match="a/kernel', whose scores are not finite"):
        kso.prune(model, 0.5)
    with pytest.raises(TypeError, match="`model` must be a Keras model"):
        kso.prune(3, 0.5)
    model = trained()
    kso.prune(model, 0.5)
    with pytest.raises(ValueError, match="2 weights have masks already"):
        kso.prune(model, 0.7)


def test_wanda_names_what_it_cannot_score():
    model = keras.Sequential([keras.Input((5, 4)), layers.LSTM(3, name="lstm"), layers.Dense(2)])
    x = np.ones((2, 5, 4), "float32")
    with pytest.raises(ValueError, match="Received: .*lstm_cell/kernel, .*recurrent_kernel"):
        kso.prune(model, 0.5, "wanda", x)
    kso.prune(model, 0.5, "wanda", x, exclude="lstm", verbose=0)
    assert len(kso.sparse_weights(model)) == 1


def test_a_variable_may_be_left_out():
    model = trained()
    kso.prune(model, 0.5, exclude=model.get_layer("b").kernel)
    assert len(kso.sparse_weights(model)) == 1
    new = keras.Sequential([keras.Input((12,)), layers.Dense(16), layers.Dense(3)])
    kso.sparsify(new, 0.5, exclude=new.layers[1].kernel)
    assert len(kso.sparse_weights(new)) == 1


def test_examples_must_end():
    tf = pytest.importorskip("tensorflow")
    endless = tf.data.Dataset.from_tensor_slices(data()[0]).batch(8).repeat()
    with pytest.raises(ValueError, match="`data` must end"):
        kso.prune(trained(), 0.5, "wanda", endless, verbose=0)
    with pytest.raises(ValueError, match="nothing for"):
        kso.prune(trained(), 0.5, "wanda", [], verbose=0)


# ---------------------------------------------------------------------- sparsify of what is trained


def test_sparsify_warns_of_trained_models():
    with pytest.warns(UserWarning, match=r"its optimizer has made 2 steps.*keras_sparseopt.prune"):
        kso.sparsify(trained(), 0.5)
    loaded = keras.models.clone_model(trained())
    loaded.set_weights(trained().get_weights())
    with pytest.warns(UserWarning, match="a/bias' is not as it was initialized"):
        kso.sparsify(loaded, 0.5)


@pytest.mark.parametrize("wrap", [kso.SparseOpt, keras.optimizers.LossScaleOptimizer])
def test_wrapped_optimizers_count_steps_too(wrap):
    model = keras.Sequential([keras.Input((12,)), layers.Dense(3, use_bias=False)])
    model.compile(wrap(keras.optimizers.SGD(0.1)), loss())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SparseOpt found no sparse weight")
        model.fit(*data(), verbose=0)
    with pytest.warns(UserWarning, match="its optimizer has made 1 steps"):
        kso.sparsify(model, 0.5)


def test_sparsify_does_not_warn_of_others():
    class Own(layers.Layer):
        bias, bias_initializer = True, keras.initializers.Zeros()  # no variable

        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 4), name="kernel")

        def call(self, x):
            return x @ self.kernel

    kso.sparsify(keras.Sequential([keras.Input((8,)), Own()]), 0.5)
    kso.sparsify(trained(), 0.0)  # nothing is lost: where GMP begins
    new = keras.Sequential([
        keras.Input((5, 4)), layers.LSTM(3), layers.Dense(2, bias_initializer="ones"),
        layers.BatchNormalization(),
    ])  # fmt: skip
    new.compile("adam", "mse")
    kso.sparsify(new, 0.5)


def test_sparsify_warns_of_trained_models_without_biases():
    inputs = keras.Input((12,))
    x = layers.RMSNormalization()(layers.Dense(16, use_bias=False)(inputs))
    model = keras.Model(inputs, layers.Dense(3, use_bias=False)(x))
    clone = keras.models.clone_model(model)
    model.compile("rmsprop", loss())
    model.fit(*data(), verbose=0)
    clone.set_weights(model.get_weights())
    with pytest.warns(UserWarning, match="scale' is not as it was initialized"):
        kso.sparsify(clone, 0.5)


def test_wanda_takes_lists_of_inputs_batch_by_batch():
    def two_inputs():
        keras.utils.set_random_seed(0)
        a, b = keras.Input((4,)), keras.Input((6,))
        return keras.Model([a, b], layers.Dense(8)(a) + layers.Dense(8)(b))

    rng = np.random.default_rng(0)
    x = [rng.normal(size=(40, n)).astype("float32") for n in (4, 6)]
    whole, parts = two_inputs(), two_inputs()
    kso.prune(whole, 0.5, "wanda", x, verbose=0)
    kso.prune(parts, 0.5, "wanda", iter([[a[:20] for a in x], [a[20:] for a in x]]), verbose=0)
    for a, b in zip(masks_of(whole), masks_of(parts), strict=True):
        assert np.array_equal(a, b)
    with pytest.raises(ValueError, match=r"as many examples for each input.*\[20, 40\]"):
        kso.prune(two_inputs(), 0.5, "wanda", [x[0], x[1][:20]], verbose=0)


def test_a_generator_without_batches_is_told():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8)])
    with pytest.raises(ValueError, match="`data` must bring values"):
        kso.prune(model, 0.5, "wanda", iter([]))


def test_the_bar_over_a_generator_ends_its_line(capsys):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8)])
    kso.prune(model, 0.5, "wanda", (np.ones((2, 4), "float32") for _ in range(2)))
    assert capsys.readouterr().out.endswith("\n")
