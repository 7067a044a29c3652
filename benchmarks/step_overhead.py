"""Seconds per `fit` step with SparseOpt and RigL attached, over the dense Keras step.

    python benchmarks/step_overhead.py

Two models: ResNet-20 at batch 128, and ResNet-50 (25 M weights). Dense and sparse epochs
alternate in one process, so that the noise of the machine hits both; the ratio is of medians.
The time to the end of the first step (building, tracing, compiling) is reported apart. Mask
updates are left out here (`mask_update.py` measures them).
"""

import argparse
import time

import keras
import numpy as np
from common import report
from models import resnet

import keras_sparseopt as kso


def resnet20():
    return resnet((32, 32, 3), 10, (16, 32, 64), 3), 128, 32


def resnet50():
    size = 160
    return keras.applications.ResNet50(
        weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
    ), 32, size  # fmt: skip


class Timer(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)


def compiled(model, optimizer):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)
    return model


def sgd():
    return keras.optimizers.SGD(0.01, momentum=0.9)


def sparse(dense):
    return kso.sparsify(keras.models.clone_model(dense), 0.9)


def measure(make, rounds, steps):
    dense, batch, size = make()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch * steps, size, size, 3)).astype("float32")
    y = rng.integers(0, 10, batch * steps)
    never = 10**6
    ways = {
        "dense": (compiled(keras.models.clone_model(dense), sgd()), lambda: []),
        "SparseOpt": (
            compiled(sparse(dense), kso.SparseOpt(sgd())),
            lambda: [],
        ),
        "SparseOpt + RigL": (
            compiled(sparse(dense), kso.SparseOpt(sgd())),
            lambda: [kso.RigL(never, end_step=2 * never)],
        ),
    }
    first, seconds = {}, {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, (model, callbacks) in ways.items():
            timer = Timer()
            start = time.perf_counter()
            model.fit(x, y, batch_size=batch, verbose=0, callbacks=[*callbacks(), timer])
            if round_ == 0:
                first[name] = time.perf_counter() - start - sum(timer.seconds[1:])
            else:
                # The first step of a fit is in no median.
                seconds[name] += timer.seconds[1:]
    base = np.median(seconds["dense"])
    return [
        {
            "model": make.__name__,
            "what": name,
            "median s/step": float(np.median(times)),
            "× dense": float(np.median(times) / base),
            "steps": len(times),
            "first step s": first[name],
            "first × dense": first[name] / first["dense"],
        }
        for name, times in seconds.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    rows = measure(resnet20, args.rounds, args.steps)
    rows += measure(resnet50, args.rounds, args.steps)
    report("step_overhead", rows, ["aim: SparseOpt + RigL ≤ 1.02 × dense"])


if __name__ == "__main__":
    main()
