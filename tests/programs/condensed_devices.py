"""Condensed weights on several devices equal those on one. Usage: condensed_devices.py"""

import os

os.environ["JAX_NUM_CPU_DEVICES"] = "4"

import keras  # noqa: E402
import numpy as np  # noqa: E402

IS_JAX = keras.backend.backend() == "jax"
if not IS_JAX:
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

import tiny  # noqa: E402

import keras_sparseopt as kso  # noqa: E402
from keras_sparseopt import backend  # noqa: E402


def train(devices, method, is_condensed=True):
    with devices.scope():
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((6, 6, 4)),
                keras.layers.Conv2D(16, 3, activation="relu"),
                keras.layers.Flatten(),
                keras.layers.Dense(32, "relu", name="hidden"),
                keras.layers.Dense(3, name="head"),
            ]
        )
        structure = kso.Block(3, 16, balanced=True)
        kso.sparsify(model, 0.5, exclude="head", structure=structure)
        if is_condensed:
            kso.condense(model)
        optimizer = kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(48, 6, 6, 4)).astype("float32"), np.arange(48) % 3
    history = model.fit(
        x, y, batch_size=8, epochs=2, shuffle=False, verbose=0,
        callbacks=[method(update_every=2, drop_fraction=0.5, end_step=100, check_replicas=True)],
    )  # fmt: skip
    kso.assert_replicas_agree(model)
    return model, history.history


def assert_same(one, many):
    (one, of_one), (many, of_many) = one, many
    for name, values in of_one.items():
        np.testing.assert_allclose(of_many[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    for a, b in zip(kso.sparse_weights(one), kso.sparse_weights(many), strict=True):
        masks, kernels = (
            [keras.ops.convert_to_numpy(getattr(v.topology, name)) for v in (a, b)]
            for name in ("mask", "kernel")
        )
        np.testing.assert_array_equal(*masks)
        np.testing.assert_allclose(*kernels, rtol=1e-4, atol=1e-5)


def check_nothing_is_gathered():
    """How arrays lie in memory is left to XLA where every device has a part of them."""
    import jax

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    part = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    rows = jax.device_put(np.ones((8, 4), "float32"), part)
    columns = jax.jit(lambda rows: backend.settled(rows.T) + 1.0)
    assert "all-gather" not in columns.lower(rows).compile().as_text()


def main():
    single = kso.resolve_strategy("one")
    methods = kso.RigL, kso.SET
    masked = [train(single, method, is_condensed=False) for method in methods]
    one = [train(single, method) for method in methods]
    several = kso.resolve_strategy("data_parallel" if IS_JAX else "mirrored")
    many = [train(several, method) for method in methods]
    for reference, *others in zip(masked, one, many):
        for other in others:
            assert_same(reference, other)
            assert all(v.topology.is_condensed for v in kso.sparse_weights(other[0]))
    if IS_JAX:
        check_nothing_is_gathered()
        # What is sharded stays masked, the rest is condensed.
        tiny.model_parallel((2, 2), {".*hidden/kernel": (None, "model")})
        parallel = train(single.__class__("one", None, 1, 0, 1), kso.RigL)
        forms = [v.topology.is_condensed for v in kso.sparse_weights(parallel[0])]
        assert forms == [True, False], forms
        assert_same(masked[0], parallel)
    print("all equal")


if __name__ == "__main__":
    main()
