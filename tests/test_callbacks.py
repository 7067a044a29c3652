import csv

import keras
import numpy as np
import pytest
from helpers import (
    AfterEachStep,
    array,
    assert_invariants,
    compiled,
    data,
    drop_and_grow_oracle,
    masks_of,
    mlp,
    sparse_opt,
)

import keras_sparseopt as kso

REPRS = {
    "RigL(update_every=100)": lambda: kso.RigL(),
    "RigL(update_every=5, drop_fraction=0.5, end_step=90, layers=('a',), seed=3)": lambda: kso.RigL(
        5, 0.5, end_step=90, seed=3, layers=["a"]
    ),
    "GMP(final_sparsity=0.8, update_every=100, scope='global')": lambda: kso.GMP(
        0.8, scope="global"
    ),
    "Static()": lambda: kso.Static(),
    "GradientFlow(every=7)": lambda: kso.GradientFlow(7),
    "Own(update_every=2)": lambda: type("Own", (kso.DynamicSparseTraining,), {})(2),
}


@pytest.mark.parametrize("told", REPRS)
def test_methods_say_what_they_are(told):
    found = repr(REPRS[told]())
    parts = [sorted(text[:-1].partition("(")[2].split(", ")) for text in (found, told)]
    assert parts[0] == parts[1] and found.partition("(")[0] == told.partition("(")[0]


def sgd(**kwargs):
    return kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9), **kwargs)


class Recorder(AfterEachStep):
    """Remembers masks after every batch; put it after the method's callback."""

    def __init__(self, method):
        super().__init__()
        self.method = method
        self.masks, self.logs = [], []

    def on_train_begin(self, logs=None):
        self.masks.append(masks_of(self.model))

    def see(self, logs):
        self.masks.append(masks_of(self.model))
        self.logs.append(self.method.read_logs())

    @property
    def update_steps(self):
        pairs = zip(self.masks, self.masks[1:])
        return [
            step
            for step, (old, new) in enumerate(pairs, 1)
            if any(not np.array_equal(a, b) for a, b in zip(old, new))
        ]


def fit(method, optimizer=None, epochs=2, batch_size=4, model=None, compile_args=None, **kwargs):
    keras.utils.set_random_seed(1)
    model = compiled(model or mlp(), optimizer or sgd(), **(compile_args or {}))
    recorder = Recorder(method)
    x, y = data(32)
    callbacks = [method, *kwargs.pop("callbacks", []), recorder]
    history = model.fit(
        x, y, epochs=epochs, batch_size=batch_size, verbose=0, shuffle=False,
        callbacks=callbacks, **kwargs,
    )  # fmt: skip
    assert_invariants(model)
    for a, b in zip(recorder.masks[0], recorder.masks[-1]):
        assert a.sum() == b.sum()
    return model, recorder, history


CONSTANT = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 1.0)
METHODS = {
    "RigL": lambda **k: kso.RigL(**{"update_every": 3, "drop_fraction": 0.5, **k}),
    "SET": lambda **k: kso.SET(**{"update_every": 3, "drop_fraction": 0.5, **k}),
}
BOTH = pytest.mark.parametrize("name", METHODS)


@BOTH
def test_updates_come_at_the_interval_between_begin_and_end(name):
    _, recorder, _ = fit(METHODS[name](drop_fraction=CONSTANT, begin_step=4, end_step=13))
    assert recorder.update_steps == [6, 9, 12]


@BOTH
def test_end_step_defaults_to_three_quarters_of_the_fit(name):
    # 2 epochs of 8 steps: no update at or after step 12
    _, recorder, _ = fit(METHODS[name](update_every=2, drop_fraction=0.9))
    assert recorder.update_steps and max(recorder.update_steps) < 12


def test_end_step_of_a_second_fit_counts_from_its_own_start():
    model, _, _ = fit(kso.SET(2, 0.9))
    recorder = Recorder(kso.SET(2, 0.9))
    x, y = data(32)
    callbacks = [recorder.method, recorder]
    model.fit(x, y, epochs=2, batch_size=4, verbose=0, callbacks=callbacks)
    assert recorder.update_steps and max(recorder.update_steps) < 12


