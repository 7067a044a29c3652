"""JAX `ModelParallel` over two processes: weights and masks that no process holds whole.

Usage: model_parallel.py OUTPUT; with KERAS_DISTRIBUTION_… one of two processes, without it the
reference in one process on one device.
"""

import os
import sys

import keras
import numpy as np

SEVERAL = "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ
if SEVERAL:
    keras.distribution.initialize()

import jax  # noqa: E402
import tiny  # noqa: E402

import keras_sparseopt as kso  # noqa: E402


def main():
    if SEVERAL:
        assert jax.process_count() == 2 == len(jax.devices())
        tiny.model_parallel((1, 2), {".*(hidden|second)/kernel": (None, "model")})
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(16, name="hidden", use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(8, name="second"),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(4, name="head"),
        ]
    )
    kso.sparsify(model, 0.6)
    model.compile(kso.SparseOpt(keras.optimizers.SGD(0.05, momentum=0.9)), "mse")
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(32, n)).astype("float32") for n in (12, 4))
    half = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 1.0)
    logs = {}
    for method in (kso.RigL(2, half, end_step=100), kso.SET(2, half, end_step=100)):
        history = model.fit(
            x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[method]
        ).history
        logs |= {f"{type(method).__name__} {k}": np.array(v) for k, v in history.items()}
    mask = model.get_layer("hidden").kernel.topology.mask.value
    assert mask.is_fully_addressable != SEVERAL

    @jax.jit
    def whole(values):
        return values

    if SEVERAL:
        replicated = jax.sharding.NamedSharding(
            model.get_layer("hidden").kernel.value.sharding.mesh, jax.sharding.PartitionSpec()
        )
        whole = jax.jit(lambda values: values, out_shardings=replicated)
    variables = [*model.variables, *model.optimizer.variables]
    state = [np.asarray(value) for value in whole([v.value for v in variables])]
    index = jax.process_index()
    np.savez(f"{sys.argv[1]}-{index}.npz", **{f"{i:03d}": v for i, v in enumerate(state)}, **logs)


if __name__ == "__main__":
    main()
