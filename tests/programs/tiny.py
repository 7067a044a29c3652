"""What the programs of the distribution and crash tests train; each runs in its own process."""

import hashlib
import json

import keras
import numpy as np

import keras_sparseopt as kso


def data(examples=96):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 6, 6, 3)).astype("float32")
    return x, rng.integers(0, 5, examples)


def model(inner="sgd", dropout=0.0, renormalize=False, synchronized=True):
    """BatchNormalization is over the global batch, so that any number of devices is one."""
    synchronized = synchronized and keras.backend.backend() == "tensorflow"
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((6, 6, 3)),
        kso.SparseConv2D(12, 3, sparsity=0.7, use_bias=False, name="conv"),
        keras.layers.BatchNormalization(synchronized=synchronized),
        keras.layers.ReLU(),
        keras.layers.Flatten(),
        kso.SparseDense(16, sparsity=0.8, name="hidden"),
        keras.layers.Dense(5),
    ]
    if dropout:
        layers.insert(-1, keras.layers.Dropout(dropout))
    network = keras.Sequential(layers)
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    inner = {
        "sgd": lambda: keras.optimizers.SGD(schedule, momentum=0.9),
        "adam": lambda: keras.optimizers.Adam(0.01),
        "ham": lambda: kso.HAM(keras.optimizers.SGD(0.01, momentum=0.9)),
    }[inner]()
    network.compile(
        kso.SparseOpt(inner, renormalize=renormalize),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return network


def model_parallel(shape, layouts):
    """Shard weights from now on (JAX).

    Args:
        shape: Devices along "batch" and "model".
        layouts: Dict from patterns of paths to axes.
    """
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh(shape, ["batch", "model"], devices)
    layout_map = keras.distribution.LayoutMap(mesh)
    for pattern, axes in layouts.items():
        layout_map[pattern] = axes
    distribution = keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch", auto_shard_dataset=False
    )
    keras.distribution.set_distribution(distribution)


def method(name, **kwargs):
    kinds = {"rigl": kso.RigL, "set": kso.SET}
    return kinds[name](update_every=2, drop_fraction=0.5, **kwargs)


def state(network):
    """Everything that must be equal between two trainings, by name."""
    optimizer = network.optimizer
    transient = {id(v) for v in optimizer.transient_variables}
    variables = [v for v in optimizer.variables if id(v) not in transient]
    return {
        f"{i}:{v.name.split('_')[-1]}": keras.ops.convert_to_numpy(v)
        for i, v in enumerate([*network.variables, *variables])
    }


def assert_close(a, b):
    """Masks equal exactly, everything else to float tolerance."""
    assert list(a) == list(b)
    for name, value in a.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(value, b[name], rtol=1e-3, atol=2e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(value, b[name], err_msg=name)


def digest(network, history):
    """One short string for the whole result."""
    sha = hashlib.sha256(json.dumps(history.history, sort_keys=True).encode())
    for name, value in state(network).items():
        sha.update(name.encode() + value.tobytes())
    return sha.hexdigest()