def test_rigl_update_equals_the_oracle():
    """One full-batch step and one update, recomputed in NumPy from the dense gradient."""
    layer = kso.SparseDense(5, sparsity=0.6, seed=2, use_bias=False)
    model = keras.Sequential([keras.Input((8,)), layer])
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(16, n)).astype("float32") for n in (8, 5))
    w, mask = array(layer.kernel).astype("float64"), array(layer.kernel_mask)
    optimizer = kso.SparseOpt(keras.optimizers.SGD(0.1), skew_correction=False)
    model.compile(optimizer=optimizer, loss="mse")
    callback = kso.RigL(update_every=1, drop_fraction=0.4, end_step=2)
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[callback])
    gradient = 2 / y.size * x.T @ (x @ w - y)
    w = w - 0.1 * gradient * mask
    # at step 1 of end_step 2: cos(π/2) = 0, half of the drop fraction
    num_update = int(np.floor(0.2 * mask.sum()))
    expected = drop_and_grow_oracle(w, mask, np.abs(gradient), num_update)
    assert not np.array_equal(expected, mask)
    assert np.array_equal(array(layer.kernel_mask), expected)
    np.testing.assert_allclose(array(layer.kernel), w * (expected & mask), rtol=1e-5, atol=1e-7)


def growth(growth_gradient, gradient_steps=1, steps=1, accumulation=None):
    """Dense gradients of each step (NumPy) and what RigL takes as growth scores."""
    layer = kso.SparseDense(5, sparsity=0.6, seed=2, use_bias=False)
    model = keras.Sequential([keras.Input((8,)), layer])
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(4 * steps, n)).astype("float32") for n in (8, 5))
    w = array(layer.kernel).astype("float64")
    inner = keras.optimizers.SGD(0.0, gradient_accumulation_steps=accumulation)
    model.compile(optimizer=kso.SparseOpt(inner), loss="mse")
    scores = []

    class Spy(kso.RigL):
        def scores(self, weight, mask, gradient, update):
            scores.append(array(super().scores(weight, mask, gradient, update)))
            return scores[-1]

    every = steps // (accumulation or 1)
    spy = Spy(every, 0.5, end_step=100, growth_gradient=growth_gradient,
              gradient_steps=gradient_steps)  # fmt: skip
    mask = array(layer.kernel_mask)
    model.fit(x, y, batch_size=4, verbose=0, shuffle=False, callbacks=[spy])
    batches = [slice(4 * i, 4 * i + 4) for i in range(steps)]
    gradients = [2 / 20 * x[b].T @ (x[b] @ w - y[b]) for b in batches]
    return gradients, scores[0], mask


def test_growth_gradient_corrected():
    (gradient,), scores, mask = growth("corrected")
    counts = mask.sum(axis=0)
    expected = np.abs(gradient) * np.sqrt(counts / counts.mean())
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.parametrize("gradient_steps", [1, 2, 4])
def test_growth_on_the_gradient_averaged_over_the_last_steps(gradient_steps):
    gradients, scores, _ = growth("original", gradient_steps, steps=4)
    expected = np.abs(np.mean(gradients[-gradient_steps:], axis=0))
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-7)


def test_growth_gradient_under_accumulation_is_the_accumulated_one():
    gradients, scores, _ = growth("original", steps=4, accumulation=2)
    np.testing.assert_allclose(scores, np.abs(np.mean(gradients[-2:], axis=0)), rtol=1e-4)


