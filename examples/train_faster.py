"""What training costs: a dense network beside the same one at 90 % sparsity, condensed.

    python examples/train_faster.py            # about three minutes on two CPU cores
    python examples/train_faster.py --quick    # half a minute: few steps

An MLP with three hidden layers of 1024 units learns the next character of the Python manual, which
comes with Python, from the 32 before it. It trains dense; 90 % sparse by RigL and SparseOpt in
tiles that 64 neurons share, condensed, for as many steps; and so again for as many steps as fit
into the dense network's time. Accuracy over seconds, step time, bytes and a mask end in
`runs/train_faster.png` and `runs/train_faster.json`, whichever way it comes out.
"""

import argparse
import json
import pathlib
import time

import keras
import manual
import numpy as np
from keras import layers
from record import bytes_of, facts

import keras_sparseopt as kso

SPARSITY = 0.9
TILE = (1, 64)  # inputs, neurons
WIDTH, HIDDEN, CONTEXT = 1024, 3, 32
STEPS, BATCH_SIZE = 1000, 256
LEARNING_RATE = 1e-3
UPDATE_EVERY, DROP_FRACTION = 50, 0.3
EVALUATIONS = 8
PATCH = 192  # inputs and neurons of the mask that is drawn


def dense_model():
    inputs = keras.Input((CONTEXT,), dtype="int32")
    x = layers.Flatten()(layers.Embedding(manual.classes(), 16)(inputs))
    for _ in range(HIDDEN):
        x = layers.Dense(WIDTH, "relu")(layers.LayerNormalization()(x))
    outputs = layers.Dense(manual.classes(), name="classifier")(layers.LayerNormalization()(x))
    return keras.Model(inputs, outputs)


def compiled(sparse, steps, jit_compile, update_every):
    """The network, dense or condensed, ready for `fit`, and the callbacks of sparse training."""
    keras.utils.set_random_seed(0)
    model = dense_model()
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps))
    callbacks = []
    if sparse:
        tiles = kso.Block(*TILE, balanced=True)
        kso.sparsify(model, SPARSITY, "uniform", exclude="classifier", structure=tiles)
        kso.condense(model)
        optimizer = kso.SparseOpt(optimizer)
        callbacks = [kso.RigL(update_every, DROP_FRACTION, end_step=round(0.75 * steps))]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=jit_compile)
    return model, callbacks


