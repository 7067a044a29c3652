import keras
import numpy as np
import pytest
from helpers import (
    array,
    assert_invariants,
    compiled,
    correct_oracle,
    data,
    masks_of,
    mlp,
)
from keras import ops

import keras_sparseopt as kso
from keras_sparseopt.keras_internals import plain_class
from keras_sparseopt.optimizers.sparse_opt import KEEPS_ZEROS

OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "nesterov": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "Adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "AdamW": lambda: keras.optimizers.AdamW(0.01),
    "Adamax": lambda: keras.optimizers.Adamax(0.01),
    "Nadam": lambda: keras.optimizers.Nadam(0.01),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.9, centered=True),
    "Adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "Adadelta": lambda: keras.optimizers.Adadelta(1.0),
    "Lion": lambda: keras.optimizers.Lion(0.01),
    "Lamb": lambda: keras.optimizers.Lamb(0.01),
    "Muon": lambda: keras.optimizers.Muon(0.01),
    "ScheduleFreeAdamW": lambda: keras.optimizers.ScheduleFreeAdamW(0.01),
    "HAM": lambda: kso.HAM(keras.optimizers.SGD(0.1, momentum=0.9)),
}
REFUSED = {"Adafactor", "Ftrl", "LossScaleOptimizer", "MultiOptimizer"}


def test_every_optimizer_of_keras_is_covered():
    classes = {
        name
        for name, item in vars(keras.optimizers).items()
        if isinstance(item, type) and issubclass(item, keras.optimizers.Optimizer)
    } - {"Optimizer"}
    covered = {type(make()).__name__ for make in OPTIMIZERS.values()} - {"HAM"}
    assert classes == covered | REFUSED


def kernels_and_gradients(mask_kind="random"):
    rng = np.random.default_rng(0)
    layers = [
        kso.SparseDense(6, sparsity=0.7, seed=1),
        kso.SparseConv2D(6, 3, groups=2, sparsity=0.7, seed=1),
        kso.SparseEinsumDense("abc,cde->abde", (None, 3, 4), sparsity=0.7, seed=1),
    ]
    for layer, shape in zip(layers, [(1, 10), (1, 5, 5, 4), (1, 5, 8)]):
        layer(np.zeros(shape, "float32"))
        mask = array(layer.kernel_mask)
        if mask_kind == "empty neuron":
            mask[..., 0] = False
        elif mask_kind == "empty layer":
            mask[:] = False
        kso.set_mask(layer, mask)
    kernels = [layer.kernel for layer in layers]
    grads = [rng.normal(size=tuple(k.shape)).astype("float32") for k in kernels]
    return layers, kernels, grads


@pytest.mark.parametrize("mask_kind", ["random", "empty neuron", "empty layer"])
def test_update_equals_the_oracle(mask_kind):
    layers, kernels, grads = kernels_and_gradients(mask_kind)
    before = [array(k) for k in kernels]
    kso.SparseOpt(keras.optimizers.SGD(0.5)).apply(
        [keras.ops.convert_to_tensor(g) for g in grads], kernels
    )
    for layer, kernel, w, g in zip(layers, kernels, before, grads):
        axes = kernel.topology.neuron_axes
        expected = w - 0.5 * correct_oracle(g, array(layer.kernel_mask), axes)
        np.testing.assert_allclose(array(kernel), expected, rtol=1e-5, atol=1e-6)
        if mask_kind == "empty layer":
            assert np.array_equal(array(kernel), w)


def applied_gradient(optimizer_kwargs, layer_kwargs=None):
    """The g' that SparseOpt hands on, read off one SGD step of rate 1."""
    layer = kso.SparseDense(6, sparsity=0.7, seed=1, **(layer_kwargs or {}))
    layer.build((None, 10))
    g = np.random.default_rng(0).normal(size=(10, 6)).astype("float32")
    before = array(layer.kernel)
    optimizer = kso.SparseOpt(keras.optimizers.SGD(1.0), **optimizer_kwargs)
    optimizer.apply([keras.ops.convert_to_tensor(g)], [layer.kernel])
    return before - array(layer.kernel), g, array(layer.kernel_mask)


