"""Peak memory of training, over training the dense model, in bytes per sparse weight.

    python benchmarks/memory.py

Each way trains in a process of its own (a wide MLP, so that weights are what counts, not
activations) and reports by how much `fit` raises its resident memory at the peak (Linux; mask
updates included). The steady-state bytes of the variables, which the allocator's slack and the
step's temporaries do not blur, stand beside it.
"""

import argparse
import json
import os
import subprocess
import sys

LAYERS = 12
WAYS = ("dense", "SparseOpt", "SparseOpt + SET", "SparseOpt + RigL")


def train(way, units, steps):
    import keras
    import numpy as np
    from common import reset_peak, resident

    import keras_sparseopt as kso

    layers = [keras.Input((units,))]
    for _ in range(LAYERS):
        layers += [keras.layers.Dense(units, use_bias=False), keras.layers.BatchNormalization()]
    model = keras.Sequential([*layers, keras.layers.Dense(10)])
    del layers
    optimizer, callbacks = keras.optimizers.SGD(0.01, momentum=0.9), []
    if way != "dense":
        kso.sparsify(model, None, {x.name: 0.9 for x in model.layers[:-1:2]})
        optimizer = kso.SparseOpt(optimizer)
    if "+" in way:
        method = kso.RigL if "RigL" in way else kso.SET
        callbacks = [method(update_every=4, end_step=1000)]
    model.compile(optimizer=optimizer, loss="mse")
    rng = np.random.default_rng(0)  # gradients that are all 0 would be all ties
    x = rng.normal(size=(32 * steps, units)).astype("float32")
    y = rng.normal(size=(32 * steps, 10)).astype("float32")
    held = []

    class Held(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            variables = {id(v): v for v in model.weights + optimizer.variables}
            for variable in getattr(optimizer, "transient_variables", ()):
                variables[id(variable)] = variable  # mask copies and dense gradients
            held.append(sum(keras.ops.convert_to_numpy(v).nbytes for v in variables.values()))

    # From here on: building and converting the model is not training.
    reset_peak()
    before = resident("VmRSS")
    model.fit(x, y, batch_size=32, verbose=0, callbacks=[*callbacks, Held()])
    rise = resident("VmHWM") - before
    print(json.dumps({"before": before, "rise": rise, "held": held[-1]}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--units", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        return train(args.way, args.units, args.steps)
    from common import LITTLE_SLACK, report

    measured = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--units", str(args.units),
                   "--steps", str(args.steps)]  # fmt: skip
        environment = os.environ | LITTLE_SLACK
        output = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment
        ).stdout
        measured[way] = json.loads(output.splitlines()[-1])
    weights = LAYERS * args.units**2
    dense = measured["dense"]
    rows = [
        {
            "what": way,
            "rise in fit MB": m["rise"] / 1e6,
            "rise − dense, bytes/weight": (m["rise"] - dense["rise"]) / weights,
            "held MB": m["held"] / 1e6,
            "held − dense, bytes/weight": (m["held"] - dense["held"]) / weights,
        }
        for way, m in measured.items()
    ]
    report(
        "memory",
        rows,
        ["aim: with RigL ≤ 6 bytes per weight over dense, without ≤ 1"],
        [f"{weights:,} sparse weights, SGD with momentum"],
    )


if __name__ == "__main__":
    main()