def test_set_draws_depend_on_seed_kernel_and_step_only():
    def run(seed):
        return fit(METHODS["SET"](seed=seed))[1].masks[-1]

    first, again, other = run(1), run(1), run(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize(
    "schedule, expected", [("constant", [0.4, 0.4, 0.4]), ("linear", [0.3, 0.2, 0.0])]
)
def test_drop_schedules_by_name(schedule, expected):
    method = kso.RigL(update_every=2, drop_fraction=0.4, end_step=8, drop_schedule=schedule)
    _, recorder, _ = fit(method)
    now = [recorder.logs[step - 1]["drop_fraction"] for step in (2, 4, 8)]
    np.testing.assert_allclose(now, expected)


def test_drop_fraction_schedule_of_keras():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([4], [0.5, 0.0])
    _, recorder, _ = fit(kso.SET(3, schedule, end_step=100))
    assert recorder.update_steps == [3]
    assert recorder.logs[3]["drop_fraction"] == pytest.approx(0.5)


def test_static_never_changes_and_logs():
    several = {} if keras.backend.backend() == "torch" else {"steps_per_execution": 2}
    _, recorder, history = fit(kso.Static(), compile_args=several)
    assert recorder.update_steps == []
    assert history.history["mask_change"] == [0.0, 0.0]
    assert history.history["drop_fraction"] == [0.0, 0.0]


@BOTH
def test_logs_reach_history_csv_and_tensorboard(name, tmp_path, capsys):
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    callbacks = [logger]
    if keras.backend.backend() == "tensorflow":
        callbacks.append(keras.callbacks.TensorBoard(tmp_path / "tb", update_freq=1))
    model = mlp()
    _, recorder, history = fit(METHODS[name](), model=model, callbacks=callbacks)
    names = {"sparsity", "drop_fraction", "itop_rate", "mask_change", "dead_neurons"}
    assert names <= set(history.history) and names == set(recorder.logs[0])
    with open(tmp_path / "log.csv") as file:
        assert names <= set(csv.DictReader(file).fieldnames)
    size = sum(array(weight).size for weight in kso.sparse_weights(model))
    active = sum(m.sum() for m in recorder.masks[-1])
    assert history.history["sparsity"][-1] == pytest.approx(1 - active / size)
    assert history.history["itop_rate"][-1] == pytest.approx(kso.itop_rate(recorder.masks))
    step = recorder.update_steps[0]
    new = sum((b & ~a).sum() for a, b in zip(*recorder.masks[step - 1 : step + 1]))
    assert recorder.logs[step - 1]["mask_change"] == pytest.approx(new / active)
    if keras.backend.backend() == "tensorflow":
        events = list((tmp_path / "tb" / "train").glob("events*"))
        text = b"".join(path.read_bytes() for path in events)
        assert b"itop_rate" in text and b"mask_change" in text


@pytest.mark.parametrize("compiled", [False, True])
def test_dead_neurons_are_logged(compiled):
    """Of a kernel (4, 3): the first neuron has weights, the second none, the third gets one."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, use_bias=False)])
    model.layers[0].set_weights([np.array([[3, 0, 0], [0.1, 0, 0], [2, 0, 0], [4.0, 0, 0]])])
    kso.masks_from_zeros(model)
    model.compile(kso.SparseOpt(keras.optimizers.SGD(0.0)), loss="mse")
    x, y = np.ones((8, 4), "float32") * [1, 2, 3, 4], np.zeros((8, 3), "float32")
    y[:, 2] = 1  # the only gradient at inactive weights is the third neuron's, largest at input 4
    y[:, 0] = model.predict(x, verbose=0)[:, 0]
    callback = kso.RigL(2, 0.25, drop_schedule="constant", end_step=3, compiled=compiled)
    history = model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[callback]).history
    assert history["dead_neurons"] == [2, 1, 1]


def test_progress_bar_shows_the_logs(capsys):
    model = compiled(mlp(), sgd())
    x, y = data()
    model.fit(x, y, verbose=2, batch_size=4, callbacks=[kso.RigL(3)])
    assert "itop_rate" in capsys.readouterr().out


def test_intervals_are_optimizer_steps_under_accumulation():
    optimizer = kso.SparseOpt(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    _, recorder, _ = fit(kso.RigL(3, 0.5, end_step=100), optimizer)
    assert recorder.update_steps == [6, 12]


@BOTH
def test_steps_per_execution(name):
    run = fit(METHODS[name](update_every=4, end_step=100), compile_args={"steps_per_execution": 2})
    plain = fit(METHODS[name](update_every=4, end_step=100))
    for a, b in zip(run[1].masks[-1], plain[1].masks[-1]):
        assert np.array_equal(a, b)


class Overflow(keras.layers.Layer):
    """Multiplies by infinity at certain training steps, so that gradients are not finite."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.count = self.add_weight(shape=(), dtype="int32", trainable=False)

    def call(self, x, training=False):
        if not training:
            return x
        self.count.assign(self.count + 1)
        hit = keras.ops.any(keras.ops.equal(self.count, np.array(self.steps)))
        return x * keras.ops.cast(keras.ops.where(hit, np.inf, 1.0), x.dtype)


def with_overflow(steps):
    model = mlp()
    x = keras.Input((12,))
    y = Overflow(steps)(model(x))
    return keras.Model(x, y)


def test_skipped_steps_of_loss_scaling_neither_count_nor_update():
    optimizer = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=8.0)
    # Step 3 is skipped, so the third optimizer step is the fourth batch.
    model, recorder, _ = fit(kso.RigL(3, 0.5, end_step=100), optimizer,
                             model=with_overflow([3]))  # fmt: skip
    assert recorder.update_steps == [4, 7, 10, 13, 16]
    assert int(array(sparse_opt(model).iterations)) == 15