@pytest.mark.parametrize(
    "optimizer, layer", [({"skew_correction": False}, {}), ({}, {"skew_correction": False})]
)
def test_without_correction_the_gradient_is_only_masked(optimizer, layer):
    applied, g, mask = applied_gradient(optimizer, layer)
    np.testing.assert_allclose(applied, g * mask, rtol=1e-4, atol=1e-6)


def test_renormalize_keeps_the_norm_and_the_corrected_direction():
    applied, g, mask = applied_gradient({"renormalize": True})
    corrected = correct_oracle(g, mask, (1,))
    expected = corrected * np.linalg.norm(g * mask) / np.linalg.norm(corrected)
    np.testing.assert_allclose(applied, expected, rtol=1e-4, atol=1e-6)


def run_steps(optimizer, sparsity, steps=4, seed=0):
    """Some `apply` steps on made-up gradients; returns kernel and optimizer variables."""
    keras.utils.set_random_seed(3)
    layer = kso.SparseDense(6, sparsity=sparsity, seed=1)
    layer.build((None, 10))
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        grads = [
            keras.ops.convert_to_tensor(rng.normal(size=tuple(v.shape)).astype("float32"))
            for v in layer.trainable_variables
        ]
        optimizer.apply(grads, layer.trainable_variables)
    return layer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inactive_weights_and_slots_stay_zero(name):
    optimizer = kso.SparseOpt(OPTIMIZERS[name]())
    layer = run_steps(optimizer, 0.7)
    assert_invariants(layer, optimizer)
    rng = np.random.default_rng(1)
    mask = np.zeros((10, 6), bool)
    mask.flat[rng.choice(60, 18, replace=False)] = True
    old, kernel = array(layer.kernel_mask), array(layer.kernel)
    optimizer.rewire(layer.kernel, mask)
    assert_invariants(layer, optimizer)
    both = old & mask
    assert np.array_equal(array(layer.kernel)[both], kernel[both])
    assert not array(layer.kernel)[mask & ~old].any()
    moved = array(layer.kernel)
    grads = [keras.ops.ones(v.shape) for v in layer.trainable_variables]
    for _ in range(2):
        optimizer.apply(grads, layer.trainable_variables)
    assert_invariants(layer, optimizer)
    assert (array(layer.kernel) != moved)[mask].all()


TRUSTED = ["HAM"]
TRUSTED += [name for name, make in OPTIMIZERS.items() if plain_class(make()) in KEEPS_ZEROS]
RUN_OPTIONS = {
    "plain": {},
    "decay and clipping": {"weight_decay": 0.1, "clipnorm": 0.1},
    "average": {"use_ema": True, "ema_overwrite_frequency": 2, "global_clipnorm": 1.0},
    "accumulation": {"gradient_accumulation_steps": 2, "clipvalue": 0.1},
}


@pytest.mark.parametrize("options", RUN_OPTIONS)
@pytest.mark.parametrize("name", TRUSTED)
def test_what_is_trusted_keeps_zeros_without_being_masked_again(name, options, monkeypatch):
    monkeypatch.delattr(kso.SparseOpt, "_mask_again")
    config = OPTIMIZERS[name]().get_config()
    of_inner = config["inner_optimizer"]["config"] if name == "HAM" else config
    of_inner.update(RUN_OPTIONS[options])
    inner = type(OPTIMIZERS[name]()).from_config(config)
    _, kernels, grads = kernels_and_gradients()
    optimizer = kso.SparseOpt(inner)
    for _ in range(4):
        optimizer.apply([ops.convert_to_tensor(g) for g in grads], kernels)
    for weight in optimizer.weights:
        inactive = ~array(weight.topology.mask)
        for variable in (weight.variable, *weight.slots):
            assert not array(variable)[inactive].any(), variable.path
    optimizer.finalize_variable_values(kernels)
    assert not any(array(k)[~array(k.topology.mask)].any() for k in kernels)


