"""BackupAndRestore: nothing lost, nothing half restored, nothing silently begun again."""

import keras
import numpy as np
import pytest
from crash_and_resume import disturbed
from helpers import array, compiled, data, mlp
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_sparseopt as kso


def network(seed=1, units=12, inner=None):
    keras.utils.set_random_seed(3)
    layers = [
        keras.Input((10,)),
        kso.SparseDense(units, sparsity=0.6, seed=seed),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.3),
        keras.layers.Dense(4),
    ]
    return compiled(keras.Sequential(layers), kso.SparseOpt(inner or "adam"))


def fit(model, directory, epochs, callbacks=(), keep=2):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 10)).astype("float32"), rng.integers(0, 4, 24)
    backup = kso.BackupAndRestore(directory, keep=keep)
    return model.fit(
        x, y, batch_size=6, epochs=epochs, shuffle=False, verbose=0,
        callbacks=[kso.SET(3, 0.5, end_step=20), *callbacks, backup],
    )  # fmt: skip


def state(model):
    transient = {id(v) for v in model.optimizer.transient_variables}
    variables = [*model.variables, *model.optimizer.variables]
    return [array(v) for v in variables if id(v) not in transient]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x, y)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A training of four epochs, never disturbed: its directory, state and history."""
    directory = tmp_path_factory.mktemp("straight")
    model = network()
    history = fit(model, directory, 4, keep=4)
    return directory, state(model), history.history


def copied(finished, tmp_path, epochs):
    for epoch in epochs:
        name = f"epoch-{epoch:06d}.npz"
        (tmp_path / name).write_bytes((finished[0] / name).read_bytes())
    return tmp_path


def test_goes_on_in_a_new_model_with_history_and_generators(finished, tmp_path):
    directory = copied(finished, tmp_path, [1, 2])
    assert kso.BackupAndRestore(directory).initial_epoch == 2
    model = network(seed=9)
    history = fit(model, directory, 4)
    assert_same(state(model), finished[1])
    assert history.history == finished[2] and history.epoch == [0, 1, 2, 3]


def test_a_finished_training_has_nothing_left_to_do(finished, tmp_path):
    directory = copied(finished, tmp_path, [4])
    model = network(seed=9)
    history = fit(model, directory, 4)
    assert_same(state(model), finished[1])
    assert history.history == finished[2]


def test_keeps_the_newest(tmp_path):
    fit(network(), tmp_path, 3, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-000003.npz"]


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut off":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    elif how == "bit flipped":
        content[len(content) // 3] ^= 16
    elif how == "text":
        content = b"not a backup"
    elif how == "other archive":
        np.savez(path.with_suffix(".tmp.npz"), a=np.ones(3))
        content = path.with_suffix(".tmp.npz").read_bytes()
        path.with_suffix(".tmp.npz").unlink()
    path.write_bytes(content)


DAMAGES = ["cut off", "empty", "bit flipped", "text", "other archive"]


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_backup_the_previous_one_is_used(finished, tmp_path, how):
    directory = copied(finished, tmp_path, [2, 3])
    damage(directory / "epoch-000003.npz", how)
    model = network(seed=9)
    with pytest.warns(UserWarning, match=r"cannot use epoch-000003.npz: .*epoch-000002.npz"):
        fit(model, directory, 4)
    assert_same(state(model), finished[1])


@pytest.mark.parametrize("how", [*DAMAGES, "other model", "other optimizer"])
def test_no_usable_backup_is_an_error_and_changes_nothing(finished, tmp_path, how):
    directory = copied(finished, tmp_path, [3])
    model = network(seed=9)
    if how == "other model":
        model = network(units=13)
    elif how == "other optimizer":
        model = network(inner="sgd")
    else:
        damage(directory / "epoch-000003.npz", how)
    model.optimizer.build(model.trainable_variables)
    before, files = state(model), {p: p.read_bytes() for p in directory.iterdir()}
    with pytest.raises(ValueError, match="training from the start would hide") as error:
        fit(model, directory, 4)
    assert "epoch-000003.npz" in str(error.value)
    assert_same(state(model), before)
    assert {p: p.read_bytes() for p in directory.iterdir()} == files


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_every_flipped_bit_is_noticed(finished, tmp_path_factory, position, bit):
    directory = copied(finished, tmp_path_factory.mktemp("flip"), [4])
    path = directory / "epoch-000004.npz"
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(ValueError, match="epoch-000004.npz: it is damaged"):
        _ = kso.BackupAndRestore(directory).initial_epoch


def test_loss_scaling_is_restored(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(directory, callbacks=()):
        keras.utils.set_random_seed(0)
        model = compiled(mlp(), kso.SparseOpt("adam"))
        x, y = data()
        own = [kso.RigL(3, 0.5, end_step=20), kso.BackupAndRestore(directory)]
        model.fit(
            x, y, batch_size=4, epochs=4, shuffle=False, verbose=0, callbacks=[*own, *callbacks]
        )
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        return [array(v) for v in [*model.variables, *model.optimizer.variables]]

    straight = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", [Stop()])
    assert_same(run(tmp_path / "b"), straight)


def test_methods_behind_it_are_refused(tmp_path):
    """Two steps an epoch, an update every two: it comes after the last step of each."""
    model, (x, y) = compiled(mlp(), kso.SparseOpt("sgd")), data()
    before = [array(v) for v in model.variables]
    own = [kso.BackupAndRestore(tmp_path), kso.GradientFlow(2), kso.RigL(2, 0.5, end_step=20)]
    with pytest.raises(ValueError, match="must come last .* Received: GradientFlow, RigL behind"):
        model.fit(x, y, batch_size=4, verbose=0, callbacks=own)
    assert_same([array(v) for v in model.variables], before)
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[own[0], kso.Static(), *own[3:]])


def test_averages_of_another_method_are_left_out_with_a_word(tmp_path):
    def fit(method, epochs):
        x, y = np.ones((24, 10), "float32"), np.arange(24) % 4
        callbacks = [method, kso.BackupAndRestore(tmp_path)]
        network().fit(x, y, batch_size=6, epochs=epochs, verbose=0, callbacks=callbacks)

    fit(kso.SNFS(3, 0.5, end_step=20), 1)
    with pytest.warns(UserWarning, match="averages of dense gradients that no method"):
        fit(kso.RigL(3, 0.5, end_step=20), 2)


def test_works_for_a_dense_model(tmp_path):
    def dense():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(4)])
        return compiled(model, keras.optimizers.SGD(0.1, momentum=0.9))

    def run(model, epochs):
        x, y = np.ones((8, 10), "float32"), np.arange(8) % 4
        backup = kso.BackupAndRestore(tmp_path)
        model.fit(x, y, epochs=epochs, shuffle=False, verbose=0, callbacks=[backup])
        return [array(v) for v in model.variables]

    run(dense(), 1)
    resumed = run(dense(), 2)
    again = run(dense(), 2)
    assert_same(resumed, again)


def test_a_later_fit_on_a_resumed_model_trains_all_its_epochs(finished, tmp_path):
    directory = copied(finished, tmp_path, [3])
    model = network()
    fit(model, directory, 4)
    steps = int(array(model.optimizer.iterations))
    x, y = np.ones((6, 10), "float32"), np.arange(6) % 4
    assert model.fit(x, y, epochs=2, verbose=0).epoch == [0, 1]
    assert int(array(model.optimizer.iterations)) == steps + 2


def test_foreign_newest_backup(finished, tmp_path):
    """Neither does the data begin at the wrong epoch, nor is own progress deleted."""
    directory = copied(finished, tmp_path, [2])
    fit(network(units=13), tmp_path / "other", 5)
    (tmp_path / "other" / "epoch-000005.npz").rename(directory / "epoch-000005.npz")
    backup = kso.BackupAndRestore(directory)
    assert backup.initial_epoch == 5
    model = network()
    x, y = np.ones((6, 10), "float32"), np.arange(6) % 4
    with (
        pytest.warns(UserWarning, match="of another model"),
        pytest.raises(ValueError, match="`initial_epoch` was 5, this model's backup has 2"),
    ):
        model.fit(x, y, verbose=0, callbacks=[backup])
    with pytest.warns(UserWarning, match="of another model"):
        fit(model, directory, 4, keep=1)
    assert sorted(p.name for p in directory.glob("*.npz")) == [
        "epoch-000004.npz", "epoch-000005.npz",
    ]  # fmt: skip


def test_a_directory_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    model = network()
    with pytest.raises(ValueError, match="`backup_dir` must be a directory that can be written"):
        fit(model, tmp_path / "file", 1)
    assert int(array(model.optimizer.iterations)) == 0


def test_logs_that_are_no_numbers_are_left_out(tmp_path):
    class Log(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs.update(note="text", nothing=None, number=np.float32(2))

    fit(network(), tmp_path, 1, [Log()])
    history = fit(network(), tmp_path, 1).history
    assert history["number"] == [2.0] and "note" not in history and "nothing" not in history


@pytest.mark.parametrize(
    "make",
    [
        lambda: kso.SNFS(3, 0.5, end_step=20),
        lambda: kso.RigL(3, 0.5, end_step=20, gradient_steps=3),
    ],
)
def test_averaged_gradients_are_part_of_a_backup(tmp_path, make):
    """Five steps an epoch: the averages straddle its end."""

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(directory, callbacks=()):
        model = network()
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(20, 10)).astype("float32"), rng.integers(0, 4, 20)
        model.fit(
            x, y, batch_size=4, epochs=4, shuffle=False, verbose=0,
            callbacks=[make(), kso.BackupAndRestore(directory), *callbacks],
        )  # fmt: skip
        return state(model)

    straight = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", [Stop()])
    assert_same(run(tmp_path / "b"), straight)


def test_unbuilt_model_is_refused(tmp_path):
    model = compiled(keras.Sequential([keras.layers.Dense(4)]), keras.optimizers.SGD())
    backup = kso.BackupAndRestore(tmp_path)
    backup.set_model(model)
    with pytest.raises(ValueError, match="built before `fit`"):
        backup.on_train_begin()


def test_killed_trainings_come_back_exactly(tmp_path):
    """SIGKILL while writing, in a mask update, and at a random moment."""
    backend = keras.backend.backend()
    # The benchmark runs all combinations; its record is in results/.
    runs = {"tensorflow": ("one", "rigl"), "jax": ("mirrored", "set"), "torch": ("one", "set")}
    strategy, method = runs[backend]
    row = disturbed(backend, strategy, method, tmp_path, randomly=int(backend != "torch"), seed=0)
    assert row["came back exactly"] == row["kills"] >= 2


@pytest.mark.backend("torch")
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_data_is_shuffled_anew_in_every_epoch(tmp_path):
    """Its order draws from the generator that a backup holds, and the model does not."""
    import torch

    orders = []

    class Shuffled(torch.utils.data.IterableDataset):
        def __iter__(self):
            orders.append(tuple(torch.randperm(24).tolist()))
            yield np.array(orders[-1], dtype="float32")[:, None], np.zeros(24)

    data = torch.utils.data.DataLoader(Shuffled(), batch_size=None)
    model = keras.Sequential([keras.Input((1,)), kso.SparseDense(4, sparsity=0.5)])
    compiled(model, kso.SparseOpt("sgd"))
    backup = kso.BackupAndRestore(tmp_path)
    model.fit(data, epochs=4, shuffle=False, verbose=0, callbacks=[backup])
    assert len(orders) >= 4 and len(set(orders)) == len(orders)
