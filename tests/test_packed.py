"""Packed files: nothing is lost, masks are there, and a bad file changes nothing."""

import keras
import numpy as np
import pytest
from helpers import array, assert_invariants, compiled, data, masks_of
from keras import layers

import keras_sparseopt as kso


def without_masks():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(64, name="hidden"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(),
            kso.SparseDense(64, sparsity=0.7, seed=4, name="owned"),
            layers.Dense(3, name="head"),
        ]
    )


def network(structure=None, seed=0):
    model = kso.sparsify(without_masks(), 0.8, seed=seed, structure=structure)
    return compiled(model, kso.SparseOpt(keras.optimizers.SGD(0.05, momentum=0.9)))


def train(model, first=0, last=1):
    x, y = data()
    model.fit(
        x, y, batch_size=4, shuffle=False, verbose=0, initial_epoch=first, epochs=last,
        callbacks=[kso.RigL(2, 0.5, end_step=100)],
    )  # fmt: skip
    return model


def bits(values):
    return [np.ascontiguousarray(value).tobytes() for value in values]


def same(a, b):
    assert bits(a.get_weights()) == bits(b.get_weights())
    assert bits(masks_of(a)) == bits(masks_of(b))


def test_a_packed_model_is_the_same_and_small(tmp_path):
    model = train(network())
    before = bits(model.get_weights())
    written = kso.save_packed(model, tmp_path / "m.ksp")
    assert written.path == tmp_path / "m.ksp" and written.size == written.path.stat().st_size
    # Random generators of layers are in the file, and no weights.
    assert 0 <= written.dense_size - sum(w.nbytes for w in model.get_weights()) <= 16
    assert written.ratio == written.dense_size / written.size > 0.1
    assert f"{written.size:,} bytes" in str(written)
    model.save(tmp_path / "m.keras")
    assert bits(model.get_weights()) == before and model.optimizer.built
    loaded = kso.load_packed(tmp_path / "m.ksp")
    same(model, loaded)
    assert not loaded.compiled
    for own, other in zip(kso.sparse_weights(model), kso.sparse_weights(loaded)):
        a, b = (weight.topology.get_config() for weight in (own, other))
        assert {**a, "path": ""} == {**b, "path": ""}
    plain = kso.load_packed(tmp_path / "m.ksp", masks=False)
    x, _ = data()
    assert np.array_equal(array(plain(x)), array(model(x)))
    assert not kso.sparse_weights(plain)
    assert all(type(layer).__module__.startswith("keras.") for layer in plain.layers)
    wide = keras.Sequential([keras.Input((300,)), layers.Dense(300)])
    kso.sparsify(wide, 0.9)
    kso.save_packed(wide, tmp_path / "w.ksp")
    wide.save(tmp_path / "w.keras")
    assert 8 * (tmp_path / "w.ksp").stat().st_size < (tmp_path / "w.keras").stat().st_size


def test_training_goes_on_bit_for_bit(tmp_path):
    model = train(network())
    kso.save_packed(model, tmp_path / "m.ksp", include_optimizer=True)
    loaded = kso.load_packed(tmp_path / "m.ksp")
    for one in (model, loaded):
        train(one, 1, 3)
        assert_invariants(one)
    same(model, loaded)
    assert bits(array(v) for v in model.optimizer.variables) == bits(
        array(v) for v in loaded.optimizer.variables
    )


@pytest.mark.parametrize("structure", [kso.Block(4, 1), kso.ConstantFanIn()], ids=str)
def test_it_goes_into_a_model_with_masks_or_without(structure, tmp_path):
    model = train(network(structure=structure))
    kso.save_packed(model, tmp_path / "m.ksp")
    other = train(network(structure=structure, seed=9))  # its slots follow
    assert kso.load_packed(tmp_path / "m.ksp", other) is other
    same(model, other)
    assert_invariants(other)
    train(other, 1, 2)
    plain = without_masks()
    assert [w.topology.name for w in kso.sparse_weights(plain)] == ["owned"]
    kso.load_packed(tmp_path / "m.ksp", plain)
    same(model, plain)
    assert kso.sparse_weights(plain)[0].topology.structure == structure
    train(compiled(plain, kso.SparseOpt("sgd")))
    # Without masks weights win in those that are there.
    third = network(structure=structure, seed=10)
    kso.load_packed(tmp_path / "m.ksp", third, masks=False)
    assert bits(third.get_weights()) == bits(model.get_weights())


class Odd(layers.Layer):
    """Numbers that are easily lost."""

    VALUES = np.array([0.0, -0.0, np.nan, np.inf, 1e-45, 3.4e38, -1.5, 0.0], "float32")

    def build(self, shape):
        def add(values, name):
            variable = self.add_weight(
                values.shape, "zeros", keras.backend.standardize_dtype(values.dtype),
                trainable=False, name=name,
            )  # fmt: skip
            variable.assign(values)

        add(np.tile(self.VALUES, 9), "odd")
        add(np.zeros(40, "float32"), "zeros")
        add(np.arange(-20, 20, dtype="int32"), "ints")
        add(np.arange(41) % 3 == 0, "bools")
        add(np.tile(np.array([0, -0.0, np.nan, 6e-8, 1], "float16"), 9), "half")
        self.brain = self.add_weight((5,), "ones", "bfloat16", trainable=False, name="brain")
        self.scalar = self.add_weight((), "ones", trainable=False, name="scalar")

    def call(self, x):
        return x


