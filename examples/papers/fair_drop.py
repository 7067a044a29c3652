"""Does the correction starve sparse neurons, and would a fairer ranking of what is dropped help?

    python examples/papers/fair_drop.py --data_dir /data/tfds --seeds 5 --jobs 2
    python examples/papers/fair_drop.py rates --data_dir /data/tfds --seeds 5 --jobs 2    # hours
    python examples/papers/fair_drop.py --quick                      # made-up data: does it run?

The suspicion: SparseOpt makes the steps of sparse neurons smaller, so their weights stay smaller,
so ranking by |w| drops them first, so these neurons become sparser still, until they are dead.

Part `loop`: the small task of `proxy.py`, 98 % sparse, five epochs, masked only and SparseOpt,
with what is dropped ranked by

    |w|                    as RigL and SET do
    |w| / √(fan-in)        fair to the correction, whose steps grow with √fan-in
    |w| / ‖w of neuron‖    what matters to a neuron behind a normalization
    least fan-in           |w|, but every neuron keeps its ⌈mean fan-in / 4⌉ largest
    starved grow           |w|, and what grows ranked by score / √(fan-in + 1)

Stated before it was run. The loop is there if with SparseOpt more neurons die and fan-ins vary
more than with masking alone, and the sparsest tenth of the neurons loses a larger share of its
connections relative to the densest tenth. A ranking wins if its accuracy at the end is surely (95
% interval of the paired differences, ten seeds) above that of |w| with SparseOpt *and* with
masking alone, for RigL and for SET, and surely below nowhere. Fewer dead neurons alone are no
win.

Part `rates`: thirty epochs, RigL, 98 %, peak rates from 0.03 to 1: masked only and SparseOpt,
ranked by |w| and by |w| / √(fan-in), each at its own best rate. Stated before it was run: the
correction gains if the paired difference of the final accuracies, each at its best rate, is
surely above 0 with five seeds; or if it needs at most 0.9 of the steps to the lower of the two;
or if it trains stably (final accuracy of all seeds above half of the best) at a rate at which
masking alone does not.

All trainings go into one file and none is repeated. Five epochs take half a minute on a core.
"""

import itertools

import numpy as np
from driver import arguments, command
from proxy import Record, confidence, train_all

CORRECTIONS = {"masked only": 0.0, "SparseOpt": 0.5}
RANKINGS = {
    "|w|": {},
    "|w| / √(fan-in)": {"drop_by": "fan_in"},
    "|w| / ‖w of neuron‖": {"drop_by": "norm"},
    "least fan-in": {"drop_by": "least_fan_in"},
    "starved grow": {"grow_by": "starved"},
}
LOOP = {"sparsity": 0.98, "epochs": 5}
CONDITIONS = {
    "RigL, lr 0.3": {**LOOP, "learning_rate": 0.3},
    "SET, lr 0.3": {**LOOP, "learning_rate": 0.3, "method": "set"},
    "RigL, lr 0.1": {**LOOP, "learning_rate": 0.1},
    "SET, lr 0.1": {**LOOP, "learning_rate": 0.1, "method": "set"},
    "RigL, lr 0.3, 95 %": {**LOOP, "learning_rate": 0.3, "sparsity": 0.95},
    "RigL, lr 0.3, half as wide": {**LOOP, "learning_rate": 0.3, "widths": (8, 16, 32)},
}
RATES = {"sparsity": 0.98, "epochs": 30}
RATES_RANKINGS = ("|w|", "|w| / √(fan-in)")
LEARNING_RATES = (0.1, 0.3, 1.0, 0.03)


def loop_arms(conditions=CONDITIONS):
    """(condition, correction, ranking) → setting."""
    return {
        (condition, correction, ranking): {**setting, "exponent": exponent, **ranked}
        for condition, setting in conditions.items()
        for correction, exponent in CORRECTIONS.items()
        for ranking, ranked in RANKINGS.items()
    }


def rate_arms():
    """(rate, correction, ranking) → setting."""
    return {
        (rate, correction, ranking): {
            **RATES, "learning_rate": rate, "exponent": exponent, **RANKINGS[ranking]
        }
        for rate, (correction, exponent), ranking in itertools.product(
            LEARNING_RATES, CORRECTIONS.items(), RATES_RANKINGS
        )
    }  # fmt: skip


def seeds_of(record, setting, *others):
    """The results of a setting, seed by seed, of the seeds that others have as well."""
    return [record[{**setting, "seed": seed}] for seed in record.seeds(setting, *others)]


def at_the_end(results):
    return 100 * np.array([result["test_accuracy"][-1] for result in results])


def cell(values, digits=2):
    """Mean and 95 % interval of a list, for a table and a file."""
    if not len(values):
        return None
    half = confidence(list(values)) if len(values) > 1 else np.nan
    return {"mean": round(float(np.mean(values)), digits), "confidence": _finite(half, digits)}


