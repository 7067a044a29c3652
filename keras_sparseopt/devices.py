"""Several devices: choosing a strategy, training where Keras' `fit` cannot, and proof of agreement.

TensorFlow's strategies (`tf.distribute`) and JAX's distributions (`keras.distribution`) own the
devices; nothing here keeps state.
"""

import zlib
from typing import Any

import keras
import numpy as np

from keras_sparseopt import backend, keras_internals
from keras_sparseopt.backend.common import Devices
from keras_sparseopt.models.topology import topology_of

STRATEGIES = ("one", "mirrored", "multiworker", "tpu", "data_parallel")


def resolve_strategy(name: str) -> Devices:
    """Set up the devices for a name as `--strategy` options have it.

    | name | backend | what it is | who trains |
    |---|---|---|---|
    | `one` | all | the default device | `model.fit` |
    | `mirrored` | TensorFlow | all GPUs (else CPU devices) of this machine | `model.fit` |
    | `multiworker` | TensorFlow | several processes, described by `TF_CONFIG` | `fit_distributed` |
    | `tpu` | TensorFlow | `TPUStrategy` | `fit_distributed` |
    | `data_parallel` | JAX | all devices, of all processes if the `KERAS_DISTRIBUTION_*` variables of `keras.distribution.initialize` are set | `model.fit` |

    `fit_distributed` hands over to `model.fit` where that works, so that one call serves all.
    Call it before any other use of the devices.

    Args:
        name: One of the names above.

    Returns:
        `Devices`.

    Raises:
        ValueError: For another name, a name that the backend does not have, or `multiworker`
            without `TF_CONFIG`.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    devices = kso.resolve_strategy("one")
    with devices.scope():
        model = keras.Sequential([keras.Input((8,)), kso.SparseDense(4, sparsity=0.5)])
    assert devices.num_workers == 1
    ```
    """  # noqa: E501
    if name not in STRATEGIES:
        raise ValueError(f"`name` must be one of {', '.join(STRATEGIES)}. Received: name={name!r}")
    return backend.resolve(name)


def use_step(model):
    """Give the model the train step for the gradients that its optimizers keep now.

    Each is compiled once: a step that keeps gradients is another than one that does not.
    """
    kept = _kept_gradients(model)
    steps = keras_internals.steps_of(model)
    if not any(model.train_function is step for step in steps.values()):
        steps.clear()  # compiled anew
    if kept not in steps:
        model.make_train_function(force=True)
        steps[kept] = model.train_function
    model.train_function = steps[kept]


def _kept_gradients(model):
    return tuple(getattr(o, "kept_gradients", None) for o in _optimizers_inside(model))


def _optimizers_inside(model):
    for optimizer in optimizers_of(model):
        while optimizer is not None:
            yield optimizer
            optimizer = getattr(optimizer, "inner_optimizer", None)


def optimizers_by_name(model):
    """The optimizers that a model holds: `compile`'s, and those it keeps as attributes.

    Returns:
        Dict from the name of the attribute, with the key or position for those in a dict or list,
        to the optimizer; each once.
    """
    found, unique = all_names(model), dict[int, str]()
    # An attribute of one's own before a container, and before what Keras and TensorFlow keep.
    in_order = sorted(found.items(), key=lambda item: (item[0][0] == "_", "[" in item[0]))
    for name, optimizer in in_order:
        if isinstance(optimizer, keras.optimizers.Optimizer):
            unique.setdefault(id(optimizer), name)
    return {name: found[name] for name in unique.values()}


def all_names(model):
    """Dict from names as in `optimizers_by_name` to what they stand for, be it an optimizer."""
    found: dict[str, Any] = {"optimizer": getattr(model, "optimizer", None)}
    for name, value in vars(model).items():
        found.setdefault(name, value)
        if isinstance(value, dict):
            found.update({f"{name}[{key!r}]": x for key, x in value.items()})
        elif isinstance(value, (list, tuple)):
            found.update({f"{name}[{i}]": x for i, x in enumerate(value)})
    return found


def attributes_with_optimizers(model):
    """The names of the attributes in which a model holds optimizers, in containers too: set."""
    return {name.partition("[")[0] for name in optimizers_by_name(model)}


def optimizers_of(model):
    """The optimizers that a model holds, each once."""
    return list(optimizers_by_name(model).values())


def build_optimizer(model):
    """Build the model's optimizer, in its scope, if it is not built yet."""
    if not model.optimizer.built:
        with backend.strategy_scope(model.optimizer):
            model.optimizer.build(model.trainable_variables)


# ---------------------------------------------------------------------- training


