"""Drop-and-grow of all ResNet-50 kernels, over a plain copy of the bytes it has to read.

    python benchmarks/mask_update.py

Rows: the update as RigL does it (ranking, and moving mask, weights and a momentum slot), on the
host and compiled; the ranking alone; the ranking by argsort; and drop-and-grow of one kernel of
2.36 M weights, compiled and on the host. Everything in one process, round after round, so that the
noise of the machine hits all of them; medians.
"""

import argparse
import math
import time

import keras
import numpy as np
from common import report
from keras import ops

import keras_sparseopt as kso
from keras_sparseopt import masks
from keras_sparseopt.backend import compiled, host

LARGEST = (3, 3, 512, 512)


def argsort_update(weights, mask, scores, num_update):
    """What a straightforward implementation does: two sorts per kernel."""
    active = int(mask.sum())
    order = np.argsort(-np.where(mask, np.abs(weights), -1.0), axis=None, kind="stable")
    keep = np.zeros(mask.size, bool)
    keep[order[: active - num_update]] = True
    order = np.argsort(-np.where(keep, -1.0, scores.ravel()), kind="stable")
    keep[order[:num_update]] = True
    return keep.reshape(mask.shape)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sparsity", type=float, default=0.9)
    args = parser.parse_args()

    model = kso.sparsify(keras.applications.ResNet50(weights=None), args.sparsity)
    optimizer = kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9))
    optimizer.build(model.trainable_variables)
    methods = {}
    for name in ("host", "compiled"):
        methods[name] = kso.RigL(end_step=1000, compiled=name == "compiled")
        methods[name].begin(optimizer)
    rng = np.random.default_rng(0)
    taps = optimizer._state.gradients.taps()
    for tap in taps:
        tap.assign(ops.convert_to_tensor(rng.normal(size=tap.shape).astype("float32")))
    weights = [host(weight.variable) for weight in optimizer.weights]
    scores = [np.abs(host(tap.read())) for tap in taps]
    old = [host(weight.topology.mask) for weight in optimizer.weights]
    counts = [math.floor(0.3 * mask.sum()) for mask in old]
    arrays = [np.ascontiguousarray(x) for group in (weights, scores, old) for x in group]
    weights, scores, old = ([np.array(x) for x in group] for group in (weights, scores, old))
    targets = [np.empty_like(x) for x in arrays]
    largest = next(i for i, mask in enumerate(old) if mask.shape == LARGEST)
    tensors = [ops.convert_to_tensor(x[largest]) for x in (weights, old, scores)]
    number = np.int32(counts[largest])
    drop_and_grow = compiled(lambda w, m, s, n: masks.drop_and_grow(w, m, s, n))

    def copy():
        for target, array in zip(targets, arrays):
            np.copyto(target, array)

    def ranking():
        for w, m, s, n in zip(weights, old, scores, counts):
            kso.drop_and_grow(w, m, s, n)

    def argsort():
        for w, m, s, n in zip(weights, old, scores, counts):
            argsort_update(w, m, s, n)

    def update_compiled():
        methods["compiled"].update_masks()
        host(optimizer.mask_change)  # waits for the last of them

    ways = {
        "plain copy": copy,
        "ranking": ranking,
        "whole update on the host": methods["host"].update_masks,
        "whole update, compiled": update_compiled,
        "argsort ranking": argsort,
        "one kernel of 2.36 M, host": lambda: kso.drop_and_grow(
            weights[largest], old[largest], scores[largest], counts[largest]
        ),
        "one kernel of 2.36 M, compiled": lambda: host(drop_and_grow(*tensors, number)),
    }
    first, seconds = {}, {name: [] for name in ways}
    for name, way in ways.items():
        start = time.perf_counter()
        way()
        first[name] = time.perf_counter() - start
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    base = np.median(seconds["plain copy"])
    rows = [
        {
            "what": name,
            "median ms": 1e3 * float(np.median(times)),
            "× copy": float(np.median(times) / base),
            "first call ms": 1e3 * first[name],
        }
        for name, times in seconds.items()
    ]
    size = sum(array.nbytes for array in arrays)
    report(
        "mask_update",
        rows,
        ["aim: ranking ≤ 8 × copy; one compiled kernel ≤ 50 ms"],
        [
            f"{len(old)} kernels, {sum(m.size for m in old):,} weights at sparsity "
            f"{args.sparsity}, {size / 1e6:.0f} MB read"
        ],
    )


if __name__ == "__main__":
    main()
