"""Condensed weights: the same training as masked, wherever they lie; files of the plain model."""

import functools

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from helpers import array, assert_invariants, compiled, masks_of, sparse_opt
from keras import layers

import keras_sparseopt as kso
from keras_sparseopt.backend import compiled as compile_function
from keras_sparseopt.forms import Geometry
from keras_sparseopt.models.condensed import CondensedLayer, by_neuron
from keras_sparseopt.structures import units_of

BALANCED = kso.Block(1, 16, balanced=True)
PADDED = kso.Block(5, 16, balanced=True)


def network(structure=BALANCED, sparsity=0.7, regularizer=None, seed=1):
    """Two layers that can be condensed, and two that stay as they are."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(32, "relu", kernel_regularizer=regularizer),
            layers.Dense(48, use_bias=False),
            layers.BatchNormalization(),
            layers.Dense(3),
        ]
    )
    rules = {model.layers[i].name: structure for i in (0, 1)}
    kso.sparsify(model, sparsity, distribution="uniform", structure=rules)
    return model


def data(n=48):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 12)).astype("float32"), rng.integers(0, 3, n)


def fit(model, *callbacks, first=0, last=2, **options):
    x, y = data()
    return model.fit(
        x, y, batch_size=8, shuffle=False, verbose=0, initial_epoch=first, epochs=last,
        callbacks=list(callbacks), **options,
    ).history  # fmt: skip


def sgd():
    return kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9))


def assert_same(one, other, tolerance=2e-5):
    """The same masks, kernels and slots up to rounding, whatever the forms."""
    pairs = list(zip(kso.sparse_weights(one), kso.sparse_weights(other), strict=True))
    for a, b in pairs:
        a, b = a.topology, b.topology
        assert np.array_equal(array(a.mask), array(b.mask)), a.name
        np.testing.assert_allclose(array(a.kernel), array(b.kernel), tolerance, tolerance)
        assert not array(b.kernel)[~array(b.mask)].any()
        for x, y in zip(a.optimizers, b.optimizers):
            slots = zip(x.weight_of(a.variable).slots, y.weight_of(b.variable).slots, strict=True)
            for mine, its in slots:
                np.testing.assert_allclose(a.plain(mine), b.plain(its), tolerance, tolerance)
            assert x.itop_rate() == y.itop_rate()
    assert pairs


# ---------------------------------------------------------------------- the arithmetic

KERNELS = [
    ((10, 6), (1,), (0,), 2, 3),
    ((7, 8), (1,), (0,), 3, 4),  # the last tile is shorter
    ((5, 2, 4), (1, 2), (0,), 1, 4),  # heads
    ((2, 3, 6), (2,), (0, 1), 2, 2),  # back from heads
    ((3, 5, 4), (2,), (1,), 2, 2),  # a window
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: "×".join(map(str, k[0])))
def test_the_form_is_the_kernel_without_its_zeros(kernel):
    shape, neuron_axes, input_axes, p, c = kernel
    structure = kso.Block(p, c, balanced=True)
    units = units_of(structure, shape, neuron_axes, input_axes)
    geometry = Geometry(structure, shape, neuron_axes, input_axes, True)
    total = units.unit_shape[1] * units.unit_shape[2]
    rng = np.random.default_rng(0)
    for seed in range(6):
        count = units.nearest(units.nearest(round(0.4 * np.prod(shape))) * np.prod(shape) // total)
        old, new = (units.random_mask(count, [seed, i]) for i in range(2))
        tiles = int(units.num_active(old)) // units.unit_shape[2]
        form, masked = geometry._replace(tiles=tiles).form, geometry.form
        kernel = np.where(old, rng.normal(size=shape), 0).astype("float32")
        start = rng.normal(size=shape).astype("float32")
        gradient = rng.normal(size=shape).astype("float32")

        def run(kernel, start, gradient, old, new, form=form):
            at, then = form.of_mask(old), form.of_mask(new)
            values = form.stored(kernel, at)
            moved = [form.moved(values, at, then), form.moved(values, at, then, start)]
            return (
                values, at, form.plain(values, at), form.mask(at), form.held(at),
                *(form.plain(v, then) for v in moved), *form.read(values, at, gradient),
                form.count(at), form.num_grown(at, then), form.mean_magnitude(values, at),
                form.bits(at),
            )  # fmt: skip

        found = run(kernel, start, gradient, old, new)
        values, at, plain, mask, held, moved, grown, *read, number, more, mean, bits = found
        assert values.shape == form.values_shape() and np.array_equal(np.sort(at), at)
        assert np.array_equal(plain, kernel) and np.array_equal(mask, old)
        # the same as the masked form, which is checked against oracles of its own, bit for bit
        assert np.array_equal(moved, np.where(old & new, kernel, 0))
        assert np.array_equal(grown, np.where(old & new, kernel, np.where(new, start, 0)))
        for mine, its in zip(read, masked.read(kernel, old, gradient), strict=True):
            assert np.array_equal(mine, its)
        assert number == old.sum() and more == (new & ~old).sum()
        np.testing.assert_allclose(mean, np.abs(kernel).sum() / old.sum(), rtol=1e-5)
        # what reaches beyond the inputs is 0
        assert values.size - old.sum() == (
            0 if held is None else np.sum(~np.broadcast_to(held, values.shape))
        )
        # bits: by tile inside, by weight in files
        assert form.count_bits(bits) == old.sum()
        assert np.array_equal(form.bits_of_weights(bits), masked.bits(old))
        assert np.array_equal(form.bits_from_weights(masked.bits(old)), bits)
        if seed < 2:
            tensors = map(keras.ops.convert_to_tensor, (kernel, start, gradient, old, new))
            for mine, its in zip(compile_function(run)(*tensors), found, strict=True):
                if its is not mean and its is not None:
                    assert np.array_equal(array(mine), its)


# ---------------------------------------------------------------------- layers

KINDS = {
    "dense": lambda: (layers.Dense(32, "relu"), (12,)),
    "dense of rank 3": lambda: (layers.Dense(32, use_bias=False), (3, 12)),
    "query": lambda: (layers.EinsumDense("abc,cde->abde", (3, 2, 16), bias_axes="de"), (3, 12)),
    "output": lambda: (layers.EinsumDense("abcd,cde->abe", (3, 32), bias_axes="e"), (3, 2, 6)),
    "ellipsis": lambda: (layers.EinsumDense("...x,xy->...y", 16, activation="tanh"), (3, 12)),
    "turned": lambda: (layers.EinsumDense("abc,dc->adb", (16, 3)), (3, 12)),
    "two axes": lambda: (layers.EinsumDense("abc,ecb->ae", (16,), bias_axes="e"), (3, 4)),
    "1×1": lambda: (layers.Conv2D(32, 1, activation="relu"), (2, 3, 12)),
    "3×3": lambda: (layers.Conv2D(32, 3, activation="relu"), (5, 4, 12)),
    "same": lambda: (layers.Conv2D(16, (3, 2), padding="same", use_bias=False), (5, 4, 12)),
    "strides": lambda: (layers.Conv2D(16, 3, (2, 1), "same"), (6, 5, 12)),
    "strides of 1×1": lambda: (layers.Conv2D(16, 1, 2), (4, 5, 12)),
    "dilation": lambda: (layers.Conv2D(16, 3, padding="same", dilation_rate=2), (6, 5, 12)),
    "causal": lambda: (layers.Conv1D(16, 3, padding="causal", dilation_rate=2), (7, 12)),
    "rank 1": lambda: (layers.Conv1D(16, 4, 3, padding="same"), (8, 12)),
    "rank 3": lambda: (layers.Conv3D(16, 2), (3, 3, 2, 12)),
    "channels first": lambda: (
        layers.Conv2D(16, 3, 2, "same", data_format="channels_first"),
        (12, 5, 6),
    ),
    "whole width": lambda: (layers.Dense(24), (12,)),  # 24 is no multiple of 16
}


def outputs_and_gradients(layer, x):
    """The outputs, and the gradients by the inputs, the bias and the stored kernel."""
    variables = [v for v in layer.weights if v.trainable]
    held = keras.Variable(x)
    weights = np.cos(np.arange(array(layer(x)).size)).reshape(layer(x).shape).astype("float32")
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            outputs = layer(held)
            loss = keras.ops.sum(outputs * weights)
        found = tape.gradient(loss, [held.value, *(v.value for v in variables)])
        return array(outputs), [array(tf.convert_to_tensor(g)) for g in found]
    if keras.backend.backend() == "torch":
        layer.zero_grad()
        outputs = layer(held.value)
        keras.ops.sum(outputs * keras.ops.convert_to_tensor(weights)).backward()
        return array(outputs), [array(v.value.grad) for v in (held, *variables)]
    import jax

    def function(values):
        with keras.StatelessScope(state_mapping=list(zip([held, *variables], values))):
            return keras.ops.sum(layer(keras.ops.convert_to_tensor(held)) * weights)

    values = [v.value for v in (held, *variables)]
    return array(layer(x)), [array(g) for g in jax.grad(function)(values)]


@pytest.mark.parametrize("structure", [BALANCED, PADDED], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_the_same(kind, structure):
    if kind == "channels first" and keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow's own convolution cannot do this on a CPU")
    layer, shape = KINDS[kind]()
    model = keras.Sequential([keras.Input(shape), layer])
    kso.sparsify(model, 0.6, structure=structure)
    if layer.bias is not None:
        layer.bias.assign(np.arange(1, 1 + np.prod(layer.bias.shape)).reshape(layer.bias.shape))
    kernel, mask = array(layer.kernel), array(layer._kernel.topology.mask)
    x = np.random.default_rng(0).normal(size=(4, *shape)).astype("float32")
    before, of_plain = outputs_and_gradients(layer, x)
    variable, plain = layer._kernel, type(layer)
    if kind == "whole width":
        with pytest.raises(ValueError, match="16 neurons do not divide its 24"):
            kso.condense(model)
        assert type(layer) is layers.Dense and layer._kernel.shape == kernel.shape
        return
    assert kso.condense(model) is model
    assert isinstance(layer, CondensedLayer) and type(layer).__name__ == plain.__name__
    assert layer._kernel is variable and kso.sparse_weights(model) == [variable]
    groups, entries, width = variable.shape
    assert width == 16 and mask.sum() <= groups * entries * width < 0.7 * mask.size
    assert np.array_equal(array(layer.kernel), kernel) and layer.kernel.shape == kernel.shape
    assert np.array_equal(array(variable.topology.mask), mask)
    after, condensed = outputs_and_gradients(layer, x)
    np.testing.assert_allclose(after, before, 1e-5, 1e-5)
    np.testing.assert_allclose(condensed[0], of_plain[0], 1e-4, 1e-5)
    np.testing.assert_allclose(
        variable.topology.plain(condensed[1]), of_plain[1] * mask, 1e-4, 1e-5
    )
    for mine, its in zip(condensed[2:], of_plain[2:], strict=True):
        np.testing.assert_allclose(mine, its, 1e-4, 1e-5)
    np.testing.assert_allclose(model.predict(x, verbose=0), before, 1e-5, 1e-5)
    # and back
    assert kso.uncondense(model) is model
    assert type(layer) is plain and len(layer.weights) == len(of_plain) - 1
    assert np.array_equal(array(layer.kernel), kernel) and layer._kernel is variable
    assert np.array_equal(array(variable.topology.mask), mask)


# ---------------------------------------------------------------------- the same training

METHODS = {
    "Static": lambda: kso.Static(),
    "SET": lambda: kso.SET(2, 0.5, end_step=100),
    "RigL": lambda: kso.RigL(2, 0.5, end_step=100),
    "RigL corrected": lambda: kso.RigL(3, 0.5, end_step=100, growth_gradient="corrected"),
    "RigL of averages": lambda: kso.RigL(3, 0.5, end_step=100, gradient_steps=2),
    "RigL every step": lambda: kso.RigL(1, 0.5, end_step=100),
    "random values": lambda: kso.SET(2, 0.5, end_step=100, growth_values="random"),
    "SNFS": lambda: kso.SNFS(2, 0.5, end_step=100),
    "MEST": lambda: kso.MEST(2, 0.5, end_step=100, gradient_weight=1.0),
    "compiled": lambda: kso.RigL(2, 0.5, end_step=100, compiled=True),
}
OPTIMIZERS = {
    "SGD": sgd,
    "Adam": lambda: kso.SparseOpt(keras.optimizers.Adam(0.01, clipnorm=1.0)),
    "AdamW, EMA": lambda: kso.SparseOpt(
        keras.optimizers.AdamW(0.01, weight_decay=0.1, use_ema=True, ema_overwrite_frequency=3)
    ),
    "accumulation": lambda: kso.SparseOpt(
        keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2)
    ),
    "renormalized": lambda: kso.SparseOpt(keras.optimizers.SGD(0.1), renormalize=True),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=8.0),
}


def both(method="RigL", optimizer="SGD", structure=BALANCED, tolerance=2e-5, **options):
    histories, models = [], []
    for is_condensed in (False, True):
        model = network(structure, **options)
        if is_condensed:
            kso.condense(model)
        compiled(model, OPTIMIZERS[optimizer](), jit_compile=keras.backend.backend() == "jax")
        histories.append(fit(model, METHODS[method](), last=3))
        models.append(model)
    for name, values in histories[0].items():
        np.testing.assert_allclose(histories[1][name], values, 1e-4, 1e-6, err_msg=name)
    assert_same(*models, tolerance)
    if method != "Static":
        assert histories[0]["itop_rate"][-1] > 1 - histories[0]["sparsity"][-1]
    return models


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_it_as_masked(method):
    _, model = both(method)
    assert [w.topology.is_condensed for w in kso.sparse_weights(model)] == [True, True, False]


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "SGD"])
def test_every_optimizer_trains_it_as_masked(optimizer):
    both("RigL", optimizer, PADDED)


def test_regularizers_act_on_the_values():
    both("RigL", "SGD", BALANCED, regularizer=keras.regularizers.L2(0.01))


def test_large_tiles_that_reach_beyond_the_inputs():
    both("SET", "SGD", kso.Block(8, 16, balanced=True), sparsity=0.5)


def convolutional():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(16, 3, padding="same", name="first")(inputs)
    shared = layers.Conv2D(16, 3, padding="same", use_bias=False, name="shared")
    x = layers.BatchNormalization()(layers.Add()([x, shared(layers.ReLU()(shared(x)))]))
    x = layers.Conv2D(32, 3, 2, "same", activation="relu", name="strides")(x)
    x = layers.Conv2D(32, 1, activation="relu", name="narrow")(x)
    x = layers.Reshape((9, 32))(x)
    x = layers.Conv1D(32, 3, padding="causal", name="causal")(x)
    model = keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))
    kso.sparsify(model, 0.5, exclude=["first", "head"], structure=kso.Block(3, 16, balanced=True))
    return model


@pytest.mark.parametrize("method", ["RigL", "SET", "SNFS"])
def test_convolutions_train_as_masked(method, tmp_path):
    x = np.random.default_rng(0).normal(size=(32, 6, 6, 3)).astype("float32")
    models = []
    for is_condensed in (False, True):
        model = convolutional()
        if is_condensed:
            kso.condense(model)
        compiled(model, sgd(), jit_compile=keras.backend.backend() == "jax")
        model.fit(x, np.arange(32) % 3, batch_size=8, epochs=2, shuffle=False, verbose=0,
                  callbacks=[METHODS[method]()])  # fmt: skip
        models.append(model)
    assert_same(*models, 1e-4)
    weights = kso.sparse_weights(model)
    assert len(weights) == 4 and all(w.topology.is_condensed for w in weights)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert_same(model, loaded, 0)
    assert type(loaded.get_layer("shared")) is layers.Conv2D


def shared_layers():
    """One layer is called twice; one lies in a layer; one in a frozen part."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4, 16))
    shared = layers.Dense(16, "tanh", name="shared")
    x = shared(shared(inputs))
    x = layers.MultiHeadAttention(2, 16, name="attention")(x, x)
    x = layers.TimeDistributed(layers.Dense(16, name="inner"), name="timed")(x)
    frozen = layers.Dense(32, name="frozen")
    model = keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(frozen(x))))
    kso.sparsify(model, 0.5, exclude="head", structure=BALANCED)
    frozen.trainable = False
    return model


