"""When does SparseOpt's correction help? Named experiments on a small task, with seeds.

    python examples/papers/experiments.py --list
    python examples/papers/experiments.py convergence --data_dir /data/tfds --seeds 3 --jobs 2
    python examples/papers/experiments.py all --quick       # made-up data: does it run?
    python examples/papers/experiments.py cifar10 --scale full --data_dir /data --jobs 8    # a GPU

An experiment is a set of paired comparisons: two settings (see `proxy.DEFAULTS`) that differ in one
thing, trained from the same weights and masks on the same batches, for several seeds. Reported are
the mean differences of the test accuracy, at the end and on average over the training (which is
higher for whoever learns faster), with their 95 % confidence intervals.

All trainings go into one file, `<output>/experiments.json`, and none is repeated: experiments share
them, and the command goes on where it was stopped. A training takes about half a minute on a core.

`--scale full` is the papers' task instead of the small one (`full_scale.py`), for a GPU: ResNet-20
on images in full size, 100 epochs, five seeds. Its file is `<output>/full_scale.json`; a training
that was stopped goes on from its last epoch (`<output>/backups`). Every run says what it will take
before it starts. Machines share the work by `--first_seed`, each with an `--output` of its own, and
`--merge` takes over what other runs trained; `--report` trains nothing and shows what there is.
`<data_dir>` holds `cifar10.npz` and `cifar100.npz` (`x_train`, `y_train`, `x_test`, `y_test`), or
what TensorFlow Datasets needs.
"""

import dataclasses
import functools
import importlib.util
import itertools
import os
import pathlib
from collections.abc import Callable

import full_scale
import numpy as np
import proxy
from driver import arguments, command
from proxy import confidence

MASKED = {"exponent": 0.0}
CORRECTED = {"exponent": 0.5}  # the paper's


def corrected_and_not(**setting):
    """The comparison that most experiments make."""
    return {**setting, **MASKED}, {**setting, **CORRECTED}


def convergence():
    """Figs. 3, 4, 11–16: is the corrected training faster, and better at the end?"""
    return {
        f"{method} {sparsity:.0%}": corrected_and_not(method=method.lower(), sparsity=sparsity)
        for method, sparsity in itertools.product(
            ("RigL", "SET"), (0.90, 0.95, 0.97, 0.98, 0.99)
        )
    }  # fmt: skip


def price():
    """What does sparsity cost, beside the dense network?"""
    dense = {**MASKED, "method": "static", "sparsity": 0.0}
    return {
        f"{sparsity:.0%}": (dense, {**MASKED, "sparsity": sparsity})
        for sparsity in (0.90, 0.95, 0.97, 0.98, 0.99)
    }


def learning_rate_and_decay():
    """Does the gain depend on the learning rate and the weight decay?"""
    return {
        (f"{decay:g}", f"{rate:g}"): corrected_and_not(learning_rate=rate, weight_decay=decay)
        for decay, rate in itertools.product((0.0, 5e-4, 2e-3), (0.03, 0.1, 0.3))
    }


def sparsity_and_budget():
    """Does the gain depend on the sparsity and the length of the training?"""
    return {
        (f"{sparsity:.0%}", f"{epochs}"): corrected_and_not(sparsity=sparsity, epochs=epochs)
        for sparsity, epochs in itertools.product((0.90, 0.95, 0.98), (1, 3, 6))
    }


def small_steps():
    """Small learning rates, at which neurons turn unevenly (see skew.py): does it help there?"""
    return {
        f"lr {rate:g}, {sparsity:.0%}": corrected_and_not(learning_rate=rate, sparsity=sparsity)
        for sparsity, rate in ((0.95, 0.003), (0.95, 0.01), (0.95, 0.03), (0.98, 0.01))
    }


def conditions():
    """One thing at a time: where does the correction help?"""
    return {
        "as in DEFAULTS": corrected_and_not(),
        "SGD without momentum, lr 0.5": corrected_and_not(optimizer="sgd", learning_rate=0.5),
        "Adam, lr 0.003": corrected_and_not(
            optimizer="adam", learning_rate=0.003, weight_decay=0.0
        ),
        "LayerNorm": corrected_and_not(normalization="layer"),
        "GroupNorm": corrected_and_not(normalization="group"),
        "He by actual fan-in": corrected_and_not(sparse_initialization=True),
        "warm-up, 10 % of the steps": corrected_and_not(warmup=0.1),
        "masks updated every 25 steps": corrected_and_not(update_every=25),
        "masks updated every 400 steps": corrected_and_not(update_every=400),
        "static masks": corrected_and_not(method="static"),
    }