def gain(record, setting, base):
    """What a setting reaches over another one, over the seeds of both."""
    own, others = seeds_of(record, setting, base), seeds_of(record, base, setting)
    return cell(at_the_end(own) - at_the_end(others))


def _finite(value, digits):
    return round(float(value), digits) if np.isfinite(value) else None


def compare(record, arms):
    """A row for each arm that was trained: accuracy, its paired gain over |w|, and the topology."""
    rows = []
    for (condition, correction, ranking), setting in arms.items():
        results = seeds_of(record, setting)
        if not results:
            continue
        drops = np.mean([result["drops"] for result in results], axis=0)
        rows.append(
            {
                "condition": condition, "correction": correction, "ranking": ranking,
                "seeds": len(results),
                "accuracy": cell(at_the_end(results)),
                "gain": gain(record, setting, arms[condition, correction, "|w|"]),
                "dead_neurons": cell([result["dead_neurons"][-1] for result in results], 1),
                "fan_in_variation": cell([r["fan_in_variation"][-1] for r in results]),
                "drops": np.round(drops, 4).tolist(),
            }
        )  # fmt: skip
    return rows


def correction_gains(record, arms):
    """SparseOpt minus masked only, paired, for each condition and ranking."""
    rows = []
    for (condition, correction, ranking), setting in arms.items():
        if correction != "SparseOpt":
            continue
        base = arms[condition, "masked only", ranking]
        pairs = len(record.seeds(setting, base))
        if pairs:
            found = gain(record, setting, base)
            rows.append({"condition": condition, "ranking": ranking, "seeds": pairs, "gain": found})
    return rows


def steps_to(results, accuracy):
    """Steps until the mean curve over seeds reaches an accuracy; NaN if it does not."""
    curve = np.mean([result["test_accuracy"] for result in results], axis=0)
    reached = np.flatnonzero(curve >= accuracy)
    return results[0]["steps"][reached[0]] if reached.size else np.nan


def at_best_rates(record, arms):
    """Each method at its own best rate, paired with others at theirs.

    `gain` is over masking alone ranked by |w|, `gain_of_ranking` over |w| with the same correction.
    """
    rows, best = [], {}
    for correction, ranking in itertools.product(CORRECTIONS, RATES_RANKINGS):
        found = {rate: seeds_of(record, arms[rate, correction, ranking]) for rate in LEARNING_RATES}
        found = {rate: results for rate, results in found.items() if results}
        if not found:
            continue
        rate = max(found, key=lambda r: at_the_end(found[r]).mean())
        best[correction, ranking] = arms[rate, correction, ranking]
        top = at_the_end(found[rate]).mean()
        stable = [r for r, results in found.items() if at_the_end(results).min() > top / 2]
        rows.append(
            {
                "correction": correction, "ranking": ranking, "best_rate": rate,
                "accuracy": cell(at_the_end(found[rate])), "seeds": len(found[rate]),
                "by_rate": {str(r): cell(at_the_end(found[r])) for r in sorted(found)},
                "stable_up_to": max(stable, default=None),
            }
        )  # fmt: skip

    for row in rows:
        base = best.get(("masked only", "|w|"))
        own = best[row["correction"], row["ranking"]]
        if (row["correction"], "|w|") in best:
            row["gain_of_ranking"] = gain(record, own, best[row["correction"], "|w|"])
        if base:
            row["gain"] = gain(record, own, base)
            own, base = seeds_of(record, own), seeds_of(record, base)
            accuracy = min(
                np.mean([result["test_accuracy"][-1] for result in side]) for side in (base, own)
            )
            ratio = steps_to(own, accuracy) / steps_to(base, accuracy)
            row["ratio_of_steps"] = _finite(ratio, 2)
    return rows


def shown(found):
    if found is None or found["confidence"] is None:
        return "–" if found is None else f"{found['mean']:.1f}"
    return f"{found['mean']:.1f} ± {found['confidence']:.1f}"


def table(rows):
    yield (
        f"{'':<28}{'':<13}{'dropped by':<22}{'seeds':>5}{'accuracy':>14}{'over |w|':>14}"
        f"{'dead':>14}{'variation':>12}{'drops, sparsest / densest tenth':>34}"
    )
    for row in rows:
        first, last = row["drops"][0], row["drops"][-1]
        gain = "" if row["ranking"] == "|w|" else shown(row["gain"])
        yield (
            f"{row['condition']:<28}{row['correction']:<13}{row['ranking']:<22}{row['seeds']:>5}"
            f"{shown(row['accuracy']):>14}{gain:>14}{shown(row['dead_neurons']):>14}"
            f"{row['fan_in_variation']['mean']:>12.2f}{first:>20.1%} / {last:.1%}"
        )


