"""Masks that hang on weights: files, weights that come from elsewhere, leases, compiled updates."""

import gc
import pickle

import keras
import numpy as np
import pytest
from helpers import AfterEachStep, array, assert_invariants, compiled, data, masks_of
from keras import layers, ops

import keras_sparseopt as kso
from keras_sparseopt import masks
from keras_sparseopt.backend import compiled as compile_function
from keras_sparseopt.backend import host
from keras_sparseopt.structures import units_of


def network(sparsity=0.6, seed=0, inner=None, structure=None, is_large=False):
    """Dense layers, Batch Normalization and Dropout; attention and a recurrent cell if large."""
    keras.utils.set_random_seed(3)
    inputs = x = keras.Input((12,))
    if is_large:
        x = layers.Reshape((4, 3))(x)
        x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
        x = layers.Bidirectional(layers.LSTM(4, name="lstm"), name="recurrent")(x)
    x = layers.BatchNormalization()(layers.Dense(16, name="hidden")(x))
    x = layers.Dropout(0.2, name="dropout")(layers.Dense(8, name="second")(x))
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    kso.sparsify(model, sparsity, seed=seed, structure=structure)
    optimizer = kso.SparseOpt(inner or keras.optimizers.Adam(0.01))
    # What is tested is not how TensorFlow compiles a step.
    return compiled(model, optimizer, jit_compile=keras.backend.backend() == "jax")


def train(model, first=0, last=1, callbacks=None, method=None):
    x, y = data()
    method = method or kso.RigL(3, 0.5, end_step=100)
    return model.fit(
        x, y, batch_size=4, shuffle=False, verbose=0, initial_epoch=first, epochs=last,
        callbacks=[method, *(callbacks or [])] if method != "none" else callbacks,
    )  # fmt: skip


def state(model):
    generators = [v for v in model.variables if "seed_generator" in v.path]
    return [array(v) for v in [*model.weights, *generators, *model.optimizer.variables]]


def assert_same(a, b):
    assert all(np.array_equal(x, y) for x, y in zip(state(a), state(b), strict=True))


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("where", [".keras", ".weights.h5", "pickle", "checkpoint"])
def test_comes_back_and_trains_on_bit_for_bit(where, tmp_path):
    def no_dropout(model):  # its generator is in no file of Keras
        for layer in model.layers:
            if isinstance(layer, layers.Dropout):
                layer.rate = 0.0
        return model

    is_large = where != ".keras"  # which is in `make test`
    model = no_dropout(network(is_large=is_large))
    train(model, 0, 2)
    path = str(tmp_path / f"file{where}")
    if where == ".keras":
        model.save(path)
        loaded = keras.models.load_model(path)
        assert not any(type(x).__module__.startswith("keras_sparseopt") for x in loaded.layers)
    elif where == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        loaded = network(seed=9, is_large=is_large)
        loaded.optimizer.build(loaded.trainable_variables)
        if where == "checkpoint":
            if keras.backend.backend() != "tensorflow":
                pytest.skip("tf.train.Checkpoint")
            import tensorflow as tf

            both = {"model": model, "optimizer": model.optimizer}
            saved = tf.train.Checkpoint(**both).save(path)
            both = {"model": loaded, "optimizer": loaded.optimizer}
            tf.train.Checkpoint(**both).restore(saved).assert_existing_objects_matched()
        else:
            model.save_weights(path)
            loaded.load_weights(path)
    no_dropout(loaded)
    assert masks_of(model) and all(
        np.array_equal(a, b) for a, b in zip(masks_of(model), masks_of(loaded), strict=True)
    )
    assert loaded.optimizer.itop_rate() == model.optimizer.itop_rate()
    names = [weight.topology.name for weight in kso.sparse_weights(model)]
    assert names == [weight.topology.name for weight in kso.sparse_weights(loaded)]
    train(model, 2, 4)
    train(loaded, 2, 4)
    weights = [array(v) for v in model.weights]
    assert all(np.array_equal(a, array(b)) for a, b in zip(weights, loaded.weights))
    assert all(np.array_equal(a, b) for a, b in zip(masks_of(model), masks_of(loaded)))
    assert_invariants(loaded)


