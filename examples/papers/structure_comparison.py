"""What a structure costs in test accuracy, beside unstructured masks that are as sparse.

    python examples/papers/structure_comparison.py --jobs 2      # hours on two CPU cores
    python examples/papers/structure_comparison.py --only ^mlp   # one task
    python examples/papers/structure_comparison.py --quick       # minutes: does it run?

Trainings in pairs, from the same initial weights and on the same batches: one under a structure,
one unstructured and as sparse, by RigL, with and without SparseOpt's correction, and by gradual
magnitude pruning (GMP). Four tasks:

    mlp      handwritten digits of scikit-learn, two hidden layers of 256 units
    resnet   the same by a small ResNet
    text     the next character of the Python manual that comes with Python, from the 16 before it,
             two hidden layers of 512 units
    cifar    CIFAR-10 at 16 × 16 pixels by the small ResNet of `proxy.py` (`--data_dir`)

The mean of the paired differences and its 95 % confidence interval; all trainings go into one file,
and none is repeated.
"""

import functools
import re

from driver import arguments, command  # which finds the examples beside this folder

# isort: split
import digits
import keras
import manual
import numpy as np
import proxy
from models import mlp, resnet
from proxy import Record, confidence, full, train_all

import keras_sparseopt as kso

DEFAULTS = {
    "family": "mlp",
    "structure": "unstructured",
    "sparsity": 0.9,
    "method": "rigl",
    "skew_correction": True,
    "epochs": None,  # the task's own
    "seed": 0,
}
STRUCTURES = {
    "unstructured": None,
    "Block(4, 1)": kso.Block(4, 1),
    "Block(8, 1)": kso.Block(8, 1),
    "Block(4, 4)": kso.Block(4, 4),
    "ConstantFanIn()": kso.ConstantFanIn(),
    "NM(2, 4)": kso.NM(2, 4),
    "NM(1, 4)": kso.NM(1, 4),
}
SPARSITIES = {"NM(2, 4)": [0.5], "NM(1, 4)": [0.75]}
CONTEXT = 16  # characters


# --------------------------------------------------------------------------------------- tasks


def load_digits():
    train_x, test_x, train_y, test_y = digits.load()
    return (train_x, train_y), (test_x, test_y)


def text_model():
    classes = manual.classes()
    return keras.Sequential(
        [
            keras.Input((CONTEXT,), dtype="int32"),
            keras.layers.Embedding(classes, 16),
            mlp((CONTEXT, 16), classes, 512, hidden=2),
        ]
    )


TASKS = {
    "mlp": {
        "model": lambda: mlp((8, 8, 1), 10, 256, hidden=2),
        "epochs": 20, "batch_size": digits.BATCH_SIZE, "learning_rate": digits.LEARNING_RATE,
        "update_every": 15,
    },
    "resnet": {
        "model": lambda: resnet((8, 8, 1), 10, (16, 32), 1, bn_momentum=0.9),
        "epochs": 20, "batch_size": digits.BATCH_SIZE, "learning_rate": digits.LEARNING_RATE,
        "update_every": 15,
    },
    "text": {
        "model": text_model,
        "epochs": 6, "batch_size": 256, "learning_rate": 0.1, "update_every": 50,
    },
    "cifar": {
        "model": lambda: resnet((16, 16, 3), 10, (16, 32, 64), 1, bn_momentum=0.9, stem_stride=2),
        "epochs": 3, "batch_size": proxy.BATCH_SIZE, "learning_rate": 0.1, "update_every": 50,
    },
}  # fmt: skip
COLORS = {"mlp": "#30638e", "resnet": "#d1495b", "text": "#5b8e30", "cifar": "#8e5330"}


def load(families, data_dir, quick):
    """The data of each family, by name."""
    windows = (2000, 500) if quick else (100_000, 20_000)
    loads = {
        "mlp": load_digits,
        "resnet": load_digits,
        "text": functools.partial(manual.load, *windows, CONTEXT),
        "cifar": proxy.made_up if quick else functools.partial(proxy.load, data_dir),
    }
    return {family: loads[family]() for family in families}


