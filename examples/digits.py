"""The main job on real data, in minutes: RigL with and without SparseOpt on handwritten digits.

    python examples/digits.py            # about four minutes on two CPU cores
    python examples/digits.py --quick    # seconds: one seed, two epochs

A small BatchNorm ResNet learns scikit-learn's digits (1797 real scans of 8×8 pixels, a fixed
third of them for testing) at 95 % sparsity. Every seed trains twice from the same weights and
masks: once with the plain inner optimizer, once with SparseOpt around it. What was measured
ends as a table, as `runs/digits.png` and as `runs/digits.json`, whichever way it comes out.
"""

import argparse
import json
import pathlib
import time

import keras
import numpy as np
from models import resnet
from record import facts
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_sparseopt as kso

SPARSITY = 0.95
EPOCHS = 15
SEEDS = 5
BATCH_SIZE = 64
LEARNING_RATE = 0.05
MOMENTUM = 0.9
UPDATE_EVERY = 15
DROP_FRACTION = 0.3
WIDTHS, BLOCKS, BN_MOMENTUM = (32, 64), 2, 0.9
METHODS = {"inner optimizer": False, "SparseOpt": True}  # skew_correction


def dense_model():
    return resnet((8, 8, 1), 10, WIDTHS, BLOCKS, bn_momentum=BN_MOMENTUM)


def load():
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16.0).astype("float32")
    return train_test_split(images, labels, test_size=1 / 3, random_state=0, stratify=labels)


class Progress(keras.callbacks.Callback):
    """One bar for all the trainings; also times the steps."""

    def __init__(self, bar, offset):
        super().__init__()
        self.bar, self.offset, self.seconds = bar, offset, []

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)

    def on_epoch_end(self, epoch, logs=None):
        values = [("test accuracy", logs["val_accuracy"]), ("ITOP rate", logs["itop_rate"])]
        self.bar.update(self.offset + epoch + 1, values=values)


def fan_ins(model):
    """Active inputs of every neuron of the convolutions ERK made sparse, as a fraction."""
    topologies = [weight.topology for weight in kso.sparse_weights(model)]
    return np.concatenate([1 - t.neuron_sparsity for t in topologies if t.sparsity > 0.5])


