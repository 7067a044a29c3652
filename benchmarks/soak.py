"""A thousand mask updates: exact counts, no growing memory, no retracing, no slowing down.

    python benchmarks/soak.py

A small convolutional network, one mask update every second step. Memory is the resident set of the
process; "growth" is from the end of the first fifth to the end. Update times are medians of the
second and of the last tenth of the updates.
"""

import argparse
import pathlib
import time

import keras
import numpy as np
from common import report

import keras_sparseopt as kso

UPDATE_EVERY = 2


class CountTraces(keras.layers.Layer):
    """Python runs a layer's `call` only while the step is being traced; on PyTorch always."""

    def __init__(self):
        super().__init__()
        self.traces = 0

    def call(self, x):
        self.traces += 1
        return x


def network():
    keras.utils.set_random_seed(0)
    counter = CountTraces()
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            counter,
            kso.SparseConv2D(32, 3, sparsity=0.9, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            kso.SparseConv2D(32, 3, 2, sparsity=0.95, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            kso.SparseDense(64, sparsity=0.97),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        kso.SparseOpt(keras.optimizers.SGD(0.05, momentum=0.9)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model, counter


def resident_megabytes():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def active(model):
    return [weight.topology.num_active() for weight in kso.sparse_weights(model)]


class Watch(keras.callbacks.Callback):
    """Measures every update of a method; comes after it in the list."""

    def __init__(self, method, counter):
        super().__init__()
        self.method, self.counter = method, counter
        self.seconds, self.memory, self.traces, self.counts = [], [], [], []
        update = method.update_masks

        def timed():
            start = time.perf_counter()
            update()
            self.seconds.append(time.perf_counter() - start)

        method.update_masks = timed

    def on_train_batch_begin(self, batch, logs=None):
        if len(self.seconds) > len(self.memory):
            self.memory.append(resident_megabytes())
            self.traces.append(self.counter.traces)
            self.counts.append(active(self.model))


def soak(kind, updates):
    model, counter = network()
    before = active(model)
    steps = UPDATE_EVERY * updates
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 12, 12, 3)).astype("float32"), rng.integers(0, 10, 80)
    schedule = keras.optimizers.schedules.PolynomialDecay(0.3, steps, 0.1)
    method = kind(UPDATE_EVERY, schedule, end_step=steps + 1)
    watch = Watch(method, counter)
    model.fit(
        x, y, batch_size=8, epochs=steps // 10, shuffle=False, verbose=0,
        callbacks=[method, watch],
    )  # fmt: skip
    milliseconds = np.array(watch.seconds) * 1000
    part = max(updates // 10, 1)
    is_eager = keras.backend.backend() == "torch"
    early, late = np.median(milliseconds[part : 2 * part]), np.median(milliseconds[-part:])
    return {
        "method": kind.__name__,
        "updates": len(watch.seconds),
        "counts exact": all(counts == before for counts in watch.counts),
        "ITOP rate": model.optimizer.itop_rate(),
        "traces after first update": None if is_eager else watch.traces[-1] - watch.traces[0],
        "memory MB": watch.memory[-1],
        "growth MB": watch.memory[-1] - watch.memory[updates // 5],
        "update ms early": float(early),
        "update ms late": float(late),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--updates", type=int, default=1000)
    args = parser.parse_args()
    rows = [soak(kind, args.updates) for kind in (kso.RigL, kso.SET)]
    report("soak", rows, ["aim: exact counts, 0 traces, no growth, early = late"])


if __name__ == "__main__":
    main()
