"""The small task of the experiments: data, network, one training, and the file of all trainings.

Cheap enough for many seeds on a CPU core: CIFAR-10 averaged down to 16 × 16 pixels, and a ResNet
with one block per stage. A training is described by a dict of what differs from `DEFAULTS`. Two
settings with the same seed start from the same weights and masks and see the same batches, so
that their difference is a paired one.
"""

import concurrent.futures
import functools
import json
import math
import multiprocessing
import os
import threading
import traceback

import keras
import numpy as np
from driver import facts
from models import resnet

import keras_sparseopt as kso

BATCH_SIZE = 128
MOMENTUM = 0.9
BN_MOMENTUM = 0.9
DROP_FRACTION = 0.3
EVALUATE_EVERY = 195  # optimizer steps: half an epoch
STEPS_PER_EXECUTION = 5
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

DEFAULTS = {
    # network
    "widths": (16, 32, 64),
    "blocks": 1,  # per stage
    "stem_stride": 2,
    "normalization": "batch",
    "activation": "relu",
    "sparse_initialization": False,  # He by actual fan-in instead of by the dense one
    # sparsity
    "sparsity": 0.95,  # ERK
    "method": "rigl",  # or "set", "static"
    "update_every": 100,  # optimizer steps
    "growth_gradient": "original",
    "drop_by": "magnitude",  # what is dropped first, see `DROP_BY`
    "grow_by": "score",  # or "starved": the method's score over √(fan-in + 1) of its neuron
    "rescale": False,  # neurons brought to one norm at every mask update, the function preserved
    # optimizer
    "exponent": 0.0,  # p of ((1 − s_i) / (1 − s_avg))^p: 0 masks only, ½ is SparseOpt
    "renormalize": False,
    "optimizer": "momentum",  # or "sgd", "adam", "rmsprop", "adagrad"
    "ham": None,  # or HAM's alpha
    "learning_rate": 0.1,  # peak; cosine to 0
    "warmup": 0.0,  # share of the training with a linear warm-up
    "weight_decay": 5e-4,  # coupled
    "decay": "outside",  # added after the correction (as PyTorch's SGD does), or "inside"
    # schedule
    "epochs": 3,
    "seed": 0,
}


# ---------------------------------------------------------------------------------------- data


def load(data_dir, size=16):
    """((images, labels) of training, the same of testing), averaged down, normalized."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    parts = tfds.load("cifar10", split=["train", "test"], data_dir=data_dir, as_supervised=True)
    arrays = []
    for part in parts:
        images, labels = part.batch(60_000).get_single_element()
        images = tf.image.resize(images, (size, size), "area").numpy()
        arrays.append((((images / 255 - MEAN) / STD).astype("float32"), labels.numpy()))
    return arrays


def made_up():
    """Data of the same form that nobody has to download: coloured noise with a class each."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 1664)
    images = rng.normal(size=(1664, 16, 16, 3)) + rng.normal(size=(10, 1, 1, 3))[labels]
    images = images.astype("float32")
    return [(images[:1408], labels[:1408]), (images[1408:], labels[1408:])]


def steps_per_epoch(labels):
    """Whole batches, and whole executions of the train step."""
    return len(labels) // BATCH_SIZE // STEPS_PER_EXECUTION * STEPS_PER_EXECUTION