def train(seed, skew_correction, data, epochs, bar, offset):
    train_x, test_x, train_y, test_y = data
    keras.utils.set_random_seed(seed)
    model = kso.sparsify(dense_model(), SPARSITY, seed=seed)
    before = fan_ins(model)
    steps = epochs * -(-len(train_x) // BATCH_SIZE)
    schedule = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    sgd = keras.optimizers.SGD(schedule, momentum=MOMENTUM)
    model.compile(
        optimizer=kso.SparseOpt(sgd, skew_correction=skew_correction),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    progress = Progress(bar, offset)
    history = model.fit(
        train_x, train_y, batch_size=BATCH_SIZE, epochs=epochs, verbose=0,
        validation_data=(test_x, test_y),
        callbacks=[kso.RigL(UPDATE_EVERY, DROP_FRACTION), progress],
    ).history  # fmt: skip
    return {
        "seed": seed,
        "test_accuracy": history["val_accuracy"],
        "sparsity": history["sparsity"][-1],
        "itop_rate": history["itop_rate"][-1],
        "seconds_per_step": float(np.median(progress.seconds)),
        "layer_sparsity": {
            weight.topology.name: weight.topology.sparsity for weight in kso.sparse_weights(model)
        },
        "fan_in_before": before.tolist(),
        "fan_in_after": fan_ins(model).tolist(),
    }


def table(runs):
    """Accuracy per epoch, mean ± standard deviation over the seeds, and the closing facts."""
    lines = ["", "test accuracy in %   " + "".join(name.rjust(22) for name in runs)]
    curves = {name: 100 * np.array([r["test_accuracy"] for r in rs]) for name, rs in runs.items()}
    for epoch in range(len(next(iter(curves.values()))[0])):
        cells = [f"{c[:, epoch].mean():.2f} ± {c[:, epoch].std():.2f}" for c in curves.values()]
        lines.append(f"epoch {epoch + 1:2d}".ljust(21) + "".join(cell.rjust(22) for cell in cells))
    for key, label in (
        ("sparsity", "sparsity"),
        ("itop_rate", "ITOP rate"),
        ("seconds_per_step", "seconds per step"),
    ):
        cells = [f"{np.mean([r[key] for r in rs]):.4f}" for rs in runs.values()]
        lines.append(label.ljust(21) + "".join(cell.rjust(22) for cell in cells))
    baseline, sparseopt = curves.values()
    gain = sparseopt.mean(axis=1) - baseline.mean(axis=1)
    lines += [
        "",
        f"SparseOpt − inner optimizer, mean over epochs, over {len(gain)} seeds: "
        f"{gain.mean():+.2f} ± {gain.std():.2f} percentage points",
    ]
    return "\n".join(lines)


def picture(runs, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), width_ratios=[1.15, 1, 1])
    colors = {"inner optimizer": "#7a7a7a", "SparseOpt": "#d1495b"}

    for name, rs in runs.items():
        curve = 100 * np.array([r["test_accuracy"] for r in rs])
        epochs = np.arange(1, curve.shape[1] + 1)
        mean, spread = curve.mean(axis=0), curve.std(axis=0)
        axes[0].plot(epochs, mean, color=colors[name], label=name, linewidth=2)
        axes[0].fill_between(epochs, mean - spread, mean + spread, color=colors[name], alpha=0.2)
    axes[0].set(
        xlabel="epoch",
        ylabel="test accuracy (%)",
        title=f"RigL at {SPARSITY:.0%} sparsity, mean ± std of {len(rs)} seeds",
    )
    if curve[:, -1].mean() > 90:  # the last percent is where the difference would be
        axes[0].set_ylim(85, 100)
    axes[0].legend(frameon=False, loc="lower right")
    axes[0].grid(axis="y", alpha=0.25)

    sparsities = runs["SparseOpt"][0]["layer_sparsity"]
    rows = np.arange(len(sparsities))
    axes[1].barh(rows, [100 * s for s in sparsities.values()], color="#30638e")
    axes[1].set_yticks(rows, [f"{i + 1}  {name}" for i, name in enumerate(sparsities)])
    axes[1].invert_yaxis()
    axes[1].axvline(100 * SPARSITY, color="black", linewidth=1, linestyle=":")
    axes[1].set(xlabel="sparsity (%)", title="ERK: sparsity per layer", xlim=(0, 100))

    before = 100 * np.concatenate([r["fan_in_before"] for r in runs["SparseOpt"]])
    after = 100 * np.concatenate([r["fan_in_after"] for r in runs["SparseOpt"]])
    bins = np.linspace(0, np.quantile(np.concatenate([before, after]), 0.995), 40)
    for values, color, label in (
        (before, "#30638e", "before (random masks)"),
        (after, "#d1495b", "after RigL"),
    ):
        axes[2].hist(values, bins, color=color, alpha=0.55, label=label, density=True)
    axes[2].set(
        xlabel="active inputs of a neuron (% of its fan-in)",
        ylabel="density",
        title="Fan-in of the neurons of sparse layers",
    )
    axes[2].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs"))
    args = parser.parse_args(argv)
    epochs, seeds = (2, 1) if args.quick else (EPOCHS, SEEDS)
    data = load()
    args.output.mkdir(parents=True, exist_ok=True)

    kso.summary(kso.sparsify(dense_model(), SPARSITY))
    print(f"\n{len(METHODS) * seeds} trainings of {epochs} epochs, {len(data[0])} images")
    bar = keras.utils.Progbar(
        len(METHODS) * seeds * epochs,
        stateful_metrics=["test accuracy", "ITOP rate"],
        unit_name="epoch",
    )
    runs = {name: [] for name in METHODS}
    for seed in range(seeds):
        for name, skew_correction in METHODS.items():
            offset = epochs * sum(map(len, runs.values()))
            runs[name].append(train(seed, skew_correction, data, epochs, bar, offset))
            keras.backend.clear_session()
    print(table(runs))
    picture(runs, args.output / "digits.png")
    results = {
        "command": "python examples/digits.py" + (" --quick" if args.quick else ""),
        **facts(),
        "settings": {
            "sparsity": SPARSITY, "epochs": epochs, "seeds": seeds, "batch_size": BATCH_SIZE,
            "learning_rate": f"{LEARNING_RATE}, cosine to 0", "momentum": MOMENTUM,
            "update_every": UPDATE_EVERY, "drop_fraction": DROP_FRACTION,
            "widths": WIDTHS, "blocks": BLOCKS,
        },
        "runs": runs,
    }  # fmt: skip
    (args.output / "digits.json").write_text(json.dumps(results) + "\n")
    print(f"picture: {args.output / 'digits.png'}   numbers: {args.output / 'digits.json'}")
    return results


if __name__ == "__main__":
    main()