def variants():
    """Beyond the paper: other exponents, decay inside, other norms of neurons. Against masking."""
    pairs = {}
    for sparsity in (0.95, 0.98):
        base = {"sparsity": sparsity}
        for label, changed in {
            "p = ½ (the paper)": {"exponent": 0.5},
            "p = 1": {"exponent": 1.0},
            "p = ½, decay inside": {"exponent": 0.5, "decay": "inside"},
            "p = 1, decay inside": {"exponent": 1.0, "decay": "inside"},
            "He by actual fan-in": {"sparse_initialization": True},
            "He by actual fan-in, p = ½": {"sparse_initialization": True, "exponent": 0.5},
            "rescaled at updates": {"rescale": True},
            "rescaled at updates, p = ½": {"rescale": True, "exponent": 0.5},
        }.items():
            pairs[f"{label}, {sparsity:.0%}"] = base, {**base, **changed}
    return pairs


def growth_gradient():
    """Figs. 5, 10: gradients corrected for the update only, or for ranking growth too."""
    pairs = {}
    for sparsity in (0.95, 0.98):
        base = {"sparsity": sparsity}
        both = {**CORRECTED, "growth_gradient": "corrected"}
        pairs[f"update corrected, {sparsity:.0%}"] = base, {**base, **CORRECTED}
        pairs[f"update and growth corrected, {sparsity:.0%}"] = base, {**base, **both}
    return pairs


def ham():
    """Figs. 17, 18, 25, 26: HAM, SparseOpt, and both."""
    pairs = {"SparseOpt": corrected_and_not()}
    for alpha in (2.0, 20.0, 200.0):
        pairs[f"HAM, α = {alpha:g}"] = {}, {"ham": alpha}
        pairs[f"SparseOpt + HAM, α = {alpha:g}"] = {}, {"ham": alpha, **CORRECTED}
    return pairs


def renormalized():
    """Figs. 19–22: only the direction corrected, every layer's gradient norm as it was."""
    pairs = {}
    for sparsity in (0.95, 0.98):
        base = {"sparsity": sparsity}
        pairs[f"corrected, {sparsity:.0%}"] = base, {**base, **CORRECTED}
        only_direction = {**base, **CORRECTED, "renormalize": True}
        pairs[f"corrected and renormalized, {sparsity:.0%}"] = base, only_direction
    return pairs


def at_the_papers_scale(**setting):
    """Masking only against SparseOpt, HAM, and both: the most telling sparsities first."""
    return {
        f"{method} {sparsity:.0%}, {name}": (
            {**setting, "method": method.lower(), "sparsity": sparsity, **MASKED},
            {**setting, "method": method.lower(), "sparsity": sparsity, **changed},
        )
        for method, sparsity in itertools.product(("RigL", "SET"), (0.98, 0.95, 0.99, 0.90))
        for name, changed in {
            "SparseOpt": CORRECTED,
            "HAM": {"ham": 200.0},
            "SparseOpt + HAM": {"ham": 200.0, **CORRECTED},
        }.items()
    }


def cifar10():
    """The paper's comparisons on CIFAR-10: SparseOpt, HAM, both, over masking only."""
    return at_the_papers_scale()


def cifar100():
    """The paper's comparisons on CIFAR-100: SparseOpt, HAM, both, over masking only."""
    return at_the_papers_scale(dataset="cifar100")


def twice_as_long():
    """Does the gain shrink as the training gets longer? 200 epochs."""
    return {
        f"{dataset}, {sparsity:.0%}": corrected_and_not(
            dataset=dataset, sparsity=sparsity, epochs=200, warmup=0.025
        )
        for dataset, sparsity in itertools.product(("cifar10", "cifar100"), (0.98, 0.95))
    }


def fair_ranking():
    """Does ranking what is dropped by |w| / √(fan-in) help SparseOpt? See fair_drop.py."""
    pairs = {}
    for sparsity, rate in itertools.product((0.98, 0.95), (0.1, 0.3)):
        base = {"sparsity": sparsity, "learning_rate": rate}
        fair = {**base, **CORRECTED, "drop_by": "fan_in"}
        where = f"{sparsity:.0%}, lr {rate:g}"
        pairs[f"{where}, over SparseOpt by |w|"] = {**base, **CORRECTED}, fair
        pairs[f"{where}, over masking only"] = {**base, **MASKED}, fair
    return pairs