def test_no_mask_is_computed_from_a_gradient_that_is_not_finite(capsys):
    model = compiled(with_overflow([3]), sgd())
    before = masks_of(model)
    x, y = data(12)
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[kso.RigL(3, 0.5, end_step=100)])
    assert all(np.array_equal(a, b) for a, b in zip(before, masks_of(model)))
    expected = "RigL: the dense gradient is not finite at step 3; the masks stay as they are."
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("callback", [kso.RigL(3, 0.5, end_step=100), kso.GradientFlow(3)])
def test_a_model_that_lets_no_gradient_through_is_told(callback):
    inner = mlp()
    inputs = keras.Input((12,))
    model = compiled(keras.Model(inputs, 0 * inner(inputs)), sgd())
    before = masks_of(model)
    x, y = data(12)
    with pytest.warns(
        UserWarning, match="does nothing: the dense gradients of all its weights are 0"
    ):
        model.fit(x, y, batch_size=4, verbose=0, callbacks=[callback])
    assert all(np.array_equal(a, b) for a, b in zip(before, masks_of(model)))


@BOTH
def test_no_mask_is_computed_from_weights_that_are_not_finite(name, capsys):
    model = compiled(mlp(), sgd())
    kernel = kso.sparse_layers(model)[1].kernel
    kernel.assign(np.where(array(kernel) == array(kernel).max(), np.nan, array(kernel)))
    before = masks_of(model)
    x, y = data(12)
    model.fit(
        x, y, batch_size=4, verbose=0, callbacks=[METHODS[name](update_every=3, end_step=100)]
    )
    assert all(np.array_equal(a, b) for a, b in zip(before, masks_of(model)))
    assert "not finite at step 3; the masks stay as they are" in capsys.readouterr().out


def test_dense_gradients_are_freed_after_fit():
    model, _, _ = fit(kso.RigL(3))
    assert not sparse_opt(model).kept_gradients and not sparse_opt(model).transient_variables[2:]
    x, y = data()
    model.fit(x, y, verbose=0)  # the train function is made anew, without the taps
    assert_invariants(model)


def test_custom_loop_equals_fit():
    def make():
        keras.utils.set_random_seed(1)
        return compiled(mlp(), sgd())

    x, y = data(32)
    fitted = make()
    fitted.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0,
               callbacks=[kso.RigL(3, 0.5)])  # fmt: skip
    model = make()
    model.optimizer.build(model.trainable_variables)
    rigl = kso.RigL(3, 0.5)
    assert rigl.begin(model.optimizer, total_steps=16)
    for _ in range(2):
        for i in range(0, 32, 4):
            model.train_on_batch(x[i : i + 4], y[i : i + 4])
            logs = rigl.step()
    rigl.end()
    assert {"sparsity", "drop_fraction", "itop_rate", "mask_change", "dead_neurons"} == set(logs)
    for a, b in zip(masks_of(fitted), masks_of(model)):
        assert np.array_equal(a, b)
    for a, b in zip(fitted.weights, model.weights):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-5, atol=1e-6)


def test_a_new_method_is_one_overridden_method():
    class GrowFirst(kso.DynamicSparseTraining):
        def scores(self, weight, mask, gradient, update):
            positions = keras.ops.arange(int(np.prod(mask.shape)), dtype="float32")
            return -keras.ops.reshape(positions, mask.shape)

    model, recorder, _ = fit(GrowFirst(3, 0.9, end_step=1000))
    mask = recorder.masks[-1][0].ravel()
    assert mask[: mask.sum() // 2].mean() > 0.8


def test_updates_do_not_trace_the_train_step_again():
    traces = []

    class Counting(keras.layers.Layer):
        def call(self, x):
            traces.append(1)
            return x

    inner = mlp()
    x = keras.Input((12,))
    model = keras.Model(x, Counting()(inner(x)))
    traces.clear()
    fit(kso.RigL(3, 0.5, end_step=100), model=model, epochs=3)
    assert len(traces) <= 2


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = kso.SparseDense(16, sparsity=0.8, seed=1, use_bias=False)
        self.norm = keras.layers.BatchNormalization()
        self.head = kso.SparseDense(3, sparsity=0.5, seed=2, skew_correction=False)

    def call(self, x, training=False):
        return self.head(keras.ops.relu(self.norm(self.hidden(x), training=training)))


@BOTH
@pytest.mark.parametrize("kind", ["subclassed", "Sequential without Input"])
def test_a_model_that_is_first_built_inside_of_fit(name, kind):
    model = Subclassed()
    if kind != "subclassed":
        model = keras.Sequential(
            [
                kso.SparseDense(16, sparsity=0.8, seed=1),
                keras.layers.BatchNormalization(),
                kso.SparseDense(3, sparsity=0.5, seed=2),
            ]
        )
    model = compiled(model, sgd())
    x, y = data(32)
    callback = METHODS[name](end_step=100)
    changes = []

    class Watch(AfterEachStep):
        def see(self, logs):
            changes.append(float(array(self.model.optimizer.mask_change)))

    model.fit(x, y, batch_size=4, verbose=0, callbacks=[callback, Watch()])
    assert max(changes) > 0
    assert_invariants(model)


@pytest.mark.backend("tensorflow")  # on JAX, Keras itself wants a new optimizer then
@BOTH
def test_layers_frozen_later_keep_their_topology(name):
    model, _, _ = fit(METHODS[name]())
    frozen, other = kso.sparse_layers(model)
    frozen.trainable = False
    compiled(model, model.optimizer)
    before = array(frozen.kernel), array(frozen.kernel_mask), array(other.kernel_mask)
    x, y = data(32)
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[METHODS[name](end_step=1000)])
    assert np.array_equal(before[0], array(frozen.kernel))
    assert np.array_equal(before[1], array(frozen.kernel_mask))
    assert not np.array_equal(before[2], array(other.kernel_mask))