@pytest.mark.parametrize("jit", [False, True])
def test_shared_and_nested_layers_train_as_masked(jit):
    x = np.random.default_rng(0).normal(size=(32, 4, 16)).astype("float32")
    y = np.arange(32) % 3
    models = []
    for is_condensed in (False, True):
        model = shared_layers()
        if is_condensed:
            kso.condense(model)
        compiled(model, sgd(), jit_compile=jit)
        history = model.fit(
            x, y, batch_size=8, epochs=3, shuffle=False, verbose=0, validation_data=(x, y),
            callbacks=[kso.RigL(2, 0.5, end_step=100)],
        ).history  # fmt: skip
        models.append(model)
    assert_same(*models, 1e-4)
    assert all(w.topology.is_condensed for w in kso.sparse_weights(models[1]))
    assert len(kso.sparse_weights(model)) == 7 and history["itop_rate"][-1] > 0.55
    # of a layer that is called twice the magnitudes do not add: it tells the dense gradient
    weights = {w.topology.name: w for w in sparse_opt(model).weights}
    assert weights["shared"].calls == 2 and weights["attention/query"].calls == 1


class TwoLosses(keras.Model):
    """Two parts, two optimizers; the loss of one goes back through the other, which is called
    twice."""

    def __init__(self):
        super().__init__()
        self.first = keras.Sequential(
            [keras.Input((8,)), layers.Dense(32, "relu"), layers.Dense(16)]
        )
        self.second = keras.Sequential(
            [keras.Input((16,)), layers.Dense(32, "relu"), layers.Dense(1)]
        )

    def call(self, x):
        return self.second(self.first(x))


