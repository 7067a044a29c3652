"""How many neurons die in sparse training, and how many could be taken out without a difference.

    python benchmarks/dead_neurons.py          # about twenty minutes

Networks for scikit-learn's digits: an MLP, and a ResNet with 3×3 convolutions. A hidden neuron is
dead if it has no active inputs, unread if no active weight reads it. An unread one can go. A dead
one puts out a constant: it can go if that is 0, or if a dense layer reads it, whose bias takes the
constant; behind a 3×3 convolution with zero padding it cannot, since the border differs. Of the
ResNet only channels inside of a block are looked at: the others are tied by additions. FLOPs are
those of the whole network, dense, over those of the smaller one.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import digits  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
from common import report  # noqa: E402
from models import mlp, resnet  # noqa: E402

import keras_sparseopt as kso  # noqa: E402

NETWORKS = {
    "MLP 3×256": lambda: mlp((8, 8, 1), 10, 256),
    "ResNet 32/64": digits.dense_model,
    "narrow ResNet 16/32": lambda: resnet((8, 8, 1), 10, (16, 32), 2, bn_momentum=0.9),
}
METHODS = {
    "dense": None,
    "RigL": lambda: kso.RigL(15, 0.3),
    "SRigL 0.3": lambda: kso.SRigL(15, 0.3, ablation_exclude=["classifier"]),
    "SRigL 0.9": lambda: kso.SRigL(15, 0.3, min_salient=0.9, ablation_exclude=["classifier"]),
}


def train(make, method, sparsity, seed, data, epochs):
    train_x, test_x, train_y, test_y = data
    keras.utils.set_random_seed(seed)
    model, callbacks = make(), []
    optimizer = keras.optimizers.SGD(
        keras.optimizers.schedules.CosineDecay(0.05, epochs * -(-len(train_x) // 64)), 0.9
    )
    if method != "dense":
        structure = kso.ConstantFanIn() if method.startswith("SRigL") else None
        kso.sparsify(model, sparsity, seed=seed, structure=structure)
        optimizer, callbacks = kso.SparseOpt(optimizer), [METHODS[method]()]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    model.fit(train_x, train_y, batch_size=64, epochs=epochs, verbose=0, callbacks=callbacks)
    return model, model.evaluate(test_x, test_y, verbose=0)[1]


def constant(model, name):
    """What each neuron of a layer puts out after its normalization and ReLU if its sum is 0."""
    norm = model.get_layer(f"{name}_bn")
    gamma, beta, mean, variance = map(np.asarray, norm.get_weights())
    return np.maximum(beta - gamma * mean / np.sqrt(variance + norm.epsilon), 0)


def kernel(model, name):
    values = np.array(model.get_layer(name).kernel)
    return values.reshape(-1, *values.shape[-2:])


def counted(model):
    """Hidden neurons, those that are dead or unread, those that can go, and both FLOP ratios."""
    names = [layer.name for layer in model.layers if hasattr(layer, "kernel")]
    pairs = [(name, f"{name[:-1]}b") for name in names if name.endswith("_a")]
    is_mlp = not pairs
    if is_mlp:
        pairs = list(zip(names, names[1:]))
    sizes = {name: kernel(model, name).size for name in names}
    positions = {
        name: np.prod(model.get_layer(name).output.shape[1:-1], dtype=int) for name in names
    }
    hidden = dead_or_unread = can_go = 0
    unread: dict = {}
    kept = {name: [1.0, 1.0] for name in names}  # share of inputs and outputs, if all go
    exact = {name: [1.0, 1.0] for name in names}
    kernels = {name: kernel(model, name) for name in names}
    dead = {name: ~kernels[name].any(axis=(0, 1)) for name, _ in pairs}
    for name, reader in reversed(pairs):  # what only unread ones read is unread
        read = kernels[reader][:, :, ~unread[reader]] if reader in unread else kernels[reader]
        unread[name] = ~read.any(axis=(0, 2))
    for name, reader in pairs:
        gone = unread[name] | (dead[name] & (is_mlp | (constant(model, name) == 0)))
        either = dead[name] | unread[name]
        hidden += len(gone)
        dead_or_unread += either.sum()
        can_go += gone.sum()
        for shares, out in ((kept, either), (exact, gone)):
            shares[name][1] = shares[reader][0] = 1 - out.mean()
    whole = sum(sizes[name] * positions[name] for name in names)
    ratios = [
        whole / sum(sizes[n] * positions[n] * np.prod(shares[n]) for n in names)
        for shares in (kept, exact)
    ]
    return int(hidden), int(dead_or_unread), int(can_go), *map(float, ratios)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    data, rows = digits.load(), []
    cells = [
        (network, method, sparsity)
        for network in ("MLP 3×256", "ResNet 32/64")
        for method in ("RigL", "SRigL 0.3", "SRigL 0.9")
        for sparsity in (0.95, 0.98, 0.99)
    ]
    cells += [(network, "dense", 0.0) for network in NETWORKS]
    for network, method, sparsity in cells:
        accuracies, found = [], []
        for seed in range(args.seeds):
            model, accuracy = train(
                NETWORKS[network], method, sparsity, seed, data, args.epochs
            )  # fmt: skip
            accuracies.append(accuracy)
            found.append(counted(model))
            keras.backend.clear_session()
        hidden, dead, can_go, ideal, exact = np.mean(found, axis=0)
        rows.append(
            {
                "network": network,
                "method": method,
                "sparsity": sparsity,
                "test accuracy": float(np.mean(accuracies)),
                "hidden neurons": int(hidden),
                "dead or unread": float(dead / hidden),
                "can go": float(can_go / hidden),
                "FLOPs × if all went": float(ideal),
                "FLOPs × of what can go": float(exact),
            }
        )
        print(rows[-1], flush=True)
    report("dead_neurons", rows, [], [f"seeds: {args.seeds}, epochs: {args.epochs}"])


if __name__ == "__main__":
    main()