def fit_distributed(
    model: keras.Model,
    data: Any,
    epochs: int = 1,
    steps_per_epoch: int | None = None,
    initial_epoch: int = 0,
    validation_data: Any = None,
    callbacks: Any = None,
    verbose: Any = "auto",
) -> Any:
    """`fit` that also trains under `MultiWorkerMirroredStrategy` and `TPUStrategy`.

    Keras 3's `fit` fails with several workers and has open faults on TPUs, so their loop is here;
    under everything else, this is `model.fit`. Callbacks are called as `fit` does: RigL and its
    kin, `BackupAndRestore`, `CSVLogger`, schedules. Metrics are those of `compile`, over the global
    batch; the logs of a batch are empty, because reading a metric makes the workers wait for each
    other.

    ```
    every step:   strategy.run(model.train_step, one batch per replica)
    every epoch:  strategy.run(model.test_step, ...) over `validation_data`
    ```

    Every worker runs the same program. Worker 0 alone should write files (`BackupAndRestore`
    sees to that itself).

    Args:
        model: Compiled Keras model, created in the strategy's scope. Its input shape must be
            known.
        data: `tf.data.Dataset` of global batches (shared out by example over the workers), or a
            distributed dataset, such as `strategy.distribute_datasets_from_function` returns.
            With `drop_remainder=True`; for TPUs all shapes must be static. Where `model.fit`
            trains, whatever that takes; arrays as a tuple `(x, y)` or `(x, y, sample_weight)`,
            which are not shuffled.
        epochs: Int, defaults to 1.
        steps_per_epoch: Int, or `None` (default) for all of `data` in each epoch. With an int,
            `data` is read on from epoch to epoch.
        initial_epoch: Int, defaults to 0.
        validation_data: As `data`, or `None` (default).
        callbacks: List of Keras callbacks.
        verbose: `"auto"`, 0, 1 or 2, as in `fit`. Only worker 0 prints.

    Returns:
        `keras.callbacks.History`.

    Raises:
        ValueError: For a model that is not built, or `steps_per_execution` > 1.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((8,)), kso.SparseDense(4, sparsity=0.5)])
    model.compile(optimizer=kso.SparseOpt("sgd"), loss="mse")
    history = kso.fit_distributed(
        model, (np.ones((8, 8)), np.ones((8, 4))), epochs=2, verbose=0,
        callbacks=[kso.RigL(update_every=1)],
    )
    assert len(history.history["loss"]) == 2
    ```
    """
    settings = {
        "epochs": epochs,
        "steps_per_epoch": steps_per_epoch,
        "initial_epoch": initial_epoch,
        "validation_data": validation_data,
        "callbacks": callbacks,
        "verbose": verbose,
    }
    own_loop = backend.needs_own_loop(model)
    backend.check_fit(model, own_loop)
    if own_loop:
        return backend.fit_in_own_loop(
            model, data, **settings, use_step=use_step, build_optimizer=build_optimizer,
        )  # fmt: skip
    x, y, weights = (*data, None, None)[:3] if isinstance(data, tuple) else (data, None, None)
    return model.fit(x, y, sample_weight=weights, shuffle=False, **settings)


# ---------------------------------------------------------------------- agreement


def assert_replicas_agree(model: Any) -> None:
    """Check that all devices, of all workers, hold the same masks, weights and slots, bit for bit.

    Under several workers, call it on all of them. On one device there is nothing to compare.
    Metrics, the statistics of Batch Normalization and the dense gradients that RigL keeps differ
    between the replicas of `tf.distribute` by design and are left out.

    Args:
        model: Keras model; or a `SparseOpt`, for its own variables and sparse kernels.

    Raises:
        AssertionError: Naming the first variable that differs.
        ValueError: If `model` is neither a model nor an optimizer.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((8,)), kso.SparseDense(4, sparsity=0.5)])
    model.compile(optimizer=kso.SparseOpt("sgd"), loss="mse")
    kso.assert_replicas_agree(model)
    ```
    """
    if isinstance(model, keras.optimizers.Optimizer):
        optimizer, kernels = model, getattr(model, "sparse_weights", [])
        variables = list(kernels)
    elif isinstance(model, keras.Model):
        optimizer, variables = getattr(model, "optimizer", None), list(model.trainable_variables)
        kernels = variables
    else:
        raise ValueError(f"`model` must be a Keras model or optimizer. Received: model={model!r}")
    variables += [k.topology.filled_pattern for k in kernels if topology_of(k) is not None]
    variables += [] if optimizer is None else list(optimizer.variables)
    variables = list({id(v): v for v in variables}.values())
    variables = [v for v in variables if getattr(v, "synchronization", "") != "on_read"]
    digests: np.ndarray = np.zeros(len(variables), dtype="int32")
    for i, variable in enumerate(variables):
        shards = backend.copies_of_shards(variable)
        for copies in shards:
            same = [copy.tobytes() == copies[0].tobytes() for copy in copies]
            if not all(same):
                raise AssertionError(
                    f"Replicas disagree on '{variable.path}': copy {same.index(False)} differs "
                    f"from copy 0 (of {len(copies)} in this process)."
                )
        if len(shards) == 1:
            digests[i] = zlib.crc32(shards[0][0].tobytes()) >> 1  # fits int32
    for other in backend.of_all_workers(digests, optimizer):
        if not np.array_equal(other, digests):
            variable = variables[int(np.flatnonzero(other != digests)[0])]
            raise AssertionError(f"Workers disagree on '{variable.path}'.")