def test_no_bit_is_lost(tmp_path):
    inputs = keras.Input((12,))
    normalized = layers.Normalization()
    normalized.adapt(data()[0])
    model = keras.Model(inputs, layers.Dense(3)(Odd()(normalized(inputs))))
    kso.save_packed(model, tmp_path / "m.ksp")
    loaded = kso.load_packed(tmp_path / "m.ksp", custom_objects={"Odd": Odd})
    assert bits(model.get_weights()) == bits(loaded.get_weights())
    x, _ = data()
    assert np.array_equal(array(loaded(x)), array(model(x)))


def test_bad_files_are_told_and_change_nothing(tmp_path):
    model, path, bad = network(), tmp_path / "m.ksp", tmp_path / "bad.ksp"
    kso.save_packed(model, path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    flipped = []
    for position in rng.integers(0, len(whole), 20):
        content = bytearray(whole)
        content[position] ^= 1 << int(rng.integers(8))
        flipped.append(bytes(content))
    other = network(seed=5)
    before = bits(other.get_weights()), bits(masks_of(other))
    for content in (b"", b"PK", whole[:-1], whole[: len(whole) // 2], whole + b"0", *flipped):
        bad.write_bytes(content)
        for target in (None, other):
            with pytest.raises(ValueError, match="`path` must be a whole file of save_packed"):
                kso.load_packed(bad, target)
    third = keras.Sequential([keras.Input((12,)), layers.Dense(3)])
    with pytest.raises(ValueError, match="`path` must be the file of such a model. Received"):
        kso.load_packed(path, third)
    with pytest.raises(FileNotFoundError):
        kso.load_packed(tmp_path / "none.ksp", other)
    assert (bits(other.get_weights()), bits(masks_of(other))) == before


def test_an_interrupted_save_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    model, path = network(), tmp_path / "m.ksp"
    kso.save_packed(model, path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        kso.save_packed(model, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.ksp"]


def test_what_is_wrong_is_said(tmp_path):
    model = network()
    for call, error, message in [
        (lambda: kso.save_packed("model", tmp_path / "x"), TypeError, "must be a Keras model"),
        (lambda: kso.save_packed(keras.Sequential([layers.Dense(2)]), "x"), ValueError, "be built"),
        (lambda: kso.save_packed(model, "x", include_optimizer=1), ValueError, "must be a bool"),
        (
            lambda: kso.load_packed("x", model, compile=False),
            ValueError,
            r"Options are for a model that is made here. Received: \['compile'\]",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()


# ---------------------------------------------------------------------- faults that a review found


def test_a_model_that_the_file_does_not_fit_is_not_half_changed(tmp_path):
    """Other nesting with the same weights; a mask that breaks the structure of the target's."""
    file, dense = tmp_path / "m.ksp", layers.Dense

    def flat():
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((16,)), dense(16), dense(16, name="two"), dense(16)])

    kso.save_packed(kso.sparsify(flat(), 0.5), file)
    inner = keras.Sequential([keras.Input((16,)), dense(16), dense(16)])
    nested = keras.Sequential([keras.Input((16,)), dense(16), inner])
    before = bits(nested.get_weights())
    with pytest.raises(ValueError, match="`path` must be the file of such a model. Received one"):
        kso.load_packed(file, nested)
    assert bits(nested.get_weights()) == before and not kso.sparse_weights(nested)
    blocks = kso.sparsify(flat(), 0.5, structure={"two": kso.Block(4, 1)}, seed=1)
    compiled(blocks, kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9)))
    x = np.random.default_rng(0).normal(size=(32, 16)).astype("float32")
    blocks.fit(x, np.zeros(32, int), batch_size=8, verbose=0)
    before = bits(array(v) for v in blocks.variables)
    with pytest.raises(ValueError, match=r"mask of 'two' must have the structure Block\(4, 1\)"):
        kso.load_packed(file, blocks)
    assert bits(array(v) for v in blocks.variables) == before
    kso.save_packed(flat(), file)  # dense
    with pytest.raises(ValueError, match="is denser than its mask"):
        kso.load_packed(file, blocks)
    assert bits(array(v) for v in blocks.variables) == before
    blocks.fit(x, np.zeros(32, int), batch_size=8, verbose=0)
    assert_invariants(blocks)
    with pytest.raises(TypeError, match="must be a Keras model"):
        kso.load_packed(file, "model")


def test_a_frozen_layer_keeps_its_mask(tmp_path):
    model = without_masks()
    kso.sparsify(model, 0.8)
    model.get_layer("hidden").trainable = False
    train(compiled(model, kso.SparseOpt("sgd")))
    kso.save_packed(model, tmp_path / "m.ksp", include_optimizer=True)
    loaded = kso.load_packed(tmp_path / "m.ksp")
    same(model, loaded)
    assert not loaded.get_layer("hidden").trainable
    train(loaded, 1, 2)
    assert not kso.sparse_weights(kso.load_packed(tmp_path / "m.ksp", masks=False))


def test_a_directory_that_is_not_there_is_told_first(tmp_path):
    with pytest.raises(FileNotFoundError, match="`path` must be in a directory that exists"):
        kso.save_packed(network(), tmp_path / "no" / "m.ksp")


# ---------------------------------------------------------------------- into a model that is there


class Refusing(layers.Dense):
    def load_own_variables(self, store):
        raise ValueError("not this one")


def with_last(kind):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((12,)), layers.Dense(16, name="a"), kind(16, name="b"), kind(3, name="c")]
    )


@pytest.mark.filterwarnings("ignore:.*seems to be trained")
def test_a_load_that_fails_late_gives_everything_back(tmp_path):
    """Masks that were there and new ones, stripped weights, slots of an optimizer of one's own."""
    source = kso.sparsify(with_last(layers.Dense), 0.5, "uniform", seed=1)
    kso.save_packed(source, tmp_path / "m.ksp")
    model = kso.sparsify(with_last(Refusing), 0.5, "uniform", exclude=["b", "c"])
    kso.strip(model.get_layer("c"))
    optimizer = kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9))
    optimizer.build(model.trainable_variables)
    optimizer.apply([keras.ops.ones(v.shape) for v in model.trainable_variables])
    copy = kso.follow(keras.models.clone_model(model), model)

    def state():
        held = [*model.weights, *copy.weights, *optimizer.weights_of_inner()]
        return bits(map(array, held)), bits(masks_of(model)), bits(masks_of(copy))

    optimizer.weights_of_inner = lambda: optimizer.inner_optimizer.variables
    before = state()
    with pytest.raises(ValueError):
        kso.load_packed(tmp_path / "m.ksp", model)
    assert state() == before
    assert model.get_layer("c").kernel.was_stripped


