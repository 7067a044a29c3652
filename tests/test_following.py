"""Copies that have the masks of a model: averages and target networks."""

import keras
import numpy as np
import pytest
from helpers import array, assert_invariants, compiled, data, masks_of
from keras import layers, ops

import keras_sparseopt as kso

BACKEND = keras.backend.backend()
TILES = kso.Block(1, 16, balanced=True)


def network(structure=None):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(16, name="a"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dense(3, name="b"),
        ]
    )
    return kso.sparsify(model, 0.6, exclude="b", structure=structure)


def assert_follows(copy, model):
    assert len(masks_of(copy)) == len(masks_of(model)) > 0
    for one, other in zip(kso.sparse_weights(copy), kso.sparse_weights(model)):
        assert np.array_equal(array(one.topology.mask), array(other.topology.mask))
        assert not array(one.topology.kernel)[~array(one.topology.mask)].any()


class Averaged(keras.Model):
    """A network, and the average of its weights, which the compiled step assigns."""

    def __init__(self, structure=None):
        super().__init__()
        self.network = network(structure)
        self.average = keras.models.clone_model(self.network)
        self.average.set_weights(self.network.get_weights())
        self.average.trainable = False

    def build(self, shape):
        pass

    def call(self, x, training=None):
        return self.network(x, training=training)

    def train_step(self, *arguments):
        logs = super().train_step(*arguments)
        if BACKEND == "jax":
            logs, (trained, others, *rest) = logs
            values = {id(v): x for v, x in zip(self.trainable_variables, trained)}
            values |= {id(v): x for v, x in zip(self.non_trainable_variables, others)}
            for mine, its in zip(self.average.weights, self.network.weights):
                values[id(mine)] = 0.7 * values[id(mine)] + 0.3 * values[id(its)]
            others = [values[id(v)] for v in self.non_trainable_variables]
            return logs, (trained, others, *rest)
        for mine, its in zip(self.average.weights, self.network.weights):
            mine.assign(0.7 * ops.convert_to_tensor(mine) + 0.3 * ops.convert_to_tensor(its))
        return logs


@pytest.mark.parametrize("method", ["RigL", "SET"])
def test_an_average_that_the_compiled_step_assigns(method):
    model = Averaged()
    assert kso.follow(model.average, model.network) is model.average
    compiled(model, kso.SparseOpt(keras.optimizers.SGD(0.2, momentum=0.9)))
    callback = getattr(kso, method)(2, 0.5, end_step=100)
    before = masks_of(model.network)
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            assert_follows(model.average, model.network)
            seen.append(masks_of(model.network))

    model.fit(*data(64), batch_size=8, epochs=4, verbose=0, callbacks=[callback, Look()])
    assert_follows(model.average, model.network)
    assert_invariants(model.network, model.optimizer)
    assert not np.array_equal(seen[0][0], seen[-1][0]) and not np.array_equal(seen[0], before)
    # the average is one: what is active has the values of an average, not those of the network
    assert not np.array_equal(
        array(model.average.layers[0].kernel), array(model.network.layers[0].kernel)
    )


def test_the_average_of_weights_of_whom_masks_move():
    model = compiled(network(), kso.SparseOpt("sgd"))
    model.optimizer.build(model.trainable_variables)
    average = kso.follow(keras.models.clone_model(model), model)
    average.set_weights(model.get_weights())
    weight, mine = kso.sparse_weights(model)[0], kso.sparse_weights(average)[0]
    rng, expected = np.random.default_rng(0), array(mine)
    for step in range(5):
        mask = array(weight.topology.mask)
        if step % 2:
            mask = weight.topology.units.random_mask(int(mask.sum()), step)
            kso.set_mask(weight, mask)
        expected = expected * mask
        assert np.array_equal(array(mine), expected)
        weight.assign(rng.normal(size=mask.shape).astype("float32") * mask)
        expected = np.float32(0.9) * expected + np.float32(0.1) * array(weight)
        mine.assign(expected)
        assert_follows(average, model)