@pytest.mark.parametrize("own", [True, False])
def test_backups_resume_exactly(own, tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    kind = kso.BackupAndRestore if own else keras.callbacks.BackupAndRestore

    def run(directory, more=(), seed=0):
        model = network(seed=seed, is_large=own)
        if not own:  # Keras' file lacks the generator of Dropout
            model.get_layer("dropout").rate = 0.0
        train(model, 0, 4, [kind(directory), *more])
        return model

    straight = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", [Stop()])
    resumed = run(tmp_path / "b", seed=7)
    weights = [array(v) for v in straight.weights]
    assert all(np.array_equal(a, array(b)) for a, b in zip(weights, resumed.weights))
    assert all(np.array_equal(a, b) for a, b in zip(masks_of(straight), masks_of(resumed)))


def test_without_the_optimizer_masks_come_from_zeros(tmp_path):
    model = network()
    train(model)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras", compile=False)
    assert not kso.sparse_weights(loaded)
    assert kso.masks_from_zeros(loaded) is loaded
    for weight in kso.sparse_weights(loaded):
        topology = weight.topology
        assert np.array_equal(array(topology.mask), array(weight) != 0)
    train(compiled(loaded, kso.SparseOpt("sgd")))
    assert_invariants(loaded)


def test_stripped_file_needs_no_package(tmp_path):
    model = network()
    train(model)
    kso.strip(model).save(tmp_path / "m.keras")
    import zipfile

    config = zipfile.ZipFile(tmp_path / "m.keras").read("config.json")
    assert b"keras_sparseopt" not in config


# ---------------------------------------------------------------------- weights win


def other_weights(model):
    """The weights of such a model with other masks of the same sizes."""
    return network(seed=8).get_weights()


@pytest.mark.parametrize("with_callback", [True, False])
@pytest.mark.parametrize("how", ["set_weights", "load_weights", "assign"])
def test_weights_win(how, with_callback, tmp_path):
    model = network(inner=keras.optimizers.SGD(0.05, momentum=0.9))
    train(model)
    counts = [mask.sum() for mask in masks_of(model)]
    weights = other_weights(model)
    if how == "set_weights":
        model.set_weights(weights)
    elif how == "load_weights":
        other = network(seed=8)
        keras.Model(other.inputs, other.outputs).save_weights(tmp_path / "w.weights.h5")
        plain = keras.Model(model.inputs, model.outputs)
        plain.load_weights(tmp_path / "w.weights.h5")
    else:
        for variable, value in zip(model.weights, weights):
            variable.assign(value)
    for variable, value in zip(model.weights, weights):
        np.testing.assert_array_equal(array(variable), value)  # nothing is lost
    assert [mask.sum() for mask in masks_of(model)] == counts
    for weight in kso.sparse_weights(model):
        assert array(weight.topology.mask)[array(weight) != 0].all()
    assert_invariants(model)
    before = masks_of(model)
    train(model, method=None if with_callback else "none")
    assert_invariants(model)
    assert [mask.sum() for mask in masks_of(model)] == counts
    changed = any(not np.array_equal(a, b) for a, b in zip(before, masks_of(model)))
    assert changed == with_callback


@pytest.mark.parametrize("with_callback", [True, False])
def test_restored_best_weights_bring_masks_and_clear_slots(with_callback):
    stopping = keras.callbacks.EarlyStopping("loss", patience=1, mode="max",
                                             restore_best_weights=True)  # fmt: skip
    model, seen = network(), []

    class See(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(self.model.get_weights())

    half = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 1.0)
    train(model, 0, 4, [See(), stopping], kso.RigL(2, half, end_step=1000))
    for value, best in zip(model.get_weights(), seen[stopping.best_epoch]):
        np.testing.assert_array_equal(value, best)
    assert stopping.best_epoch < len(seen) - 1
    assert_invariants(model)  # masks follow, and slots
    train(model, method=None if with_callback else "none")
    assert_invariants(model)


def test_a_checkpoint_of_the_model_alone_is_noticed_by_the_callback(tmp_path):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("tf.train.Checkpoint")
    import tensorflow as tf

    saved = tf.train.Checkpoint(model=network(seed=8)).write(str(tmp_path / "c"))
    model = network()
    train(model)
    tf.train.Checkpoint(model=model).restore(saved).expect_partial()
    train(model, method=kso.Static())
    assert_invariants(model)


def test_a_wrong_assignment_changes_nothing():
    model = network()
    weight = kso.sparse_weights(model)[0]
    before, mask = array(weight), array(weight.topology.mask)
    with pytest.raises(ValueError, match="denser than its mask"):
        weight.assign(np.ones(before.shape))
    assert np.array_equal(before, array(weight))
    assert np.array_equal(mask, array(weight.topology.mask))


def plain(units=8):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(units, name="a"), layers.Dense(2)])
    return kso.sparsify(model, 0.5)


