"""Several processes train one model: TensorFlow through `fit_distributed`, JAX through `fit`.

Usage: multiworker.py METHOD OUTPUT [--backup DIR] [--die EPOCH]
With TF_CONFIG or KERAS_DISTRIBUTION_… in the environment it is one of several processes, without
it the reference on one device.
"""

import argparse
import os
import signal
import warnings

import keras
import numpy as np
import tiny

import keras_sparseopt as kso

EPOCHS = 4
BATCH = 24


class Die(keras.callbacks.Callback):
    """In the middle of an epoch, as a machine that is switched off."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch == self.epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.now and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def data(devices):
    """Global batches; on JAX this process's share of each."""
    x, y = tiny.data()
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH, drop_remainder=True)
    share = BATCH // devices.num_workers

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return len(x) // BATCH

        def __getitem__(self, index):
            first = index * BATCH + devices.worker * share
            return x[first : first + share], y[first : first + share]

    return Batches()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("method")
    parser.add_argument("output")
    parser.add_argument("--backup")
    parser.add_argument("--private", action="store_true", help="a backup directory per worker")
    parser.add_argument("--die", type=int)
    args = parser.parse_args()

    several = {"TF_CONFIG", "KERAS_DISTRIBUTION_NUM_PROCESSES"} & set(os.environ)
    name = {"tensorflow": "multiworker", "jax": "data_parallel"}[keras.backend.backend()]
    devices = kso.resolve_strategy(name if several else "one")
    assert (devices.num_workers > 1) == bool(several)
    with warnings.catch_warnings(record=True) as caught:
        if devices.name == "multiworker":
            with devices.strategy.scope():
                kso.SparseOpt("sgd")
            assert "Use keras_sparseopt.fit_distributed" in str(caught.pop().message)
        with devices.scope():
            model = tiny.model()
    assert not caught, caught[0].message

    callbacks = [tiny.method(args.method, check_replicas=True)]
    if args.backup:
        private = f"-{devices.worker}" if args.private else ""
        callbacks.append(kso.BackupAndRestore(args.backup + private))
    if args.die is not None:
        callbacks.append(Die(args.die))
    validation = data(devices)
    history = kso.fit_distributed(
        model,
        data(devices),
        epochs=EPOCHS,
        validation_data=validation,
        callbacks=callbacks,
        verbose=0,
    )
    kso.assert_replicas_agree(model)
    logs = {f"log:{name}": np.array(values) for name, values in history.history.items()}
    np.savez(f"{args.output}-{devices.worker}.npz", **tiny.state(model), **logs)


if __name__ == "__main__":
    main()
