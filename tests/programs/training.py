"""A small training that can be killed. Usage: training.py METHOD OUTPUT BACKUP [options]

Prints `ready` when training begins. Run again with the same arguments, it goes on where it was.
"""

import argparse
import os
import signal
import sys

parser = argparse.ArgumentParser()
parser.add_argument("method", choices=["rigl", "set"])
parser.add_argument("output", help="file for the digest of the final state")
parser.add_argument("backup", help="directory")
parser.add_argument("--strategy", default="one", choices=["one", "mirrored"])
parser.add_argument("--kill", choices=["update", "write"], help="in the middle of this")
parser.add_argument("--kill_at", type=int, default=2, help="the how manieth time")
parser.add_argument("--epochs", type=int, default=30)
ARGS = parser.parse_args()

if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()
    if ARGS.strategy == "mirrored":
        (cpu,) = tf.config.list_physical_devices("CPU")
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
elif ARGS.strategy == "mirrored":
    os.environ["JAX_NUM_CPU_DEVICES"] = "2"

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402

import keras_sparseopt as kso  # noqa: E402
from keras_sparseopt.models.topology import Topology  # noqa: E402

BATCH = 24


class Batches(keras.utils.PyDataset):
    """Every epoch in an order of its own, which depends on the epoch only."""

    def __init__(self, first_epoch):
        super().__init__()
        self.data = tiny.data()
        self.epoch = first_epoch
        self.shuffle()

    def shuffle(self):
        self.order = np.random.default_rng([1, self.epoch]).permutation(len(self.data[0]))

    def __len__(self):
        return len(self.order) // BATCH

    def __getitem__(self, index):
        chosen = self.order[index * BATCH : (index + 1) * BATCH]
        return tuple(values[chosen] for values in self.data)

    def on_epoch_end(self):
        self.epoch += 1
        self.shuffle()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_middle_of(what, count):
    """The `count`-th mask update after one of its kernels, or backup after half of its bytes."""
    remaining = [count]
    if what == "update":
        change = Topology.change

        def killing(self, *args):
            change(self, *args)
            if self.variable is self.optimizers[0].sparse_weights[0]:
                remaining[0] -= 1
                if remaining[0] == 0:
                    die()

        Topology.change = killing
    else:
        savez = np.savez

        def killing(file, **arrays):
            remaining[0] -= 1
            if remaining[0] == 0:
                half = dict(list(arrays.items())[: len(arrays) // 2])
                savez(file, **half)
                file.flush()
                die()
            savez(file, **arrays)

        np.savez = killing


class Ready(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if not getattr(self, "said", False):
            self.said = True
            print("ready", flush=True)


def main():
    name = ARGS.strategy
    if name == "mirrored" and keras.backend.backend() == "jax":
        name = "data_parallel"
    devices = kso.resolve_strategy(name)
    with devices.scope():
        model = tiny.model(dropout=0.2)
    if ARGS.kill:
        die_in_the_middle_of(ARGS.kill, ARGS.kill_at)
    backup = kso.BackupAndRestore(ARGS.backup)
    first_epoch = backup.initial_epoch
    print(f"starts at epoch {first_epoch}", flush=True)
    data = Batches(first_epoch)
    if keras.backend.backend() == "tensorflow" and ARGS.strategy == "mirrored":
        data = as_tf_data(first_epoch)
    history = model.fit(
        data, epochs=ARGS.epochs, initial_epoch=first_epoch, shuffle=False, verbose=0,
        steps_per_epoch=4, callbacks=[Ready(), tiny.method(ARGS.method), backup],
    )  # fmt: skip
    assert len(history.epoch) == ARGS.epochs
    with open(ARGS.output, "w") as file:
        file.write(tiny.digest(model, history))


def as_tf_data(first_epoch):
    def batches():
        for epoch in range(first_epoch, ARGS.epochs + 1):  # Keras wants to see one batch
            data = Batches(epoch)
            yield from (data[index] for index in range(len(data)))

    x, y = tiny.data()
    signature = (
        tf.TensorSpec((BATCH, *x.shape[1:]), tf.float32),
        tf.TensorSpec((BATCH,), tf.int64),
    )
    return tf.data.Dataset.from_generator(batches, output_signature=signature)


if __name__ == "__main__":
    sys.exit(main())
