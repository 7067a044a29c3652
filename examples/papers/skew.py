"""What the gradient skew does while a network learns, seen from inside.

    python examples/papers/skew.py --data_dir /data/tfds        # ten minutes on one CPU core
    python examples/papers/skew.py --quick                      # made-up data: does it run?

On the small task of `proxy.py` (CIFAR-10 at 16×16 pixels, ResNet, 95 % sparse), three seeds each:

1. Theory against measurement: does Batch Normalization amplify by 1/√(1 − s_i) (its moving
   variances tell), still after some training?
2. Mask updates: what happens to the loss, and to the direction of the gradient, on a fixed batch?
   The angle is that between the gradients right before and right after the update, over the
   connections that survive it; beside it the angle by which one ordinary step turns it.
3. Turning: by how many degrees does a neuron's weight vector turn in 30 steps, and how does that
   depend on its fan-in k? Fitted within layers: angle ∝ k^x. x = 0 would mean that no neuron
   is favoured: what a correction is for. Static masks; exponents p of the correction
   ((1 − s_i)/(1 − s_avg))^p, both initializations, and a learning rate a hundred times smaller.

Trainings that are in the file already are not repeated.
"""

import itertools

import keras
import numpy as np
from driver import arguments, command
from proxy import Record, confidence, full, load, made_up, make_callbacks, prepare

import keras_sparseopt as kso

WINDOW = range(-5, 21)  # steps around a mask update
TURN = (5, 35)  # steps after an update between which neurons are watched
PROBE_EXAMPLES = 512
# Whose turning is compared: exponent of the correction, He by actual fan-in, learning rate.
STILL = [
    *itertools.product((0.0, 0.5, 1.0), (False, True), (0.1,)),
    *itertools.product((0.0, 0.5), (False,), (0.001,)),
]


class Probe:
    """Loss and gradients of a model on a fixed batch, in training mode, without side effects."""

    def __init__(self, model, images, labels):
        import tensorflow as tf

        self.model = model
        positions = [
            next(i for i, v in enumerate(model.trainable_variables) if v is weight)
            for weight in kso.sparse_weights(model)
        ]
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        @tf.function
        def measure(trainable, others):
            with tf.GradientTape() as tape:
                tape.watch(trainable)
                outputs, _ = model.stateless_call(trainable, others, images, training=True)
                value = loss(labels, outputs)
            gradients = tape.gradient(value, trainable)
            return value, [gradients[position] for position in positions]

        self._measure = measure

    def __call__(self):
        """(loss, one dense gradient per sparse layer)."""
        trainable, others = (
            [keras.ops.convert_to_tensor(v) for v in variables]
            for variables in (self.model.trainable_variables, self.model.non_trainable_variables)
        )
        value, gradients = self._measure(trainable, others)
        return float(value), [g.numpy() for g in gradients]


def masks_of(model):
    return [keras.ops.convert_to_numpy(v.topology.mask) for v in kso.sparse_weights(model)]


def factor(mask, exponent):
    """The correction's; 1 for the classifier, which feeds no normalization."""
    if mask.ndim == 2:
        return 1.0
    density = mask.mean(axis=tuple(range(mask.ndim - 1)))
    return (density / density.mean()) ** exponent