def test_what_is_not_exactly_trusted_is_masked_again():
    class Mine(keras.optimizers.SGD):
        pass

    trusted = {
        name: kso.SparseOpt(make())._inner_keeps_zeros() for name, make in OPTIMIZERS.items()
    }
    assert {name for name, is_trusted in trusted.items() if is_trusted} == set(TRUSTED)
    assert not kso.SparseOpt(Mine(0.1))._inner_keeps_zeros()
    assert not kso.SparseOpt(kso.HAM(Mine(0.1)))._inner_keeps_zeros()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dense_mask_is_bitwise_the_inner_optimizer(name):
    inner = OPTIMIZERS[name]()
    expected = run_steps(inner, 0.0)
    optimizer = kso.SparseOpt(OPTIMIZERS[name]())
    layer = run_steps(optimizer, 0.0)
    for a, b in zip(expected.trainable_variables, layer.trainable_variables):
        assert np.array_equal(array(a), array(b))
    for a, b in zip(inner.variables, optimizer.inner_optimizer.variables):
        assert np.array_equal(array(a), array(b)), a.path


INNER_OPTIONS = {
    "weight_decay": {"weight_decay": 0.1},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.1},
    "ema": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 2},
    "loss_scale": {"loss_scale_factor": 128.0},
}


@pytest.mark.parametrize("option", INNER_OPTIONS)
def test_options_of_the_inner_optimizer_act_on_the_corrected_gradient(option):
    """SparseOpt(inner) on g equals inner on the oracle's g'."""
    kwargs = INNER_OPTIONS[option]
    layers, kernels, grads = kernels_and_gradients()
    twins = [keras.Variable(array(k)) for k in kernels]
    corrected = [
        correct_oracle(g, array(layer.kernel_mask), k.topology.neuron_axes).astype("float32")
        for layer, k, g in zip(layers, kernels, grads)
    ]
    inner = keras.optimizers.SGD(0.1, momentum=0.9, **kwargs)
    optimizer = kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9, **kwargs))
    for _ in range(5):
        inner.apply([keras.ops.convert_to_tensor(g) for g in corrected], twins)
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in grads], kernels)
    inner.finalize_variable_values(twins)
    optimizer.finalize_variable_values(kernels)
    for kernel, twin in zip(kernels, twins):
        np.testing.assert_allclose(array(kernel), array(twin), rtol=1e-5, atol=1e-6)
    for layer in layers:
        assert not array(layer.kernel)[~array(layer.kernel_mask)].any()
    assert int(array(optimizer.iterations)) == int(array(inner.iterations))


def test_learning_rate_is_the_inner_ones():
    inner = keras.optimizers.SGD(0.3)
    optimizer = kso.SparseOpt(kso.HAM(inner))
    assert float(array(optimizer.learning_rate)) == pytest.approx(0.3)
    optimizer.learning_rate = 0.2
    assert float(array(inner.learning_rate)) == pytest.approx(0.2)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    optimizer = kso.SparseOpt(keras.optimizers.SGD(schedule))
    run_steps(optimizer, 0.5, steps=2)
    assert float(array(optimizer.learning_rate)) == pytest.approx(0.025)


def test_strings_and_configs_as_inner_optimizer():
    assert isinstance(kso.SparseOpt("adam").inner_optimizer, keras.optimizers.Adam)
    config = keras.optimizers.serialize(keras.optimizers.SGD(0.7))
    assert float(array(kso.SparseOpt(config).learning_rate)) == pytest.approx(0.7)


def test_config_round_trip():
    optimizer = kso.SparseOpt(
        kso.HAM(keras.optimizers.SGD(0.1, momentum=0.5), alpha=7, beta=0.1),
        skew_correction=False,
        renormalize=True,
    )
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert copy.get_config() == optimizer.get_config()
    assert (copy.inner_optimizer.alpha, copy.base_optimizer().momentum) == (7, 0.5)


def test_constraint_that_moves_inactive_weights():
    class AddOne(keras.constraints.Constraint):
        def __call__(self, w):
            return w + 1.0

    layer = kso.SparseDense(6, sparsity=0.7, kernel_constraint=AddOne())
    layer.build((None, 10))
    optimizer = kso.SparseOpt("sgd")
    optimizer.apply([keras.ops.ones(v.shape) for v in layer.trainable_variables],
                    layer.trainable_variables)  # fmt: skip
    assert_invariants(layer, optimizer)
    assert array(layer.kernel)[array(layer.kernel_mask)].mean() > 0.5