def two_losses():
    keras.utils.set_random_seed(1)
    model = TwoLosses()
    model(np.ones((1, 8), "float32"))
    last = [model.first.layers[-1], model.second.layers[-1]]
    return kso.sparsify(model, 0.5, exclude=last, structure=BALANCED)


def test_a_loss_that_goes_back_through_another_part_tells_it_nothing():
    """What the backward pass of a layer sees belongs to the loss that is differentiated by it."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("On JAX what a step is not differentiated by cannot arrive")
    import tensorflow as tf

    x = np.random.default_rng(0).normal(size=(24, 8)).astype("float32")
    models = []
    for is_condensed in (False, True):
        model = two_losses()
        if is_condensed:
            kso.condense(model)
        parts = model.first, model.second
        optimizers, methods = [sgd(), sgd()], [kso.RigL(2, 0.5, end_step=100) for _ in parts]
        for optimizer, part, method in zip(optimizers, parts, methods):
            optimizer.build(part.trainable_variables)
            method.begin(optimizer, 100)

        @tf.function
        def step(x, parts=parts, optimizers=optimizers):
            with tf.GradientTape(persistent=True) as tape:
                of_made = parts[1](parts[0](x, training=True), training=True)
                of_given = parts[1](tf.repeat(x, 2, axis=1), training=True)
                wanted = tf.reduce_mean((of_made - 1) ** 2)
                told = tf.reduce_mean(of_made**2 + (of_given - 1) ** 2)
            for optimizer, part, loss in zip(optimizers, parts, (wanted, told)):
                weights = part.trainable_variables
                optimizer.apply(tape.gradient(loss, weights), weights)

        for i in range(6):
            step(tf.convert_to_tensor(x[4 * i : 4 * i + 4]))
            for method in methods:
                method.step()
        models.append(model)
    assert_same(*models, 1e-4)
    assert all(v.topology.is_condensed for v in kso.sparse_weights(models[1]))


def test_scores_need_no_dense_gradient_and_live_in_windows_only():
    """What a step keeps: nothing, but before an update one number per tile."""
    model = compiled(kso.condense(network()), sgd())
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            opened = [w for w in model.optimizer.weights if w.topology.seen]
            shapes = [
                w.taps[kind].shape
                for w in opened
                for kind in model.optimizer._state.gradients.kinds
            ]
            seen.append(shapes)
            assert len(self.model.weights) == len(self.model.get_weights()) == 3 + 2 + 4 + 2

    fit(model, kso.RigL(3, 0.5, end_step=100), Look(), last=2)
    tiles = [(1, 12, 2), (1, 32, 3)]
    assert seen == [[], [], tiles, [], [], tiles, [], [], tiles, [], [], tiles]
    assert not model.optimizer.kept_gradients and not sparse_opt(model).seen_variables


@pytest.mark.parametrize("every", [2, 3])
def test_the_flow_of_gradients_is_measured_as_of_masked(every):
    measured, shapes = [], []
    for form in (lambda model: model, kso.condense):
        model = compiled(form(network()), sgd())
        flow = kso.GradientFlow(every)
        fit(model, kso.RigL(2, 0.5, end_step=100), flow)
        measured.append(flow.history)
        shapes.append(model.optimizer.kept_gradients)
    assert [entry["step"] for entry in measured[1]] == list(range(every, 13, every))
    assert not any(shapes)
    for masked, condensed in zip(*measured, strict=True):
        for name in ("effective_gradient_flow", "gradient_flow", "skew_angle"):
            np.testing.assert_allclose(condensed[name], masked[name], 1e-4, 1e-5)


# ---------------------------------------------------------------------- in the middle of it


def test_a_training_goes_on_in_another_form():
    masked, other = (compiled(network(PADDED), sgd()) for _ in range(2))
    optimizer = other.optimizer
    optimizer.exclude_from_weight_decay(var_list=[kso.sparse_weights(other)[0]])
    for model in (masked, other):
        fit(model, kso.RigL(2, 0.5, end_step=100), last=1)
    kso.condense(other)
    assert other.optimizer is optimizer
    assert_same(masked, other, 0)  # nothing was lost, slots included
    for first, change in ((1, kso.uncondense), (2, kso.condense), (3, None)):
        for model in (masked, other):
            fit(model, kso.RigL(2, 0.5, end_step=100), first=first, last=first + 1)
        assert_same(masked, other)
        if change is not None:
            change(other)
    excluded = optimizer.inner_optimizer._exclude_from_weight_decay
    assert {optimizer.inner_optimizer._var_key(kso.sparse_weights(other)[0])} == excluded
    assert_invariants(masked)


def test_plain_optimizers_need_no_mask():
    model = kso.condense(network(sparsity=0.7))
    before = [array(v.topology.mask) for v in kso.sparse_weights(model)[:2]]
    fit(compiled(model, keras.optimizers.Adam(0.01)))
    for mask, variable in zip(before, kso.sparse_weights(model)):
        kernel = array(variable.topology.kernel)
        assert np.array_equal(kernel != 0, mask)
    # one that was built for the plain kernels has slots of theirs
    model = compiled(network(), keras.optimizers.Adam(0.01))
    fit(model, last=1)
    with pytest.raises(ValueError, match="not in a SparseOpt was built.*Received: Adam"):
        kso.condense(model)
    assert not any(w.topology.is_condensed for w in kso.sparse_weights(model))


class Noisy(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient + 1.0, variable, learning_rate)


def test_padding_stays_zero_under_any_optimizer():
    model = compiled(kso.condense(network(PADDED)), kso.SparseOpt(Noisy(0.1, momentum=0.9)))
    fit(model, kso.SET(2, 0.5, end_step=100))
    for weight in sparse_opt(model).weights[:2]:
        held = np.broadcast_to(array(weight.held), weight.variable.shape)
        assert not held.all()
        for variable in (weight.variable, *weight.slots):
            assert not array(variable)[~held].any() and array(variable)[held].any()


# ---------------------------------------------------------------------- assigned from outside


def test_weights_of_the_stored_form_come_and_go_together():
    model = compiled(kso.condense(network()), sgd())
    fit(model, kso.RigL(2, 0.5, end_step=100), last=1)
    weights, condensed = model.get_weights(), kso.sparse_weights(model)[:2]
    masks = [array(v.topology.mask) for v in condensed]
    kernels = [array(v.topology.kernel) for v in condensed]
    fit(model, kso.RigL(1, 0.9, end_step=100), first=1, last=3)
    assert not np.array_equal(masks[0], array(kso.sparse_weights(model)[0].topology.mask))
    model.set_weights(weights)
    for variable, mask, kernel in zip(condensed, masks, kernels):
        assert np.array_equal(array(variable.topology.mask), mask)
        assert np.array_equal(array(variable.topology.kernel), kernel)
    for weight in sparse_opt(model).weights:
        topology = weight.topology
        for slot in weight.slots:
            assert not topology.plain(slot)[~array(topology.mask)].any()
    wrong = [w if w.dtype != "int32" else w[:, ::-1] for w in weights]
    with pytest.raises(ValueError, match="must be those of tiles, sorted"):
        model.set_weights(wrong)
    early = keras.callbacks.EarlyStopping(
        "loss", restore_best_weights=True, baseline=-1.0, patience=1
    )
    fit(model, kso.RigL(1, 0.5, end_step=100), early, last=3)


def test_masks_are_set_and_read_as_those_of_the_plain_kernel():
    model = compiled(kso.condense(network(PADDED)), sgd())
    fit(model, last=1)
    variable = kso.sparse_weights(model)[0]
    topology = variable.topology
    before, old = array(topology.kernel), array(topology.mask)
    new = topology.units.random_mask(topology.num_active_units(), 5)
    assert not np.array_equal(new, old)
    kso.set_mask(variable, new)
    assert np.array_equal(array(topology.mask), new)
    assert np.array_equal(array(topology.kernel), np.where(new & old, before, 0))
    fewer = topology.units.random_mask(4, 5)
    with pytest.raises(ValueError, match="must have 2 tiles.*uncondense.*Received: 4"):
        kso.set_mask(variable, fewer)
    assert np.array_equal(array(topology.mask), new)
    fit(model, first=1, last=2)
    new = masks_of(model)
    assert kso.masks_from_zeros(model) is model
    assert all(np.array_equal(a, b) for a, b in zip(masks_of(model), new))


# ---------------------------------------------------------------------- files


def saved_and_loaded(model, path, how):
    if how == "keras":
        model.save(path / "m.keras")
        return keras.models.load_model(path / "m.keras")
    if how == "packed":
        kso.save_packed(model, path / "m.ksp", include_optimizer=True)
        return kso.load_packed(path / "m.ksp", masks=True)
    model.save_weights(path / "m.weights.h5")
    other = compiled(network(PADDED, seed=5), sgd())
    other.optimizer.build(other.trainable_variables)
    other.load_weights(path / "m.weights.h5")
    return other


@pytest.mark.parametrize("how", ["keras", "weights", "packed"])
def test_files_are_those_of_the_plain_model(how, tmp_path):
    model, masked = (compiled(network(PADDED), sgd()) for _ in range(2))
    kso.condense(model)
    for one in (model, masked):
        fit(one, kso.RigL(2, 0.5, end_step=100), last=1)
    loaded = saved_and_loaded(model, tmp_path, how)
    assert not any(w.topology.is_condensed for w in kso.sparse_weights(loaded))
    assert type(loaded.layers[0]) is layers.Dense
    assert_same(model, loaded, 0)
    # it goes on in either form
    for one in (masked, loaded):
        fit(one, kso.RigL(2, 0.5, end_step=100), first=1, last=2)
    assert_same(masked, loaded)
    loaded = saved_and_loaded(model, tmp_path, how)
    kso.condense(loaded)
    assert_same(model, loaded, 0)
    fit(loaded, kso.RigL(2, 0.5, end_step=100), first=1, last=2)
    assert_same(masked, loaded)
    # and into a condensed model that is there already
    if how == "weights":
        there = compiled(kso.condense(network(PADDED, seed=7)), sgd())
        there.optimizer.build(there.trainable_variables)
        there.load_weights(tmp_path / "m.weights.h5")
        assert_same(model, there, 0)
        fit(there, kso.RigL(2, 0.5, end_step=100), first=1, last=2)
        assert_same(masked, there)


def test_weights_come_into_a_model_that_was_loaded_and_condensed(tmp_path):
    model = compiled(network(PADDED), sgd())
    fit(model, kso.RigL(2, 0.5, end_step=100), last=1)
    model.save(tmp_path / "m.keras")
    loaded = kso.condense(keras.models.load_model(tmp_path / "m.keras"))
    fit(model, kso.RigL(2, 0.5, end_step=100), first=1, last=2)
    model.save_weights(tmp_path / "m.weights.h5")
    loaded.load_weights(tmp_path / "m.weights.h5")
    assert_same(model, loaded, 0)


def keep_arrays(found, name, item):
    if hasattr(item, "dtype"):
        found[name] = item[()]


def test_a_file_is_the_same_bytes_in_either_form(tmp_path):
    """Dataset by dataset: kernels, masks, slots and what was explored."""
    import h5py

    models = both("SET", "SGD", PADDED, 1e-4)
    contents = []
    for i, model in enumerate(models):
        model.save_weights(tmp_path / f"{i}.weights.h5")
        found: dict = {}
        with h5py.File(tmp_path / f"{i}.weights.h5") as file:
            file.visititems(functools.partial(keep_arrays, found))
        contents.append(found)
    assert contents[0].keys() == contents[1].keys()
    for name, value in contents[0].items():
        if value.dtype == "uint8" and value.ndim == 1:
            continue  # names, with Keras' numbers of layers
        if value.dtype.kind == "f":
            np.testing.assert_allclose(contents[1][name], value, 1e-4, 1e-5, err_msg=name)
        else:
            assert np.array_equal(contents[1][name], value), name


def test_a_kernel_from_elsewhere_brings_its_topology(tmp_path):
    model = kso.condense(network())
    other = network(seed=9, sparsity=0.7)
    rng = np.random.default_rng(3)
    for variable in kso.sparse_weights(other):
        topology = variable.topology
        mask = topology.units.random_mask(topology.num_active_units(), 77)
        kso.set_mask(variable, mask)
        variable.assign(rng.normal(size=variable.shape) * mask)
    other.save_weights(tmp_path / "m.weights.h5")
    model.load_weights(tmp_path / "m.weights.h5")
    for a, b in zip(kso.sparse_weights(model), kso.sparse_weights(other)):
        assert np.array_equal(array(a.topology.kernel), array(b.topology.kernel))
        assert np.array_equal(array(a.topology.mask), array(b.topology.mask))
    dense = network(seed=9, sparsity=0.0)
    dense.save_weights(tmp_path / "dense.weights.h5")
    before = array(kso.sparse_weights(model)[0].topology.kernel)
    with pytest.raises(ValueError, match="denser than its mask"):
        model.load_weights(tmp_path / "dense.weights.h5")
    assert np.array_equal(array(kso.sparse_weights(model)[0].topology.kernel), before)


def test_a_killed_training_goes_on(tmp_path):
    def train(last, *callbacks):
        model = compiled(kso.condense(network(PADDED)), sgd())
        return model, fit(model, kso.RigL(2, 0.5, end_step=100), *callbacks, last=last)

    whole, expected = train(3)
    train(2, kso.BackupAndRestore(tmp_path))
    again, history = train(3, kso.BackupAndRestore(tmp_path))
    assert_same(whole, again, 0)
    assert history["loss"] == expected["loss"]


# ---------------------------------------------------------------------- around it


@pytest.mark.parametrize("back", [False, True])
def test_layers_that_were_frozen_meanwhile_can_be_trained(back):
    model = network()
    if back:
        kso.condense(model)
    for layer in model.layers[:2]:
        layer.trainable = False
    (kso.uncondense if back else kso.condense)(model)
    frozen = [array(layer.kernel) for layer in model.layers[:2]]
    fit(compiled(model, "sgd"))
    assert all(np.array_equal(array(x.kernel), k) for x, k in zip(model.layers, frozen))
    for layer in model.layers[:2]:
        layer.trainable = True
    fit(compiled(model, sgd()), kso.Static())
    for layer, kernel in zip(model.layers, frozen):
        assert not np.allclose(array(layer.kernel), kernel)
        assert np.array_equal(array(layer.kernel) != 0, kernel != 0)


def test_the_loss_scale_is_in_files_of_any_form(tmp_path):
    keras.mixed_precision.set_global_policy("mixed_float16")
    model = kso.condense(network())
    scaled = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=64.0, dynamic_growth_steps=3)
    fit(compiled(model, scaled))
    scale = float(array(model.optimizer.dynamic_scale))
    assert scale > 64
    model.save(tmp_path / "m.keras")
    kso.save_packed(model, tmp_path / "m.ksp", include_optimizer=True)
    for again in (
        keras.models.load_model(tmp_path / "m.keras"),
        kso.load_packed(tmp_path / "m.ksp"),
    ):
        assert float(array(again.optimizer.dynamic_scale)) == scale
        for form in (lambda model: model, kso.condense):
            assert_same(form(again), model, 0)


def test_copies_and_conversions_go_by_the_plain_form(tmp_path):
    model = kso.condense(network())
    x, _ = data()
    expected, kernel = model.predict(x, verbose=0), array(model.layers[0].kernel)
    clone = keras.models.clone_model(model)
    assert type(clone.layers[0]) is layers.Dense and clone.count_params() > 500
    assert clone.layers[0].kernel.shape == (12, 32)
    rows = {row["name"]: row for row in kso.layer_costs(model)}
    assert rows[model.layers[0].name]["shape"] == (12, 32)
    assert rows[model.layers[0].name]["flops_sparse"] == 2 * np.count_nonzero(kernel)
    smaller = kso.compact(model)
    np.testing.assert_allclose(smaller.model.predict(x, verbose=0), expected, 1e-4, 1e-5)
    assert isinstance(model.layers[0], CondensedLayer)
    assert kso.csr_matrices(model)[model.layers[0].name].nnz == np.count_nonzero(kernel)
    model.layers[1].quantize("int8")
    assert not isinstance(model.layers[1], CondensedLayer)
    stripped = kso.strip(model)
    assert type(stripped.layers[0]) is layers.Dense and not kso.sparse_weights(stripped)
    assert np.array_equal(array(stripped.layers[0].kernel), kernel)


def test_mixed_precision():
    for policy in ("mixed_bfloat16", "mixed_float16"):
        keras.mixed_precision.set_global_policy(policy)
        try:
            model = compiled(kso.condense(network()), sgd())
            losses = fit(model, kso.RigL(2, 0.5, end_step=100), last=3)["loss"]
        finally:
            keras.mixed_precision.set_global_policy("float32")
        assert losses[-1] < losses[0]
        assert model.layers[0]._kernel.dtype == "float32"
        assert keras.backend.standardize_dtype(model.layers[0].kernel.dtype) == "float32"


def test_a_subclassed_model_and_masking():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = layers.Embedding(9, 16, mask_zero=True)
            self.hidden, self.head = layers.Dense(32, "relu"), layers.Dense(3)
            self.pool = layers.GlobalAveragePooling1D()

        def call(self, x):
            return self.head(self.pool(self.hidden(self.embedding(x))))

    x = np.random.default_rng(0).integers(0, 9, (16, 5))
    keras.utils.set_random_seed(1)
    model = Net()
    model(x)
    kso.sparsify(model, 0.5, exclude=model.head, structure=BALANCED)
    expected = array(model(x))
    kso.condense(model)
    np.testing.assert_allclose(array(model(x)), expected, 1e-5, 1e-6)
    compiled(model, sgd())
    history = model.fit(x, np.arange(16) % 3, verbose=0, batch_size=4, epochs=2,
                        callbacks=[kso.RigL(2, 0.5, end_step=100)])  # fmt: skip
    assert history.history["sparsity"][-1] == 0.5


CONSTRUCTED = {
    "dense": lambda **k: (kso.SparseDense(32, activation="relu", **k), (12,)),
    "einsum": lambda **k: (kso.SparseEinsumDense("abc,cde->abde", (3, 2, 16), **k), (3, 12)),
    "convolution": lambda **k: (kso.SparseConv2D(32, 3, padding="same", **k), (4, 4, 12)),
    "1×1": lambda **k: (kso.SparseConv1D(16, 1, use_bias=False, **k), (4, 12)),
    "he": lambda **k: (kso.SparseDense(32, kernel_initializer="sparse_he_normal", **k), (12,)),
}


@pytest.mark.parametrize("kind", CONSTRUCTED)
def test_layers_are_condensed_by_construction(kind, tmp_path, monkeypatch):
    def made(is_condensed, structure=BALANCED, **options):
        keras.utils.set_random_seed(3)
        layer, shape = CONSTRUCTED[kind](
            sparsity=0.6, seed=1, structure=structure, condensed=is_condensed, **options
        )
        model = keras.Sequential(
            [keras.Input(shape), layer, layers.Flatten(), layers.Dense(3, name="head")]
        )
        return compiled(model, sgd()), layer, shape

    plain, of_plain, shape = made(False)
    sizes: list = []
    original = keras.layers.Layer.add_weight

    def add_weight(self, *args, **kwargs):
        sizes.append(int(np.prod(kwargs["shape"])))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(keras.layers.Layer, "add_weight", add_weight)
    model, layer, _ = made(True)
    monkeypatch.undo()
    kernel, mask = array(layer.kernel), array(layer.kernel_mask)
    assert sizes[0] < 0.6 * kernel.size  # never an array of its shape
    assert isinstance(layer, CondensedLayer) and type(layer).__name__ == type(of_plain).__name__
    assert np.array_equal(mask, array(of_plain.kernel_mask))  # the same draw
    assert np.array_equal(kernel != 0, mask) and abs(layer.sparsity - 0.6) < 0.1
    spread = kernel[mask].std() / array(of_plain.masked_kernel)[mask].std()
    assert 0.9 < spread < 1.8  # drawn for the inputs that are read
    # the same training, given the same values
    of_plain._kernel.assign(kernel)
    plain.layers[-1].set_weights(model.layers[-1].get_weights())
    x = np.random.default_rng(0).normal(size=(16, *shape)).astype("float32")
    y = np.arange(16) % 3
    for one in (plain, model):
        one.fit(x, y, batch_size=4, shuffle=False, verbose=0, callbacks=[METHODS["RigL"]()])
    assert_same(plain, model, 1e-4)
    # files: in this form again, as the argument says; and weights of either form in the other
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert isinstance(loaded.layers[0], CondensedLayer)
    assert_same(model, loaded, 0)
    model.save_weights(tmp_path / "m.weights.h5")
    other, _, _ = made(False)
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "m.weights.h5")
    assert_same(model, other, 0)
    other.save_weights(tmp_path / "o.weights.h5")
    again, _, _ = made(True)
    again.optimizer.build(again.trainable_variables)
    again.load_weights(tmp_path / "o.weights.h5")
    assert_same(model, again, 0)
    # and back, and there again, training on
    for change in (kso.uncondense, kso.condense):
        change(again)
        assert isinstance(again.layers[0], CondensedLayer) == (change is kso.condense)
        assert_same(model, again, 1e-4)
        for one in (model, again):
            one.fit(x, y, batch_size=4, shuffle=False, verbose=0, callbacks=[METHODS["SET"]()])
        assert_same(model, again, 1e-4)
    kernel = array(again.layers[0].kernel)
    kso.strip(again)
    assert not hasattr(again.layers[0], "sparsity")
    assert np.array_equal(array(again.layers[0].kernel), kernel)


def test_errors_of_layers_condensed_by_construction():
    with pytest.raises(ValueError, match="`condensed` must be a bool"):
        kso.SparseDense(32, condensed=1)
    for layer, why in (
        (kso.SparseDense(32, condensed=True), r"Unstructured\(\) is not balanced"),
        (
            kso.SparseDense(10, structure=BALANCED, condensed=True),
            "16 neurons do not divide its 10",
        ),
        (
            kso.SparseDense(32, structure=BALANCED, condensed=True, kernel_constraint="max_norm"),
            "it has a constraint",
        ),
    ):
        with pytest.raises(ValueError, match=why):
            layer.build((None, 8))


def test_the_summary_says_in_which_form_and_why():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 12))
    x = layers.Dense(100, name="hundred")(
        layers.LSTM(16, return_sequences=True, name="lstm")(inputs)
    )
    x = layers.Dense(64, name="constrained", kernel_constraint="max_norm")(x)
    model = keras.Model(inputs, layers.Dense(10, name="head")(x))
    kso.sparsify(model, 0.5, structure=kso.Block(1, 64, balanced=True))
    kso.condense(model)
    text: list = []
    kso.summary(model, text.append)
    (text,) = text
    rows = {line.split()[0]: line.split() for line in text.splitlines()[::-1] if line.strip()}
    assert rows["hundred"][-1] == "C" and rows["head"][-1] == "M"
    assert "form: M masked, C condensed" in text
    joined = " ".join(text.split())
    why = joined[joined.index("masked, not condensed:") :]
    assert "lstm/lstm_cell (LSTMCell cannot be condensed)" in why
    assert "head (64 neurons do not divide its 10)" in why
    assert "constrained (it has a constraint)" in why
    found = {row["name"]: row for row in kso.layer_costs(model)}
    assert found["hundred"]["form"] == "condensed" and found["head"]["form"] == "masked"
    told = found["hundred"]["structure"]
    assert told == "Block(1, 64, balanced=True), of 50 as 64 do not divide 100"


# ---------------------------------------------------------------------- refused

REFUSED = {
    "GMP": (lambda m: fit(compiled(m, sgd()), kso.GMP(0.9, 2, end_step=4)), "GMP changes how many"),
    "GraNet": (lambda m: fit(compiled(m, sgd()), kso.GraNet(0.9, 2, end_step=4)), "GraNet changes"),
    "redistribution": (
        lambda m: fit(compiled(m, sgd()), kso.RigL(2, end_step=4, redistribution="global")),
        "`redistribution` is for weights whose number",
    ),
    "Muon": (
        lambda m: fit(compiled(m, kso.SparseOpt(keras.optimizers.Muon(0.1)))),
        "Muon looks at a kernel as a matrix",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_by_name(what):
    act, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        act(kso.condense(network()))


def test_a_legacy_file_is_refused(tmp_path):
    model = kso.condense(network())
    with pytest.raises(ValueError, match="legacy `.h5` file cannot hold condensed weights"):
        model.save(tmp_path / "m.h5")
    kso.uncondense(model).save(tmp_path / "m.h5")
    again = keras.models.load_model(tmp_path / "m.h5", compile=False)
    assert np.array_equal(array(again.layers[0].kernel), array(model.layers[0].kernel))


@pytest.mark.parametrize("change", ["condense", "uncondense"])
def test_an_optimizer_that_knows_no_masks_holds_on_to_the_form(change):
    model = network() if change == "condense" else kso.condense(network())
    fit(compiled(model, "adam"))
    with pytest.raises(ValueError, match="not in a SparseOpt was built .* Received: Adam for"):
        getattr(kso, change)(model)
    fit(model)
    fit(getattr(kso, change)(compiled(model, "adam")))


def test_errors_of_condense():
    with pytest.raises(TypeError, match="must be a Keras model"):
        kso.condense("model")
    with pytest.raises(TypeError, match="must be a Keras model"):
        kso.uncondense("model")
    with pytest.raises(ValueError, match="`trainable` must be a bool"):
        kso.condense(network(), trainable=1)
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(32)])
    with pytest.raises(ValueError, match=r"Block\(1, 64, balanced=True\).*no sparse weight"):
        kso.condense(plain)
    assert kso.uncondense(plain) is plain
    for structure, why in (
        (kso.Unstructured(), "not balanced"),
        (kso.ConstantFanIn(), "not balanced"),
    ):
        with pytest.raises(ValueError, match=why):
            kso.condense(network(structure))
    constrained = keras.Sequential(
        [keras.Input((4,)), layers.Dense(32, kernel_constraint="non_neg")]
    )
    kso.sparsify(constrained, 0.5, structure=BALANCED)
    with pytest.raises(ValueError, match="it has a constraint"):
        kso.condense(constrained)
    odd = keras.Sequential(
        [keras.Input((4,)), layers.Dense(32, kernel_regularizer="orthogonal_regularizer")]
    )
    kso.sparsify(odd, 0.5, structure=BALANCED)
    with pytest.raises(ValueError, match="may look at the shape"):
        kso.condense(odd)

    class InTraining(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            kso.uncondense(self.model)

    model = compiled(kso.condense(network()), sgd())
    with pytest.raises(ValueError, match="between trainings"):
        fit(model, kso.RigL(1, 0.5, end_step=100), InTraining())


class ADifferentNumber(kso.DynamicSparseTraining):
    def new_mask(self, weight, mask, gradient, update):
        return mask & (np.cumsum(mask, axis=1) > 1)


def test_a_method_of_ones_own_keeps_the_number():
    model = compiled(kso.condense(network()), sgd())
    with pytest.raises(ValueError, match="must keep its 4 tiles.*Received: from 3 to 3"):
        fit(model, ADifferentNumber(2, end_step=100, compiled=False))


# ---------------------------------------------------------------------- for inference alone


@hypothesis.given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 9), st.floats(0.5, 1))
@hypothesis.settings(max_examples=30, deadline=None)
def test_by_neuron_nothing_is_lost(seed, inputs, neurons, zeros):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(inputs, neurons)) * (rng.random((inputs, neurons)) >= zeros)
    indices, values = by_neuron(matrix)
    again = np.zeros_like(matrix)
    np.add.at(again, (indices, np.arange(neurons)), values)
    np.testing.assert_array_equal(again, matrix)
    fan_in = np.count_nonzero(matrix, axis=0).max()
    assert len(values) == 4 * max(1, -(-fan_in // 4))


def test_any_mask_for_inference(tmp_path, monkeypatch):
    from keras_sparseopt.models import condensing

    model = compiled(network(kso.Unstructured(), 0.96), sgd())
    balanced = compiled(network(BALANCED, 0.7), sgd())
    x, _ = data()
    with pytest.raises(ValueError, match="or 2,000,000 weights or more, 95% of them 0"):
        kso.condense(model, trainable=False)
    monkeypatch.setattr(condensing, "_LARGE", 300)
    expected, of_tiles = model.predict(x, verbose=0), balanced.predict(x, verbose=0)
    kernels = [array(layer.kernel) for layer in (model.layers[0], model.layers[1])]
    masks = len(kso.sparse_weights(model))
    kso.condense(balanced, trainable=False)
    assert kso.condense(model, trainable=False) is model and not model.compiled
    assert len(kso.sparse_weights(model)) < masks
    for layer, kernel in zip(model.layers, kernels):
        assert isinstance(layer, CondensedLayer) and np.array_equal(array(layer.kernel), kernel)
        assert layer._kernel.shape[0] <= 8 and layer.indices.dtype == "uint16"
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, 1e-5, 1e-5)
    np.testing.assert_allclose(balanced.predict(x, verbose=0), of_tiles, 1e-5, 1e-5)
    matrices, rows = kso.csr_matrices(model), kso.layer_costs(model)
    for layer, kernel, row in zip(model.layers, kernels, rows):
        assert np.array_equal(matrices[layer.name].toarray(), kernel.T)
        nonzero = np.count_nonzero(kernel)
        assert (row["name"], row["form"]) == (layer.name, "by neuron")
        assert (row["active_weights"], row["weights"]) == (nonzero, kernel.size)
        assert row["flops_sparse"] == 2 * nonzero
    told: list[str] = []
    kso.summary(model, told.append)
    assert "N by neuron" in told[0]
    for one in (model, balanced):
        with pytest.raises(ValueError, match="condensed for inference alone"):
            fit(compiled(one, sgd()))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras", compile=False)
    assert type(loaded.layers[0]) is layers.Dense
    np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, 1e-5, 1e-5)
    loaded.layers[0].kernel.assign(np.ones((12, 32)))
    with pytest.raises(ValueError, match="must have at most 4 weights per neuron"):
        loaded.save_weights(tmp_path / "dense.weights.h5")
        model.load_weights(tmp_path / "dense.weights.h5")
    kso.uncondense(model)
    assert type(model.layers[0]) is layers.Dense and len(model.layers[0].weights) == 2
    assert np.array_equal(array(model.layers[0].kernel), kernels[0])
    fit(compiled(model, sgd()))  # plain again


def test_an_exported_model_multiplies_condensed(tmp_path):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("SavedModels are TensorFlow's here")
    model = kso.condense(network())
    x, _ = data()
    model.export(tmp_path / "served", verbose=False)
    again = keras.layers.TFSMLayer(tmp_path / "served", call_endpoint="serve")
    np.testing.assert_allclose(array(again(x)), array(model(x)), 1e-5, 1e-5)
    assert {tuple(v.shape) for v in again.variables} >= {tuple(model.layers[0]._kernel.shape)}
    file = kso.export_tflite(model, tmp_path / "m.tflite", inputs=x)
    assert file.largest_difference < 1e-4 and isinstance(model.layers[0], CondensedLayer)


def by_construction(seed):
    keras.utils.set_random_seed(seed)
    layer = kso.SparseDense(32, sparsity=0.5, structure=BALANCED, condensed=True, seed=seed)
    return keras.Sequential([keras.Input((12,)), layer, layers.Dense(3)])


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize("make", [lambda seed: kso.condense(network(seed=seed)), by_construction])
def test_tensorflow_finds_the_active_tiles(make, tmp_path):
    """In its own checkpoints and SavedModels, which know what is an attribute of a layer."""
    import tensorflow as tf

    class Served(tf.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        @tf.function(input_signature=[tf.TensorSpec((None, 12))], autograph=False)
        def call(self, x):
            return self.model(x)

    one, other, (x, _) = make(1), make(2), data()
    expected = array(one(x))
    saved = tf.train.Checkpoint(model=one).write(str(tmp_path / "c"))
    tf.train.Checkpoint(model=other).read(saved).assert_existing_objects_matched()
    assert np.array_equal(array(one.layers[0].kernel), array(other.layers[0].kernel))
    np.testing.assert_allclose(array(other(x)), expected, 1e-5, 1e-5)
    tf.saved_model.save(Served(one), tmp_path / "served")
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.call(x), expected, 1e-5, 1e-5)
    kso.uncondense(one)
    assert not hasattr(one.layers[0], "indices")
    np.testing.assert_allclose(array(one(x)), expected, 1e-5, 1e-5)


def test_batch_by_batch_it_trains_as_masked():
    x, y = np.random.default_rng(0).normal(size=(2, 3, 8, 64)).astype("float32")
    losses = []
    for form in (kso.condense, lambda model: model):
        keras.utils.set_random_seed(0)
        layers = [keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(64)]
        model = keras.Sequential(layers)
        form(kso.sparsify(model, 0.5, structure=kso.Block(1, 16, balanced=True)))
        model.compile(kso.SparseOpt("adam"), "mse")
        losses.append([float(model.train_on_batch(*batch)) for batch in zip(x, y)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.backend("torch")
def test_a_condensed_weight_is_a_parameter_of_its_module():
    """`fit` empties the gradients of parameters only: those of others would add up."""
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(4)])
    tiles = kso.Block(1, 16, balanced=True)
    kso.sparsify(model, 0.5, exclude=model.layers[-1], structure=tiles)
    for change in (kso.condense, kso.uncondense):
        change(model)
        assert {id(p) for p in model.parameters()} >= {
            id(v.value) for v in model.trainable_variables
        }


def test_ways_back_from_inference():
    x, _ = data()
    model = compiled(network(BALANCED, 0.7), sgd())
    kso.condense(model, trainable=False)
    with pytest.raises(ValueError, match="condensed for inference alone"):
        fit(compiled(model, sgd()))
    fit(compiled(kso.condense(model), sgd()))  # tiles are for both
    kso.condense(model, trainable=False)
    outer = kso.condense(keras.Sequential([keras.Input((12,)), model]), trainable=False)
    kso.uncondense(model)
    fit(compiled(outer, sgd()))
    kso.condense(model, trainable=False)
    plain = compiled(kso.strip(model), "sgd")
    fit(plain)
    assert model.predict(x, verbose=0).shape == (48, 3)


def test_what_was_compiled_for_inference_knows_of_the_form():
    x, y = data()
    model = compiled(network(BALANCED, 0.7), sgd())
    for change in (kso.condense, kso.uncondense, kso.condense):
        model.evaluate(x, y, verbose=0)
        before = model.predict(x, verbose=0)
        change(model)
        np.testing.assert_allclose(model.predict(x, verbose=0), before, 1e-4, 1e-5)
        fit(model, kso.RigL(2, 0.3, end_step=100), validation_data=(x, y))
        now = array(model(x))
        np.testing.assert_allclose(model.predict(x, verbose=0), now, 1e-4, 1e-5)
        assert not np.allclose(now, before, 1e-3)


def test_what_cannot_be_stripped_is_told_before_anything_changes():
    class Own(kso.SparseDense):
        pass

    model = keras.Sequential(
        [
            keras.Input((512,)),
            keras.layers.Dense(512, name="tiled"),
            Own(4096, sparsity=0.97, name="own"),
            keras.layers.Dense(2),
        ]
    )
    kso.sparsify(model.get_layer("tiled"), 0.9, structure=kso.Block(1, 32, balanced=True))
    model.compile(kso.SparseOpt("sgd"), "mse")
    with pytest.raises(ValueError, match="a subclass of one has no plain counterpart"):
        kso.condense(model, trainable=False)
    assert model.compiled and not any(w.topology.is_condensed for w in kso.sparse_weights(model))
    model.fit(np.ones((4, 512)), np.ones((4, 2)), verbose=0)
