"""Files of one backend, trained on by another.

Usage: files_between.py write FOLDER, or files_between.py read FOLDER ...

The first one trains small networks, saves them in all ways that hold a training, goes on and
records what comes of it; the second one loads these files, compares and goes on itself.
"""

import pathlib
import sys

import keras
import numpy as np

import keras_sparseopt as kso

METHODS = {"RigL": kso.RigL, "SET": kso.SET, "SNFS": kso.SNFS}
OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(3e-3),
}
CASES = (
    ("RigL", "Adam", "masked"),
    ("SNFS", "SGD", "masked"),
    ("RigL", "SGD", "condensed"),
    ("SET", "Adam", "condensed"),
)
STEPS, BATCH, UPDATE_EVERY, TOTAL = 7, 8, 3, 14


def network(form):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(16, 3, use_bias=False, name="conv")(inputs)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization(name="norm")(x))
    x = keras.layers.Reshape((36, 16))(x)
    x = x + keras.layers.MultiHeadAttention(2, 8, name="attention")(x, x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    x = keras.layers.Dense(32, "tanh", name="hidden")(x)
    model = keras.Model(inputs, keras.layers.Dense(4, name="head")(x))
    structure = kso.Block(1, 16, balanced=True) if form == "condensed" else None
    kso.sparsify(model, 0.5, "uniform", exclude=["conv", "head"], structure=structure, seed=3)
    return kso.condense(model) if form == "condensed" else model


def train(model, method, part):
    rng = np.random.default_rng(part)
    x = rng.normal(size=(STEPS * BATCH, 8, 8, 3)).astype("float32")
    y = rng.integers(0, 4, STEPS * BATCH)
    callback = METHODS[method](UPDATE_EVERY, 0.5, end_step=TOTAL, seed=5)
    losses = model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[callback])
    return losses.history["loss"][-1]


def array(variable):
    return keras.ops.convert_to_numpy(variable)


def state(model):
    """Plain kernels, their masks and slots, and all else that is trained: dict of arrays."""
    found = {"iterations": array(model.optimizer.iterations)}
    for i, variable in enumerate(kso.sparse_weights(model)):
        topology = variable.topology
        found |= {f"mask {i}": array(topology.mask), f"kernel {i}": array(topology.kernel)}
        for j, slot in enumerate(model.optimizer.weight_of(variable).slots):
            found[f"slot {i} {j}"] = np.array(topology.plain(slot))
    sparse = {id(variable) for variable in kso.sparse_weights(model)}
    rest = [w for w in model.weights if id(w) not in sparse and w.dtype == "float32"]
    return found | {w.path: array(w) for w in rest}


def write(folder):
    folder.mkdir(parents=True)
    for case in CASES:
        method, optimizer, form = case
        name = "-".join(case)
        model = network(form)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(kso.SparseOpt(OPTIMIZERS[optimizer]()), loss)
        train(model, method, 0)
        model.save(folder / f"{name}.keras")
        model.save_weights(folder / f"{name}.weights.h5")
        kso.save_packed(model, folder / f"{name}.ksp")
        np.savez(folder / f"{name}-saved.npz", **state(model))
        loss = train(model, method, 1)
        np.savez(folder / f"{name}-gone-on.npz", loss=loss, **state(model))


def compare(name, found, path, atol):
    expected = np.load(path)
    assert set(found) == set(expected.files), (name, set(found) ^ set(expected.files))
    for key in expected.files:
        if atol == 0 or key.startswith("mask"):
            assert np.array_equal(found[key], expected[key]), (name, key)
        else:
            np.testing.assert_allclose(
                found[key], expected[key], atol=atol, err_msg=f"{name}: {key}"
            )


def read(folder):
    for case in CASES:
        method, optimizer, form = case
        name = "-".join(case)
        saved = np.load(folder / f"{name}-saved.npz")
        model = keras.models.load_model(folder / f"{name}.keras")
        # A file of TensorFlow or JAX asks for compiling, which takes `torch.compile` minutes.
        model.jit_compile &= keras.backend.backend() != "torch"
        if form == "condensed":
            kso.condense(model)
        compare(name, state(model), folder / f"{name}-saved.npz", 0)
        loss = train(model, method, 1)
        compare(name, {"loss": loss, **state(model)}, folder / f"{name}-gone-on.npz", 2e-5)
        by_weights = network(form)
        by_weights.load_weights(folder / f"{name}.weights.h5")
        for other in (by_weights, kso.load_packed(folder / f"{name}.ksp")):
            for i, weight in enumerate(kso.sparse_weights(other)):
                topology = weight.topology
                assert np.array_equal(
                    keras.ops.convert_to_numpy(topology.kernel), saved[f"kernel {i}"]
                )
                assert np.array_equal(keras.ops.convert_to_numpy(topology.mask), saved[f"mask {i}"])


if __name__ == "__main__":
    action = {"write": write, "read": read}[sys.argv[1]]
    for folder in sys.argv[2:]:
        action(pathlib.Path(folder))