def picture(record, arms, rows, path):
    """Accuracy, dead neurons and drops over training, and drops by fan-in: first condition."""
    import matplotlib.pyplot as plt

    condition = rows[0]["condition"]
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    colors = dict(zip(RANKINGS, plt.rcParams["axes.prop_cycle"].by_key()["color"]))
    for row in (row for row in rows if row["condition"] == condition):
        results = seeds_of(record, arms[condition, row["correction"], row["ranking"]])
        style = {
            "color": colors[row["ranking"]],
            "linestyle": "-" if row["correction"] == "SparseOpt" else "--",
        }
        label = row["ranking"] if row["correction"] == "SparseOpt" else None
        steps = results[0]["steps"]
        accuracy = 100 * np.mean([result["test_accuracy"] for result in results], axis=0)
        dead = np.mean([result["dead_neurons"] for result in results], axis=0)
        axes[0].plot(steps, accuracy, **style, label=label)
        axes[1].plot(steps, dead, **style)
        axes[2].plot(range(1, 11), 100 * np.array(row["drops"]), **style)
        over_time = [r["drops_over_time"] for r in results if "drops_over_time" in r]
        if row["ranking"] == "|w|" and over_time:
            axes[3].set_title(f"seeds: {len(over_time)}", fontsize=8)
            for tenth, marker in (("sparsest", "v"), ("densest", "^")):
                shares = 100 * np.mean([of[tenth] for of in over_time], axis=0)
                updated = shares > 0
                axes[3].plot(
                    np.array(steps)[updated], shares[updated], **style, marker=marker,
                    label=f"{tenth} tenth, {row['correction']}",
                )  # fmt: skip
    axes[0].set(xlabel="step", ylabel="test accuracy, %")
    axes[1].set(xlabel="step", ylabel="dead neurons")
    axes[2].set(
        xlabel="neurons by fan-in, tenths, sparsest first", ylabel="dropped at an update, %"
    )
    axes[3].set(xlabel="step", ylabel="dropped by |w| at an update, %")
    axes[0].legend(fontsize=8, title="dropped by", title_fontsize=8)
    if axes[3].lines:
        axes[3].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    seeds = max(row["seeds"] for row in rows if row["condition"] == condition)
    figure.suptitle(
        f"{condition}, 98 % sparse, mean of {seeds} seeds. Solid: SparseOpt, dashed: masked only",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    quick = "made-up data, one epoch, two seeds; into quick/"
    parser = arguments(__doc__, seeds=5, quick=quick, jobs=True)
    parser.add_argument("parts", nargs="*", metavar="part", help="`loop` (default), `rates`")
    parser.add_argument("--conditions", type=int, help="only the first so many of the loop")
    args = parser.parse_args(argv)
    parts = args.parts or ["loop"]
    if set(parts) - {"loop", "rates"}:
        parser.error(f"a part is `loop` or `rates`. Received: {' '.join(parts)}")
    every_loop, every_rate = loop_arms(), rate_arms()
    conditions = dict(itertools.islice(CONDITIONS.items(), args.conditions))
    wanted = loop_arms(conditions)
    if args.quick:
        args.seeds, args.output = 2, args.output / "quick"
        shortened = {"epochs": 1, "widths": (8,), "sparsity": 0.9, "update_every": 5}
        conditions = {"RigL, lr 0.3": CONDITIONS["RigL, lr 0.3"]}
        wanted = every_loop = {
            arm: {**setting, **shortened} for arm, setting in loop_arms(conditions).items()
        }
        every_rate = {arm: {**setting, **shortened} for arm, setting in every_rate.items()}
    record = Record(args.output / "fair_drop.json", command(__file__, argv))
    settings = []
    if "loop" in parts:
        settings += [  # a condition after the other, in each the first seed of everything first
            {**wanted[arm], "seed": seed}
            for condition in conditions
            for seed in range(args.seeds)
            for arm in wanted
            if arm[0] == condition
        ]
    if "rates" in parts:
        settings += [
            {**setting, "seed": seed}
            for seed in range(args.seeds)
            for setting in every_rate.values()
        ]
    train_all(settings, record, args.data_dir, args.quick, args.jobs)
    rows = compare(record, every_loop)
    found = {
        "loop": rows,
        "correction_gains": correction_gains(record, every_loop),
        "rates": at_best_rates(record, every_rate),
        "correction_gains_by_rate": correction_gains(record, every_rate),
    }
    print(*table(rows), sep="\n")
    print("\nSparseOpt minus masked only:")
    for row in found["correction_gains"]:
        print(f"  {row['condition']:<28}{row['ranking']:<22}{shown(row['gain']):>14}")
    for row in found["rates"]:
        print(
            f"  {row['correction']:<13}{row['ranking']:<22}best rate {row['best_rate']:g}: "
            f"{shown(row['accuracy'])}, over masked only {shown(row.get('gain'))}, "
            f"steps × {row.get('ratio_of_steps')}, stable up to {row['stable_up_to']}"
        )
    record.content.update(found)
    record.write()
    if rows:
        picture(record, every_loop, rows, record.path.with_suffix(".png"))
    print(f"→ {record.path}")
    return record.content


if __name__ == "__main__":
    main()