def test_none_gradients_pass_through():
    layer = kso.SparseDense(6, sparsity=0.7)
    layer.build((None, 10))
    optimizer = kso.SparseOpt("sgd")
    before = array(layer.kernel)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([None, keras.ops.ones((6,))], layer.trainable_variables)
    assert np.array_equal(array(layer.kernel), before)


def test_nan_gradient_at_inactive_weights_does_no_harm():
    layer = kso.SparseDense(6, sparsity=0.7, seed=0)
    layer.build((None, 10))
    gradient = np.where(array(layer.kernel_mask), 1.0, np.nan).astype("float32")
    optimizer = kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9))
    optimizer.apply([keras.ops.convert_to_tensor(gradient)], [layer.kernel])
    assert_invariants(layer, optimizer)


def test_warns_when_nothing_is_sparse():
    with pytest.warns(UserWarning, match="no sparse weight"):
        kso.SparseOpt("sgd").build([keras.Variable(np.zeros((2, 2), "float32"))])


def test_a_slot_that_cannot_be_followed_is_refused():
    class Odd(keras.optimizers.SGD):
        def build(self, variables):
            super().build(variables)
            self.extra = self.add_variable(variables[0].shape)

    layer = kso.SparseDense(6, sparsity=0.5)
    layer.build((None, 10))
    with pytest.raises(ValueError, match="Odd holds a slot that SparseOpt cannot follow"):
        kso.SparseOpt(Odd(0.1)).build(layer.trainable_variables)


def test_itop_rate_is_the_union_of_all_masks():
    layer = kso.SparseDense(6, sparsity=0.7, seed=0)
    layer.build((None, 11))
    optimizer = kso.SparseOpt("sgd")
    gradients = [keras.ops.ones(v.shape) for v in layer.trainable_variables]
    optimizer.build(layer.trainable_variables)
    # Before the first step a new mask replaces the initial one; it was never trained.
    optimizer.rewire(layer.kernel, np.random.default_rng(9).random((11, 6)) < 0.3)
    optimizer.apply(gradients, layer.trainable_variables)
    seen = [[array(layer.kernel_mask)]]
    for seed in range(4):
        mask = np.random.default_rng(seed).random((11, 6)) < 0.3
        optimizer.rewire(layer.kernel, mask)
        seen.append([mask])
        assert optimizer.itop_rate() == pytest.approx(kso.itop_rate(seen))


def test_set_mask_during_training_moves_the_slots():
    optimizer = kso.SparseOpt(keras.optimizers.Adam(0.01))
    layer = run_steps(optimizer, 0.7)
    mask = np.zeros((10, 6), bool)
    mask[:3] = True
    kso.set_mask(layer, mask)
    assert np.array_equal(array(layer.kernel_mask), mask)
    assert_invariants(layer, optimizer)


def test_set_weights_is_taken_over_at_once():
    model = compiled(mlp(), kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9)))
    weights = mlp(seed=9).get_weights()
    x, y = data()
    model.fit(x, y, verbose=0)
    model.set_weights(weights)
    assert_invariants(model)
    model.fit(x, y, verbose=0)
    assert_invariants(model)


# ---------------------------------------------------------------------------- HAM


def ham_oracle(w, g, m, lr, momentum, alpha, beta):
    """SGD with momentum, then the hyperbolic step; two lines of METHODS in NumPy."""
    m[:] = momentum * m - lr * g
    w = w + m
    return w * np.exp(np.clip(lr * (-alpha * np.sign(w) * g - beta), -5, 5))


