"""One and two sparse neurons learn a teacher: what masks, BatchNorm, the correction and HAM do.

    python examples/papers/student_teacher.py            # five minutes on one CPU core
    python examples/papers/student_teacher.py --quick

After the SparseOpt paper's figures 6 to 9. The student is Σ_i a_i · ReLU(N(w_i · x)), N being Batch
Normalization without parameters, or nothing; teacher and student share the mask. All data form one
batch and steps are small, so that training follows the gradient flow

    w' = −c · (1 + α|w|) · ∂L/∂w        a' = −(1 + α|a|) · ∂L/∂a        (c: correction, α: HAM's)

What such a flow conserves, with Ψ(v) = ∫ v / (1 + α|v|) dv (which is v²/2 without HAM):

    without normalization:  Σ_j Ψ(w_ij) / c_i − Ψ(a_i)     since  w_i · ∂L/∂w_i = a_i · ∂L/∂a_i
    with it:                Σ_j Ψ(w_ij)                    since  w_i · ∂L/∂w_i = 0

With Batch Normalization and no HAM that is the norm of every neuron. A direction w/‖w‖ then turns
at the rate c_i · ‖∂L/∂(w/‖w‖)‖ / ‖w_i‖²: drawn by the dense fan-in, ‖w_i‖² ∝ k_i, sparse neurons
turn faster by 1/k_i where the teacher pulls equally; drawn by the actual fan-in they do not.
"""

import keras
import numpy as np
from driver import arguments, command, write

import keras_sparseopt as kso

INPUTS, EXAMPLES = 32, 2048
LEARNING_RATE, STEPS, RECORD_EVERY = 0.02, 1500, 25
ALPHA = 5.0
FAN_INS = (32, 16, 8, 4)  # one neuron: of 32 inputs
TWO_NEURONS = (32, 4)


def teacher(fan_ins, seed):
    """Unit directions of the given fan-ins on shared first inputs: (inputs, neurons)."""
    rng = np.random.default_rng([seed, 1])
    mask = np.arange(INPUTS)[:, None] < np.array(fan_ins)[None, :]
    weights = rng.normal(size=mask.shape) * mask
    return mask, (weights / np.linalg.norm(weights, axis=0)).astype("float32")


def he(fan_in_of_std, mask, seed):
    rng = np.random.default_rng([seed, 2])
    return (rng.normal(size=mask.shape) * np.sqrt(2 / fan_in_of_std) * mask).astype("float32")


def inner_optimizer(learning_rate, ham):
    sgd = keras.optimizers.SGD(learning_rate)
    return kso.HAM(sgd, alpha=ALPHA, beta=0.0) if ham else sgd


def train(setting, learning_rate=LEARNING_RATE, steps=STEPS):
    """One student.

    Args:
        setting: Dict with `fan_ins` (of each neuron), `normalized`, `corrected`, `ham`,
            `sparse_initialization` and `seed`.

    Returns:
        Dict of lists over time: `loss`; `angle`, in degrees between each neuron and its teacher;
        `conserved`, the quantity above of each neuron; and `terms`, its two parts.
    """
    seed, fan_ins = setting["seed"], setting["fan_ins"]
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    mask, target = teacher(fan_ins, seed)
    rng = np.random.default_rng([seed, 0])
    x = rng.normal(size=(EXAMPLES, INPUTS)).astype("float32")
    y = np.maximum(x @ target, 0).sum(axis=1, keepdims=True)

    hidden = kso.SparseDense(len(fan_ins), use_bias=False)
    normalization = keras.layers.BatchNormalization(center=False, scale=False, epsilon=1e-9)
    outer = keras.layers.Dense(1, use_bias=False)
    model = keras.Sequential(
        [keras.Input((INPUTS,)), hidden]
        + ([normalization] if setting["normalized"] else [])
        + [keras.layers.ReLU(), outer]
    )
    kso.set_mask(hidden, mask)
    std_fan_in = np.array(fan_ins) if setting["sparse_initialization"] else INPUTS
    start = he(std_fan_in, mask, seed)
    start *= np.where((start * target).sum(axis=0) < 0, -1, 1)  # ReLU: start on the right side
    hidden.kernel.assign(start)
    outer.kernel.assign(np.full((len(fan_ins), 1), 0.5, "float32"))
    model.compile(
        kso.SparseOpt(
            inner_optimizer(learning_rate, setting["ham"]), skew_correction=setting["corrected"]
        ),
        loss="mse",
    )
    density = np.array(fan_ins) / INPUTS
    correction = np.sqrt(density / density.mean()) if setting["corrected"] else np.ones(2)[:1]
    times: dict = {"loss": [], "angle": [], "conserved": [], "terms": []}

    def look(loss):
        w, a = (keras.ops.convert_to_numpy(layer.kernel) for layer in (hidden, outer))
        cosine = (w * target).sum(axis=0) / np.linalg.norm(w, axis=0)
        alpha = ALPHA if setting["ham"] else 0.0
        terms = [psi(w, alpha).sum(axis=0) / correction, psi(a[:, 0], alpha)]
        conserved = terms[0] if setting["normalized"] else terms[0] - terms[1]
        times["loss"].append(float(loss))
        times["angle"].append(np.degrees(np.arccos(np.minimum(cosine, 1))).tolist())
        times["conserved"].append(conserved.tolist())
        times["terms"].append(np.array(terms).tolist())

    for step in range(steps):
        loss = model.train_on_batch(x, y)
        if step == 0 or (step + 1) % RECORD_EVERY == 0:
            look(loss)
    return times


