"""What `compact` makes of networks whose neurons died or were ablated, beside narrower dense ones.

    python benchmarks/compaction.py          # about ten minutes

Networks for scikit-learn's digits. `SRigL` with a large `min_salient` moves towards fewer, fuller
neurons. Multiply-adds and the latency in native TFLite (stored dense, batch 1, one thread, in
turns) are those of the dense network over those of the compacted one, both without using zeros.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras  # noqa: E402
import numpy as np  # noqa: E402
from common import report  # noqa: E402
from digits import dense_model, load  # noqa: E402
from models import mlp, resnet  # noqa: E402

import keras_sparseopt as kso  # noqa: E402
from keras_sparseopt.deployment.convert import converted, exported, make_interpreter  # noqa: E402
from keras_sparseopt.deployment.measuring import milliseconds  # noqa: E402

NETWORKS = {
    "MLP 3×256": lambda: mlp((8, 8, 1), 10, 256),
    "ResNet 32/64": dense_model,
}
NARROW = {
    "MLP 3×256": {
        "dense, 3×160": lambda: mlp((8, 8, 1), 10, 160),
        "dense, 3×64": lambda: mlp((8, 8, 1), 10, 64),
    },
    "ResNet 32/64": {
        "dense, 24/48": lambda: resnet((8, 8, 1), 10, (24, 48), 2, bn_momentum=0.9),
        "dense, 16/32": lambda: resnet((8, 8, 1), 10, (16, 32), 2, bn_momentum=0.9),
    },
}
MIN_SALIENT = {"RigL": None, "SRigL 0.3": 0.3, "SRigL 0.6": 0.6, "SRigL 0.9": 0.9}


def train(make, method, sparsity, seed, data, epochs):
    train_x, test_x, train_y, test_y = data
    keras.utils.set_random_seed(seed)
    model, callbacks = make(), []
    steps = epochs * -(-len(train_x) // 64)
    optimizer = keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.05, steps), 0.9)
    if sparsity:
        salient = MIN_SALIENT[method]
        structure = None if salient is None else kso.ConstantFanIn()
        kso.sparsify(model, sparsity, seed=seed, structure=structure)
        optimizer = kso.SparseOpt(optimizer)
        callbacks = [kso.RigL(15, 0.3)]
        if salient is not None:
            callbacks = [
                kso.SRigL(15, 0.3, min_salient=salient, ablation_exclude=["classifier"])
            ]  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    model.fit(train_x, train_y, batch_size=64, epochs=epochs, verbose=0, callbacks=callbacks)
    return model, model.evaluate(test_x, test_y, verbose=0)[1]


def interpreter(model):
    with exported(model, np.zeros((1, 8, 8, 1), "float32")) as directory:
        return make_interpreter(converted(directory, sparse=False)).invoke


def multiply_adds(model):
    return sum(row["flops_dense"] for row in kso.layer_costs(model)) / 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    data, rows = load(), []
    for network, whole in NETWORKS.items():
        cells = [("dense", 0.0, whole)]
        cells += [(name, 0.0, make) for name, make in NARROW[network].items()]
        cells += [(method, s, whole) for method in MIN_SALIENT for s in (0.9, 0.95, 0.98)]
        reference = whole()
        dense_time = interpreter(reference)
        for method, sparsity, make in cells:
            found = []
            for seed in range(args.seeds):
                model, accuracy = train(make, method, sparsity, seed, data, args.epochs)
                compacted = kso.compact(model)
                dense, small = milliseconds([dense_time, interpreter(compacted.model)], 0.3)
                found.append(
                    (
                        accuracy,
                        multiply_adds(reference) / multiply_adds(compacted.model),
                        dense / small,
                        sum(before - after for before, after in compacted.removed.values()),
                        sum(number for number, _ in compacted.kept.values()),
                    )
                )
            accuracies = [100 * accuracy for accuracy, *_ in found]
            _, fewer, faster, removed, kept = np.mean(found, axis=0)
            rows.append(
                {
                    "network": network,
                    "method": method,
                    "sparsity": sparsity,
                    "test accuracy, %": float(np.mean(accuracies)),
                    "±": float(np.std(accuracies, ddof=1)) if args.seeds > 1 else 0.0,
                    "neurons removed": float(removed),
                    "dead, kept": float(kept),
                    "× fewer multiply-adds": float(fewer),
                    "× faster": float(faster),
                }
            )
            print(rows[-1], flush=True)
    report("compaction", rows, [], [f"seeds: {args.seeds}, epochs: {args.epochs}"])


if __name__ == "__main__":
    main()
