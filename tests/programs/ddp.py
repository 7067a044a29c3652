"""PyTorch: several processes train one model in a loop of their own, by DistributedDataParallel.

Usage: ddp.py FORM OUTPUT. With WORLD_SIZE in the environment it is one of several processes,
without it the reference in one process.
"""

import os
import sys

import keras
import numpy as np
import torch

import keras_sparseopt as kso

BATCH, STEPS = 16, 12


def network(is_condensed):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((24,)),
            keras.layers.Dense(32, "tanh", kernel_regularizer=keras.regularizers.L2(0.01)),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(16, "tanh"),
            keras.layers.Dense(4),
        ]
    )
    kso.sparsify(
        model, 0.5, "uniform", seed=1, exclude=model.layers[-1],
        structure=kso.Block(1, 16, balanced=True),
    )  # fmt: skip
    return kso.condense(model) if is_condensed else model


def main(form, output):
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    model = forward = network(form == "condensed")
    optimizer = kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9))
    weights = model.trainable_variables
    optimizer.build(weights)
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(STEPS, BATCH, 24)).astype("float32"))
    y = torch.tensor(rng.integers(0, 4, (STEPS, BATCH)))
    if processes > 1:
        torch.distributed.init_process_group("gloo")
        forward = torch.nn.parallel.DistributedDataParallel(model)
        model.compile(optimizer, "sparse_categorical_crossentropy")
        try:
            model.fit(x[0], y[0], callbacks=[kso.RigL(1, end_step=2)])
        except ValueError as error:
            assert "shares no gradients between processes" in str(error), error
        else:
            raise AssertionError("`fit` was not refused")

    share = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    rigl = kso.RigL(3, 0.5, check_replicas=True)
    rigl.begin(optimizer, total_steps=STEPS)
    for inputs, targets in zip(x, y):
        model.zero_grad()
        outputs = forward(inputs[share], training=True)
        loss = torch.nn.functional.cross_entropy(outputs, targets[share]) + sum(model.losses)
        loss.backward()
        with torch.no_grad():
            optimizer.apply([weight.value.grad for weight in weights], weights)
        rigl.step()
    rigl.end()
    found = {weight.path: keras.ops.convert_to_numpy(weight) for weight in weights}
    for weight in kso.sparse_weights(model):
        found[f"mask of {weight.path}"] = keras.ops.convert_to_numpy(weight.topology.mask)
    np.savez(f"{output}-{rank}.npz", itop=optimizer.itop_rate(), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
