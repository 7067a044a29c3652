"""A whole mask update of ResNet-50 under each structure, over the unstructured one as sparse.

    python benchmarks/structure_updates.py

As RigL does it: ranking, and moving weight, momentum slot and mask, on the host. Round after round
in one process, so that the noise of the machine hits all rows; medians.
"""

import argparse
import time

import keras
import numpy as np
from common import report
from keras import ops

import keras_sparseopt as kso

# Each with the unstructured row that it is compared with.
ROWS = {
    "unstructured, 90 %": (0.9, None, "unstructured, 90 %"),
    "Block(4, 1), 90 %": (0.9, kso.Block(4, 1), "unstructured, 90 %"),
    "Block(4, 4), 90 %": (0.9, kso.Block(4, 4), "unstructured, 90 %"),
    "ConstantFanIn(), 90 %": (0.9, kso.ConstantFanIn(), "unstructured, 90 %"),
    "unstructured, 50 %": (0.5, None, "unstructured, 50 %"),
    "NM(2, 4)": (0.5, kso.NM(2, 4), "unstructured, 50 %"),
    "unstructured, 75 %": (0.75, None, "unstructured, 75 %"),
    "NM(1, 4)": (0.75, kso.NM(1, 4), "unstructured, 75 %"),
}


def method(sparsity, structure, seed):
    model = keras.applications.ResNet50(weights=None)
    kso.sparsify(model, sparsity, structure=structure)
    optimizer = kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9))
    optimizer.build(model.trainable_variables)
    rigl = kso.RigL(end_step=1000)
    rigl.begin(optimizer)
    rng = np.random.default_rng(seed)
    taps = optimizer._state.gradients.taps()
    for tap in taps:
        tap.assign(ops.convert_to_tensor(rng.normal(size=tap.shape).astype("float32")))
    return rigl


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    methods = {
        name: method(sparsity, structure, seed)
        for seed, (name, (sparsity, structure, _)) in enumerate(ROWS.items())
    }
    seconds = {name: [] for name in ROWS}
    for turn in range(args.rounds + 1):
        for name, rigl in methods.items():
            start = time.perf_counter()
            rigl.update_masks()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    rows = [
        {
            "what": name,
            "median ms": 1e3 * median[name],
            "× unstructured": median[name] / median[base],
        }
        for name, (_, _, base) in ROWS.items()
    ]
    report("structure_updates", rows, ["aim: at most 1.5 × the unstructured update"])


if __name__ == "__main__":
    main()