def test_a_step_compiled_under_another_optimizer_follows_a_new_mask():
    """On JAX the mask is a constant of that step."""
    model = plain()
    model.compile("adam", "mse")
    x, y = np.random.rand(8, 6).astype("float32"), np.random.rand(8, 2)
    model.fit(x, y, verbose=0)
    weight = kso.sparse_weights(model)[0]
    new = ~array(weight.topology.mask)
    kso.set_mask(weight, new)
    model.fit(x, y, epochs=3, verbose=0)
    assert not array(weight)[~new].any() and array(weight)[new].any()


def test_eager_steps_of_another_optimizer_are_held():
    model = plain()
    optimizer = keras.optimizers.SGD(0.1)
    variables = model.trainable_variables
    for _ in range(2):
        optimizer.apply([ops.ones(v.shape) for v in variables], variables)
    for weight in kso.sparse_weights(model):
        mask = array(weight.topology.mask)
        assert not array(weight)[~mask].any() and array(weight)[mask].all()


def test_a_file_of_a_model_that_was_frozen_after_training(tmp_path):
    model = plain()
    model.compile(kso.SparseOpt("sgd"), "mse")
    x, y = np.random.rand(8, 6).astype("float32"), np.random.rand(8, 2)
    model.fit(x, y, verbose=0)
    model.get_layer("a").trainable = False
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    kso.strip(loaded)
    kso.masks_from_zeros(loaded, include="a")
    found, own = ([w.topology.sparsity for w in kso.sparse_weights(m)] for m in (loaded, model))
    assert found == own


@pytest.mark.filterwarnings("ignore:`build..` was called on layer 'net'")  # Keras' own, of such
def test_layers_that_only_training_calls_need_not_be_built():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.augment, self.head = layers.RandomFlip(), layers.Dense(3)

        def call(self, x, training=False):
            x = self.augment(x) if training else x
            return self.head(layers.Flatten()(x))

    net = Net()
    net(np.ones((2, 4, 4, 1), "float32"))
    assert len(kso.sparse_weights(kso.sparsify(net, 0.5))) == 1


def test_a_callback_may_be_evaluated_first():
    model = network()
    x, y = data()
    model.evaluate(x, y, verbose=0, callbacks=[kso.RigL()])


def test_what_hangs_on_weights_says_what_it_is():
    model = network()
    optimizer = model.optimizer
    assert repr(kso.SparseOpt("sgd")) == "<SparseOpt around <SGD>, not built>"
    wrapped = repr(kso.SparseOpt(kso.HAM("adam")))
    assert wrapped == "<SparseOpt around <HAM around <Adam>>, not built>"
    optimizer.build(model.trainable_variables)
    weights = kso.sparse_weights(model)
    active = sum(weight.topology.num_active() for weight in weights)
    sparsity = 1 - active / sum(array(weight).size for weight in weights)
    told = f"{len(weights)} sparse weights, {sparsity:.2%} sparse"
    assert repr(optimizer) == f"<SparseOpt around <Adam>, {told}>"
    topology = weights[0].topology
    shape = "×".join(map(str, topology.shape))
    expected = f"'{topology.name}': {shape}, {topology.sparsity:.2%} sparse, Unstructured(), masked"
    assert repr(topology) == f"<Topology of {expected}>"


