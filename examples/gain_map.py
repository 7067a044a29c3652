"""Where does SparseOpt's correction help? A map over learning rate and weight decay, with seeds.

    python examples/gain_map.py --data_dir /data/tfds    # about an hour on one CPU core
    python examples/gain_map.py --quick                  # made-up images, seconds
    python examples/gain_map.py --seeds 5 --learning_rates 0.1 --weight_decays 0 0.0005

A proxy that is cheap enough for many seeds: CIFAR-10 averaged down to 16 × 16 pixels, a ResNet with
one block per stage, RigL at 95 % (ERK), few epochs. Every cell trains with and without the
correction from the same weights and masks, on the same batches; the gain is the paired difference
of the test accuracies. Results are added to the JSON file after every training, and trainings that
are in it already are not repeated, so the command can be stopped and run again.
"""

import argparse
import json
import pathlib
import re
import sys

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from models import resnet
from record import facts

import keras_sparseopt as kso

SPARSITY = 0.95
WIDTHS, BLOCKS = (16, 32, 64), 1
BATCH_SIZE = 128
MOMENTUM = 0.9
UPDATE_EVERY, DROP_FRACTION = 100, 0.3
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def load(data_dir, size=16):
    """((images, labels) of training, the same of testing), averaged down, normalized."""
    parts = tfds.load("cifar10", split=["train", "test"], data_dir=data_dir, as_supervised=True)
    arrays = []
    for part in parts:
        images, labels = part.batch(60_000).get_single_element()
        images = tf.image.resize(images, (size, size), "area").numpy()
        arrays.append((((images / 255 - MEAN) / STD).astype("float32"), labels.numpy()))
    return arrays


class Batches(keras.utils.PyDataset):
    """Shuffled and flipped by (seed, epoch) only, so that both trainings of a pair see the same."""

    def __init__(self, images, labels, seed):
        super().__init__()
        self.images, self.labels, self.seed, self.epoch = images, labels, seed, 0
        self.on_epoch_end()

    def __len__(self):
        return len(self.labels) // BATCH_SIZE

    def __getitem__(self, index):
        chosen = slice(index * BATCH_SIZE, (index + 1) * BATCH_SIZE)
        images = self.images[self.order[chosen]]
        flipped = self.flip[chosen, None, None, None]
        return np.where(flipped, images[:, :, ::-1], images), self.labels[self.order[chosen]]

    def on_epoch_end(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        self.order = rng.permutation(len(self.labels))
        self.flip = rng.random(len(self.labels)) < 0.5
        self.epoch += 1


def train(data, setting):
    """Test accuracy after every epoch, and the ITOP rate.

    Args:
        data: As `load` returns it.
        setting: Dict with `learning_rate`, `weight_decay` (coupled, part of the gradient that is
            corrected), `corrected`, `seed` and `epochs`.
    """
    (images, labels), test = data
    seed, epochs = setting["seed"], setting["epochs"]
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    model = resnet(images.shape[1:], 10, WIDTHS, BLOCKS, setting["weight_decay"], bn_momentum=0.9)
    model = kso.sparsify(model, SPARSITY, "erk", seed=seed)
    batches = Batches(images, labels, seed)
    schedule = keras.optimizers.schedules.CosineDecay(
        setting["learning_rate"], epochs * len(batches)
    )
    sgd = keras.optimizers.SGD(schedule, momentum=MOMENTUM)
    model.compile(
        kso.SparseOpt(sgd, skew_correction=setting["corrected"]),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        batches, epochs=epochs, shuffle=False, verbose=0, validation_data=test,
        validation_batch_size=500, callbacks=[kso.RigL(UPDATE_EVERY, DROP_FRACTION)],
    ).history  # fmt: skip
    return {
        "test_accuracy": history["val_accuracy"],
        "loss": history["loss"],
        "itop_rate": history["itop_rate"][-1],
    }


class Record:
    """The JSON file: settings with their results, written after every training."""

    def __init__(self, path, command):
        self.path = path
        self.content = {"command": command, **facts(), "fixed": fixed(), "runs": []}
        if path.exists():
            self.content["runs"] = json.loads(path.read_text())["runs"]

    def get(self, setting):
        for run in self.content["runs"]:
            if run["setting"] == setting:
                return run["result"]
        return None

    def add(self, setting, result):
        self.content["runs"].append({"setting": setting, "result": result})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def fixed():
    return {
        "data": "CIFAR-10 at 16×16, flipped", "network": f"ResNet, widths {WIDTHS}, {BLOCKS} block",
        "method": f"RigL, every {UPDATE_EVERY} steps, drop fraction {DROP_FRACTION}",
        "sparsity": f"{SPARSITY} (ERK)", "batch_size": BATCH_SIZE, "momentum": MOMENTUM,
        "schedule": "cosine to 0",
    }  # fmt: skip


def gains(record, learning_rate, weight_decay, epochs):
    """Paired differences of the final test accuracy, in percentage points, and the base's mean."""
    pairs: dict[int, dict] = {}
    for run in record.content["runs"]:
        s = run["setting"]
        if (s["learning_rate"], s["weight_decay"], s["epochs"]) == (
            learning_rate,
            weight_decay,
            epochs,
        ):
            pairs.setdefault(s["seed"], {})[s["corrected"]] = run["result"]["test_accuracy"][-1]
    both = [pair for pair in pairs.values() if len(pair) == 2]
    differences = np.array([100 * (pair[True] - pair[False]) for pair in both])
    base = 100 * np.mean([pair[False] for pair in both]) if both else np.nan
    return differences, base


def confidence(differences):
    """Half the width of the 95 % confidence interval of the mean (Student's t)."""
    from scipy import stats

    n = len(differences)
    if n < 2:
        return np.nan
    return stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n)