@pytest.mark.parametrize("scale", [0.01, 10.0])  # without and with clipping of the exponent
def test_ham_equals_the_oracle(scale):
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(5, 4)), rng.normal(size=4)
    w[0, 0] = 0.0
    kernel, bias = keras.Variable(w.astype("float32")), keras.Variable(b.astype("float32"))
    optimizer = kso.HAM(keras.optimizers.SGD(0.1, momentum=0.9), alpha=20, beta=0.5)
    m, mb = np.zeros_like(w), np.zeros_like(b)
    for _ in range(3):
        g, gb = scale * rng.normal(size=w.shape), scale * rng.normal(size=b.shape)
        optimizer.apply(
            [keras.ops.convert_to_tensor(x.astype("float32")) for x in (g, gb)], [kernel, bias]
        )
        w = ham_oracle(w, g, m, 0.1, 0.9, 20, 0.5)
        mb = 0.9 * mb - 0.1 * gb
        b = b + mb  # rank 1: the inner step alone
        np.testing.assert_allclose(array(kernel), w, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(array(bias), b, rtol=1e-4, atol=1e-6)


def test_ham_uses_the_clipped_gradient():
    w, g = np.full((2, 2), 0.5, "float32"), np.full((2, 2), 3.0, "float32")
    kernel = keras.Variable(w)
    kso.HAM(keras.optimizers.SGD(0.1, clipvalue=0.2), alpha=10, beta=0).apply(
        [keras.ops.convert_to_tensor(g)], [kernel]
    )
    np.testing.assert_allclose(array(kernel), 0.48 * np.exp(-0.1 * 10 * 0.2), rtol=1e-5)


def test_ham_accumulates_gradients():
    kernel = keras.Variable(np.full((2, 2), 0.5, "float32"))
    sgd = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    optimizer = kso.HAM(sgd, alpha=10, beta=0)
    optimizer.apply([keras.ops.full((2, 2), 1.0)], [kernel])
    assert (array(kernel) == 0.5).all()
    optimizer.apply([keras.ops.full((2, 2), 2.0)], [kernel])
    np.testing.assert_allclose(array(kernel), 0.35 * np.exp(-0.1 * 10 * 1.5), rtol=1e-5)


def test_ham_skips_a_variable_with_a_gradient_that_is_not_finite():
    good, bad = (keras.Variable(np.full((2, 2), 0.5, "float32")) for _ in range(2))
    g = np.array([[np.inf, 0.0], [0.0, 0.0]], "float32")
    optimizer = kso.HAM(keras.optimizers.SGD(0.1), alpha=10, beta=1.0)
    optimizer.apply([keras.ops.zeros((2, 2)), keras.ops.convert_to_tensor(g)], [good, bad])
    np.testing.assert_allclose(array(good), 0.5 * np.exp(-0.1), rtol=1e-6)
    assert array(bad)[1, 1] == 0.5  # the inner step alone, which is 0 here


def test_sparse_opt_around_ham_gives_ham_the_corrected_gradient():
    layer = kso.SparseDense(6, sparsity=0.7, seed=1)
    layer.build((None, 10))
    w, mask = array(layer.kernel).astype("float64"), array(layer.kernel_mask)
    g = np.random.default_rng(0).normal(size=(10, 6)).astype("float32")
    kso.SparseOpt(kso.HAM(keras.optimizers.SGD(0.1), alpha=3, beta=0.1)).apply(
        [keras.ops.convert_to_tensor(g)], [layer.kernel]
    )
    corrected = correct_oracle(g, mask, (1,))
    expected = ham_oracle(w, corrected, np.zeros_like(w), 0.1, 0.0, 3, 0.1)
    np.testing.assert_allclose(array(layer.kernel), expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------- inside of fit


def test_fit_equals_a_training_loop_in_numpy():
    """One linear sparse layer, MSE, SGD: the whole path of `fit` against NumPy."""
    layer = kso.SparseDense(3, sparsity=0.6, seed=2, use_bias=False)
    model = keras.Sequential([keras.Input((8,)), layer])
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(12, n)).astype("float32") for n in (8, 3))
    w, mask = array(layer.kernel).astype("float64"), array(layer.kernel_mask)
    model.compile(optimizer=kso.SparseOpt(keras.optimizers.SGD(0.2)), loss="mse")
    model.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0)
    for _ in range(3):
        for i in range(0, 12, 4):
            xb, yb = x[i : i + 4], y[i : i + 4]
            gradient = 2 / yb.size * xb.T @ (xb @ w - yb)
            w = w - 0.2 * correct_oracle(gradient, mask, (1,))
    np.testing.assert_allclose(array(layer.kernel), w, rtol=1e-4, atol=1e-6)