def psi(v, alpha):
    """∫ v / (1 + α|v|) dv from 0."""
    v = np.abs(v).astype("float64")
    if alpha == 0:
        return v**2 / 2
    return v / alpha - np.log1p(alpha * v) / alpha**2


def drift(times):
    """How much of what is conserved was lost, relative to how much its parts moved."""
    conserved, terms = np.array(times["conserved"]), np.array(times["terms"])
    moved = np.abs(terms - terms[0]).sum(axis=1).max()
    return float(np.abs(conserved - conserved[0]).max() / moved)


def first_turn(times):
    """Degrees that each neuron turned until the first record."""
    angle = np.array(times["angle"])
    return (angle[0] - angle[1]).tolist()


# One neuron: title → what differs.
ONE = {
    "one neuron, BatchNorm": {},
    "BatchNorm, He by actual fan-in": {"sparse_initialization": True},
    "BatchNorm, HAM": {"ham": True},
    "no normalization": {"normalized": False},
}


def one_neuron(seeds, steps):
    plain = {"normalized": True, "corrected": False, "sparse_initialization": False, "ham": False}
    runs = []
    for differs in ONE.values():
        for fan_in in FAN_INS:
            for seed in seeds:
                setting = {**plain, **differs, "fan_ins": [fan_in], "seed": seed}
                runs.append((setting, train(setting, steps=steps)))
    return runs


def two_neurons(seeds, steps):
    runs = []
    for normalized in (True, False):
        for ham in (False, True):
            for corrected in (False, True):
                for seed in seeds:
                    setting = {
                        "fan_ins": list(TWO_NEURONS), "normalized": normalized,
                        "corrected": corrected, "sparse_initialization": False, "ham": ham,
                        "seed": seed,
                    }  # fmt: skip
                    runs.append((setting, train(setting, steps=steps)))
    return runs


def selected(runs, **wanted):
    return [
        times
        for setting, times in runs
        if all(setting[key] == value for key, value in wanted.items())
    ]


def of_one_neuron(runs, differs, fan_in):
    plain = {"normalized": True, "sparse_initialization": False, "ham": False}
    return selected(runs, **{**plain, **differs}, fan_ins=[fan_in])


def turning_exponent(runs, differs):
    """Slope of log(first turn) over log(fan-in), one per seed."""
    turns = np.array([[first_turn(t)[0] for t in of_one_neuron(runs, differs, k)] for k in FAN_INS])
    return np.polyfit(np.log(FAN_INS), np.log(np.maximum(turns, 1e-9)), 1)[0].tolist()


def recorded_steps(steps):
    return [1, *range(RECORD_EVERY, steps + 1, RECORD_EVERY)]