MAPS = {
    learning_rate_and_decay: ("coupled weight decay", "peak learning rate"),
    sparsity_and_budget: ("sparsity", "epochs"),
}
SHARED = (
    learning_rate_and_decay, small_steps, conditions, variants, growth_gradient, ham, renormalized,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
    """A task, and the experiments that are made on it."""

    experiments: dict
    file: str
    defaults: dict
    made_up: Callable
    load_data: Callable  # of the directory
    seeds: int
    quick: dict  # what makes a setting short


def named(*experiments):
    return {experiment.__name__: experiment for experiment in experiments}


SCALES = {
    "small": Scale(
        named(convergence, price, sparsity_and_budget, *SHARED), "experiments.json", proxy.DEFAULTS,
        proxy.made_up, proxy.load, 3, {"epochs": 1, "widths": (8,), "update_every": 5},
    ),
    "full": Scale(
        named(cifar10, cifar100, fair_ranking, twice_as_long, *SHARED), "full_scale.json",
        full_scale.DEFAULTS, full_scale.made_up, full_scale.Datasets, 5,
        {"epochs": 2, "widths": (8,), "blocks": 1, "update_every": 5},
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------- comparing


def differences(record, base, other, measure):
    """Paired differences of a measure over the seeds that both settings were trained with."""
    return np.array(
        [
            measure(record[{**other, "seed": seed}]) - measure(record[{**base, "seed": seed}])
            for seed in record.seeds(base, other)
        ]
    )


def at_the_end(result):
    return 100 * result["test_accuracy"][-1]


def over_training(result):
    return 100 * np.mean(result["test_accuracy"])


def itop(result):
    return 100 * result["itop_rate"][-1]


MEASURES = {"at_the_end": at_the_end, "over_training": over_training, "itop_rate": itop}


def steps_to_reach(result, accuracy, chance=0.1):
    """Steps until the accuracy is first reached, interpolated from `chance`; NaN if it never is."""
    steps, values = [0, *result["steps"]], [chance, *result["test_accuracy"]]
    if accuracy <= values[0]:
        return 0.0
    for i in range(1, len(values)):
        if values[i] >= accuracy:
            share = (accuracy - values[i - 1]) / (values[i] - values[i - 1])
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return np.nan


def compare(record, pairs, alike=False):
    """Rows of a table: what the second setting of each pair gains over the first.

    Pairs of which nothing was trained yet have no row. `alike`: take the variance between seeds to
    be the same in all rows, as in the maps.
    """
    rows = []
    pairs = {label: pair for label, pair in pairs.items() if record.seeds(*pair)}
    values = {
        name: {label: differences(record, *pair, measure) for label, pair in pairs.items()}
        for name, measure in MEASURES.items()
    }
    for label, (base, other) in pairs.items():
        row = {"label": list(label) if isinstance(label, tuple) else label}
        for name, of_pairs in values.items():
            every = list(of_pairs.values()) if alike else None
            row[name] = {
                "mean": float(np.mean(of_pairs[label])),
                "confidence": confidence(of_pairs[label], every),
            }
        seeds = record.seeds(base, other)
        row["seeds"] = len(seeds)
        row["base"] = float(np.mean([at_the_end(record[{**base, "seed": s}]) for s in seeds]))
        row["ratio_of_steps"] = ratio_of_steps(record, base, other, seeds)
        rows.append(row)
    return rows


def pooled(record, experiments):
    """All settings that were trained with and without the correction, each once.

    Every setting counts with its mean over seeds, and the interval is over settings: the seeds of
    one setting are no independent settings.
    """
    pairs = {}
    for comparisons in experiments.values():
        for base, other in comparisons.values():
            if {**base, **CORRECTED} == {**MASKED, **other} and {**MASKED, **base} != other:
                pairs[record.key(other)] = base, other
    pairs = {key: pair for key, pair in pairs.items() if record.seeds(*pair)}
    if not pairs:
        return None
    found: dict = {}
    for name, measure in MEASURES.items():
        values = [differences(record, base, other, measure) for base, other in pairs.values()]
        means = [np.mean(of_setting) for of_setting in values]
        found["settings"], found["pairs"] = len(values), sum(map(len, values))
        found[name] = {"mean": float(np.mean(means)), "confidence": confidence(means)}
    return found


def ratio_of_steps(record, base, other, seeds):
    """Steps of the second to an accuracy over those of the first, on curves averaged over seeds.

    The accuracy is the lower one of the two final ones, so that both reach it: below 1 the second
    is faster, above 1 the first.
    """
    curves = []
    for setting in (base, other):
        results = [record[{**setting, "seed": seed}] for seed in seeds]
        accuracy = np.mean([result["test_accuracy"] for result in results], axis=0)
        curves.append({"steps": results[0]["steps"], "test_accuracy": accuracy})
    target = min(curve["test_accuracy"][-1] for curve in curves)
    chance = 1 / full_scale.CLASSES[base.get("dataset", "cifar10")]
    first, second = (steps_to_reach(curve, target, chance) for curve in curves)
    return second / first if first else np.nan


def is_sure(cell):
    return abs(cell["mean"]) > cell["confidence"]


def table(rows):
    columns = (f"{name.replace('_', ' '):>16}" for name in MEASURES)
    yield f"{'':>38}{'seeds':>6}{'base':>7}{''.join(columns)}{'steps':>8}"
    for row in rows:
        label = " · ".join(row["label"]) if isinstance(row["label"], list) else row["label"]
        cells = "".join(
            f"{cell['mean']:>+7.2f} ± {cell['confidence']:.2f}{'*' if is_sure(cell) else ' '} "
            for cell in (row[name] for name in MEASURES)
        )
        yield f"{label:>38}{row['seeds']:>6}{row['base']:>7.1f}{cells}{row['ratio_of_steps']:>7.2f}"


# ----------------------------------------------------------------------------------- pictures


def heat_map(rows, axis_names, title, path):
    import matplotlib.pyplot as plt

    y, x = (list(dict.fromkeys(row["label"][axis] for row in rows)) for axis in (0, 1))
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained", sharey=True)
    for axis, name in zip(axes, ("at_the_end", "over_training")):
        cells = {tuple(row["label"]): row[name] for row in rows}
        mean = np.array(
            [[cells[i, j]["mean"] if (i, j) in cells else np.nan for j in x] for i in y]
        )
        limit = 2 * np.nanmax(np.abs(mean)) or 1  # pale enough for the text
        image = axis.imshow(mean, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        for (a, b), cell in cells.items():
            i, j = y.index(a), x.index(b)
            axis.text(
                j, i, f"{cell['mean']:+.1f} ± {cell['confidence']:.1f}",
                ha="center", va="center", weight="bold" if is_sure(cell) else "normal",
            )  # fmt: skip
        axis.set_xticks(range(len(x)), x)
        axis.set_yticks(range(len(y)), y)
        axis.set(xlabel=axis_names[1], title=f"gain {name.replace('_', ' ')}")
        figure.colorbar(image)
    axes[0].set_ylabel(axis_names[0])
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def forest(rows, title, path):
    """Every comparison's mean difference with its interval."""
    import matplotlib.pyplot as plt

    shown = [name for name in MEASURES if not np.isnan([row[name]["mean"] for row in rows]).all()]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(3.4 + 2.4 * len(shown), 1.5 + 0.3 * len(rows)),
        layout="constrained", sharey=True,
    )  # fmt: skip
    positions = range(len(rows))[::-1]
    for axis, name in zip(axes, shown):
        for position, row in zip(positions, rows):
            color = "tab:blue" if is_sure(row[name]) else "tab:gray"
            half = np.nan_to_num(row[name]["confidence"])
            axis.errorbar(row[name]["mean"], position, xerr=half, fmt="o", color=color, capsize=3)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_yticks(positions, [row["label"] for row in rows])
        axis.set_xlabel(f"{name.replace('_', ' ')}, points")
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def curves(record, pairs, title, path):
    import matplotlib.pyplot as plt

    columns = (len(pairs) + 1) // 2
    figure, axes = plt.subplots(
        2, columns, figsize=(2.6 * columns, 5.4), layout="constrained", sharex=True, squeeze=False
    )
    for axis, (label, settings) in zip(axes.flat, pairs.items()):
        for setting, name in zip(settings, ("masked only", "SparseOpt")):
            results = [record[{**setting, "seed": seed}] for seed in record.seeds(setting)]
            accuracy = 100 * np.array([result["test_accuracy"] for result in results])
            steps, mean, spread = results[0]["steps"], accuracy.mean(0), accuracy.std(0)
            axis.plot(steps, mean, label=name)
            axis.fill_between(steps, mean - spread, mean + spread, alpha=0.2)
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    for axis in axes[:, 0]:
        axis.set_ylabel("test accuracy, %")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _save(figure, path):
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def picture(experiment, record, pairs, rows, path):
    """Nothing is drawn where there is no Matplotlib, or nothing trained yet."""
    if importlib.util.find_spec("matplotlib") is None or not rows:
        return
    seeds = sorted({row["seeds"] for row in rows})
    of = "–".join(str(count) for count in {seeds[0]: 0, seeds[-1]: 0})
    title = f"{experiment.__doc__}\n{of} seeds, 95 % intervals"
    if experiment is convergence:
        trained = {row["label"]: pairs[row["label"]] for row in rows}
        curves(record, trained, title.replace("95 % intervals", "± standard deviation"), path)
    elif experiment in MAPS:
        title += ", from the variance of all cells together"
        heat_map(rows, MAPS[experiment], title, path)
    else:
        forest(rows, title, path)


def train(scale, settings, record, args):
    """Train what is missing."""
    load_data = scale.made_up if args.quick else functools.partial(scale.load_data, args.data_dir)
    options = {"jobs": args.jobs, "load_data": load_data}
    if args.scale == "full":
        options["threads"] = max(1, os.cpu_count() // args.jobs)
        backups = record.path.with_name("backups")
        for setting in settings:
            if setting in record:
                full_scale.forget(setting, backups)
        missing = record.missing(settings)
        full_scale.share_the_device(record.path.with_name("compiled").resolve())
        if missing:
            seconds, steps, each = full_scale.estimate(missing, **options, backups=backups)
            hours, minutes = divmod(round(seconds / 60), 60)
            print(
                f"{len(missing)} trainings, together {steps} steps of {1000 * each:.1f} ms, "
                f"{min(args.jobs, len(missing))} at a time: about {hours} h {minutes} min",
                flush=True,
            )
        options["train"] = functools.partial(full_scale.train, backups=backups)
        options["then"] = functools.partial(full_scale.forget, backups=backups)
    proxy.train_all(settings, record, **options)


def main(argv=None):
    quick = "made-up data, an epoch or two, two seeds; into quick/"
    parser = arguments(__doc__, seeds=None, quick=quick, jobs=True)
    parser.add_argument("experiments", nargs="*", help="names, or `all`")
    parser.add_argument("--list", action="store_true", help="what there is")
    parser.add_argument("--scale", choices=SCALES, default="small", help="the task")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="train nothing, show what there is")
    parser.add_argument(
        "--merge", type=pathlib.Path, nargs="+", default=[], metavar="FILE",
        help="take over the trainings in such files, made by other runs",
    )  # fmt: skip
    args = parser.parse_args(argv)
    scale = SCALES[args.scale]
    if args.list or not args.experiments:
        for name, experiment in scale.experiments.items():
            print(f"{name:>24}  {experiment.__doc__} ({len(experiment())} comparisons)")
        return None
    unknown = set(args.experiments) - {*scale.experiments, "all"}
    if unknown:
        parser.error(f"unknown experiments: {', '.join(sorted(unknown))}; see --list")
    names = list(scale.experiments) if "all" in args.experiments else args.experiments
    chosen = {name: scale.experiments[name]() for name in names}
    seeds = scale.seeds if args.seeds is None else args.seeds
    if args.quick:
        seeds, args.output = 2, args.output / "quick"
        chosen = {
            name: {
                label: tuple({**setting, **scale.quick} for setting in pair)
                for label, pair in itertools.islice(pairs.items(), 2)
            }
            for name, pairs in chosen.items()
        }
    record = proxy.Record(args.output / scale.file, command(__file__, argv), scale.defaults)
    for path in args.merge:
        record.merge(path)
    settings = [
        {**setting, "seed": seed}
        for seed in range(args.first_seed, args.first_seed + seeds)  # each of everything first
        for pairs in chosen.values()
        for pair in pairs.values()
        for setting in pair
    ]
    if not args.report:
        train(scale, settings, record, args)
    tables = {}
    for name, pairs in chosen.items():
        experiment = scale.experiments[name]
        rows = tables[name] = compare(record, pairs, alike=experiment in MAPS)
        print(f"\n{name}: {experiment.__doc__}", *table(rows), sep="\n")
    every = {**{name: experiment() for name, experiment in scale.experiments.items()}, **chosen}
    together = record.content["pooled"] = pooled(record, every)
    if together:
        print(
            f"\nWith against without the correction, {together['settings']} settings, "
            f"{together['pairs']} pairs: "
            + ", ".join(
                f"{together[name]['mean']:+.2f} ± {together[name]['confidence']:.2f} "
                f"{name.replace('_', ' ')}"
                for name in ("at_the_end", "over_training")
            )
        )
    record.content["comparisons"] = {**record.content.get("comparisons", {}), **tables}
    record.write()
    for name, rows in tables.items():
        path = record.path.with_name(f"{name}{'' if args.scale == 'small' else '-full'}.png")
        picture(scale.experiments[name], record, chosen[name], rows, path)
    print(
        f"\n* the interval excludes 0; of twenty such intervals one does by chance\n→ {record.path}"
    )
    return record.content


if __name__ == "__main__":
    main()
