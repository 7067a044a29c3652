"""Block-sparse dense layers in native TFLite: one file stored dense, one stored sparse, in turns.

    python benchmarks/block_inference.py

A layer with masks of blocks of 4 inputs × 1 neuron is converted twice, without and with TFLite's
sparse format; both files are run by its interpreter with one thread, alternately, and must give the
same outputs. Ratios of medians, dense over sparse.
"""

import argparse
import os
import time

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras  # noqa: E402
import numpy as np  # noqa: E402
from common import report  # noqa: E402

import keras_sparseopt as kso  # noqa: E402
from keras_sparseopt.deployment.convert import converted, exported, make_interpreter  # noqa: E402

NETWORKS = {"1024": (1024, 1024), "4096": (4096, 4096), "BERT feed-forward": (768, 3072, 768)}
AIMS = {("1024", 0.9, 1): 1.8, ("4096", 0.9, 1): 3.0}


def network(sizes, sparsity, structure, batch):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(batch_shape=(batch, sizes[0]))])
    for position, size in enumerate(sizes[1:]):
        model.add(keras.layers.Dense(size, "relu" if position < len(sizes) - 2 else None))
    kso.sparsify(model, sparsity, "uniform", structure=structure)
    return kso.strip(model)


class Engine:
    def __init__(self, content, x):
        self.interpreter = make_interpreter(content)
        (self.input,), (self.output,) = (
            self.interpreter.get_input_details(), self.interpreter.get_output_details(),
        )  # fmt: skip
        self.interpreter.set_tensor(self.input["index"], x)

    def outputs(self):
        self.interpreter.invoke()
        return self.interpreter.get_tensor(self.output["index"])

    def seconds(self, calls):
        start = time.perf_counter()
        for _ in range(calls):
            self.interpreter.invoke()
        return (time.perf_counter() - start) / calls


def measure(sizes, sparsity, structure, batch, rounds):
    model = network(sizes, sparsity, structure, batch)
    x = np.random.default_rng(0).normal(size=(batch, sizes[0])).astype("float32")
    with exported(model, x) as directory:
        files = [converted(directory, sparse=is_sparse) for is_sparse in (False, True)]
    dense, sparse = engines = [Engine(content, x) for content in files]
    expected = np.asarray(model(x))
    difference = max(float(np.abs(engine.outputs() - expected).max()) for engine in engines)
    assert difference < 1e-3 * np.abs(expected).max(), difference
    calls = max(1, round(0.01 / dense.seconds(3)))
    times = [(dense.seconds(calls), sparse.seconds(calls)) for _ in range(rounds)]
    slow, fast = np.median(times, axis=0)
    return {
        "dense ms": 1e3 * float(slow),
        "sparse ms": 1e3 * float(fast),
        "× faster": float(slow / fast),
        "× smaller": len(files[0]) / len(files[1]),
        "largest difference": difference,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    rows = []
    for name, sizes in NETWORKS.items():
        for sparsity in (0.8, 0.9, 0.95):
            for label, structure in (("unstructured", None), ("Block(4, 1)", kso.Block(4, 1))):
                for batch in (1, 8):
                    found = measure(sizes, sparsity, structure, batch, args.rounds)
                    rows.append(
                        {"network": name, "sparsity": sparsity, "structure": label, "batch": batch,
                         **found}
                    )  # fmt: skip
                    print(rows[-1], flush=True)
    aims = [
        f"aim: ≥ {least} × for blocks, {name}, {sparsity:.0%}, batch {batch}"
        for (name, sparsity, batch), least in AIMS.items()
    ]
    report("block_inference", rows, aims)


if __name__ == "__main__":
    main()