class Seconds(keras.callbacks.Callback):
    """Times the steps, mask updates included."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_begin(self, logs=None):
        self.last = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now

    def step(self):
        """Mean in seconds, without the steps that compile: those beyond ten times the median."""
        seconds = np.array(self.seconds)
        return float(seconds[seconds < 10 * np.median(seconds)].mean())


def fastest(sparse, data, steps):
    """Whether to compile by XLA: what makes the steps of this network faster here."""
    if keras.backend.backend() != "tensorflow":
        return "auto"
    found = {}
    for jit_compile in (True, False):
        model, callbacks = compiled(sparse, steps, jit_compile, update_every=steps // 2)
        clock = Seconds()
        x, y = (array[: steps * BATCH_SIZE] for array in data[0])
        model.fit(x, y, batch_size=BATCH_SIZE, verbose=0, callbacks=[*callbacks, clock])
        found[jit_compile] = clock.step()
    return min(found, key=found.get)


def train(name, sparse, steps, jit_compile, data, bar):
    """One training; `seconds` are steps times the mean step, without evaluation and compilation."""
    (x, y), test = data
    each = max(1, steps // EVALUATIONS)
    every = min(UPDATE_EVERY, each)
    model, callbacks = compiled(sparse, each * EVALUATIONS, jit_compile, every)
    masks = [mask_of(model)] if sparse else []
    clock = Seconds()
    accuracies = []
    rng = np.random.default_rng(0)
    for turn in range(EVALUATIONS):
        chosen = rng.integers(len(x), size=each * BATCH_SIZE)
        model.fit(
            x[chosen], y[chosen], batch_size=BATCH_SIZE, initial_epoch=turn, epochs=turn + 1,
            shuffle=False, verbose=0, callbacks=[*callbacks, clock],
        )  # fmt: skip
        accuracies.append(model.evaluate(*test, batch_size=1000, verbose=0)[1])
        bar.add(1, values=[("test accuracy", accuracies[-1])])
    if sparse:
        masks.append(mask_of(model))
    step = clock.step()
    return {
        "name": name, "steps": each * EVALUATIONS, "ms_per_step": 1000 * step,
        "seconds": [each * (turn + 1) * step for turn in range(EVALUATIONS)],
        "test_accuracy": accuracies, "bytes": bytes_of(model), "jit_compile": jit_compile,
    }, masks  # fmt: skip


def mask_of(model):
    """A corner of the mask of the second hidden layer, neurons in rows."""
    topology = kso.sparse_weights(model)[1].topology
    return keras.ops.convert_to_numpy(topology.mask)[:PATCH, :PATCH].T


def picture(runs, masks, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.4), width_ratios=[1.5, 0.6, 0.6, 1.1])
    colors = {"dense": "#7a7a7a", "sparse": "#d1495b", "sparse, dense's time": "#30638e"}
    for run in runs:
        label = f"{run['name']}: {run['steps']} steps"
        accuracy = 100 * np.array(run["test_accuracy"])
        axes[0].plot(
            run["seconds"], accuracy, "o-", markersize=3, color=colors[run["name"]], label=label
        )
    axes[0].set(xlabel="seconds of training", ylabel="test accuracy (%)")
    axes[0].set_title(f"Next character, {HIDDEN} × {WIDTH} units, {SPARSITY:.0%} sparse")
    axes[0].legend(frameon=False, loc="lower right")
    axes[0].grid(alpha=0.25)
    two = runs[:2]
    for axis, key, scale, title in (
        (axes[1], "ms_per_step", 1, "ms per training step"),
        (axes[2], "bytes", 1e-6, "MB of weights,\ngradients and Adam"),
    ):
        heights = [scale * run[key] for run in two]
        bars = axis.bar(
            ["dense", "sparse"], heights, color=[colors["dense"], colors["sparse"]], width=0.6
        )
        axis.bar_label(bars, [f"{height:.1f}" for height in heights])
        axis.set_title(title)
    before, after = masks
    kinds = ListedColormap(["#ffffff", "#e8b4a0", "#30638e", "#d1495b"])
    state = np.select([before & after, after, before], [2, 3, 1], 0)
    axes[3].imshow(state, cmap=kinds, vmin=0, vmax=3, interpolation="nearest")
    axes[3].set(xlabel=f"input (the first {PATCH})", ylabel=f"neuron (the first {PATCH})")
    axes[3].set_title("Mask: kept (blue), grown (red), dropped (pale)")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(runs):
    lines = ["", f"{'':<24}{'steps':>7}{'seconds':>9}{'ms/step':>9}{'MB':>7}{'accuracy':>10}"]
    for run in runs:
        lines.append(
            f"{run['name']:<24}{run['steps']:>7}{run['seconds'][-1]:>9.1f}{run['ms_per_step']:>9.1f}"
            f"{run['bytes'] / 1e6:>7.1f}{run['test_accuracy'][-1]:>10.1%}"
        )
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs"))
    args = parser.parse_args(argv)
    steps, trial = (16, 4) if args.quick else (STEPS, 40)
    data = manual.load(400_000, 500 if args.quick else 8000, CONTEXT)
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"3 trainings, dense for {steps} steps; first a look at which way is the faster one here")
    jits = {sparse: fastest(sparse, data, trial) for sparse in (False, True)}
    bar = keras.utils.Progbar(3 * EVALUATIONS, unit_name="evaluation")
    dense, _ = train("dense", False, steps, jits[False], data, bar)
    sparse, masks = train("sparse", True, steps, jits[True], data, bar)
    longer = round(steps * dense["ms_per_step"] / sparse["ms_per_step"])
    last, _ = train("sparse, dense's time", True, longer, jits[True], data, bar)
    runs = [dense, sparse, last]
    print(table(runs))
    picture(runs, masks, args.output / "train_faster.png")
    results = {
        "command": "python examples/train_faster.py" + (" --quick" if args.quick else ""),
        **facts(),
        "settings": {
            "sparsity": SPARSITY, "tile": TILE, "width": WIDTH, "hidden": HIDDEN, "steps": steps,
            "batch_size": BATCH_SIZE, "learning_rate": f"{LEARNING_RATE}, cosine to 0, Adam",
            "update_every": UPDATE_EVERY, "drop_fraction": DROP_FRACTION,
        },
        "runs": runs,
    }  # fmt: skip
    path = args.output / "train_faster.json"
    path.write_text(json.dumps(results) + "\n")
    print(f"picture: {path.with_suffix('.png')}   numbers: {path}")
    return results


if __name__ == "__main__":
    main()