def train(data, setting):
    setting = full(setting, DEFAULTS)
    task = TASKS[setting["family"]]
    (train_x, train_y), test = data[setting["family"]]
    epochs, batch_size = setting["epochs"] or task["epochs"], task["batch_size"]
    keras.backend.clear_session()
    keras.utils.set_random_seed(setting["seed"])
    model = task["model"]()
    prunes = setting["method"] == "gmp"
    kso.sparsify(
        model,
        0.0 if prunes else setting["sparsity"],
        "uniform" if prunes else "erk",
        # A first convolution reads one or three channels, which no structure can divide.
        exclude=["stem"] if setting["family"] in ("resnet", "cifar") else (),
        structure=STRUCTURES[setting["structure"]],
        seed=setting["seed"],
    )
    steps = epochs * -(-len(train_x) // batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(task["learning_rate"], steps)
    sgd = keras.optimizers.SGD(schedule, momentum=digits.MOMENTUM)
    model.compile(
        optimizer=kso.SparseOpt(sgd, skew_correction=setting["skew_correction"]),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    method = (
        kso.GMP(setting["sparsity"], task["update_every"])
        if prunes
        else kso.RigL(task["update_every"], digits.DROP_FRACTION)
    )
    history = model.fit(
        train_x, train_y, batch_size=batch_size, epochs=epochs, verbose=0,
        validation_data=test, validation_batch_size=500, callbacks=[method],
    ).history  # fmt: skip
    fan_ins = np.concatenate(
        [(1 - w.topology.neuron_sparsity).ravel() for w in kso.sparse_weights(model)]
    )
    return {
        "test_accuracy": [round(a, 5) for a in history["val_accuracy"]],
        "sparsity": history["sparsity"][-1],
        "dead_neurons": int((fan_ins == 0).sum()),
        "neurons": fan_ins.size,
    }


# ----------------------------------------------------------------------------------- comparison


def cells():
    """What is compared: dicts of settings, without the seed."""
    for method, corrected in (("rigl", True), ("rigl", False), ("gmp", True)):
        for family in TASKS:
            for structure in list(STRUCTURES)[1:]:
                for sparsity in SPARSITIES.get(structure, [0.5, 0.75, 0.8, 0.9, 0.95]):
                    yield {
                        "family": family, "structure": structure, "sparsity": sparsity,
                        "method": method, "skew_correction": corrected,
                    }  # fmt: skip


def described(cell):
    correction = "corrected" if cell["skew_correction"] else "masked"
    return f"{cell['family']} {cell['method']} {correction} {cell['sparsity']} {cell['structure']}"


def compare(record, chosen, seeds):
    """Rows of differences to the unstructured twin, in percentage points."""
    rows = []
    for cell in chosen:
        pairs = []
        for seed in range(seeds):
            setting = {**cell, "seed": seed}
            twin = {**setting, "structure": "unstructured"}
            if setting in record and twin in record:
                pairs.append([100 * record[s]["test_accuracy"][-1] for s in (setting, twin)])
        if len(pairs) < 2:  # no interval
            continue
        own, twins = np.array(pairs).T
        rows.append(
            {
                **cell,
                "seeds": len(pairs),
                "accuracy": float(own.mean()),
                "unstructured": float(twins.mean()),
                "difference": float((own - twins).mean()),
                "± 95 %": confidence(own - twins),
                "reached": float(np.mean([
                    record[{**cell, "seed": s}]["sparsity"] for s in range(seeds)
                    if {**cell, "seed": s} in record
                ])),
            }
        )  # fmt: skip
    return rows


def table(rows):
    yield (
        f"{'family':<8}{'method':<18}{'structure':<18}{'sparsity':>9}{'accuracy':>10}"
        f"{'unstructured':>14}{'difference':>20}"
    )
    for row in rows:
        method = row["method"] + ("" if row["skew_correction"] else ", masked only")
        yield (
            f"{row['family']:<8}{method:<18}{row['structure']:<18}{row['reached']:>9.3f}"
            f"{row['accuracy']:>10.2f}{row['unstructured']:>14.2f}"
            f"{row['difference']:>+12.2f} ± {row['± 95 %']:.2f}"
        )


def picture(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    most = max(row["seeds"] for row in rows)
    rows = [row for row in rows if row["skew_correction"] and row["seeds"] == most]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    order = list(STRUCTURES)
    labels = sorted(
        {(row["structure"], row["sparsity"]) for row in rows},
        key=lambda label: (order.index(label[0]), label[1]),
    )
    figure, axes = plt.subplots(
        1, len(methods), figsize=(6 * len(methods), 1.2 + 0.32 * len(labels)), sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axis, method in zip(axes[0], methods):
        for offset, (family, color) in enumerate(COLORS.items()):
            some = [r for r in rows if (r["method"], r["family"]) == (method, family)]
            if not some:
                continue
            heights = [labels.index((r["structure"], r["sparsity"])) for r in some]
            axis.errorbar(
                [r["difference"] for r in some], np.array(heights) + 0.2 * offset - 0.3,
                xerr=[r["± 95 %"] for r in some], fmt="o", color=color, label=family, capsize=2,
            )  # fmt: skip
        axis.axvline(0, color="black", linewidth=1)
        axis.set(
            xlabel="test accuracy − unstructured (percentage points)",
            title={"rigl": "RigL + SparseOpt", "gmp": "GMP + SparseOpt"}[method],
        )
        axis.grid(axis="x", alpha=0.25)
    axes[0][0].set_yticks(range(len(labels)), [f"{name}, {s:.0%}" for name, s in labels])
    axes[0][0].invert_yaxis()
    axes[0][0].legend(frameon=False, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    parser = arguments(__doc__, seeds=5, quick="one epoch, two seeds; into quick/", jobs=True)
    parser.add_argument(
        "--only", help="regular expression: cells to run, as 'mlp rigl corrected 0.5 NM(2, 4)'"
    )
    args = parser.parse_args(argv)
    everything = list(cells())
    chosen = [c for c in everything if not args.only or re.search(args.only, described(c))]
    if not chosen:
        parser.error(f"no cell matches: {args.only}")
    if args.quick:
        args.output, args.seeds = args.output / "quick", 2
        chosen = [{**c, "epochs": 1} for c in chosen if c["structure"] == "NM(2, 4)"]
    record = Record(args.output / "structure_comparison.json", command(__file__, argv), DEFAULTS)
    settings = [
        {**cell, "structure": structure, "seed": seed}
        for cell in chosen
        for seed in range(args.seeds)
        for structure in (cell["structure"], "unstructured")
    ]
    families = sorted({cell["family"] for cell in chosen})
    load_data = functools.partial(load, families, args.data_dir, args.quick)
    train_all(settings, record, jobs=args.jobs, train=train, load_data=load_data)
    rows = compare(record, chosen if args.quick else everything, args.seeds)
    record.content["comparisons"] = rows
    record.write()
    print(*table(rows), sep="\n")
    picture(rows, record.path.with_suffix(".png"))
    print(f"→ {record.path}, {record.path.with_suffix('.png')}")
    return record.content


if __name__ == "__main__":
    main()
