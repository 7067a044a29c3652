"""Same capacity, sparse against dense: is a wide sparse network better than a narrow dense one?

    python examples/papers/capacity_comparison.py --data_dir /data/tfds --seeds 6 --jobs 2
    python examples/papers/capacity_comparison.py --quick       # made-up data: does it run?

SC-SDC of Tessera, Hooker and Rosman ("Keep the Gradients Flowing", 2021): both networks have the
same depth, the same number of active weights in every layer, the same initial values of these (here
even the very same numbers, shuffled), and are trained in the same way. The accuracies over several
seeds are compared by Wilcoxon's signed-rank test, not corrected for the number of conditions;
effective gradient flow is measured beside them.

On CIFAR-10 at 16×16 pixels: an MLP with three hidden layers under many conditions (normalization,
optimizer, activation, L2), and a ResNet whose wide network is sparse from the start, or starts
dense with weights of its own and is pruned while it learns (GMP). Biases and normalization
parameters come on top, of which the wide network has more. A training takes some ten seconds on a
core; all go into one file, and none is repeated.
"""

import re

import keras
import numpy as np
from driver import arguments, command
from models import mlp, resnet
from proxy import BN_MOMENTUM, Batches, Record, full, make_inner_optimizer, train_all

import keras_sparseopt as kso

DEFAULTS = {
    "family": "mlp",
    "network": "sparse",  # the wide one; "dense": the narrow one; "gmp": wide, pruned in training
    "normalization": "batch",
    "activation": "relu",
    "optimizer": "momentum",
    "l2": 0.0,  # coupled weight decay
    "epochs": 2,
    "seed": 0,
}
WIDTHS = {"mlp": (24, 192), "resnet": (4, 16)}  # narrow, wide
LEARNING_RATES = {"sgd": 0.1, "momentum": 0.03, "adam": 0.001, "rmsprop": 0.001, "adagrad": 0.03}
MEASURE_EVERY = 50
GMP_EVERY = 20


# ---------------------------------------------------------------- the two networks of a comparison


def same_capacity(family, narrow, wide, seed):
    """A narrow dense network and a wide sparse one with as many active weights in every layer.

    The active weights of the wide network start with the narrow one's values, shuffled.

    Args:
        family: Function of a width that makes a Keras model, with the same layer names for all
            widths.
        narrow: Int, width of the dense network.
        wide: Int, width of the sparse network.
        seed: Int, of masks and initial values.

    Returns:
        (dense, sparse). The dense one has masks too, with nothing masked, so that the same
        optimizer and callbacks train it.
    """
    keras.utils.set_random_seed(seed)
    small, large = family(narrow), family(wide)
    sizes = kernel_sizes(small)
    sparsities = {
        name: 1 - size / kernel_sizes(large)[name] for name, size in sizes.items()
    }  # fmt: skip
    dense = kso.sparsify(small, None, dict.fromkeys(sizes, 0.0), seed=seed)
    sparse = kso.sparsify(large, None, sparsities, seed=seed)
    rng = np.random.default_rng(seed)
    for one, other in zip(kso.sparse_weights(dense), kso.sparse_weights(sparse), strict=True):
        values = rng.permutation(keras.ops.convert_to_numpy(one).ravel())
        mask = keras.ops.convert_to_numpy(other.topology.mask)
        kernel = np.zeros(mask.shape, values.dtype)
        kernel[mask] = values
        other.assign(kernel)
    return dense, sparse


def kernel_sizes(model):
    kinds = (keras.layers.Dense, keras.layers.Conv2D)
    return {
        layer.name: int(np.prod(layer.kernel.shape))
        for layer in model.layers
        if isinstance(layer, kinds)
    }


def pruned_to(family, narrow, wide, seed):
    """A wide dense network, and callbacks that prune every layer to the narrow one's size."""
    keras.utils.set_random_seed(seed)
    sizes, large = kernel_sizes(family(narrow)), family(wide)
    model = kso.sparsify(large, None, dict.fromkeys(sizes, 0.0), seed=seed)
    pruning = [
        kso.GMP(1 - size / kernel_sizes(large)[name], GMP_EVERY, layers=[name])
        for name, size in sizes.items()
    ]
    return model, pruning