def test_moved_weights_are_told(capsys):
    model = network()
    weight = kso.sparse_weights(model)[0]
    with weight.topology.moving():  # as an assignment past the variable would
        weight.assign(np.ones(weight.shape))
    kso.summary(model)
    assert "NOT HELD" in capsys.readouterr().out
    with pytest.raises(ValueError, match="denser than its mask"):
        train(model)


def test_what_is_sparse_is_told_at_the_start_of_training(capsys):
    model = network()
    x, y = data()
    model.fit(x, y, verbose=2, batch_size=8,
              callbacks=[kso.GradientFlow(2), kso.RigL(2)])  # fmt: skip
    text = capsys.readouterr().out
    assert text.count("of the 344 kernel weights have a mask") == 1, text


# ---------------------------------------------------------------------- compiled updates


METHODS = {
    "RigL": lambda **k: kso.RigL(2, 0.5, end_step=100, **k),
    "RigL corrected": lambda **k: kso.RigL(
        2, 0.5, end_step=100, growth_gradient="corrected", gradient_steps=2, **k
    ),
    "SET": lambda **k: kso.SET(2, 0.5, end_step=100, seed=4, **k),
    "SNFS": lambda **k: kso.SNFS(2, 0.5, end_step=100, **k),
    "MEST": lambda **k: kso.MEST(2, 0.5, end_step=100, gradient_weight=0.5, **k),
    "GMP": lambda **k: kso.GMP(0.9, 2, end_step=12, **k),
    "GMP global": lambda **k: kso.GMP(0.9, 2, end_step=12, scope="global", **k),
    "GraNet": lambda **k: kso.GraNet(0.9, 2, end_step=12, initial_sparsity=0.3, **k),
    "SRigL": lambda **k: kso.SRigL(2, 0.5, end_step=100, min_salient=0.5, **k),
}


@pytest.mark.parametrize("name", METHODS)
def test_compiled_updates_equal_those_on_the_host(name):
    def run(where):
        structure = kso.ConstantFanIn() if name == "SRigL" else None
        inner = keras.optimizers.SGD(0.05, momentum=0.9)
        model = network(0.3, inner=inner, structure=structure)
        history = train(model, 0, 2, method=METHODS[name](compiled=where)).history
        assert_invariants(model)
        return state(model), history

    (host_state, host_logs), (compiled_state, compiled_logs) = run(False), run(True)
    for a, b in zip(host_state, compiled_state, strict=True):
        if a.dtype.kind == "f":  # the correction's root, and mask_change
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
        else:
            assert np.array_equal(a, b)
    for log, values in host_logs.items():
        np.testing.assert_allclose(values, compiled_logs[log], rtol=1e-5)


def test_layers_sparse_by_construction_move_compiled_as_well():
    def run(where):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((12,)), kso.SparseDense(16, sparsity=0.7, seed=1),
             layers.BatchNormalization(), kso.SparseDense(3, sparsity=0.5, seed=2)]
        )  # fmt: skip
        compiled(model, kso.SparseOpt("sgd"))
        train(model, 0, 2, method=METHODS["RigL"](compiled=where))
        assert_invariants(model)
        return masks_of(model)

    assert all(np.array_equal(a, b) for a, b in zip(run(False), run(True)))