def test_without_following_the_error_says_what_to_do():
    model = network()
    average = keras.models.clone_model(model)
    average.set_weights(model.get_weights())
    kso.masks_from_zeros(average, exclude="b")
    weight, mine = kso.sparse_weights(model)[0], kso.sparse_weights(average)[0]
    kso.set_mask(weight, weight.topology.units.random_mask(weight.topology.num_active(), 5))
    weight.assign(np.where(array(weight.topology.mask), 0.5, 0).astype("float32"))
    with pytest.raises(ValueError, match=r"keras_sparseopt.follow\(copy, model\)"):
        mine.assign(0.5 * array(mine) + 0.5 * array(weight))


@pytest.mark.parametrize("forms", ["model", "copy", "both"])
def test_condensed(forms):
    model = network(TILES)
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    kso.follow(copy, model)
    if forms != "copy":
        kso.condense(model)
    if forms != "model":
        kso.condense(copy)
    assert_follows(copy, model)
    compiled(model, kso.SparseOpt("sgd"))
    before = masks_of(model)
    model.fit(*data(64), batch_size=8, verbose=0, callbacks=[kso.RigL(2, 0.5, end_step=100)])
    assert not np.array_equal(masks_of(model), before)
    assert_follows(copy, model)


def test_following_may_begin_before_there_are_masks(tmp_path):
    model = kso.strip(network())
    copy = keras.models.clone_model(model)
    kso.follow(copy, model)
    assert not kso.sparse_weights(copy)
    kso.sparsify(model, 0.8)
    assert_follows(copy, model)
    kept = masks_of(copy)
    kso.strip(model)
    assert all(np.array_equal(a, b) for a, b in zip(masks_of(copy), kept, strict=True))
    kso.prune(model, 0.7)
    assert_follows(copy, model)
    kso.strip(copy)
    weight = kso.sparse_weights(model)[0]
    kso.set_mask(weight, weight.topology.units.random_mask(weight.topology.num_active(), 5))
    assert not kso.sparse_weights(copy)


def test_files_bring_masks_back_to_what_follows(tmp_path):
    model = compiled(network(), kso.SparseOpt("sgd"))
    model.fit(*data(64), batch_size=8, verbose=0, callbacks=[kso.RigL(2, 0.5, end_step=100)])
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    copy = kso.follow(keras.models.clone_model(loaded), loaded)
    assert_follows(copy, loaded)
    other = compiled(network(), kso.SparseOpt("sgd"))
    other.optimizer.build(other.trainable_variables)
    copy = kso.follow(keras.models.clone_model(other), other)
    model.save_weights(tmp_path / "m.weights.h5")
    other.load_weights(tmp_path / "m.weights.h5")
    assert np.array_equal(masks_of(other), masks_of(model))
    assert_follows(copy, other)


def test_methods_leave_copies_alone_that_the_optimizer_knows():
    inputs = keras.Input((12,))
    model = network()
    copy = keras.Sequential.from_config({**model.get_config(), "name": "copy"})
    copy.set_weights(model.get_weights())
    kso.follow(copy, model)
    both = keras.Model(inputs, model(inputs) + copy(inputs))
    compiled(both, kso.SparseOpt("sgd"))
    both.fit(*data(64), batch_size=8, verbose=0, callbacks=[kso.RigL(2, 0.5, end_step=100)])
    assert_follows(copy, model)
    assert_invariants(both, both.optimizer)


def test_what_a_copy_is_given_goes_with_the_next_change():
    model = network()
    copy = kso.follow(keras.models.clone_model(model), model)
    weight, mine = kso.sparse_weights(model)[0], kso.sparse_weights(copy)[0]
    given = np.random.default_rng(0).normal(size=mine.shape).astype("float32")
    mine.assign(given)  # as a file does, before that of the model brings other masks
    assert np.array_equal(array(mine), given)
    mask = weight.topology.units.random_mask(weight.topology.num_active(), 5)
    kso.set_mask(weight, mask)
    assert np.array_equal(array(mine), given * mask)


