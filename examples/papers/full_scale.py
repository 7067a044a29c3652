"""The task at the papers' scale: ResNet-20 as published, CIFAR-10 or -100 in full size.

What `experiments.py --scale full` trains. The images lie on the device, and are cropped and flipped
there inside the train step: an input pipeline would be slower than the network. A training is
backed up after every epoch; where the device computes deterministically, as CPUs do, one that was
stopped and goes on ends with the same bits.

Shortcuts that change shape are 1×1 convolutions with Batch Normalization, as in most codes, not the
padding of He et al.'s ResNet-20. The last, partial batch of an epoch is left out.
"""

import datetime
import hashlib
import json
import os
import pathlib
import shutil
import time
import zlib

import keras
import numpy as np
import proxy
from keras import ops
from proxy import MEAN, STD, Batches

import keras_sparseopt as kso

DEFAULTS = {
    **proxy.DEFAULTS,
    "dataset": "cifar10",  # or "cifar100"
    "blocks": 3,
    "stem_stride": 1,
    "epochs": 100,
    "warmup": 0.05,  # 5 of 100 epochs
}
CLASSES = {"cifar10": 10, "cifar100": 100}
PADDING = 4
TIMED = 30  # steps, for the estimate


# ---------------------------------------------------------------------------------------- data


class Datasets(dict):
    """Name → ((images, labels) of training, the same of testing), uint8, read at first use.

    Args:
        data_dir: Path of a directory. `<name>.npz` in it, with `x_train`, `y_train`, `x_test` and
            `y_test`, is preferred to what TensorFlow Datasets keeps (or puts) there.
    """

    def __init__(self, data_dir=None):
        super().__init__()
        self.data_dir = data_dir

    def __missing__(self, name):
        path = pathlib.Path(self.data_dir or ".") / f"{name}.npz"
        if path.exists():
            with np.load(path) as file:
                parts = [(file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test")]
        else:
            try:
                import tensorflow_datasets as tfds
            except ImportError:
                raise FileNotFoundError(
                    f"{path} must hold x_train, y_train, x_test and y_test, or TensorFlow Datasets "
                    "be installed. Received: neither"
                ) from None
            parts = tfds.load(
                name, split=["train", "test"], data_dir=self.data_dir, as_supervised=True,
                batch_size=-1,
            )  # fmt: skip
            parts = [tuple(map(ops.convert_to_numpy, part)) for part in parts]
        self[name] = [(images, labels.reshape(-1).astype("int32")) for images, labels in parts]
        return self[name]


def made_up():
    """Data of the same form that nobody has to download."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 1600).astype("int32")
    images = rng.integers(0, 128, (1600, 32, 32, 3)) + rng.integers(0, 128, (10, 1, 1, 3))[labels]
    images = images.astype("uint8")
    parts = [(images[:1280], labels[:1280]), (images[1280:], labels[1280:])]
    return dict.fromkeys(CLASSES, parts)


class OnDevice(keras.layers.Layer):
    """Number of an image → the image, normalized; in training also cropped and flipped at random.

    Args:
        images: Array (number, size, size, 3), uint8.
        seed: Int; crops and flips are a state of the layer, which backups hold.
    """

    def __init__(self, images, seed):
        super().__init__(dtype="float32")
        self.size, self.padded = images.shape[1], images.shape[1] + 2 * PADDING
        frame = (PADDING, PADDING)
        pixels = np.pad(images, ((0, 0), frame, frame, (0, 0))).reshape(-1, 3)
        self.pixels = ops.convert_to_tensor(pixels)
        self.random = keras.random.SeedGenerator(seed)

    def call(self, number, training=False):
        at = ops.arange(self.size, dtype="int32")[None]
        rows = columns = at + PADDING
        if training:
            shape = (ops.shape(number)[0], 1)
            top, left = (
                keras.random.randint(shape, 0, 2 * PADDING + 1, seed=self.random) for _ in range(2)
            )
            flipped = keras.random.randint(shape, 0, 2, seed=self.random) == 1
            rows = top + at
            columns = left + ops.where(flipped, self.size - 1 - at, at)
        row = number[:, None] * self.padded + rows
        images = ops.take(self.pixels, row[:, :, None] * self.padded + columns[:, None], axis=0)
        mean, std = (ops.convert_to_tensor(x, "float32") for x in (MEAN, STD))
        return (ops.cast(images, "float32") / 255 - mean) / std

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.size, self.size, 3)


class Numbers(Batches):
    """Numbers of images, shuffled by (seed, epoch) only."""

    def __init__(self, labels, seed, first_epoch=0):
        super().__init__(np.arange(len(labels), dtype="int32"), labels, seed)
        self.pieces, self.piece = 1, first_epoch
        self._draw()

    def __getitem__(self, index):
        chosen = self.order[index * proxy.BATCH_SIZE : (index + 1) * proxy.BATCH_SIZE]
        return self.images[chosen], self.labels[chosen]


# ------------------------------------------------------------------------------------ training


def share_the_device(compiled):
    """Set what the processes that train inherit: each takes only the memory that it needs.

    Args:
        compiled: Path of a directory for JAX's compiled programs, which all seeds of a setting
            share.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    if keras.backend.backend() == "jax":
        import jax

        if jax.__version_info__ >= (0, 8):  # else a program contains all images
            os.environ.setdefault("JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS", "1")
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))