@pytest.mark.backend("tensorflow", "jax")  # nothing is compiled on PyTorch
def test_updates_are_compiled_once_for_all_fits(monkeypatch):
    traced = []
    original = masks.drop_and_grow

    def counting(*args):
        traced.append(1)
        return original(*args)

    monkeypatch.setattr(masks, "drop_and_grow", counting)
    model = network()
    train(model, method=METHODS["RigL"](compiled=True))
    once = len(traced)
    assert 0 < once <= len({tuple(w.shape) for w in kso.sparse_weights(model)}) + 1
    for _ in range(3):
        train(model, method=METHODS["RigL"](compiled=True))
    assert len(traced) == once


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 2, 3, 4), (40, 50)])
def test_compiled_ranking_equals_the_host(shape):
    """Ties, infinities, NaN and both zeros; pruning, growing, bits, draws, what follows weights."""
    rng = np.random.default_rng(0)
    values = np.array([0, -0.0, 1, -1, 0.5, 1e-30, 3e38, np.inf, -np.inf, np.nan, 2], "float32")
    units = units_of(kso.Unstructured(), shape, (len(shape) - 1,), ())
    run = compile_function(
        lambda w, m, s, n: (
            masks.drop_and_grow(w, m, s, n), masks.prune(w, m, n), masks.packed(m),
            masks.count_packed(masks.packed(m)), masks.random_scores(m, 2**40 + 1, 3, n),
            units.fit(w, m),
        )
    )  # fmt: skip
    for turn in range(8):
        w = rng.choice(values, shape) if turn % 2 else rng.normal(size=shape).astype("float32")
        s = rng.choice(values, shape) if turn % 4 < 2 else rng.normal(size=shape).astype("float32")
        mask = rng.random(shape) < 0.4
        n = int(rng.integers(0, mask.sum() + 1))
        tensors = [ops.convert_to_tensor(x) for x in (w, mask, s, np.int32(n))]
        new, pruned, packed, count, draws, fit = run(*tensors)
        assert np.array_equal(host(new), kso.drop_and_grow(w, mask, s, n))
        assert np.array_equal(host(pruned), masks.prune(w, mask, n))
        assert np.array_equal(host(packed), masks.packed(mask))
        assert int(host(count)) == mask.sum() == masks.count_packed(masks.packed(mask))
        assert np.array_equal(host(draws), masks.random_scores(mask, 2**40 + 1, 3, n))
        expected = units.fit(w, mask)
        assert [int(host(x)) for x in fit[:3]] == [int(x) for x in expected[:3]]
        assert np.array_equal(host(fit[3]), expected[3])


def test_random_scores_are_uniform_and_the_same_everywhere():
    draws = masks.random_scores(np.zeros((200, 500), bool), 0, 1, 2)
    # Known bits: another version or backend must draw the same.
    assert draws.ravel()[:3].tolist() == masks.random_scores(np.zeros((3,), bool), 0, 1, 2).tolist()
    assert abs(draws.mean() - 0.5) < 0.003 and abs(draws.std() - 12**-0.5) < 0.002
    assert len(np.unique(draws)) > 99_000
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (2**32, 1, 2)):
        again = masks.random_scores(np.zeros((200, 500), bool), *other)
        assert abs(np.corrcoef(draws.ravel(), again.ravel())[0, 1]) < 0.015


# ---------------------------------------------------------------------- leases and steps


def counting_network():
    traces = []

    class Count(layers.Layer):
        def call(self, x):
            traces.append(1)
            return x

    inputs = keras.Input((12,))
    x = layers.Dense(8)(Count()(inputs))
    model = keras.Model(inputs, layers.Dense(3)(x))
    kso.sparsify(model, 0.5)
    traces.clear()
    return compiled(model, kso.SparseOpt("sgd")), traces


@pytest.mark.filterwarnings("ignore:The schedule of RigL begins anew")
def test_fits_do_not_compile_the_step_again():
    model, traces = counting_network()
    for _ in range(4):
        train(model, method=kso.RigL(2))  # its gradients end at 75 % of each fit
    assert len(traces) <= 3  # with and without gradients, and Keras' own look
    assert not model.optimizer.kept_gradients


def test_gradients_are_kept_until_the_end_of_a_short_fit():
    model, _ = counting_network()
    kept = []

    class Look(AfterEachStep):
        def see(self, logs):
            kept.append(len(self.model.optimizer.kept_gradients))

    train(model, method=kso.RigL(2, end_step=5), callbacks=[Look()])
    assert kept == [1] * 8  # so few steps are not worth another compilation


