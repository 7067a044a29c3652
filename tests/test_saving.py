import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import (
    array,
    assert_invariants,
    compiled,
    data,
    masks_of,
    mlp,
)

import keras_sparseopt as kso


def make(inner=None, seed=1):
    inner = inner or keras.optimizers.SGD(0.1, momentum=0.9)
    return compiled(mlp(seed=seed), kso.SparseOpt(inner))


def state(model):
    return [array(v) for v in model.weights + model.optimizer.variables]


def assert_same_state(a, b):
    for x, y in zip(state(a), state(b), strict=True):
        assert np.array_equal(x, y)


def method(name):
    return {"RigL": lambda: kso.RigL(3, 0.5), "SET": lambda: kso.SET(3, 0.5)}[name]()


def train(model, name, first_epoch, last_epoch, callbacks=()):
    x, y = data()
    model.fit(
        x, y, batch_size=4, shuffle=False, verbose=0, epochs=last_epoch,
        initial_epoch=first_epoch, callbacks=[method(name), *callbacks],
    )  # fmt: skip
    return model


def seeded():
    keras.utils.set_random_seed(2)
    return make()


@pytest.mark.parametrize("name", ["RigL", "SET"])
@pytest.mark.parametrize("where", [".keras", ".weights.h5", "backup"])
def test_train_save_load_train_equals_train_train(name, where, tmp_path):
    straight = seeded()
    with_end = kso.SET if name == "SET" else kso.RigL
    x, y = data()

    def fit(model, first, last, callbacks=()):
        model.fit(
            x, y, batch_size=4, shuffle=False, verbose=0, epochs=last, initial_epoch=first,
            callbacks=[with_end(3, 0.5, end_step=24), *callbacks],
        )  # fmt: skip

    fit(straight, 0, 4)
    first = seeded()
    if where == "backup":

        class Stop(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == 2:
                    raise KeyboardInterrupt

        def backup():
            return keras.callbacks.BackupAndRestore(tmp_path / "backup")

        with pytest.raises(KeyboardInterrupt):
            fit(first, 0, 4, [backup(), Stop()])
        second = make(seed=7)
        fit(second, 0, 4, [backup()])
    else:
        fit(first, 0, 2)
        path = str(tmp_path / f"model{where}")
        if where == ".keras":
            first.save(path)
            second = keras.models.load_model(path)  # safe mode is on
        else:
            first.save_weights(path)
            second = make(seed=7)
            second.optimizer.build(second.trainable_variables)
            second.load_weights(path)
        assert_same_state(first, second)
        fit(second, 2, 4)
    assert_same_state(straight, second)
    assert second.optimizer.itop_rate() == straight.optimizer.itop_rate()
    assert_invariants(second)


def test_model_checkpoint_during_rigl_loads_and_predicts_the_same(tmp_path):
    path = str(tmp_path / "best.keras")
    checkpoint = keras.callbacks.ModelCheckpoint(path)
    model = train(make(), "RigL", 0, 2, [checkpoint])
    loaded = keras.models.load_model(path)
    x, _ = data()
    np.testing.assert_array_equal(array(model(x)), array(loaded(x)))
    assert_same_state(model, loaded)


@pytest.mark.backend("tensorflow")
def test_tf_train_checkpoint(tmp_path):
    import tensorflow as tf

    model = train(make(), "SET", 0, 2)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "c")
    other = make(seed=5)
    other.optimizer.build(other.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
    checkpoint.restore(path).assert_existing_objects_matched()
    assert_same_state(model, other)


@pytest.mark.backend("tensorflow")
def test_export_saved_model(tmp_path):
    import tensorflow as tf

    model = train(make(), "RigL", 0, 1)
    x, _ = data()
    model.export(tmp_path / "export", verbose=False)
    exported = tf.saved_model.load(tmp_path / "export")
    served = exported.serve(x)
    np.testing.assert_allclose(array(served), array(model(x)), rtol=1e-5, atol=1e-6)


def test_clone_model_keeps_the_kind_of_layers():
    model = make()
    clone = keras.models.clone_model(model)
    kinds = [type(layer) for layer in model.layers]
    assert [type(layer) for layer in clone.layers] == kinds
    assert all(np.array_equal(a, b) for a, b in zip(masks_of(model), masks_of(clone)))


def test_model_config_round_trip():
    model = make()
    copy = keras.Sequential.from_config(model.get_config())
    assert copy.get_config() == model.get_config()


def test_sparsity_of_the_file_wins(tmp_path):
    path = str(tmp_path / "m.weights.h5")
    mlp(sparsity=0.9).save_weights(path)
    model = mlp(sparsity=0.2)
    model.load_weights(path)
    assert kso.sparse_layers(model)[0].sparsity == pytest.approx(0.9, abs=0.01)


@pytest.mark.filterwarnings("ignore:The schedule of RigL begins anew")
def test_loading_weights_into_a_training_model_moves_the_slots(tmp_path):
    path = str(tmp_path / "m.weights.h5")
    mlp(seed=8).save_weights(path)
    model = train(make(), "RigL", 0, 1)
    with pytest.warns(UserWarning):  # the file has no optimizer
        model.load_weights(path)
    assert_invariants(model)
    train(model, "RigL", 0, 1)
    assert_invariants(model)


# Keras' own remarks on its old format, and on what it did not restore.
def test_legacy_h5_files_say_that_they_hold_no_optimizer(tmp_path):
    def save(model):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(kso.SparseOpt("sgd"), loss)
        model.fit(*data(), verbose=0)
        model.save(tmp_path / "m.h5")

    attached = keras.Sequential([keras.Input((12,)), keras.layers.Dense(8), keras.layers.Dense(3)])
    save(kso.sparsify(attached, 0.5))
    with pytest.raises(ValueError, match="legacy `.h5` file. Save as `.keras`; or load with"):
        keras.models.load_model(tmp_path / "m.h5")
    restored = keras.models.load_model(tmp_path / "m.h5", compile=False)
    kso.masks_from_zeros(restored)
    assert all(np.array_equal(a, b) for a, b in zip(masks_of(restored), masks_of(attached)))

    save(make())
    with pytest.warns(UserWarning, match="built for no variables.*legacy `.h5` file"):
        restored = keras.models.load_model(tmp_path / "m.h5")
    train(compiled(restored, kso.SparseOpt("sgd")), "RigL", 0, 1)
    assert_invariants(restored)


def test_dense_file_is_refused_with_the_way_out(tmp_path):
    layer = kso.SparseDense(3)
    layer.build((None, 4))
    before = array(layer.kernel)
    store = {"0": np.ones((4, 3), "float32"), "1": np.ones(3, "float32")}
    with pytest.raises(ValueError, match="Load the file into the dense model, then call"):
        layer.load_own_variables(store)
    assert np.array_equal(array(layer.kernel), before)


@pytest.mark.parametrize("fault", ["shape", "dtype"])
def test_masks_that_do_not_fit_change_nothing(fault):
    layer = kso.SparseDense(3, sparsity=0.5)
    layer.build((None, 4))
    before = [array(w) for w in layer.weights]
    mask, kernel = np.ones((4, 3), bool), np.ones((4, 3), "float32")
    if fault == "shape":
        mask = mask[:2]
    else:
        mask = mask.astype("float32")
    store = {"0": kernel, "1": np.ones(3, "float32"), "kernel_mask": mask}
    with pytest.raises(ValueError, match="does not fit layer"):
        layer.load_own_variables(store)
    assert all(np.array_equal(a, array(b)) for a, b in zip(before, layer.weights))


def test_stripped_model_loads_without_the_package(tmp_path):
    model = train(make(), "RigL", 0, 1)
    plain = kso.strip(model)
    x, _ = data()
    np.testing.assert_allclose(array(plain(x)), array(model(x)), atol=1e-6)
    plain.save(tmp_path / "plain.keras")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys; sys.modules['keras_sparseopt'] = None\n"
        "import keras, numpy as np\n"
        f"model = keras.models.load_model({str(tmp_path / 'plain.keras')!r})\n"
        f"y = keras.ops.convert_to_numpy(model(np.load({str(tmp_path / 'x.npy')!r})))\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, y)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), array(model(x)), atol=1e-6)


def test_strip_replaces_the_sparse_initializer():
    model = keras.Sequential(
        [keras.Input((4,)), kso.SparseDense(3, kernel_initializer="sparse_he_normal")]
    )
    initializer = kso.strip(model).layers[0].kernel_initializer
    assert type(initializer) is keras.initializers.HeNormal


def test_mixed_float16_model_saves_and_loads(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    model = train(make(), "RigL", 0, 1)
    assert type(model.optimizer) is keras.optimizers.LossScaleOptimizer
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert_same_state(model, loaded)


def test_optimizer_state_does_not_depend_on_the_method_in_use(tmp_path):
    """A file saved while RigL keeps its gradients loads where none are kept, and back."""
    path = str(tmp_path / "during.keras")

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.save(path)

    model = train(make(), "RigL", 0, 1, [Save()])
    assert_same_state(model, keras.models.load_model(path))


def test_inactive_weights_moved_by_another_optimizer_are_not_saved(tmp_path):
    model = compiled(mlp(), keras.optimizers.SGD(0.1))
    x, y = data()
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(array(model(x)), array(loaded(x)))
    for layer in kso.sparse_layers(loaded):
        assert not array(layer.kernel)[~array(layer.kernel_mask)].any()


def test_the_state_of_nested_optimizers_is_saved_once(tmp_path):
    import zipfile

    def size(optimizer):
        model = keras.Sequential([keras.Input((300,)), kso.SparseDense(300, sparsity=0.5)])
        model.compile(optimizer=optimizer, loss="mse")
        model.optimizer.build(model.trainable_variables)
        model.save(tmp_path / "m.keras")
        return zipfile.ZipFile(tmp_path / "m.keras").getinfo("model.weights.h5").file_size

    plain = size(keras.optimizers.Adam())
    wrapped = size(kso.SparseOpt(kso.HAM(keras.optimizers.Adam())))
    assert wrapped - plain < 300 * 300 / 8 + 20_000  # the ever-active bits, and HDF5's overhead