def family_of(setting, input_shape):
    if setting["family"] == "mlp":
        return lambda width: mlp(
            input_shape, 10, width, weight_decay=setting["l2"],
            normalization=setting["normalization"], activation=setting["activation"],
        )  # fmt: skip
    activation = {"prelu": "prelu_by_channel"}.get(setting["activation"], setting["activation"])
    return lambda width: resnet(
        input_shape, 10, (width, 2 * width, 4 * width), 1, setting["l2"], BN_MOMENTUM,
        stem_stride=2, normalization=setting["normalization"], activation=activation,
    )  # fmt: skip


def train(data, setting):
    """One training: accuracy after every half epoch, gradient flow on average over training."""
    setting = full(setting, DEFAULTS)
    (images, labels), test = data
    seed = setting["seed"]
    keras.backend.clear_session()
    family = family_of(setting, images.shape[1:])
    narrow, wide = WIDTHS[setting["family"]]
    callbacks = []
    if setting["network"] == "gmp":
        model, callbacks = pruned_to(family, narrow, wide, seed)
    else:
        model = same_capacity(family, narrow, wide, seed)[setting["network"] == "sparse"]
    batches = Batches(images, labels, seed)
    evaluations = setting["epochs"] * batches.pieces
    schedule = keras.optimizers.schedules.CosineDecay(
        LEARNING_RATES[setting["optimizer"]], evaluations * len(batches)
    )
    inner = make_inner_optimizer(setting["optimizer"], schedule, 0.0)
    model.compile(
        kso.SparseOpt(inner, skew_correction=False),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=5,
    )
    flow = kso.GradientFlow(min(MEASURE_EVERY, len(batches)))
    history = model.fit(
        batches, epochs=evaluations, shuffle=False, verbose=0,
        validation_data=test, validation_batch_size=500, callbacks=[flow, *callbacks],
    ).history  # fmt: skip
    active = [weight.topology.num_active() for weight in kso.sparse_weights(model)]
    return {
        "test_accuracy": [round(value, 5) for value in history["val_accuracy"]],
        "active_weights": active,
        **{
            measure: float(np.mean([entry[measure] for entry in flow.history]))
            for measure in ("effective_gradient_flow", "gradient_flow")
        },
    }


# ------------------------------------------------------------------------------ the conditions


def conditions():
    """Label → what differs from `DEFAULTS`, the same for both networks of a comparison."""
    found = {}
    for normalization in ("batch", "none"):
        for optimizer in LEARNING_RATES:
            found[f"{optimizer}, {normalization}"] = {
                "optimizer": optimizer,
                "normalization": normalization,
            }
    for optimizer in ("momentum", "adam"):
        for activation in ("swish", "prelu"):
            found[f"{optimizer}, batch, {activation}"] = {
                "optimizer": optimizer,
                "activation": activation,
            }
        found[f"{optimizer}, batch, L2"] = {"optimizer": optimizer, "l2": 5e-3}
    for network in ("sparse", "gmp"):
        found[f"ResNet, momentum, {network}"] = {"family": "resnet", "network": network}
    return found


def wilcoxon(differences):
    """Two-sided p-value of the signed-rank test; 1 if nothing differs."""
    from scipy import stats

    differences = np.asarray(differences)
    return float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0


def compare(record, chosen, seeds):
    rows = []
    for label, setting in chosen.items():
        sides = [
            [record[{**setting, "network": network, "seed": seed}] for seed in range(seeds)]
            for network in (setting.get("network", "sparse"), "dense")
        ]
        accuracies = [np.array([100 * r["test_accuracy"][-1] for r in side]) for side in sides]
        flows = [np.mean([r["effective_gradient_flow"] for r in side]) for side in sides]
        difference = accuracies[0] - accuracies[1]
        rows.append(
            {
                "label": label,
                "sparse": float(accuracies[0].mean()),
                "dense": float(accuracies[1].mean()),
                "difference": float(difference.mean()),
                "sparse_wins": int((difference > 0).sum()),
                "seeds": seeds,
                "p_value": wilcoxon(difference),
                "effective_gradient_flow": [float(flow) for flow in flows],
            }
        )
    return rows