@pytest.mark.backend("tensorflow")
def test_a_train_step_compiled_before_begin_is_found_out():
    import tensorflow as tf

    model, optimizer = mlp(), sgd()
    optimizer.build(model.trainable_variables)
    compute = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    x, y = data(8)

    @tf.function
    def train_step():
        with tf.GradientTape() as tape:
            value = compute(y, model(x, training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

    train_step()
    rigl = kso.RigL(1, end_step=100)
    assert rigl.begin(optimizer)
    train_step()
    with pytest.raises(ValueError, match="compiled before `begin`"):
        rigl.step()


@pytest.mark.backend("tensorflow")  # JAX knows no missing gradients, only zeros
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_layer_without_loss_keeps_its_topology():
    inputs = keras.Input((12,))
    used, unused = kso.SparseDense(3, sparsity=0.5), kso.SparseDense(3, sparsity=0.5)
    model = keras.Model(inputs, [used(inputs), unused(inputs)])
    model.compile(optimizer=sgd(), loss=[keras.losses.MeanSquaredError(), None])
    before = masks_of(model)
    x, y = data(32)
    model.fit(
        x, [y[:, None], y[:, None]], batch_size=4, verbose=0,
        callbacks=[kso.RigL(2, 0.5, end_step=100)],
    )  # fmt: skip
    after = masks_of(model)
    assert not np.array_equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])


def test_annealing_starts_anew_in_a_second_fit():
    model, _, _ = fit(kso.SET(2, 0.8), epochs=6)
    recorder = Recorder(kso.SET(2, 0.8))
    x, y = data(32)
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[recorder.method, recorder])
    # 8 steps, updates before the sixth: cos(π · t / 6)
    fractions = [recorder.logs[i]["drop_fraction"] for i in (1, 3)]
    assert fractions == pytest.approx([0.4 * (1 + np.cos(np.pi * t / 6)) for t in (2, 4)])


def test_restored_best_weights_bring_their_masks():
    stopping = keras.callbacks.EarlyStopping(
        monitor="loss", mode="max", patience=1, restore_best_weights=True
    )
    model, _, _ = fit_raw(kso.RigL(2, 0.5, end_step=1000), [stopping], epochs=4)
    for layer in kso.sparse_layers(model):
        assert not array(layer.kernel)[~array(layer.kernel_mask)].any()
    fit(kso.Static(), model.optimizer, model=model)  # takes the masks over


def fit_raw(method, callbacks, epochs):
    model = compiled(mlp(), sgd())
    x, y = data(32)
    history = model.fit(
        x, y, epochs=epochs, batch_size=4, verbose=0, callbacks=[method, *callbacks]
    )
    return model, None, history


@pytest.mark.parametrize("kind", [kso.RigL, kso.SET])
def test_many_updates_neither_retrace_nor_lose_a_weight(kind):
    """A short version of benchmarks/soak.py, which also watches memory and time."""
    from soak import soak

    row = soak(kind, updates=40)
    assert row["updates"] == 40 and row["counts exact"] and row["ITOP rate"] > 0.1
    assert row["traces after first update"] == (None if keras.backend.backend() == "torch" else 0)


@pytest.mark.parametrize("name", ["optimizer", "mine"])
def test_an_optimizer_is_found_by_each_of_its_names(name):
    model = compiled(mlp(), kso.SparseOpt("sgd"))
    model.mine = model.optimizer
    before = masks_of(model)
    x, y = data()
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[kso.RigL(2, end_step=9, optimizer=name)])
    assert not all(np.array_equal(a, b) for a, b in zip(before, masks_of(model)))
