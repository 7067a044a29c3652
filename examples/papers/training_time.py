"""Is it worth it? Accuracy of condensed sparse training beside dense, by steps and by time.

    export KERAS_BACKEND=jax GLIBC_TUNABLES=glibc.malloc.hugetlb=1      # docs/faster.md says why
    python examples/papers/training_time.py --time              # a quiet machine: half an hour
    python examples/papers/training_time.py --jobs 2            # hours on two CPU cores
    python examples/papers/training_time.py --only "^text 0.9"  # one table
    python examples/papers/training_time.py --quick             # minutes: does it run?

`--time` measures what a step of `fit` costs in each row, alone on the machine and in turns, and
finds two opponents: the *narrow* dense network whose step takes as long as that of tiles 1×64, and
the *wide* network with tiles 1×64 whose step takes as long as the dense one's. Then every row is
trained twice, each time with the learning rate falling to 0 at the end: for as many steps as the
dense network, and for as many as fit into the dense network's time.

    text     the next character of the Python manual that comes with Python, from the 32 before it:
             three hidden layers of 512 units with LayerNorm and residuals
    images   CIFAR-10 by a small vision transformer: two blocks of width 256, 16 patches
             (`--data_dir`)
    causal   the characters of the manual, each from those before it: a transformer with two blocks
             of width 256, 64 characters

Stated before the trainings ran: a row **gains** over another if the mean of the paired differences
in final test accuracy, over the seeds, is above 0 with its 95 % interval (Student's t), **loses**
if it is below 0 with its interval; anything else shows no difference. What decides whether
condensed training is worth it is the comparison with the dense and with the narrow dense network
at equal time; at equal steps the sparse network has had less time.
"""

import functools
import math
import re
import statistics
import time

from driver import arguments, command, facts  # which finds the examples beside this folder

# isort: split
import keras
import manual
import numpy as np
import proxy
from keras import layers
from proxy import Record, confidence, full, train_all
from record import bytes_of

import keras_sparseopt as kso

WIDTHS = {"text": 512, "images": 256, "causal": 256}
SPARSITIES = {"text": (0.9, 0.8, 0.95), "images": (0.9,), "causal": (0.9,)}
SEEDS = {"text": 5, "images": 3, "causal": 3}
STEPS = {"text": 3000, "images": 1200, "causal": 1200}
BATCH = {"text": 128, "images": 32, "causal": 8}
REACHED = {"text": 0.53, "images": 0.48, "causal": 0.45}  # accuracy whose time is reported
CONTEXT = {"text": 32, "causal": 64}  # characters
CANDIDATES = {  # widths between which --time looks for the opponents: (narrow, wide)
    "text": ((96, 144, 208, 288, 384, 448), (512, 640, 768, 1024, 1536)),
    "images": ((96, 128, 160, 192, 224), (256, 320, 384, 512)),
    "causal": ((96, 128, 160, 192, 224), (256, 320, 384, 512)),
}
EVALUATIONS = 8
UPDATE_EVERY, DROP_FRACTION = 100, 0.3
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 1e-3, 0.05, 0.01

DEFAULTS = {
    "task": "text",
    "width": None,  # the task's own
    "tile": None,  # None: dense; "unstructured": masked; or (inputs, neurons): condensed
    "sparsity": 0.9,
    "method": "rigl",
    "by_fan_in": False,  # initial values for the number of active inputs
    "steps": None,  # as many as the dense network
    "seed": 0,
}

# --------------------------------------------------------------------------------------- tasks


def load(tasks, data_dir, quick):
    """The data of each task, by name: ((inputs, targets) of training, the same of testing)."""

    def characters(task, train, test):
        return manual.load(train, test, CONTEXT[task], every=task == "causal")

    def pictures():
        if quick:
            return [(x.repeat(2, 1).repeat(2, 2), y) for x, y in proxy.made_up()]
        train, (x, y) = proxy.load(data_dir, 32)
        return [train, (x[:5000], y[:5000])]

    loads = {
        "text": lambda: characters("text", *((2000, 200) if quick else (400_000, 8000))),
        "images": pictures,
        "causal": lambda: characters("causal", *((500, 16) if quick else (400_000, 512))),
    }
    return {task: loads[task]() for task in tasks}


def text(width):
    inputs = keras.Input((CONTEXT["text"],), dtype="int32")
    x = layers.Flatten()(layers.Embedding(manual.classes(), 16, name="characters")(inputs))
    x = layers.Dense(width, "gelu")(layers.LayerNormalization()(x))
    for _ in range(2):
        x = x + layers.Dense(width, "gelu")(layers.LayerNormalization()(x))
    x = layers.LayerNormalization()(x)
    return keras.Model(inputs, layers.Dense(manual.classes(), name="classifier")(x))