def compiled(data, setting, first_epoch=0):
    """The model of a training, its batches (from an epoch on) and its test data."""
    (images, labels), (test_images, test_labels) = data[setting["dataset"]]
    keras.backend.clear_session()
    keras.utils.set_random_seed(setting["seed"])
    network = proxy.make_model(images.shape[1:], setting, CLASSES[setting["dataset"]])
    number = keras.Input((), dtype="int32")
    on_device = OnDevice(np.concatenate([images, test_images]), setting["seed"])
    model = keras.Model(number, network(on_device(number)))
    batches = Numbers(labels, setting["seed"], first_epoch)
    model.compile(
        proxy.make_optimizer(setting, setting["epochs"] * len(batches), network),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=proxy.STEPS_PER_EXECUTION,
    )
    test = np.arange(len(images), len(images) + len(test_images), dtype="int32")
    return model, batches, (test, test_labels)


class Clock(keras.callbacks.Callback):
    """Logs the seconds of every epoch, evaluation included."""

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        logs["seconds"] = time.perf_counter() - self.began


class SideBySide(keras.callbacks.Callback):
    """Two epochs, which all workers begin at a time. The first one compiles."""

    def on_epoch_begin(self, epoch, logs=None):
        proxy.all_here()

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch == 1


def backup_of(setting, backups):
    """The directory of a training in that of all backups."""
    key = json.dumps(proxy.full(setting, DEFAULTS), sort_keys=True)
    return backups / hashlib.sha256(key.encode()).hexdigest()[:16]


def forget(setting, backups):
    """Delete the backup of a training whose result is safe."""
    shutil.rmtree(backup_of(setting, backups), ignore_errors=True)


def train(data, setting, backups):
    """One training, from its last backup on.

    Args:
        data: As `Datasets`, or `made_up()`.
        setting: Dict of what differs from `DEFAULTS`.
        backups: `pathlib.Path` of the directory of all backups.

    Returns:
        Dict as `proxy.train` returns it, without `drops`, and with the training's `seconds`,
        `device`, `backend`, `date`, and the checksum of its `images`.
    """
    setting = proxy.full(setting, DEFAULTS)
    backup = kso.BackupAndRestore(backup_of(setting, backups), keep=1)
    model, batches, test = compiled(data, setting, backup.initial_epoch)
    history = model.fit(
        batches, epochs=setting["epochs"], shuffle=False, verbose=0, validation_data=test,
        validation_batch_size=500,
        callbacks=[*proxy.make_callbacks(setting, on_host=False), Clock(), backup],
    ).history  # fmt: skip
    return {
        **proxy.curves(history, len(batches)),
        "seconds": round(sum(history["seconds"]), 1),
        "device": device(),
        "backend": keras.backend.backend(),
        "date": datetime.date.today().isoformat(),
        "images": f"{zlib.crc32(data[setting['dataset']][0][0]):08x}",
    }


def seconds_per_step(data, setting):
    """A training cut short, with its share of an evaluation: what a step costs."""
    setting = proxy.full(setting, DEFAULTS)
    model, batches, (test, labels) = compiled(data, setting)
    share = min(1, TIMED / batches.per_epoch)
    batches.per_epoch = round(share * batches.per_epoch)
    part = slice(round(share * len(test)))
    history = model.fit(
        batches, epochs=max(10, setting["epochs"]), shuffle=False, verbose=0,
        validation_data=(test[part], labels[part]), validation_batch_size=500,
        callbacks=[SideBySide(), *proxy.make_callbacks(setting, on_host=False), Clock()],
    ).history  # fmt: skip
    return history["seconds"][1] / len(batches)


def estimate(settings, load_data, jobs, threads, backups):
    """What trainings will take, from timing as many side by side as there will be.

    Compilation, mask updates and backups aside, and taking all settings to cost what the first one
    costs.

    Args:
        settings: List of the settings to train.
        load_data, jobs, threads: As `proxy.train_all` takes them.
        backups: As `train` takes it; what is in there is not counted.

    Returns:
        Tuple (seconds, optimizer steps that are left, seconds per step).
    """
    data, steps = load_data(), 0
    for setting in settings:
        setting = proxy.full(setting, DEFAULTS)
        done = kso.BackupAndRestore(backup_of(setting, backups)).initial_epoch
        labels = data[setting["dataset"]][0][1]
        steps += (setting["epochs"] - done) * proxy.steps_per_epoch(labels)
    jobs = min(jobs, len(settings))
    with proxy.processes(jobs, load_data, seconds_per_step, threads) as pool:
        per_step = np.mean(list(pool.map(proxy._run, settings[:1] * jobs)))
    return per_step * steps / jobs, steps, per_step


def device():
    """What a training ran on."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].device_kind
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(found[0])["device_name"] if found else "cpu"
