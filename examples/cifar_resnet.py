"""Sparse ResNet-20 on CIFAR-10 or CIFAR-100.

    python examples/cifar_resnet.py --method rigl --optimizer sparseopt --sparsity 0.95
    KERAS_BACKEND=jax python examples/cifar_resnet.py --dataset cifar100 --epochs 200

Writes `<output>/<run>/results.json` and, after every epoch, the state of the training. The
same command, run again, goes on where it stopped. About 0.35 s per step of 128 images on two
CPU cores; the README holds what a two-epoch run measured.
"""

import argparse
import json
import pathlib
import sys
import time

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from models import resnet
from record import facts

import keras_sparseopt as kso

# The recipe. Momentum, weight decay and warm-up follow neighbouring codes (RigL, ITOP); the
# SparseOpt paper does not state its weight decay and momentum.
BATCH_SIZE = 128
LEARNING_RATE = 0.1
FINAL_LEARNING_RATE = 1e-6
WARMUP_EPOCHS = 5  # at most a tenth of the training, for short runs
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4  # coupled, through an L2 regularizer on kernels
UPDATE_EVERY = 100
DROP_FRACTION = 0.3
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", choices=["cifar10", "cifar100"], default="cifar10")
    parser.add_argument("--data_dir", help="where tfds keeps (or puts) the dataset")
    parser.add_argument("--method", choices=["rigl", "set", "static", "dense"], default="rigl")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--distribution", choices=["erk", "er", "uniform"], default="erk")
    parser.add_argument(
        "--optimizer",
        choices=["sparseopt", "sgd", "ham", "sparseopt+ham"],
        default="sparseopt",
        help="sgd and ham mask without the correction; dense training uses sgd or ham",
    )
    parser.add_argument("--width", type=int, default=1, help="factor on all channels")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--steps_per_epoch", type=int, help="shorter epochs, for trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs")
    return parser.parse_args(argv)


def load(dataset, data_dir):
    """Images and labels of the two splits, each as one pair of tensors: they fit in memory."""
    splits = tfds.load(dataset, split=["train", "test"], data_dir=data_dir, as_supervised=True)
    return [data.batch(50_000).get_single_element() for data in splits]


def normalize(image, label):
    return (tf.cast(image, tf.float32) / 255.0 - MEAN) / STD, label


def training_data(images, labels, first_epoch, epochs, seed, prepare=normalize):
    """All epochs from `first_epoch` on, one after the other, each in an order of its own.

    Order and augmentation depend on (seed, epoch, image) only, so that a resumed training sees
    exactly what the uninterrupted one would have seen.
    """

    def one_epoch(epoch):
        def example(index):
            draw = tf.stack([seed * 100_003 + epoch, index])
            image = tf.image.resize_with_crop_or_pad(tf.gather(images, index), 40, 40)
            image = tf.image.stateless_random_crop(image, (32, 32, 3), seed=draw)
            image = tf.image.stateless_random_flip_left_right(image, seed=draw + 1)
            return prepare(image, tf.gather(labels, index))

        indices = tf.range(len(images), dtype=tf.int64)
        order = tf.random.experimental.stateless_shuffle(indices, tf.stack([seed, epoch]))
        data = tf.data.Dataset.from_tensor_slices(order)
        data = data.map(example, num_parallel_calls=tf.data.AUTOTUNE)
        return data.batch(BATCH_SIZE, drop_remainder=True)

    # Keras wants to see one batch, even if no epoch is left.
    last_epoch = max(epochs, first_epoch + 1)
    every = tf.data.Dataset.range(first_epoch, last_epoch).flat_map(one_epoch)
    return every.prefetch(tf.data.AUTOTUNE)


def make_optimizer(name, method, learning_rate):
    inner = keras.optimizers.SGD(learning_rate, momentum=MOMENTUM)
    if "ham" in name:
        inner = kso.HAM(inner)
    if method == "dense":
        if "sparseopt" in name:
            raise SystemExit("--method dense has nothing to correct: use --optimizer sgd or ham")
        return inner
    return kso.SparseOpt(inner, skew_correction="sparseopt" in name)