class Positions(layers.Layer):
    """Adds a learned vector for each position."""

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], initializer="normal", name="positions")

    def call(self, x):
        return x + self.table


def blocks(x, width, causal, number=2, heads=4):
    for _ in range(number):
        h = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(heads, width // heads)
        x = x + attention(h, h, use_causal_mask=causal)
        h = layers.LayerNormalization()(x)
        x = x + layers.Dense(width)(layers.Dense(4 * width, "gelu")(h))
    return layers.LayerNormalization()(x)


def images(width):
    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(width, 8, 8, name="patches")(inputs)
    x = Positions(name="positions")(layers.Reshape((16, width))(x))
    x = layers.GlobalAveragePooling1D()(blocks(x, width, causal=False))
    return keras.Model(inputs, layers.Dense(10, name="classifier")(x))


def causal(width):
    inputs = keras.Input((CONTEXT["causal"],), dtype="int32")
    x = layers.Embedding(manual.classes(), width, name="characters")(inputs)
    x = blocks(Positions(name="positions")(x), width, causal=True)
    return keras.Model(inputs, layers.Dense(manual.classes(), name="classifier")(x))


NETWORKS = {"text": text, "images": images, "causal": causal}
DENSE = ["classifier", "patches", "characters", "positions"]


class Batches(keras.utils.PyDataset):
    """Drawn by (seed, number of the batch) only; images are flipped."""

    def __init__(self, task, x, y, seed, steps):
        super().__init__()
        self.x, self.y, self.flips, self.size = x, y, task == "images", BATCH[task]
        self.seed, self.steps, self.piece = seed, steps, -1  # Keras announces the first epoch, too
        self.on_epoch_end()

    def on_epoch_end(self):
        self.piece += 1
        self.rng = np.random.default_rng([self.seed, self.piece])
        self.chosen = self.rng.integers(len(self.x), size=(self.steps, self.size))
        self.flipped = self.rng.random((self.steps, self.size)) < 0.5

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        chosen = self.chosen[index]
        x, y = self.x[chosen], self.y[chosen]
        if self.flips:
            x = np.where(self.flipped[index][:, None, None, None], x[:, :, ::-1], x)
        return x, y


# ------------------------------------------------------------------------------------ training


def make(setting):
    """The network of a setting."""
    model = NETWORKS[setting["task"]](setting["width"])
    tile = setting["tile"]
    if tile is None:
        return model
    masked = tile == "unstructured"
    left = [layer for layer in model.layers if layer.name in DENSE]
    kso.sparsify(
        model, setting["sparsity"], "uniform", exclude=left, seed=setting["seed"],
        structure=None if masked else kso.Block(*tile, balanced=True),
    )  # fmt: skip
    if setting["by_fan_in"]:
        for weight in kso.sparse_weights(model):
            density = 1 - weight.topology.neuron_sparsity
            weight.assign(weight / np.sqrt(np.where(density > 0, density, 1)))
    return model if masked else kso.condense(model)


def prepare(setting, steps, update_every=UPDATE_EVERY):
    """A compiled network and the callbacks of its `fit`."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(setting["seed"])
    model = make(setting)
    warmup = round(WARMUP * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=LEARNING_RATE, warmup_steps=warmup
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=WEIGHT_DECAY)
    methods = []
    if setting["tile"] is not None:
        optimizer = kso.SparseOpt(optimizer)
        method_class, options = {
            "rigl": (kso.RigL, {}),
            "set": (kso.SET, {"seed": setting["seed"]}),
        }[setting["method"]]
        end = round(0.75 * steps)
        methods = [method_class(update_every, DROP_FRACTION, end_step=end, **options)]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model, methods


def completed(setting):
    """A setting with all of its values."""
    setting = full(setting, DEFAULTS)
    own = {"width": WIDTHS[setting["task"]], "steps": STEPS[setting["task"]]}
    return {**setting, **{key: setting[key] or value for key, value in own.items()}}


def train(data, setting):
    """One training; `steps` and accuracies are lists over evaluations."""
    setting = completed(setting)
    data = data[setting["task"]]
    each = max(1, round(setting["steps"] / EVALUATIONS))
    steps = each * EVALUATIONS
    model, methods = prepare(setting, steps, min(UPDATE_EVERY, steps // 4))
    history = model.fit(
        Batches(setting["task"], *data[0], setting["seed"], each), epochs=EVALUATIONS,
        shuffle=False, verbose=0, validation_data=data[1], validation_batch_size=4 * BATCH["text"],
        callbacks=methods,
    ).history  # fmt: skip
    return {
        "steps": [each * (i + 1) for i in range(EVALUATIONS)],
        "test_accuracy": [round(value, 5) for value in history["val_accuracy"]],
        "test_loss": [round(value, 5) for value in history["val_loss"]],
        **sizes(model),
    }


def sizes(model):
    """Active weights, and bytes of weights, gradients and optimizer."""
    masked = [w.topology for w in kso.sparse_weights(model) if not w.topology.is_condensed]
    inactive = sum(t.sparsity * math.prod(t.shape) for t in masked)
    trained = sum(math.prod(v.shape) for v in model.trainable_variables)
    return {"weights": round(trained - inactive), "bytes": bytes_of(model)}


# -------------------------------------------------------------------------------------- timing


def step_times(settings, data, steps, rounds):
    """Milliseconds of a step of `fit` in each setting, one mask update among them; in turns."""
    trained = []
    for setting in map(completed, settings):
        (x, y), _ = data[setting["task"]]
        batches = Batches(setting["task"], x, y, 0, steps)
        trained.append((*prepare(setting, 10**5, steps), batches))
    times: list = [[] for _ in trained]
    for turn in range(rounds + 1):
        for (model, methods, batches), own in zip(trained, times):
            start = time.perf_counter()
            model.fit(batches, shuffle=False, verbose=0, callbacks=methods)
            if turn:  # the first one compiles
                own.append(1000 * (time.perf_counter() - start) / steps)
    return [statistics.median(own) for own in times]


def width_for(target, widths, times, multiple):
    """The width at which a step takes `target` ms, within those that were measured."""
    print(f"looking for {target:.1f} ms:", dict(zip(widths, times)), flush=True)
    return multiple * round(float(np.interp(target, times, widths)) / multiple)


def measure(task, sparsities, data, quick):
    """Finds the opponents of a task: list of dicts, a setting and its `ms` in each."""
    steps, rounds = (3, 1) if quick else (100 if task == "text" else 30, 5)
    narrow, wide = CANDIDATES[task]
    dense = [{"task": task, "width": width} for width in narrow]
    base = [{"task": task}, *({"task": task, "sparsity": s, "tile": (1, 64)} for s in sparsities)]
    found = step_times([*base, *dense], data, steps, rounds)
    rows = list(rows_of(task, sparsities))
    for sparsity, ms in zip(sparsities, found[1:]):
        width = width_for(ms, narrow, found[len(base) :], 16)
        rows.append({"task": task, "sparsity": sparsity, "width": width})
        wider = [{"task": task, "sparsity": sparsity, "tile": (1, 64), "width": w} for w in wide]
        own = step_times([{"task": task}, *wider], data, steps, rounds)
        width = width_for(own[0], wide, own[1:], 64)
        rows.append({"task": task, "sparsity": sparsity, "tile": (1, 64), "width": width})
    return [{**row, "ms": ms} for row, ms in zip(rows, step_times(rows, data, steps, rounds))]


# ---------------------------------------------------------------------------------- comparison


def rows_of(task, sparsities):
    """What is timed without a search: dicts of settings."""
    tiles = [(1, 64), (8, 64), (64, 64)] if task == "text" else [(1, 64)]
    yield {"task": task}
    for sparsity in sparsities:
        for tile in ("unstructured", *tiles):
            yield {"task": task, "sparsity": sparsity, "tile": tile}


def kind(row):
    """What a row is called in tables."""
    if row.get("tile") is None:
        return "narrow" if "width" in row else "dense"
    if "width" in row:
        return "wide 1×64 rigl"
    tile = row["tile"] if isinstance(row["tile"], str) else "{}×{}".format(*row["tile"])
    start = ", by fan-in" if row.get("by_fan_in") else ""
    return f"{tile} {row.get('method', 'rigl')}{start}"


def described(row):
    return f"{row['task']} {row.get('sparsity', '')} {kind(row)}"


def rows_to_train(times):
    """For each row its setting without a seed, the same for equal time (or `None`), and `ms`.

    The second one is the first one where both are alike, and `None` where there is no time for more
    steps. SET is taken to cost what RigL costs.
    """
    dense = {row["task"]: row["ms"] for row in times if kind(row) == "dense"}
    for timed in times:
        row = {key: value for key, value in timed.items() if key != "ms"}
        task, tile, ms = row["task"], row.get("tile"), timed["ms"]
        longer: dict | None = row
        if kind(row) != "dense" and not kind(row).startswith("wide"):
            steps = EVALUATIONS * round(STEPS[task] * dense[task] / ms / EVALUATIONS)
            longer = {**row, "steps": steps} if steps > STEPS[task] else None
        yield row, longer, ms
        if task == "text" and "width" not in row and tile is not None:
            if tile != "unstructured":
                yield {**row, "method": "set"}, None, ms
            if tile in ("unstructured", (1, 64)) and row["sparsity"] == 0.9:
                yield {**row, "by_fan_in": True}, None, ms


def compare(record, seeds):
    """Rows with accuracies in %, and differences to the dense and to the narrow network."""
    times, rows = record.content["times"], []
    every = list(rows_to_train(times))
    for row, longer, ms in every:
        task = row["task"]
        narrow = [
            x or r for r, x, _ in every
            if kind(r) == "narrow" and r["task"] == task and r["sparsity"] == row.get("sparsity")
        ]  # fmt: skip
        opponents = {"dense": {"task": task}, "narrow": narrow[0] if narrow else None}
        columns = {"task": task, "sparsity": row.get("sparsity"), "row": kind(row)}
        columns |= {"width": row.get("width") or WIDTHS[task], "ms": ms}
        own = [seed for seed in record.seeds(row) if seed < seeds.get(task, SEEDS[task])]
        if not own:
            continue
        first = record[{**row, "seed": own[0]}]
        columns |= {"seeds": len(own), "weights": first["weights"], "bytes": first["bytes"]}
        columns["equal steps"] = mean_of(record, row, own)
        columns["− dense, equal steps"] = difference(record, row, opponents["dense"], own)
        if "tile" in row and "width" not in row:
            other = {key: value for key, value in row.items() if key not in ("method", "by_fan_in")}
            unstructured = {**other, "tile": "unstructured"}
            columns["− unstructured, equal steps"] = difference(record, row, unstructured, own)
            columns["− plain row, equal steps"] = difference(record, row, other, own)
        if longer is not None:
            columns["steps in equal time"] = longer.get("steps") or STEPS[task]
            columns["equal time"] = mean_of(record, longer, own)
            for name in ("dense", "narrow"):
                if opponents[name] is not None and kind(row) != name:
                    columns[f"− {name}, equal time"] = difference(
                        record, longer, opponents[name], own
                    )
            columns["seconds to reach"] = seconds_to(record, (row, longer), ms, own)
        rows.append(columns)
    return rows


def finals(record, setting, seeds):
    return [
        100 * record[{**setting, "seed": s}]["test_accuracy"][-1]
        for s in seeds
        if {**setting, "seed": s} in record
    ]


def mean_of(record, setting, seeds):
    found = finals(record, setting, seeds)
    return statistics.mean(found) if found else None


def difference(record, setting, other, seeds):
    """Mean and half of its 95 % interval of paired differences, and the verdict."""
    pairs = [s for s in seeds if all({**x, "seed": s} in record for x in (setting, other))]
    if len(pairs) < 2 or setting == other:
        return None
    values = np.subtract(finals(record, setting, pairs), finals(record, other, pairs))
    mean, half = float(values.mean()), confidence(values)
    verdict = "gains" if mean > half else "loses" if -mean > half else "no difference shown"
    return {"points": mean, "± 95 %": half, "verdict": verdict}


def seconds_to(record, settings, ms, seeds):
    """Of both trainings the shorter time after which the mean accuracy is `REACHED`, or `None`."""
    found = []
    for setting in settings:
        runs = [record[{**setting, "seed": s}] for s in seeds if {**setting, "seed": s} in record]
        for i, steps in enumerate(runs[0]["steps"] if runs else []):
            if statistics.mean(r["test_accuracy"][i] for r in runs) >= REACHED[setting["task"]]:
                found.append(steps * ms / 1000)
                break
    return min(found, default=None)


def table(rows):
    def signed(value):
        if value is None:
            return ""
        sign = {"gains": " +", "loses": " −"}.get(value["verdict"], "")
        return f"{value['points']:+.2f} ± {value['± 95 %']:.2f}{sign}"

    def told(value, digits=2):
        return "" if value is None else f"{value:.{digits}f}"

    names = ["task", "%", "row", "width", "weights", "bytes", "ms", "equal steps", "− dense"]
    names += ["steps", "equal time", "− dense", "− narrow", "seconds to reach"]
    dense = {row["task"]: row["bytes"] for row in rows if row["row"] == "dense"}
    cells = [names]
    for row in rows:
        cells.append(
            [
                row["task"], told(row["sparsity"] and 100 * row["sparsity"], 0), row["row"],
                str(row["width"]), f"{row['weights']:,}",
                told(row["bytes"] / dense.get(row["task"], float("nan"))), told(row["ms"], 1),
                told(row["equal steps"]), signed(row["− dense, equal steps"]),
                str(row.get("steps in equal time", "")), told(row.get("equal time")),
                signed(row.get("− dense, equal time")), signed(row.get("− narrow, equal time")),
                told(row.get("seconds to reach"), 1),
            ]
        )  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths))


COLORS = {
    "dense": "#333333", "narrow": "#8a8a8a", "unstructured rigl": "#d1495b",
    "1×64 rigl": "#30638e", "8×64 rigl": "#5b8e30", "64×64 rigl": "#8e5330",
    "wide 1×64 rigl": "#7fb2d6",
}  # fmt: skip


def picture(record, path, sparsity=0.9):
    """Accuracy over seconds of the trainings that take the dense network's time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    every = list(rows_to_train(record.content["times"]))
    tasks = dict.fromkeys(row["task"] for row, longer, _ in every if record.seeds(longer or row))
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.2 * len(tasks), 4.4), squeeze=False)
    for axis, task in zip(axes[0], tasks):
        for row, longer, ms in every:
            if row["task"] != task or row.get("sparsity", sparsity) != sparsity:
                continue
            color, setting = COLORS.get(kind(row)), longer or row
            runs = [record[{**setting, "seed": s}] for s in record.seeds(setting)]
            if color is None or not runs or longer is None:
                continue
            seconds = np.array(runs[0]["steps"]) * ms / 1000
            accuracy = 100 * np.mean([run["test_accuracy"] for run in runs], axis=0)
            label = f"{kind(row)}, {row.get('width') or WIDTHS[task]} wide"
            axis.plot(seconds, accuracy, color=color, label=label, marker="o", markersize=3)
        axis.set(xlabel="seconds of training", ylabel="test accuracy (%)", title=f"{task}, 90 %")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    parser = arguments(__doc__, seeds=None, quick="few steps; into quick/", jobs=True)
    parser.add_argument("--time", action="store_true", help="measure the steps instead of training")
    parser.add_argument("--only", default="", help="regular expression: as '^text 0.9 1×64 rigl'")
    args = parser.parse_args(argv)
    if args.quick:
        args.output = args.output / "quick"
    record = Record(args.output / "training_time.json", command(__file__, argv), DEFAULTS)
    times = record.content.setdefault("times", [])
    tasks = [task for task in WIDTHS if re.search(args.only, task) or not args.time]
    if args.time:
        data = load(tasks, args.data_dir, args.quick)
        for task in tasks:
            times[:] = [row for row in times if row["task"] != task]
            times += measure(task, SPARSITIES[task], data, args.quick)
            record.content["timed"] = facts()
            record.write()
            for row in times:
                print(f"{row['ms']:8.2f} ms  {described(row)} {row.get('width', '')}", flush=True)
        return record.content
    if not times:
        parser.error("--time comes first")
    for row in times:
        if isinstance(row.get("tile"), list):
            row["tile"] = tuple(row["tile"])
    seeds = {} if args.seeds is None else dict.fromkeys(tasks, args.seeds)
    settings = [
        {**setting, "seed": seed}
        for row, longer, _ in rows_to_train(times)
        if re.search(args.only, described(row))
        for seed in range(seeds.get(row["task"], SEEDS[row["task"]]))
        for setting in (row, longer)
        if setting is not None
    ]
    chosen = sorted({setting["task"] for setting in settings})
    load_data = functools.partial(load, chosen, args.data_dir, args.quick)
    if args.quick:
        settings = [{**setting, "steps": EVALUATIONS} for setting in settings]
    train_all(settings, record, jobs=args.jobs, train=train, load_data=load_data)
    if args.quick:  # nothing that could be compared
        return record.content
    record.content["comparisons"] = rows = compare(record, seeds)
    record.write()
    print(*table(rows), sep="\n")
    picture(record, record.path.with_suffix(".png"))
    print(f"→ {record.path}, {record.path.with_suffix('.png')}")
    return record.content


if __name__ == "__main__":
    main()