def picture(record, rates, decays, epochs, path):
    import matplotlib.pyplot as plt

    cells = [[gains(record, rate, decay, epochs) for rate in rates] for decay in decays]
    mean = np.array([[d.mean() if len(d) else np.nan for d, _ in row] for row in cells])
    figure, axes = plt.subplots(
        figsize=(1.9 * len(rates) + 2, 1.1 * len(decays) + 1.6), layout="constrained"
    )
    limit = 2 * np.nanmax(np.abs(mean)) or 1  # pale enough for the text
    image = axes.imshow(mean, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for i, row in enumerate(cells):
        for j, (differences, base) in enumerate(row):
            if not len(differences):
                continue
            half = confidence(differences)
            sure = abs(differences.mean()) > half
            axes.text(
                j, i, f"{differences.mean():+.1f} ± {half:.1f}\n(base {base:.1f} %)",
                ha="center", va="center", weight="bold" if sure else "normal",
            )  # fmt: skip
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(decays)), [f"{decay:g}" for decay in decays])
    axes.set(xlabel="peak learning rate", ylabel="weight decay (coupled)")
    seeds = max(len(d) for row in cells for d, _ in row)
    axes.set_title(
        f"Gain by the correction, points of test accuracy\n{epochs} epochs, {seeds} seeds, "
        "mean ± 95 % interval, bold: excludes 0",
        fontsize=10,
    )
    figure.colorbar(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data_dir", help="where tfds keeps (or puts) CIFAR-10")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[0.03, 0.1, 0.3])
    parser.add_argument("--weight_decays", type=float, nargs="+", default=[0.0, 5e-4, 2e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="made-up images, one cell, one epoch")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs"))
    args = parser.parse_args(argv)
    if args.quick:
        args.learning_rates, args.weight_decays = [0.1], [0.0]
        args.seeds, args.epochs = 2, 1
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(512, 16, 16, 3)).astype("float32"), rng.integers(0, 10, 512)
        data = [(x, y), (x[:100], y[:100])]
    else:
        data = load(args.data_dir)
    path = args.output / "gain_map.json"
    command = " ".join(["python examples/gain_map.py", *(argv or sys.argv[1:])])
    record = Record(path, re.sub(r" --(data_dir|output) \S+", "", command))
    for seed in range(args.seeds):
        for decay in args.weight_decays:
            for rate in args.learning_rates:
                for corrected in (False, True):
                    setting = {
                        "learning_rate": rate, "weight_decay": decay, "corrected": corrected,
                        "seed": seed, "epochs": args.epochs,
                    }  # fmt: skip
                    if record.get(setting) is None:
                        record.add(setting, train(data, setting))
                        print(setting, record.get(setting)["test_accuracy"][-1], flush=True)
    picture(record, args.learning_rates, args.weight_decays, args.epochs, path.with_suffix(".png"))
    cells = [gains(record, rate, decay, args.epochs)[0] for rate in args.learning_rates
             for decay in args.weight_decays]  # fmt: skip
    pooled = np.concatenate(cells)
    half = confidence(pooled)
    print(f"all {len(pooled)} pairs together: {pooled.mean():+.2f} ± {half:.2f} points (95 %)")
    print(f"→ {path}, {path.with_suffix('.png')}")
    return record.content


if __name__ == "__main__":
    main()