def picture(one, two, steps, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 5, figsize=(16, 6), layout="constrained", sharex=True)
    x = recorded_steps(steps)
    for axis, (title, differs) in zip(axes[0], ONE.items()):
        for k in FAN_INS:
            angles = np.mean([t["angle"] for t in of_one_neuron(one, differs, k)], axis=0)
            axis.plot(x, angles[:, 0], label=f"fan-in {k} of {INPUTS}")
        axis.set(title=title, ylim=(0, None))
    kinds = ((True, False), (True, True), (False, False), (False, True))
    for axis, (normalized, ham) in zip(axes[1], kinds):
        for corrected, style in ((False, "--"), (True, "-")):
            runs = selected(two, normalized=normalized, ham=ham, corrected=corrected)
            angles = np.mean([t["angle"] for t in runs], axis=0)
            for neuron, k in enumerate(TWO_NEURONS):
                label = f"fan-in {k}, {'corrected' if corrected else 'masked only'}"
                axis.plot(x, angles[:, neuron], style, color=f"C{neuron}", label=label)
        kind = "BatchNorm" if normalized else "no normalization"
        axis.set(title=f"two neurons, {kind}{', HAM' if ham else ''}", ylim=(0, None))
    for axis, normalized in zip(axes[:, 4], (True, False)):
        for ham in (False, True):
            (first, *_) = selected(two, corrected=True, ham=ham, normalized=normalized)
            name = "HAM" if ham else "SGD"
            for part, style, label in ((0, "-", "Σ Ψ(w) / c"), (1, "--", "Ψ(a)")):
                terms = np.array(first["terms"])[:, part, 1]
                axis.plot(
                    x, terms - terms[0], style, color=f"C{int(ham)}", label=f"{label}, {name}"
                )
        kind = "BatchNorm: Σ Ψ(w) is" if normalized else "none: Σ Ψ(w) / c − Ψ(a) is"
        axis.set(title=f"{kind} conserved")
        axis.legend(fontsize=8)
    for row in axes:
        row[0].set_ylabel("angle to the teacher, degrees")
        row[0].legend(fontsize=8)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.title.set_fontsize(10)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def steps_until(angles, degrees, steps):
    """First recorded step at which the angle is below, or infinity."""
    below = np.flatnonzero(np.array(angles) < degrees)
    return float(recorded_steps(steps)[below[0]]) if below.size else np.inf


def summary(one, two, steps):
    """What the verdict rests on."""
    result: dict = {"turning_exponent": {}, "drift": {}, "steps_to_10_degrees": {}}
    for title, differs in ONE.items():
        result["turning_exponent"][title] = turning_exponent(one, differs)
    for normalized in (True, False):
        for ham in (False, True):
            for corrected in (False, True):
                name = ", ".join(
                    ["batch" if normalized else "none", "HAM" if ham else "SGD"]
                    + ["corrected"] * corrected
                )
                runs = selected(two, normalized=normalized, ham=ham, corrected=corrected)
                result["drift"][name] = [drift(times) for times in runs]
                result["steps_to_10_degrees"][name] = [
                    [steps_until(np.array(t["angle"])[:, i], 10, steps) for i in range(2)]
                    for t in runs
                ]
    return result


def main(argv=None):
    args = arguments(__doc__, seeds=5, quick="one seed, few steps", data=False).parse_args(argv)
    seeds, steps = range(1 if args.quick else args.seeds), 100 if args.quick else STEPS
    one, two = one_neuron(seeds, steps), two_neurons(seeds, steps)
    result = summary(one, two, steps)
    print("exponent of the turning rate over the fan-in, mean over seeds:")
    for name, values in result["turning_exponent"].items():
        print(f"  {name:<32}{np.mean(values):+.2f} ± {np.std(values):.2f}")
    print("two neurons: conserved quantity lost, relative; steps to 10° (fan-in 32, 4):")
    for name, values in result["drift"].items():
        reached = np.median(result["steps_to_10_degrees"][name], axis=0)
        print(f"  {name:<28}{np.max(values):.4f}   {reached[0]:>6.0f} {reached[1]:>6.0f}")
    args.output.mkdir(parents=True, exist_ok=True)
    picture(one, two, steps, args.output / "student_teacher.png")
    content = {
        "settings": {
            "inputs": INPUTS, "examples": EXAMPLES, "learning_rate": LEARNING_RATE,
            "steps": steps, "alpha": ALPHA, "seeds": len(seeds),
        },
        **result,
    }  # fmt: skip
    write(content, args.output / "student_teacher.json", command(__file__, argv))
    print(f"→ {args.output}/student_teacher.json, student_teacher.png")
    return content


if __name__ == "__main__":
    main()