class Batches(keras.utils.PyDataset):
    """Shuffled and flipped by (seed, epoch) only; Keras' epochs are pieces of the real ones.

    Keras calls `on_epoch_end` once before it trains: the first epoch begins at its second piece.
    """

    def __init__(self, images, labels, seed):
        super().__init__()
        self.images, self.labels, self.seed = images, labels, seed
        self.per_epoch = steps_per_epoch(labels)
        self.pieces = max(1, self.per_epoch // EVALUATE_EVERY)
        self.piece = 0
        self._draw()

    def _draw(self):
        rng = np.random.default_rng([self.seed, self.piece // self.pieces])
        self.order = rng.permutation(len(self.labels))
        self.flip = rng.random(len(self.labels)) < 0.5

    def __len__(self):
        return self.per_epoch // self.pieces

    def __getitem__(self, index):
        first = (self.piece % self.pieces * len(self) + index) * BATCH_SIZE
        chosen = slice(first, first + BATCH_SIZE)
        images = self.images[self.order[chosen]]
        flipped = self.flip[chosen, None, None, None]
        return np.where(flipped, images[:, :, ::-1], images), self.labels[self.order[chosen]]

    def on_epoch_end(self):
        self.piece += 1
        if self.piece % self.pieces == 0:
            self._draw()


# ------------------------------------------------------------------------------------ training


class Variant(kso.SparseOpt):
    """SparseOpt with another exponent than ½, and on request with neurons of one norm.

    scale = ((1 − s_i) / (1 − s_avg))^p; after a mask update w_i ← w_i · √(mean ‖w‖²) / ‖w_i‖, and
    the statistics of the normalization follow, so that the network computes what it did.
    """

    exponent = 0.5
    normalization_of = None  # kernel's id → Batch Normalization, to rescale
    drops = None  # array (2, 10): dropped and all connections by decile of their neuron's fan-in

    def correction(self, mask, neuron_axes):
        return super().correction(mask, neuron_axes) ** (2 * self.exponent)

    def rewire(self, kernel, new_mask, *args):
        if self.drops is not None:
            old = keras.ops.convert_to_numpy(self.weight_of(kernel).topology.mask)
            axes = tuple(range(old.ndim - 1))
            fan_in, dropped = old.sum(axes), (old & ~new_mask).sum(axes)
            decile = np.argsort(np.argsort(fan_in, kind="stable")) * 10 // fan_in.size
            for row, counts in enumerate((dropped, fan_in)):
                np.add.at(self.drops[row], decile, counts)
        super().rewire(kernel, new_mask, *args)
        normalization = (self.normalization_of or {}).get(id(kernel))
        if normalization is None:
            return
        weights = keras.ops.convert_to_numpy(kernel)
        squares = np.square(weights).sum(axis=(0, 1, 2))
        scale = np.sqrt(squares.mean() / np.where(squares > 0, squares, squares.mean()))
        kernel.assign(weights * scale)
        normalization.moving_mean.assign(normalization.moving_mean * scale)
        normalization.moving_variance.assign(normalization.moving_variance * scale**2)


OPTIMIZERS = {
    "sgd": (keras.optimizers.SGD, {}),
    "momentum": (keras.optimizers.SGD, {"momentum": MOMENTUM}),
    "adam": (keras.optimizers.Adam, {}),
    "rmsprop": (keras.optimizers.RMSprop, {}),
    "adagrad": (keras.optimizers.Adagrad, {}),
}


def make_inner_optimizer(name, schedule, kernel_decay):
    """A Keras optimizer with coupled weight decay of kernels, which SparseOpt does not correct."""
    optimizer_class, options = OPTIMIZERS[name]

    class Decayed(optimizer_class):
        def update_step(self, gradient, variable, learning_rate):
            if len(variable.shape) >= 2:
                gradient = gradient + kernel_decay * keras.ops.convert_to_tensor(variable)
            super().update_step(gradient, variable, learning_rate)

    return (Decayed if kernel_decay else optimizer_class)(schedule, **options)


def make_model(input_shape, setting, classes=10):
    """The sparse network."""
    inside = setting["weight_decay"] if setting["decay"] == "inside" else 0.0
    model = resnet(
        input_shape, classes, setting["widths"], setting["blocks"], inside, BN_MOMENTUM,
        setting["stem_stride"], setting["normalization"], setting["activation"],
    )  # fmt: skip
    kso.sparsify(model, setting["sparsity"], "erk", seed=setting["seed"])
    if setting["sparse_initialization"]:
        for weight in kso.sparse_weights(model):
            density = 1 - weight.topology.neuron_sparsity
            weight.assign(weight / np.sqrt(np.where(density > 0, density, 1)))
    return model


def make_optimizer(setting, steps, model):
    peak, warmup = setting["learning_rate"], round(setting["warmup"] * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else peak, steps - warmup,
        warmup_target=peak if warmup else None, warmup_steps=warmup,
    )  # fmt: skip
    outside = setting["weight_decay"] if setting["decay"] == "outside" else 0.0
    inner = make_inner_optimizer(setting["optimizer"], schedule, outside)
    if setting["ham"] is not None:
        inner = kso.HAM(inner, alpha=setting["ham"])
    exponent = setting["exponent"]
    optimizer = Variant(inner, skew_correction=exponent != 0, renormalize=setting["renormalize"])
    optimizer.exponent = exponent
    if setting["rescale"]:
        optimizer.normalization_of = {
            id(weight): model.get_layer(f"{weight.topology.name}_bn")
            for weight in kso.sparse_weights(model)
            if weight.topology.name != "classifier"
        }
    return optimizer


def _protected(weight, mask, fan_in):
    """|w|, without end for the largest ⌈mean fan-in / 4⌉ of every neuron."""
    magnitudes = np.where(mask, abs(weight), -1.0).reshape(-1, mask.shape[-1])
    least = math.ceil(fan_in.mean() / 4)
    rank = np.argsort(np.argsort(-magnitudes, axis=0, kind="stable"), axis=0)
    return np.where((rank < least).reshape(mask.shape), np.inf, abs(weight))


# What is dropped first, smallest first, of (weight, mask, fan-in of every neuron).
DROP_BY = {
    "magnitude": lambda w, m, k: abs(w),
    "fan_in": lambda w, m, k: abs(w) / np.sqrt(np.maximum(k, 1)),
    "norm": lambda w, m, k: abs(w) / np.sqrt(np.maximum((w**2).sum((*range(w.ndim - 1),)), 1e-20)),
    "least_fan_in": _protected,
}


def ranked(method_class, setting):
    """The method with the setting's ranking: a subclass that runs on the host."""

    class Ranked(method_class):
        def values(self, weight, mask, gradient, update):
            fan_in = mask.sum(axis=tuple(range(mask.ndim - 1)))
            return DROP_BY[setting["drop_by"]](weight, mask, fan_in)

        def scores(self, weight, mask, gradient, update):
            scores = super().scores(weight, mask, gradient, update)
            if setting["grow_by"] == "score":
                return scores
            return scores / np.sqrt(mask.sum(axis=tuple(range(mask.ndim - 1))) + 1)

    return Ranked


def make_callbacks(setting, on_host=True):
    """The method and what it logs; `on_host=False` leaves mask updates on the device if it can."""
    host = {"drop_by": "magnitude", "grow_by": "score", "rescale": False}
    on_host = on_host or any(setting[name] != value for name, value in host.items())
    every, drop = setting["update_every"], DROP_FRACTION
    method_class, options = {
        "static": (kso.Static, {}),
        "set": (kso.SET, {"seed": setting["seed"]}),
        "rigl": (kso.RigL, {"growth_gradient": setting["growth_gradient"]}),
    }[setting["method"]]
    if method_class is kso.Static:
        return [kso.Static(), Starving()]
    if on_host:
        method_class, options = ranked(method_class, setting), {**options, "compiled": False}
    return [method_class(every, drop, **options), Starving()]


class Starving(keras.callbacks.Callback):
    """Logs by how much fan-ins vary: their standard deviation over the mean, mean of the layers."""

    def on_epoch_end(self, epoch, logs=None):
        rows = kso.connectivity(self.model)
        logs["fan_in_variation"] = float(np.mean([row["fan_in_variation"] for row in rows]))


class Drops(keras.callbacks.Callback):
    """Keeps `optimizer.drops` as it was after every evaluation."""

    def __init__(self):
        super().__init__()
        self.counts = [np.zeros((2, 10))]

    def on_epoch_end(self, epoch, logs=None):
        self.counts.append(self.model.optimizer.drops.copy())

    def shares(self):
        """Of their connections lost at an average mask update: array (evaluations, tenths)."""
        dropped, active = np.moveaxis(np.diff(self.counts, axis=0), 1, 0)
        return np.round(dropped / np.maximum(active, 1), 4)


def prepare(data, setting):
    """What a training begins with: (model, optimizer, batches, number of evaluations)."""
    images, labels = data[0]
    keras.backend.clear_session()
    keras.utils.set_random_seed(setting["seed"])
    model = make_model(images.shape[1:], setting)
    batches = Batches(images, labels, setting["seed"])
    evaluations = setting["epochs"] * batches.pieces
    optimizer = make_optimizer(setting, evaluations * len(batches), model)
    return model, optimizer, batches, evaluations


def train(data, setting):
    """One training.

    Args:
        data: As `load` returns it.
        setting: Dict of what differs from `DEFAULTS`.

    Returns:
        Dict with `test_accuracy`, `loss`, `itop_rate`, `dead_neurons` and `fan_in_variation`, lists
        over evaluations, `steps`, the optimizer steps at which they were, and `drops`, the share
        of their connections that neurons lost at an average mask update, by decile of fan-in
        within the layer (the sparsest tenth first); `drops_over_time` has it of the `sparsest` and
        the `densest` tenth between evaluations, 0 where there was no update.
    """
    setting = full(setting)
    model, optimizer, batches, evaluations = prepare(data, setting)
    optimizer.drops, drops = np.zeros((2, 10)), Drops()
    model.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=STEPS_PER_EXECUTION,
    )
    history = model.fit(
        batches, epochs=evaluations, shuffle=False, verbose=0,
        validation_data=data[1], validation_batch_size=500,
        callbacks=[*make_callbacks(setting), drops],
    ).history  # fmt: skip
    over_time = drops.shares()
    return {
        **curves(history, len(batches)),
        "drops": np.round(optimizer.drops[0] / np.maximum(optimizer.drops[1], 1), 4).tolist(),
        "drops_over_time": {
            "sparsest": over_time[:, 0].tolist(),
            "densest": over_time[:, -1].tolist(),
        },
    }


def curves(history, steps):
    """What every training reports, lists over evaluations, which were `steps` apart."""
    return {
        "steps": [(i + 1) * steps for i in range(len(history["loss"]))],
        "test_accuracy": [round(value, 5) for value in history["val_accuracy"]],
        "loss": [round(value, 5) for value in history["loss"]],
        "itop_rate": [round(value, 5) for value in history["itop_rate"]],
        "dead_neurons": history["dead_neurons"],
        "fan_in_variation": [round(value, 4) for value in history["fan_in_variation"]],
    }


def full(setting, defaults=DEFAULTS):
    """A setting with its defaults."""
    unknown = set(setting) - set(defaults)
    if unknown:
        raise ValueError(f"The setting holds unknown keys: {sorted(unknown)}")
    return {**defaults, **setting}


# ------------------------------------------------------------------------------ all trainings


class Record:
    """The JSON file of all trainings; what is in it already is not trained again.

    Written after every training, so the command can be stopped and run again.

    Args:
        path: `pathlib.Path` of the file.
        command: String, by which it was made.
        defaults: Dict; settings hold what differs from it.
    """

    def __init__(self, path, command, defaults=DEFAULTS):
        self.path, self.defaults = path, defaults
        written = json.loads(json.dumps(defaults))
        self.content = {"command": command, **facts(), "defaults": written, "runs": []}
        if path.exists():
            known = json.loads(path.read_text())
            if {**written, **known["defaults"]} != written:  # new options may have come
                raise SystemExit(f"{path} was made with other defaults; move it away.")
            self.content = {**known, **self.content, "runs": known["runs"]}
        self.results = {self.key(run["setting"]): run["result"] for run in self.content["runs"]}

    def merge(self, path):
        """Take over the trainings of another such file that are not in this one."""
        other = json.loads(path.read_text())
        known = self.content["defaults"]
        if {**known, **other["defaults"]} != known:
            raise SystemExit(f"{path} was made with other defaults than {self.path}.")
        for run in other["runs"]:
            if run["setting"] not in self:
                self._keep(run["setting"], run["result"])
        self.write()

    def key(self, setting):
        return json.dumps(full(setting, self.defaults), sort_keys=True)

    def seeds(self, *settings):
        """The seeds with which all of these settings were trained, in order."""
        known = {run["setting"].get("seed", 0) for run in self.content["runs"]}
        return [
            seed
            for seed in sorted(known)
            if all({**setting, "seed": seed} in self for setting in settings)
        ]

    def __contains__(self, setting):
        return self.key(setting) in self.results

    def __getitem__(self, setting):
        return self.results[self.key(setting)]

    def missing(self, settings):
        """Those that are to be trained, each once."""
        return list(
            {self.key(setting): setting for setting in settings if setting not in self}.values()
        )

    def add(self, setting, result):
        self._keep(setting, result)
        self.write()

    def _keep(self, setting, result):
        setting = json.loads(self.key(setting))
        differs = {k: v for k, v in setting.items() if v != self.content["defaults"][k]}
        self.content["runs"].append({"setting": differs, "result": result})
        self.results[self.key(setting)] = result

    def write(self):
        """One line per training."""
        runs = ",\n".join("  " + json.dumps(run) for run in self.content["runs"])
        rest = {key: value for key, value in self.content.items() if key != "runs"}
        head = json.dumps(rest, indent=1).removesuffix("\n}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(f'{head},\n "runs": [\n{runs}\n ]\n}}\n')
        aside.replace(self.path)


_PER_PROCESS = 20  # trainings
_worker: dict = {}


def share_of(cores, index, threads, processes):
    """The cores of one of several processes; all of them where there are too few."""
    if len(cores) < threads * processes:
        return cores
    return sorted(cores)[index * threads : (index + 1) * threads]


def _keep_to_own_cores(index, threads, processes):
    # XLA takes a thread for each core that it sees, and trainings beside each other then take
    # twice as long, half of it in the kernel. Only Linux knows how.
    if not hasattr(os, "sched_setaffinity"):
        return
    own = share_of(os.sched_getaffinity(0), index, threads, processes)
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), own)


def _start_worker(load_data, train, threads, together):
    # A worker would otherwise train on after its command was killed.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _keep_to_own_cores(together.wait(timeout=900), threads, together.parties)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    _worker.update(data=load_data(), train=train, together=together)


def _run(setting):
    return _worker["train"](_worker["data"], setting)


def all_here():
    """In a worker: wait until all of them have come to this point."""
    _worker["together"].wait(timeout=900)


def processes(jobs, load_data, train, threads=1):
    """`jobs` processes of `threads` threads each, whose `_run` trains a setting."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(
        jobs, context, _start_worker, (load_data, train, threads, context.Barrier(jobs)),
    )  # fmt: skip


def train_all(
    settings, record, data_dir=None, quick=False, jobs=1, train=train, load_data=None, threads=1,
    then=None,
):  # fmt: skip
    """Train what is not in the record yet, `jobs` at a time, in processes with a thread each.

    `then` is called with every setting whose result is in the file. A training that fails is
    reported, and ends the command when all others are done.
    """
    if load_data is None:
        load_data = made_up if quick else functools.partial(load, data_dir)
    missing = record.missing(settings)
    number = failed = 0
    # Processes grow, so some trainings get new ones. Not by `max_tasks_per_child`: if all processes
    # reach it together, Python 3.11 starts no new ones and waits for ever.
    for first in range(0, len(missing), _PER_PROCESS * jobs):
        some = missing[first : first + _PER_PROCESS * jobs]
        with processes(min(jobs, len(some)), load_data, train, threads) as pool:
            waiting = {pool.submit(_run, setting): setting for setting in some}
            for training in concurrent.futures.as_completed(waiting):
                setting, number = waiting[training], number + 1
                try:
                    result = training.result()
                except concurrent.futures.BrokenExecutor:
                    raise
                except Exception:
                    failed += 1
                    print(f"{number}/{len(missing)}", setting, "failed:", flush=True)
                    traceback.print_exc()
                    continue
                record.add(setting, result)
                if then is not None:
                    then(setting)
                accuracy = result["test_accuracy"][-1]
                print(f"{number}/{len(missing)}", setting, accuracy, flush=True)
    if failed:
        raise SystemExit(f"{failed} of {len(missing)} trainings failed; all others are recorded.")


# ---------------------------------------------------------------------------------- statistics


def confidence(values, alike=None):
    """Half the width of the 95 % confidence interval of the mean (Student's t).

    Args:
        values: List of floats.
        alike: List of such lists, `values` among them, whose variance is taken to be the same: then
            few values in each suffice. `None` (default) for that of `values` alone.
    """
    from scipy import stats

    groups = [values] if alike is None else alike
    freedom = sum(len(group) - 1 for group in groups if len(group))
    if not len(values) or freedom < 1:
        return math.nan
    variance = sum(np.var(group) * len(group) for group in groups if len(group)) / freedom
    return float(stats.t.ppf(0.975, freedom) * math.sqrt(variance / len(values)))