def test_a_killed_training_brings_the_average_back(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def run(folder, stop=()):
        model = Averaged()
        model(data(2)[0])  # builds it
        kso.follow(model.average, model.network)
        compiled(model, kso.SparseOpt(keras.optimizers.SGD(0.2, momentum=0.9)))
        rigl = kso.RigL(3, 0.5, end_step=100, redistribution="global")
        model.fit(
            *data(64), batch_size=8, epochs=4, verbose=0, shuffle=False,
            callbacks=[rigl, kso.BackupAndRestore(folder), *stop],
        )  # fmt: skip
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", [Stop()])
    resumed = run(tmp_path / "killed")
    for a, b in zip(whole.variables, resumed.variables, strict=True):
        assert np.array_equal(array(a), array(b)), a.path
    assert_follows(resumed.average, resumed.network)


def test_a_copy_that_is_trained_knows_its_masks():
    model = network()
    fast = kso.strip(keras.models.clone_model(model))
    compiled(fast, "sgd")
    fast.fit(*data(64), batch_size=8, verbose=0)  # its step knows of no mask
    kso.follow(fast, model)
    fast.fit(*data(64), batch_size=8, verbose=0)
    assert_follows(fast, model)


def test_a_copy_cannot_be_trained_by_a_method_of_its_own():
    model = network()
    copy = kso.follow(keras.models.clone_model(model), model)
    compiled(copy, kso.SparseOpt("sgd"))
    with pytest.raises(ValueError, match="follow those of another model.*strip"):
        copy.fit(*data(64), batch_size=8, verbose=0, callbacks=[kso.RigL(2, end_step=100)])
    kso.masks_from_zeros(kso.strip(copy), exclude="b")
    compiled(copy, kso.SparseOpt("sgd"))
    copy.fit(*data(64), batch_size=8, verbose=0, callbacks=[kso.RigL(2, end_step=100)])


def test_pruning_methods_and_condensed_copies():
    model = kso.sparsify(kso.strip(network()), 0.0, exclude="b", structure=TILES)
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    kso.condense(kso.sparsify(copy, 0.5, exclude="b", structure=TILES))
    with pytest.raises(ValueError, match="as many tiles where it is condensed"):
        kso.follow(copy, model)
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    kso.condense(kso.follow(copy, model))
    compiled(model, kso.SparseOpt("sgd"))
    with pytest.raises(ValueError, match="changes how many weights are active"):
        model.fit(*data(64), verbose=0, callbacks=[kso.GMP(0.5, 1, end_step=2)])


def test_layers_sparse_by_construction():
    model = compiled(
        keras.Sequential([keras.Input((12,)), kso.SparseDense(16, sparsity=0.5), layers.Dense(3)]),
        kso.SparseOpt("sgd"),
    )
    copy = kso.follow(keras.models.clone_model(model), model)
    model.fit(*data(64), batch_size=8, verbose=0, callbacks=[kso.RigL(2, 0.5, end_step=100)])
    assert_follows(copy, model)


def test_what_cannot_follow():
    model, other = network(), network()
    with pytest.raises(TypeError, match="must be a Keras model"):
        kso.follow(model, 3)
    with pytest.raises(ValueError, match="`copy` must have the weights of `model`"):
        kso.follow(keras.Sequential([keras.Input((12,)), layers.Dense(4)]), model)
    with pytest.raises(ValueError, match="`copy` must have weights of its own"):
        kso.follow(model, model)
    inputs, one, two = keras.Input((4,)), layers.Dense(4), layers.Dense(4)
    pair = [keras.Model(inputs, b(a(inputs))) for a, b in ((one, two), (two, one))]
    with pytest.raises(ValueError, match="`copy` must have weights of its own"):
        kso.follow(*pair)
    masked = kso.sparsify(kso.strip(network()), 0.5, exclude="b", structure=kso.NM(2, 4))
    with pytest.raises(ValueError, match="must have the structure"):
        kso.follow(masked, model)
    kso.follow(model, other)
    third = kso.follow(network(), model)
    with pytest.raises(ValueError, match="which `model` does not follow"):
        kso.follow(other, third)
    kso.set_mask(kso.sparse_weights(other)[0], np.eye(12, 16, dtype=bool))
    assert_follows(third, other)


# ---------------------------------------------------------------------- what a copy cannot have


def test_the_masks_of_a_copy_are_not_set():
    model = network()
    copy = kso.follow(keras.models.clone_model(model), model)
    copy.set_weights(model.get_weights())
    (weight,) = kso.sparse_weights(copy)
    before = array(weight)
    for change in (
        lambda: kso.set_mask(weight, weight.topology.units.random_mask(9, 0)),
        lambda: kso.masks_from_zeros(copy),
    ):
        with pytest.raises(ValueError, match="'a' follows '.*a/kernel', whose mask it has"):
            change()
    assert_follows(copy, model)
    assert np.array_equal(array(weight), before)


def test_a_mask_that_a_copy_cannot_have_changes_nothing():
    model = network(kso.Block(1, 8, balanced=True))
    copy = kso.follow(keras.models.clone_model(model), model)
    copy.set_weights(model.get_weights())
    kso.condense(copy)
    (weight,) = kso.sparse_weights(model)
    before, mask = array(weight), array(weight.topology.mask)
    more = weight.topology.units.random_mask(2 * mask.sum(), 0)
    with pytest.raises(ValueError, match="The mask of 'a' must have .* tiles, as it is condensed"):
        kso.set_mask(weight, more)
    with pytest.raises(ValueError, match="copy with Block"):
        kso.sparsify(kso.strip(model), 0.5, exclude="b")
    assert not kso.sparse_weights(model)
    assert np.array_equal(array(weight), before)


def test_a_structure_that_the_copy_has_not():
    plain = [network() for _ in range(2)]
    model, copy = map(kso.strip, plain)
    kso.follow(copy, model)
    kso.sparsify(copy, 0.5, exclude="b", structure=kso.NM(2, 4))
    with pytest.raises(ValueError, match=r"another structure, Unstructured\(\)"):
        kso.sparsify(model, 0.5, exclude="b")
    assert not kso.sparse_weights(model)


def test_steps_know_of_the_masks_of_a_copy():
    """A compiled copy that is trained by itself gets its masks through the other model."""
    model, copy = network(), network()
    model, copy = map(kso.strip, (model, copy))
    copy.compile("sgd", "mse")
    x, y = data()
    y = np.zeros((len(x), 3), "float32")
    copy.fit(x, y, verbose=0)
    kso.follow(copy, model)
    kso.sparsify(model, 0.6, exclude="b")
    copy.fit(x, y, verbose=0)
    assert_follows(copy, model)


def test_a_file_that_does_not_fit_leaves_copies_as_they_are(tmp_path):
    other = network(kso.Block(4, 1))
    kso.save_packed(network(), tmp_path / "m.ksp")
    copy = kso.follow(keras.models.clone_model(other), other)
    copy.set_weights(other.get_weights())
    before = [array(v) for v in copy.weights], masks_of(copy)
    with pytest.raises(ValueError, match=r"must have the structure Block\(4, 1\)"):
        kso.load_packed(tmp_path / "m.ksp", other)
    assert all(np.array_equal(array(v), b) for v, b in zip(copy.weights, before[0]))
    assert all(np.array_equal(a, b) for a, b in zip(masks_of(copy), before[1]))
    assert_follows(copy, other)