def make_model(args, steps_per_epoch, classes):
    keras.utils.set_random_seed(args.seed)
    widths = [args.width * w for w in (16, 32, 64)]
    model = resnet((32, 32, 3), classes, widths, blocks=3, weight_decay=WEIGHT_DECAY)
    if args.method != "dense":
        kso.sparsify(model, args.sparsity, args.distribution, seed=args.seed)
    steps = args.epochs * steps_per_epoch
    warmup = min(WARMUP_EPOCHS * steps_per_epoch, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=steps - warmup,
        alpha=FINAL_LEARNING_RATE / LEARNING_RATE,
        warmup_target=LEARNING_RATE,
        warmup_steps=warmup,
    )
    model.compile(
        optimizer=make_optimizer(args.optimizer, args.method, schedule),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def make_callbacks(args, backup):
    callbacks = [StepTimer()]
    if args.method == "rigl":
        callbacks.append(kso.RigL(UPDATE_EVERY, DROP_FRACTION))
    elif args.method == "set":
        callbacks.append(kso.SET(UPDATE_EVERY, DROP_FRACTION, seed=args.seed))
    elif args.method == "static":
        callbacks.append(kso.Static())
    return [*callbacks, backup]


class StepTimer(keras.callbacks.Callback):
    """Logs the median seconds per step of each epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.seconds, self.last = [], time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now

    def on_epoch_end(self, epoch, logs=None):
        logs["seconds_per_step"] = float(np.median(self.seconds))


def command(args):
    """The command that repeats this run; where its files lie is the reader's choice."""
    defaults = vars(arguments([]))
    given = {k: v for k, v in vars(args).items() if v != defaults[k]}
    options = [f"--{k} {v}" for k, v in given.items() if k not in ("data_dir", "output")]
    return " ".join(["python examples/cifar_resnet.py", *options])


def main(argv=None):
    args = arguments(argv)
    name = f"{args.dataset}-w{args.width}-{args.method}"
    if args.method != "dense":
        name += f"-{args.distribution}{args.sparsity}"
    name += f"-{args.optimizer}-e{args.epochs}-s{args.seed}-{keras.backend.backend()}"
    run_dir = pathlib.Path(args.output) / name
    run_dir.mkdir(parents=True, exist_ok=True)

    (train_x, train_y), (test_x, test_y) = load(args.dataset, args.data_dir)
    steps = args.steps_per_epoch or len(train_x) // BATCH_SIZE
    test = tf.data.Dataset.from_tensor_slices((test_x, test_y)).map(normalize).batch(500)

    model = make_model(args, steps, classes=int(np.max(train_y)) + 1)
    if args.method != "dense":
        kso.summary(model)
    backup = kso.BackupAndRestore(run_dir / "backup")
    first_epoch = backup.initial_epoch
    if first_epoch:
        print(f"{name}: goes on after epoch {first_epoch} of {args.epochs}")
    history = model.fit(
        training_data(train_x, train_y, first_epoch, args.epochs, args.seed),
        epochs=args.epochs,
        initial_epoch=first_epoch,
        steps_per_epoch=steps,
        validation_data=test,
        shuffle=False,
        callbacks=make_callbacks(args, backup),
        verbose=2 if not sys.stdout.isatty() else 1,
    ).history
    results = {
        "command": command(args),
        **facts(),
        "settings": {k: v for k, v in vars(args).items() if k not in ("data_dir", "output")},
        "steps_per_epoch": steps,
        "test_accuracy": history["val_accuracy"][-1],
        "history": history,
    }
    (run_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{name}: test accuracy {100 * results['test_accuracy']:.2f} % → {run_dir}/results.json")
    return results


if __name__ == "__main__":
    main()