def correlations(record, chosen, seeds):
    """Spearman's rank correlation of gradient flow with accuracy, over conditions (mean of seeds).

    Of the MLPs only: a ResNet's flow cannot be compared with theirs.
    """
    from scipy import stats

    found = {}
    for network in ("sparse", "dense"):
        settings = [
            {**setting, "network": network}
            for setting in chosen.values()
            if setting.get("family", "mlp") == "mlp"
        ]
        results = [[record[{**s, "seed": seed}] for seed in range(seeds)] for s in settings]
        accuracy = [np.mean([r["test_accuracy"][-1] for r in rs]) for rs in results]
        for measure in ("effective_gradient_flow", "gradient_flow"):
            flow = [np.mean([r[measure] for r in rs]) for rs in results]
            test = stats.spearmanr(flow, accuracy) if len(flow) > 2 else None
            found[f"{network}, {measure}"] = {
                "rho": float(test.statistic) if test else np.nan,
                "p_value": float(test.pvalue) if test else np.nan,
            }
    return found


def table(rows):
    yield (
        f"{'':>28}{'wide sparse':>12}{'narrow dense':>14}{'difference':>12}{'wins':>7}{'p':>8}"
        f"{'EGF sparse':>12}{'dense':>8}"
    )
    for row in rows:
        flow = row["effective_gradient_flow"]
        yield (
            f"{row['label']:>28}{row['sparse']:>12.1f}{row['dense']:>14.1f}"
            f"{row['difference']:>+12.2f}{row['sparse_wins']:>4}/{row['seeds']}"
            f"{row['p_value']:>8.3f}{flow[0]:>12.3f}{flow[1]:>8.3f}"
        )


def picture(rows, path):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.2 + 0.3 * len(rows)), layout="constrained"
    )
    positions = range(len(rows))[::-1]
    colors = ["tab:blue" if row["p_value"] < 0.05 else "tab:gray" for row in rows]
    left.barh(positions, [row["difference"] for row in rows], color=colors)
    left.axvline(0, color="black", lw=0.8)
    left.set_yticks(positions, [row["label"] for row in rows])
    left.set(
        xlabel="wide sparse − narrow dense, points of test accuracy",
        title=f"{rows[0]['seeds']} seeds; blue: Wilcoxon p < 0.05",
    )
    for side, marker in ((0, "o"), (1, "s")):
        name = ("sparse", "dense")[side]
        right.plot(
            [row["effective_gradient_flow"][side] for row in rows],
            [row[name] for row in rows],
            marker, label=("wide sparse", "narrow dense")[side], alpha=0.7,
        )  # fmt: skip
    right.set(xscale="log", xlabel="effective gradient flow", ylabel="test accuracy, %")
    right.set_xticks([0.1, 0.2, 0.3, 0.5, 0.7], ["0.1", "0.2", "0.3", "0.5", "0.7"])
    right.minorticks_off()
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    quick = "made-up data, one epoch, two seeds; into quick/"
    parser = arguments(__doc__, seeds=6, quick=quick, jobs=True)  # Wilcoxon's p < 0.05 needs six
    parser.add_argument("--only", help="regular expression: conditions to run, by their label")
    args = parser.parse_args(argv)
    chosen = conditions()
    if args.quick:
        args.output = args.output / "quick"
        args.seeds, args.only = 2, args.only or "momentum, batch$|adagrad|gmp"
        chosen = {label: {**setting, "epochs": 1} for label, setting in chosen.items()}
    chosen = {k: v for k, v in chosen.items() if not args.only or re.search(args.only, k)}
    if not chosen:
        parser.error(f"no condition matches: {args.only}")
    record = Record(args.output / "capacity_comparison.json", command(__file__, argv), DEFAULTS)
    settings = [
        {**setting, "network": network, "seed": seed}
        for seed in range(args.seeds)
        for setting in chosen.values()
        for network in (setting.get("network", "sparse"), "dense")
    ]
    train_all(settings, record, args.data_dir, args.quick, args.jobs, train)
    rows = compare(record, chosen, args.seeds)
    record.content["comparisons"] = rows
    record.content["correlations"] = correlations(record, chosen, args.seeds)
    record.write()
    print(*table(rows), sep="\n")
    print("\nSpearman's correlation with the final test accuracy, MLPs, over conditions:")
    for name, found in record.content["correlations"].items():
        print(f"  {name:<32}{found['rho']:+.2f}   p = {found['p_value']:.3f}")
    picture(rows, record.path.with_suffix(".png"))
    print(f"→ {record.path}, {record.path.with_suffix('.png')}")
    return record.content


if __name__ == "__main__":
    main()