def test_an_interrupted_fit_gives_its_gradients_back():
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                raise KeyboardInterrupt

    model, _ = counting_network()
    with pytest.raises(KeyboardInterrupt):
        train(model, callbacks=[Interrupt()])
    gc.collect()
    assert not model.optimizer.kept_gradients
    rigl = kso.RigL(2, end_step=100)
    with pytest.raises(KeyboardInterrupt):
        train(model, method=rigl, callbacks=[Interrupt()])
    train(model, method=rigl)  # the same object, still alive
    assert not model.optimizer.kept_gradients
    assert_invariants(model)


def test_leases_are_counted():
    model, _ = counting_network()
    model.optimizer.build(model.trainable_variables)
    flow, rigl = kso.GradientFlow(1), kso.RigL(1, end_step=100)
    assert flow.begin(model.optimizer, 10) and not rigl.begin(model.optimizer, 10)
    flow.end()
    x, y = data(4)
    model.train_on_batch(x, y)
    rigl.step()  # still has its gradients
    assert model.optimizer.kept_gradients
    rigl.end()
    assert not model.optimizer.kept_gradients


@pytest.mark.backend("jax")  # Keras has none on TensorFlow
def test_asynchronous_dispatch_stays_on():
    methods = [kso.RigL(), kso.SET(), kso.GMP(), kso.GradientFlow()]
    assert keras.callbacks.CallbackList(methods)._async_train


def test_an_update_after_the_last_step_comes_before_validation_and_saving(tmp_path):
    """Eight steps an epoch, an update at the eighth."""
    seen = {}

    class See(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            seen["validation"] = masks_of(self.model)

    model = network()
    before = masks_of(model)
    x, y = data()
    path = tmp_path / "m.keras"
    half = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 1.0)
    model.fit(
        x, y, batch_size=4, verbose=0, validation_data=(x, y),
        callbacks=[kso.SET(8, half, end_step=9), See(), keras.callbacks.ModelCheckpoint(path)],
    )  # fmt: skip
    saved = masks_of(keras.models.load_model(path))
    for now, at_validation, in_file in zip(masks_of(model), seen["validation"], saved):
        assert np.array_equal(now, at_validation) and np.array_equal(now, in_file)
    assert any(not np.array_equal(a, b) for a, b in zip(before, saved))


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_unknown_length_is_known_from_the_second_epoch_on():
    x, y = data()

    def batches():
        for i in range(0, 32, 4):
            yield x[i : i + 4], y[i : i + 4]

    model = network()
    train(model)
    before = masks_of(model)
    half = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 1.0)
    callbacks = [kso.SET(2, half)]
    model.fit(batches(), initial_epoch=1, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    assert any(not np.array_equal(a, b) for a, b in zip(before, masks_of(model)))


@pytest.mark.backend("jax")
def test_stateless_step_in_a_loop_of_ones_own():
    """Equal to `fit`; `step`, which would do nothing there, says so."""
    import jax

    def make():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((12,)), layers.Dense(16), layers.BatchNormalization()]
        )
        model.add(layers.Dense(3))
        kso.sparsify(model, 0.6)
        return compiled(model, kso.SparseOpt(keras.optimizers.SGD(0.05, momentum=0.9)))

    def method():
        return kso.RigL(2, 0.5, end_step=7, growth_values="random")

    fitted = make()
    train(fitted, method=method())
    model = make()
    optimizer, rigl = model.optimizer, method()
    optimizer.build(model.trainable_variables)
    rigl.begin(optimizer)
    loss = model.loss

    def value(trainable, fixed, x, y):
        outputs, fixed = model.stateless_call(trainable, fixed, x, training=True)
        return loss(y, outputs), fixed

    @jax.jit
    def step(trainable, fixed, state, x, y):
        gradients, fixed = jax.grad(value, has_aux=True)(trainable, fixed, x, y)
        trainable, state = optimizer.stateless_apply(state, gradients, trainable)
        state, trainable = rigl.stateless_step(state, trainable)
        return trainable, fixed, state

    groups = model.trainable_variables, model.non_trainable_variables, optimizer.variables
    values = [[variable.value for variable in group] for group in groups]
    x, y = data()
    for i in range(0, 32, 4):
        values = step(*values, x[i : i + 4], y[i : i + 4])
    with pytest.raises(ValueError, match="lives outside of the variables. There, call"):
        for _ in range(8):
            rigl.step()
    for group, new in zip(groups, values):
        for variable, value_ in zip(group, new):
            with getattr(variable, "topology", kso.sparse_weights(model)[0].topology).moving():
                variable.assign(value_)
    assert all(np.array_equal(a, b) for a, b in zip(masks_of(fitted), masks_of(model)))
    assert_invariants(model)
    rigl.end()
    with pytest.raises(NotImplementedError, match="GMP plans its updates on the host"):
        gmp = kso.GMP(end_step=9)
        gmp.begin(optimizer)
        gmp.stateless_step([], [])