def test_steps_that_are_compiled_know_of_masks_from_a_file(tmp_path):
    kso.save_packed(network(), tmp_path / "m.ksp")
    model = without_masks()
    compiled(model, "sgd")
    model.fit(*data(), verbose=0)
    kso.load_packed(tmp_path / "m.ksp", model)
    model.fit(*data(), verbose=0)
    kernel = model.get_layer("hidden").kernel
    assert kernel.topology.sparsity > 0.5 and kernel.topology.moved_weights() == 0


def test_weights_outside_of_masks_are_not_packed(tmp_path):
    model = network()
    with model.get_layer("hidden").kernel.topology.moving():  # as `torch.optim` does
        model.get_layer("hidden").kernel.assign(np.ones((12, 64), "float32"))
    with pytest.raises(ValueError, match="Inactive weights are not 0.*Received: hidden"):
        kso.save_packed(model, tmp_path / "m.ksp")
    assert not (tmp_path / "m.ksp").exists()
    compiled(model, kso.SparseOpt("adam"))
    with pytest.raises(ValueError, match="'hidden' is denser than its mask"):
        model.fit(*data(), verbose=0)


def test_a_layer_is_no_model(tmp_path):
    for call in (
        lambda layer: kso.save_packed(layer, tmp_path / "m.ksp"),
        lambda layer: kso.load_packed(tmp_path / "m.ksp", layer),
    ):
        with pytest.raises(TypeError, match="`model` must be a Keras model"):
            call(network().get_layer("head"))


def test_a_model_of_several_optimizers_leaves_them_out(tmp_path):
    class Pair(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = network(), network(seed=1)
            self.first.optimizer = self.second.optimizer = None

        def call(self, x):
            return self.first(x) + self.second(x)

    def pair(is_built):
        found, x = Pair(), data()[0]
        found(x)
        found.a_optimizer, found.others = kso.SparseOpt("adam"), {"b": kso.SparseOpt("adam")}
        parts = (found.a_optimizer, found.first), (found.others["b"], found.second)
        for optimizer, part in parts if is_built else ():
            optimizer.build(part.trainable_variables)
        return found

    model = pair(True)
    steps = model.a_optimizer.iterations
    steps.assign(steps + 5)
    alone = kso.save_packed(model, tmp_path / "alone.ksp")
    whole = kso.save_packed(model, tmp_path / "whole.ksp", include_optimizer=True)
    assert alone.dense_size < 0.4 * whole.dense_size
    for name in ("alone", "whole"):
        for is_built in (False, True):
            other = pair(is_built)
            kso.load_packed(tmp_path / f"{name}.ksp", other)
            same(model, other)
            assert int(array(other.a_optimizer.iterations)) == 0
            assert isinstance(other.others["b"], kso.SparseOpt)
