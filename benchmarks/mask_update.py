"""Drop-and-grow of all ResNet-50 kernels, over a plain copy of the bytes it has to read.

    python benchmarks/mask_update.py

Rows: the update as RigL does it (ranking, and moving mask, weights and a momentum slot with
`rewire`), the ranking alone, and the ranking by argsort. Everything in one process, round
after round, so that the noise of the machine hits all of them; medians.
"""

import argparse
import math
import time

import keras
import numpy as np
from common import report
from keras import ops

import keras_sparseopt as kso


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

    dense = keras.applications.ResNet50(weights=None)
    model = kso.sparsify(dense, args.sparsity)
    optimizer = kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9))
    optimizer.build(model.trainable_variables)
    optimizer.open_taps()
    rng = np.random.default_rng(0)
    for kernel in optimizer._kernels:
        kernel.tap.assign(rng.normal(size=tuple(kernel.variable.shape)).astype("float32"))
    rigl = kso.RigL(end_step=1000)
    rigl.begin(optimizer)
    kernels = optimizer.sparse_kernels
    weights = [ops.convert_to_tensor(k) for k in kernels]
    scores = [ops.abs(optimizer.dense_gradient(k)) for k in kernels]
    masks = [ops.convert_to_numpy(k.topology.mask) for k in kernels]
    counts = [math.floor(0.3 * mask.sum()) for mask in masks]
    arrays = [
        np.ascontiguousarray(ops.convert_to_numpy(x))
        for group in (weights, scores, masks)
        for x in group
    ]
    targets = [np.empty_like(x) for x in arrays]

    def copy():
        for target, array in zip(targets, arrays):
            np.copyto(target, array)

    def ranking():
        for w, m, s, n in zip(weights, masks, scores, counts):
            ops.convert_to_numpy(kso.drop_and_grow(w, m, s, n))

    def argsort():
        for w, m, s, n in zip(weights, masks, scores, counts):
            argsort_update(ops.convert_to_numpy(w), m, ops.convert_to_numpy(s), n)

    ways = {
        "plain copy": copy,
        "ranking": ranking,
        "whole update": rigl._update_masks,
        "argsort ranking": argsort,
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
        ["aim: whole update ≤ 10 × copy"],
        [
            f"{len(kernels)} kernels, {sum(m.size for m in masks):,} weights at sparsity "
            f"{args.sparsity}, {size / 1e6:.0f} MB read"
        ],
    )


if __name__ == "__main__":
    main()