# ---------------------------------------------------------------------- faults of before


def test_srigl_keeps_its_budget_through_files_and_after_pruning(tmp_path):
    model = network(0.0, structure=kso.ConstantFanIn())
    train(model, method=kso.GMP(0.8, 2, end_step=6))
    active = [mask.sum() for mask in masks_of(model)]
    train(model, method=kso.SRigL(2, end_step=100, min_salient=0.0))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    for _ in range(2):
        train(loaded, method=kso.SRigL(2, end_step=100, min_salient=0.0))
    for mask, budget in zip(masks_of(loaded), active):
        assert budget - max(mask.shape) * 3 < mask.sum() <= budget
    assert [mask.sum() for mask in masks_of(loaded)] == [m.sum() for m in masks_of(model)]


@pytest.mark.parametrize("wrap", ["loss scale", "HAM", "LossScale of HAM"])
def test_ema_swap_through_wrappers(wrap):
    inner = keras.optimizers.SGD(0.05, use_ema=True)
    optimizer = kso.SparseOpt(kso.HAM(inner, 10) if "HAM" in wrap else inner)
    if "oss" in wrap:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0)
    model = network()
    compiled(model, optimizer)
    train(model, 0, 2, [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)])
    assert_invariants(model)


def test_a_subclass_of_a_sparse_layer_may_call_super():
    class Doubled(kso.SparseDense):
        def call(self, x):
            return 2 * super().call(x)

    class Scaled(keras.layers.Dense):
        def call(self, x):
            return 3 * super().call(x)

    from keras_sparseopt.models.layers import SparseLayer

    class Both(SparseLayer, Scaled):
        pass

    x = np.ones((2, 5), "float32")
    for kind, factor in ((Doubled, 2), (Both, 3)):
        layer = kind(4, sparsity=0.5)
        y = array(layer(x))
        kernel = array(layer.kernel) * array(layer.kernel_mask)
        np.testing.assert_allclose(y, factor * x @ kernel, rtol=1e-6)


def test_infinity_at_an_inactive_weight():
    layer = kso.SparseDense(4, sparsity=0.5, seed=0)
    layer.build((None, 6))
    kernel, mask = array(layer.kernel), array(layer.kernel_mask)
    layer.kernel.assign(np.where(mask, kernel, np.inf))
    x = np.ones((2, 6), "float32")
    np.testing.assert_allclose(array(layer(x)), x @ np.where(mask, kernel, 0), rtol=1e-6)


def test_a_backup_that_is_another_archive(tmp_path):
    import hashlib

    path = tmp_path / "epoch-000001.npz"
    np.savez(path, a=np.ones(3))
    path.write_bytes(path.read_bytes() + hashlib.sha256(path.read_bytes()).digest())
    with pytest.raises(ValueError, match="archive of something else"):
        _ = kso.BackupAndRestore(tmp_path).initial_epoch


def test_a_failed_sparsify_changes_nothing():
    inputs = keras.Input((12,))
    model = keras.Model(inputs, layers.Dense(3, name="head")(layers.Dense(5)(inputs)))
    before = model.get_weights()
    for wrong in ({"sparsity": 0.5, "skew_correction": "nothing"}, {"sparsity": 0.99999}):
        with pytest.raises(ValueError):
            kso.sparsify(model, **wrong)
    assert not kso.sparse_weights(model)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights()))