def test_keras_callbacks_that_set_the_learning_rate():
    x, y = data()
    model = compiled(mlp(), kso.SparseOpt(keras.optimizers.SGD(0.1)))
    model.fit(
        x, y, epochs=2, verbose=0,
        callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr / 2)],
    )  # fmt: skip
    assert float(array(model.optimizer.learning_rate)) == pytest.approx(0.025)
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.1, patience=0, min_delta=1e9)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[plateau])
    assert float(array(model.optimizer.learning_rate)) < 0.025


def test_swap_ema_weights():
    x, y = data()
    inner = keras.optimizers.SGD(0.1, use_ema=True)
    model = compiled(mlp(), kso.SparseOpt(inner))
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[swap])
    assert_invariants(model)


def test_frozen_shared_and_unmasked_layers_and_two_outputs():
    inputs = keras.Input((12,))
    shared = kso.SparseDense(12, sparsity=0.8, seed=0)
    frozen = kso.SparseDense(12, sparsity=0.8, seed=1)
    frozen.trainable = False
    x = keras.layers.BatchNormalization()(shared(shared(inputs)))
    x = frozen(x)
    outputs = {"a": keras.layers.Dense(3, name="a")(x), "b": kso.SparseDense(2, name="b")(x)}
    model = keras.Model(inputs, outputs)
    model.compile(
        optimizer=kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9)),
        loss={"a": loss_of(3), "b": loss_of(2)},
    )
    x, y = data()
    before = array(frozen.kernel), array(frozen.kernel_mask)
    model.fit(x, {"a": y, "b": y % 2}, verbose=0, callbacks=[kso.RigL(1, end_step=100)])
    assert_invariants(model)
    assert np.array_equal(before[0], array(frozen.kernel))
    assert np.array_equal(before[1], array(frozen.kernel_mask))


def loss_of(classes):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def test_regularizer_does_not_move_inactive_weights():
    model = compiled(
        mlp(kernel_regularizer=keras.regularizers.L1L2(0.1, 0.1)),
        kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9)),
    )
    x, y = data()
    model.fit(x, y, epochs=2, verbose=0)
    assert_invariants(model)


def test_masks_do_not_change_without_a_callback():
    model = compiled(mlp(), kso.SparseOpt("adam"))
    before = masks_of(model)
    x, y = data()
    model.fit(x, y, epochs=2, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(before, masks_of(model)))
    assert_invariants(model)


@pytest.mark.backend("tensorflow")
def test_custom_training_loop_with_apply_gradients():
    import tensorflow as tf

    model, optimizer = mlp(), kso.SparseOpt(keras.optimizers.Adam(0.01))
    x, y = data()
    compute = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            value = compute(y, model(x, training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return value

    losses = [float(train_step(x, y)) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert_invariants(model, optimizer)


@pytest.mark.backend("jax")
def test_custom_training_loop_with_stateless_apply():
    import jax

    model, optimizer = mlp(), kso.SparseOpt(keras.optimizers.Adam(0.01))
    optimizer.build(model.trainable_variables)
    compute = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    x, y = data()

    def value(trainable, fixed):
        outputs, fixed = model.stateless_call(trainable, fixed, x, training=True)
        return compute(y, outputs), fixed

    @jax.jit
    def train_step(trainable, fixed, state):
        (loss, fixed), grads = jax.value_and_grad(value, has_aux=True)(trainable, fixed)
        trainable, state = optimizer.stateless_apply(state, grads, trainable)
        return loss, trainable, fixed, state

    variables = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    state = [[v.value for v in group] for group in variables]
    losses = []
    for _ in range(20):
        loss, *state = train_step(*state)
        losses.append(float(loss))
    for group, values in zip(variables, state):
        for variable, new in zip(group, values):
            variable.assign(new)
    assert losses[-1] < losses[0]
    assert_invariants(model, optimizer)
