"""A training state on disk that is always whole, and the way back from it."""

import contextlib
import io
import json
import os
import pathlib
import re
import warnings

import keras
import numpy as np
from keras import ops

from keras_sparseopt import keras_internals
from keras_sparseopt.backend import (
    check_fit,
    generator_states,
    of_all_workers,
    set_generator_states,
    share_statistics,
    worker_index,
)
from keras_sparseopt.devices import build_optimizer, optimizers_of
from keras_sparseopt.files import read_whole, write_whole
from keras_sparseopt.methods.steps import StepCallback
from keras_sparseopt.optimizers.sparse_opt import sparse_opt_of
from keras_sparseopt.typing import Path

_NAME = re.compile(r"epoch-\d{6}\.npz")


class BackupAndRestore(keras.callbacks.Callback):
    """Saves the training after every epoch; the same command, run again, goes on from there.

    ```
    every epoch:  write everything to a temporary file, flush it to disk, rename it
    start of fit: read the newest whole backup, check it, then restore all of it
    ```

    A process killed at any moment and started again ends exactly where the uninterrupted one
    would have: weights, masks, optimizer slots, step count, Batch Normalization statistics, random
    generators of layers (on PyTorch its own, too), and `History`. What
    `keras.callbacks.BackupAndRestore` lacks for that: the file is never half written, the epoch is
    in the same file as the weights, history and the generators of Dropout are part of it, damage is
    noticed, and the last backup stays when training ends, so that a command run once more has
    nothing left to do.

    The order of the data is yours: it must depend on (seed, epoch) only. `initial_epoch` is the
    epoch that training will go on with, so that a data set can start there.

    Damaged files (cut off, bits flipped, not a backup of this model) are named in a warning, and
    the previous backup is used. If there are files but none is usable, training does not start.

    With several processes, worker 0 writes and all read: `backup_dir` must be on storage that
    all see. What other callbacks remember in Python (the patience of `EarlyStopping` or
    `ReduceLROnPlateau`) is not saved. Under `tf.distribute` the statistics of each replica
    (`BatchNormalization` without `synchronized=True`) are averaged at every backup, so that the
    file can bring all of them back.

    Put it last in the list of callbacks, so that what the others log and change is in the file.
    Before a method (`RigL`, …) it is refused: an update that is due after the last step of an epoch
    would be in no file.

    Args:
        backup_dir: Path of a directory for this training alone.
        keep: Int ≥ 1, how many of the newest backups stay, defaults to 2.

    Attributes:
        initial_epoch: Int, epochs that the newest usable backup has completed; 0 without one.

    Raises:
        ValueError: For a wrong argument; at the start of `fit` if the model is not built, a method
            comes behind it, or no file in `backup_dir` is usable although there are some.

    Example:

    ```python
    import tempfile
    import keras
    import numpy as np
    import keras_sparseopt as kso

    def train(epochs, backup_dir):
        model = keras.Sequential([keras.Input((8,)), kso.SparseDense(4, sparsity=0.5)])
        model.compile(optimizer=kso.SparseOpt("sgd"), loss="mse")
        backup = kso.BackupAndRestore(backup_dir)
        return model.fit(
            np.ones((8, 8)), np.ones((8, 4)), epochs=epochs, shuffle=False, verbose=0,
            callbacks=[kso.RigL(update_every=1, end_step=10), backup],
        )

    with tempfile.TemporaryDirectory() as backup_dir:
        train(2, backup_dir)
        assert train(3, backup_dir).epoch == [0, 1, 2]  # only the last one was trained
    ```
    """

    def __init__(self, backup_dir: Path, keep: int = 2) -> None:
        super().__init__()
        if not isinstance(backup_dir, (str, os.PathLike)) or not str(backup_dir):
            raise ValueError(
                f"`backup_dir` must be the path of a directory. Received: backup_dir={backup_dir!r}"
            )
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"`keep` must be an int ≥ 1. Received: keep={keep!r}")
        self.backup_dir = pathlib.Path(backup_dir)
        self.keep = keep
        self._history: dict[int, dict] = {}
        self._histories_to_fill: list[keras.callbacks.History] = []
        self._reported: int | None = None

    @property
    def initial_epoch(self):
        backup = self._newest()
        self._reported = 0 if backup is None else backup["epochs"]
        return self._reported

    # ------------------------------------------------------------------ Keras' hooks

    def on_train_begin(self, logs=None):
        model = self.model
        if keras_internals.unbuilt_layers(model):
            raise ValueError(
                "BackupAndRestore needs a model that is built before `fit`: give its first layer "
                "an input shape, or call a subclassed model on a batch once. "
                f"Received: model '{model.name}'"
            )
        build_optimizer(model)
        if not all(optimizer.built for optimizer in optimizers_of(model)):
            raise ValueError(
                "BackupAndRestore needs all optimizers of the model built before `fit`: call "
                "optimizer.build(variables) of each. "
                f"Received: {[type(o).__name__ for o in optimizers_of(model) if not o.built]}"
            )
        # A `CallbackList` of one's own may have no parameters, and no history.
        check_fit(model, own_loop=(self.params or {}).get("own_loop", False))
        before, behind = keras_internals.callbacks_around(self)
        self._check_nothing_acts(behind)
        self._check_writable()
        self._history, self._generators = {}, []
        histories = [x for x in (*before, *behind) if isinstance(x, keras.callbacks.History)]
        self._histories_to_fill = histories
        # Keras never takes back what a callback has set.
        keras_internals.set_initial_epoch(model, None)
        backup = self._newest(check=True)
        epochs = 0 if backup is None else backup["epochs"]
        reported, self._reported = self._reported, None
        if reported is not None and reported != epochs:
            raise ValueError(
                f"`initial_epoch` was {reported}, this model's backup has {epochs}, so the data "
                "may begin at the wrong epoch. The newest file is of another model, or has been "
                f"written since; look into {self.backup_dir}."
            )
        self._check_workers_agree(epochs)
        if backup is not None:
            self._restore(backup)

    def on_epoch_begin(self, epoch, logs=None):
        self._restore_history()

    def on_train_batch_begin(self, batch, logs=None):
        # Iterators of data draw, too, and not at the same time in a training that goes on: what
        # they drew since the end of the last epoch does not count in either.
        if self._generators:
            set_generator_states(self._generators)
            self._generators = []

    def on_epoch_end(self, epoch, logs=None):
        self._history[epoch] = _numbers(logs or {})
        share_statistics(self.model)  # on JAX `self.model` brings the state into the variables
        self._generators = generator_states()
        state = [ops.convert_to_numpy(variable) for variable in self._variables()]
        state += [ops.convert_to_numpy(tap.read()) for tap in self._carried()]
        if self._is_first_worker():
            self._write(epoch + 1, state)

    def on_train_end(self, logs=None):
        self._restore_history()  # where no epoch was left to train
        keras_internals.set_initial_epoch(self.model, None)

    def _restore_history(self):
        # Not in `on_train_begin`: Keras' own History empties itself there, after us.
        histories, self._histories_to_fill = self._histories_to_fill, []
        for history in histories:
            for epoch, logs in sorted(self._history.items()):
                history.epoch.append(epoch)
                for name, value in logs.items():
                    history.history.setdefault(name, []).append(value)

    # ------------------------------------------------------------------ the state

    def _variables(self):
        """All that a training consists of, in an order that is the same in every process."""
        model = self.model
        optimizers = optimizers_of(model)
        transient = {
            id(v)
            for optimizer in self._sparse_opts()
            for v in (*optimizer.transient_variables, *optimizer.seen_variables)
        }
        everything = [*model.variables, *(v for o in optimizers for v in o.variables)]
        return [v for v in {id(v): v for v in everything}.values() if id(v) not in transient]

    def _is_first_worker(self):
        return worker_index(optimizers_of(self.model)[0]) == 0

    def _sparse_opts(self):
        found = [sparse_opt_of(optimizer) for optimizer in optimizers_of(self.model)]
        return [optimizer for optimizer in found if optimizer is not None]

    def _carried(self):
        """Averages of gradients over several steps, while somebody keeps them."""
        return [tap for optimizer in self._sparse_opts() for tap in optimizer.carried_gradients]

    def _restore(self, backup):
        carried = backup["state"][len(self._variables()) :]
        with contextlib.ExitStack() as stack:
            for weight in [w for o in self._sparse_opts() for w in o.weights]:
                stack.enter_context(weight.topology.moving())  # its mask comes, too
            for variable, value in zip(self._variables(), backup["state"]):
                variable.assign(value)
        if len(carried) == len(self._carried()):
            for tap, value in zip(self._carried(), carried):
                tap.assign(value)
        elif carried:
            warnings.warn(
                "The backup holds averages of dense gradients that no method of this training "
                "keeps, or keeps otherwise. They are left out, and begin anew.",
                stacklevel=2,
            )
        for optimizer in self._sparse_opts():
            optimizer.settle()
        self._generators = [bytes.fromhex(state) for state in backup["generators"]]
        self._history = {int(epoch): logs for epoch, logs in backup["history"].items()}
        keras_internals.set_initial_epoch(self.model, backup["epochs"])

    # ------------------------------------------------------------------ files

    def _write(self, epochs, state):
        self.backup_dir.mkdir(parents=True, exist_ok=True)
        path = self.backup_dir / f"epoch-{epochs:06d}.npz"
        about = {
            "epochs": epochs,
            "history": self._history,
            "variables": self._signature(self._variables()),
            "carried": self._signature(self._carried()),
            "generators": [state.hex() for state in self._generators],
        }
        arrays = {f"{i:05d}": _to_bytes(value) for i, value in enumerate(state)}
        about = np.array(json.dumps(about))
        write_whole(path, lambda file: np.savez(file, about=about, **arrays))
        done = [file for file in self._files() if file.name <= path.name]
        for old in done[self.keep :]:
            old.unlink()

    def _check_nothing_acts(self, behind):
        names = [type(x).__name__ for x in behind if isinstance(x, StepCallback) and x.acts]
        if names:
            raise ValueError(
                "BackupAndRestore must come last in the list of callbacks: what a method does "
                "after an epoch's last step would be in no backup. Received: "
                f"{', '.join(names)} behind it"
            )

    def _check_writable(self):
        if not self._is_first_worker():
            return
        probe = self.backup_dir / "probe.unfinished"
        try:
            self.backup_dir.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"`backup_dir` must be a directory that can be written to. Received: {error}"
            ) from error

    def _check_workers_agree(self, epochs):
        mine = np.array([epochs], dtype="int32")
        others = [int(row[0]) for row in of_all_workers(mine, self.model.optimizer)]
        if any(other != epochs for other in others):
            raise ValueError(
                "All workers must see the same `backup_dir`. Received: backups of "
                f"{sorted({epochs, *others})} epochs in {self.backup_dir}"
            )

    def _signature(self, variables):
        """What must be equal for a backup to be of this model.

        Names without their numbers: Keras numbers layers on through a process.
        """
        return [[re.sub(r"_\d+(?=_|$)", "", v.name), list(v.shape), v.dtype] for v in variables]

    def _files(self):
        """The backups, newest first."""
        if not self.backup_dir.is_dir():
            return []
        return sorted(
            (p for p in self.backup_dir.iterdir() if _NAME.fullmatch(p.name)), reverse=True
        )

    def _newest(self, check=False):
        """The newest usable backup, read whole; `None` if there is no file at all.

        Args:
            check: Bool, whether it must fit the model, or only be whole.
        """
        files = self._files()
        faults = []
        for path in files:
            try:
                backup = _read(path)
                if check:
                    self._check(backup)
            except (OSError, ValueError) as error:
                faults.append(f"{path.name}: {error}")
            else:
                for fault in faults:
                    warnings.warn(
                        f"BackupAndRestore cannot use {fault}. It goes on from {path.name}, the "
                        "previous backup.",
                        stacklevel=2,
                    )
                return backup
        if files:
            raise ValueError(
                f"No backup in {self.backup_dir} is usable, and training from the start would hide "
                f"that. Move the directory away to start again. Received: {'; '.join(faults)}"
            )
        return None

    def _check(self, backup):
        mine, found = self._signature(self._variables()), backup["variables"]
        told = "it is of another model, or of this one in another form (`condense`, `uncondense`)"
        if len(mine) != len(found):
            raise ValueError(f"{told}: {len(found)} variables, this one has {len(mine)}")
        for own, other in zip(mine, found):
            if own != other:
                raise ValueError(f"{told}: it has {other}, this one {own}")


def _numbers(logs):
    """What a history can hold; other callbacks may log anything."""
    numbers = {}
    for name, value in logs.items():
        with contextlib.suppress(TypeError, ValueError):
            numbers[name] = float(value)
    return numbers


def _to_bytes(value):
    # NumPy's format does not know bfloat16; shape and dtype are in the signature.
    return np.frombuffer(np.ascontiguousarray(value).tobytes(), dtype="uint8")


def _read(path):
    """A whole backup, if the checksum at its end is right."""
    with np.load(io.BytesIO(read_whole(path))) as file:
        if "about" not in file.files:
            raise ValueError("it is an archive of something else (it holds no `about`)")
        backup = json.loads(str(file["about"]))
        backup["state"] = []
        for i, (_, shape, dtype) in enumerate(backup["variables"] + backup["carried"]):
            raw = file[f"{i:05d}"]
            backup["state"].append(np.frombuffer(raw, dtype=_numpy_dtype(dtype)).reshape(shape))
    return backup


def _numpy_dtype(name):
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)