def angle(before, after):
    """Degrees between two lists of arrays taken as one vector each."""
    a, b = (np.concatenate([x.ravel() for x in side]) for side in (before, after))
    cosine = (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def angle_of_surviving(g, m, g2, m2, exponent):
    """Between two gradients, each corrected with its own masks, where both masks are active."""
    both = [old & new for old, new in zip(m, m2)]
    sides = [
        [factor(mask, exponent) * gradient * kept for gradient, mask, kept in zip(*side, both)]
        for side in ((g, m), (g2, m2))
    ]
    return angle(*sides)


class EachStep(keras.callbacks.Callback):
    """Calls `after_step` after every step, at the point where methods change masks."""

    def on_train_batch_begin(self, batch, logs=None):
        if batch:
            self.after_step()

    def on_epoch_end(self, epoch, logs=None):
        self.after_step()


class AroundUpdates(EachStep):
    """Loss around mask updates, and what they do to the gradient. First in the callbacks."""

    def __init__(self, probe, update_every, last_update):
        super().__init__()
        self.probe = probe
        self.updates = range(update_every, last_update, update_every)
        self.loss: dict = {}  # (update, offset) → loss; offset 0 is before the update
        self.jumps: list = []
        self.step, self.before = 0, None

    def after_step(self):
        self.step += 1
        for update in self.updates:
            offset = self.step - update
            if offset in WINDOW:
                loss, gradients = self.probe()
                self.loss[update, offset] = loss
                if offset == -1:
                    self.previous = gradients
                if offset == 0:
                    self.before = gradients, masks_of(self.model)

    def after_update(self):
        if self.before is None:
            return
        (gradients, masks), self.before = self.before, None
        loss, new_gradients = self.probe()
        now = masks_of(self.model)
        jump = {"loss": loss - self.loss[self.step, 0]}
        for name, exponent in (("raw", 0.0), ("corrected", 0.5)):
            sides = gradients, masks, new_gradients, now, exponent
            jump[f"angle_{name}"] = angle_of_surviving(*sides)
        jump["angle_of_a_step"] = angle_of_surviving(self.previous, masks, gradients, masks, 0.0)
        self.jumps.append(jump)


class AfterUpdate(EachStep):
    """Last in the callbacks."""

    def __init__(self, around):
        super().__init__()
        self.around = around

    def after_step(self):
        self.around.after_update()


class Turning(EachStep):
    """The angles by which neurons turn between two steps, and their fan-in."""

    def __init__(self, every):
        super().__init__()
        self.every, self.step, self.windows, self.start = every, 0, [], None

    def _directions(self):
        for weight in kso.sparse_weights(self.model):
            if weight.topology.skew_correction:
                kernel = keras.ops.convert_to_numpy(weight).reshape(-1, weight.shape[-1])
                yield kernel / np.maximum(np.linalg.norm(kernel, axis=0), 1e-12)

    def after_step(self):
        self.step += 1
        if self.step % self.every == TURN[0]:
            self.start = list(self._directions())
        if self.step % self.every == TURN[1] and self.start is not None:
            x, y = [], []
            counted = [m.sum(axis=(0, 1, 2)) for m in masks_of(self.model) if m.ndim == 4]
            for fan_in, old, new in zip(counted, self.start, self._directions(), strict=True):
                chord = np.linalg.norm(new - old, axis=0)  # exact for small angles too
                turned = 2 * np.arcsin(np.minimum(chord / 2, 1))
                seen = (fan_in > 0) & (turned > 1e-6)
                logs_of = np.log(fan_in[seen]), np.log(turned[seen])
                for side, values in zip((x, y), logs_of):
                    side.append(values - values.mean())  # within the layer
            x, y = np.concatenate(x), np.concatenate(y)
            self.windows.append(
                {"step": self.step, "exponent": float((x * y).sum() / (x**2).sum())}
            )


class Measured(keras.callbacks.Callback):
    """Median correlation, over layers, of measured and expected amplification."""

    def __init__(self):
        super().__init__()
        self.correlation: list = []

    def on_epoch_end(self, epoch, logs=None):
        rows = kso.measured_skew(self.model)
        self.correlation.append(float(np.nanmedian([row["correlation"] for row in rows])))


def train(data, setting):
    """One training with all that is measured."""
    setting = full(setting)
    images, labels = data[0]
    model, optimizer, batches, pieces = prepare(data, setting)
    steps = pieces * len(batches)
    model.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    probe = Probe(model, images[:PROBE_EXAMPLES], labels[:PROBE_EXAMPLES])
    every = setting["update_every"]
    around = AroundUpdates(probe, every, int(0.75 * steps))
    turning, measured = Turning(every), Measured()
    moving = setting["method"] != "static"
    callbacks = [*make_callbacks(setting), measured, turning]
    if moving:
        callbacks = [around, *callbacks, AfterUpdate(around)]
    model.fit(batches, epochs=pieces, shuffle=False, verbose=0, callbacks=callbacks)
    losses = moving and [
        [around.loss.get((update, offset)) for offset in WINDOW] for update in around.updates
    ]
    return {
        "correlation": measured.correlation,
        "turning": turning.windows,
        "jumps": around.jumps,
        "loss_around_updates": np.mean(losses, axis=0).tolist() if moving else [],
    }


def settings(seeds, quick):
    shortened = {"epochs": 1, "widths": (8,), "update_every": 40} if quick else {}
    moving = [{"method": "rigl", "epochs": 2, "exponent": p} for p in (0.0, 0.5)]
    still = [
        {"method": "static", "epochs": 1, "exponent": p, "sparse_initialization": sparse,
         "learning_rate": rate}
        for p, sparse, rate in STILL
    ]  # fmt: skip
    return [{**s, **shortened, "seed": seed} for s in (*moving, *still) for seed in range(seeds)]


def of(runs, **wanted):
    return [
        result
        for setting, result in runs
        if all(full(setting)[key] == value for key, value in wanted.items())
    ]


def mean_and_half(values):
    return {"mean": float(np.mean(values)), "confidence": confidence(values)}


def summary(runs):
    found: dict = {"jumps": {}, "turning": {}, "correlation": {}}
    for p in (0.0, 0.5):
        results = of(runs, method="rigl", exponent=p)
        name = f"trained with p = {p:g}"
        found["correlation"][name] = np.mean([r["correlation"] for r in results], axis=0).tolist()
        if results[0]["jumps"]:
            found["jumps"][name] = {
                measure: mean_and_half(
                    [np.mean([jump[measure] for jump in r["jumps"]]) for r in results]
                )
                for measure in results[0]["jumps"][0]
            }
    for p, sparse, rate in STILL:
        wanted = {"exponent": p, "sparse_initialization": sparse, "learning_rate": rate}
        results = of(runs, method="static", **wanted)
        name = f"p = {p:g}, He by {'actual' if sparse else 'dense'} fan-in, lr {rate:g}"
        windows = [[window["exponent"] for window in r["turning"]] for r in results]
        if windows[0]:
            found["turning"][name] = {
                "first": mean_and_half([w[0] for w in windows]),
                "last": mean_and_half([w[-1] for w in windows]),
            }
    return found


def text(found):
    for name, values in found["correlation"].items():
        steps = ", ".join(f"{value:.2f}" for value in values)
        yield f"measured and expected amplification, {name}: correlation {steps}"
    for name, measures in found["jumps"].items():
        for measure, cell in measures.items():
            yield f"{name}: {measure:<16}{cell['mean']:+.3f} ± {cell['confidence']:.3f}"
    for name, cells in found["turning"].items():
        cells = "; ".join(
            f"{when} {cell['mean']:+.2f} ± {cell['confidence']:.2f}" for when, cell in cells.items()
        )
        yield f"turning ∝ fan-in^x, {name}: {cells}"


def picture(runs, found, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    for p, name in ((0.0, "masked only"), (0.5, "SparseOpt")):
        results = of(runs, method="rigl", exponent=p)
        correlation = np.array([r["correlation"] for r in results])
        axes[0].errorbar(
            range(1, correlation.shape[1] + 1), correlation.mean(0), correlation.std(0),
            marker="o", capsize=3, label=name,
        )  # fmt: skip
        losses = np.array([r["loss_around_updates"] for r in results])
        axes[1].plot(WINDOW, losses.mean(axis=0), label=name)
    axes[0].set(title="amplification: measured, expected", xlabel="half epochs", ylim=(0, 1))
    axes[0].set_ylabel("correlation, median of layers")
    axes[1].axvline(0, color="black", lw=0.8, ls=":")
    axes[1].set(title="loss around mask updates", xlabel="steps since the update")
    names = ["angle_raw", "angle_corrected", "angle_of_a_step"]
    for i, (trained, cells) in enumerate(found["jumps"].items()):
        axes[2].bar(
            np.arange(3) + 0.4 * i, [cells[n]["mean"] for n in names], 0.38,
            yerr=[np.nan_to_num(cells[n]["confidence"]) for n in names], capsize=3, label=trained,
        )  # fmt: skip
    axes[2].set_xticks(np.arange(3) + 0.2, ["raw", "corrected", "one step,\nno update"])
    axes[2].set(title="gradient turned by a mask update", ylabel="degrees")
    for i, cells in enumerate(found["turning"].values()):
        for when, marker in (("first", "o"), ("last", "s")):
            axes[3].errorbar(
                cells[when]["mean"], -i, xerr=np.nan_to_num(cells[when]["confidence"]),
                fmt=marker, capsize=3, color="C0" if when == "first" else "C1",
                label=f"{when} window" if i == 0 else None,
            )  # fmt: skip
    axes[3].axvline(0, color="black", lw=0.8)
    axes[3].set_yticks([-i for i in range(len(found["turning"]))], list(found["turning"]))
    axes[3].set(title="turning ∝ fan-in^x", xlabel="x")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    quick = "made-up data, few steps, two seeds; into quick/"
    args = arguments(__doc__, seeds=3, quick=quick).parse_args(argv)
    if args.quick:
        args.seeds, args.output = 2, args.output / "quick"
    data = made_up() if args.quick else load(args.data_dir)
    if args.quick:  # a short epoch, over and over
        data = [(np.tile(data[0][0], (10, 1, 1, 1)), np.tile(data[0][1], 10)), data[1]]
    record = Record(args.output / "skew.json", command(__file__, argv))
    runs = []
    for setting in settings(args.seeds, args.quick):
        if setting not in record:
            record.add(setting, train(data, setting))
        runs.append((setting, record[setting]))
        print(f"{len(runs)}: {setting}", flush=True)
    found = summary(runs)
    print(*text(found), sep="\n")
    picture(runs, found, record.path.with_suffix(".png"))
    record.content.update(found)
    record.write()
    print(f"→ {args.output}/skew.json, skew.png")
    return record.content


if __name__ == "__main__":
    main()
