"""Several devices: choosing a strategy, training where Keras' `fit` cannot, and proof of agreement.

TensorFlow's strategies (`tf.distribute`) and JAX's distributions (`keras.distribution`) own the
devices; nothing here keeps state.
"""

import collections
import contextlib
import dataclasses
import os
import re
import warnings
import zlib
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_sparseopt import keras_internals
from keras_sparseopt.backend import IS_TENSORFLOW
from keras_sparseopt.topology import topology_of

STRATEGIES = ("one", "mirrored", "multiworker", "tpu", "data_parallel")


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of one training, as `resolve_strategy` returns them.

    Attributes:
        name: String, one of the names that `resolve_strategy` takes.
        strategy: `tf.distribute.Strategy`, `keras.distribution.Distribution`, or `None`.
        num_workers: Int, processes that train together.
        worker: Int, index of this process; 0 writes the files.
        num_replicas: Int, devices of all processes that share the global batch.
    """

    name: str
    strategy: Any
    num_workers: int
    worker: int
    num_replicas: int

    def scope(self):
        """Context manager in which the model and its optimizer are created."""
        if self.strategy is None:
            return contextlib.nullcontext()
        if self.name == "multiworker":
            return _informed_scope(self.strategy)
        return self.strategy.scope()


@contextlib.contextmanager
def _informed_scope(strategy):
    """A scope without the warning for those who do not know `fit_distributed` yet."""
    with warnings.catch_warnings(), strategy.scope():
        warnings.filterwarnings("ignore", message=re.escape(_FIT_FAILS))
        yield


def resolve_strategy(name: str) -> Devices:
    """Set up the devices for a name as `--strategy` options have it.

    | name | backend | what it is | who trains |
    |---|---|---|---|
    | `one` | both | the default device | `model.fit` |
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
    backend = keras.backend.backend()
    if name == "one":
        if backend == "jax":
            keras.distribution.set_distribution(None)
        return Devices(name, None, 1, 0, 1)
    needed = "jax" if name == "data_parallel" else "tensorflow"
    if backend != needed:
        raise ValueError(
            f"'{name}' needs KERAS_BACKEND={needed}; on the {backend} backend use "
            f"{'data_parallel' if backend == 'jax' else 'mirrored'}. Received: name={name!r}"
        )
    if name == "data_parallel":
        return _data_parallel()
    import tensorflow as tf

    if name == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
    elif name == "multiworker":
        if "TF_CONFIG" not in os.environ:
            raise ValueError(
                "'multiworker' needs the environment variable TF_CONFIG with the cluster and "
                "the task of this process. Received: no TF_CONFIG"
            )
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect()
        strategy = tf.distribute.TPUStrategy(resolver)
    num_workers, worker = _tf_workers(strategy)
    return Devices(name, strategy, num_workers, worker, strategy.num_replicas_in_sync)


def _data_parallel():
    if "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ:
        keras.distribution.initialize()
    import jax

    distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(distribution)
    return Devices(
        "data_parallel", distribution, jax.process_count(), jax.process_index(), jax.device_count()
    )


def _tf_workers(strategy):
    """Number of processes, and the index of this one."""
    resolver = strategy.cluster_resolver
    if resolver is None or not _trains_with_several_workers(strategy):
        return 1, 0
    workers = resolver.cluster_spec().as_dict()
    chiefs = len(workers.get("chief", []))
    index = resolver.task_id + (0 if resolver.task_type == "chief" else chiefs)
    return chiefs + len(workers.get("worker", [])), index


def worker_index(model):
    """Index of this process among those that train `model` together; 0 if it is the only one."""
    if not IS_TENSORFLOW:
        import jax

        return jax.process_index()
    return _tf_workers(model.distribute_strategy)[1]


def _trains_with_several_workers(strategy):
    import tensorflow as tf

    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def _needs_own_loop(strategy):
    import tensorflow as tf

    return isinstance(
        strategy, (tf.distribute.MultiWorkerMirroredStrategy, tf.distribute.TPUStrategy)
    )


def _strategy_scope(optimizer):
    """The scope in which an optimizer's variables are created."""
    if IS_TENSORFLOW:
        return keras_internals.strategy_of(optimizer).scope()
    return contextlib.nullcontext()


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


def optimizers_of(model):
    """The optimizers that a model holds: `compile`'s, and those it keeps as attributes."""
    found = [getattr(model, "optimizer", None), *vars(model).values()]
    unique = {id(o): o for o in found if isinstance(o, keras.optimizers.Optimizer)}
    return list(unique.values())


def build_optimizer(model):
    """Build the model's optimizer, in its scope, if it is not built yet."""
    if not model.optimizer.built:
        with _strategy_scope(model.optimizer):
            model.optimizer.build(model.trainable_variables)


# ---------------------------------------------------------------------- what Keras cannot do


_FIT_FAILS = (
    "`fit` under MultiWorkerMirroredStrategy fails in Keras 3 itself, with 'unsupported type "
    "PerReplica'. Use keras_sparseopt.fit_distributed(model, data, ...), which takes the same "
    "callbacks, or a loop of your own; or the JAX backend, where several processes train by "
    "plain `fit`."
)


def check_strategy(optimizer):
    """Refuse strategies, or warn of what they break, when an optimizer is made in their scope."""
    if not IS_TENSORFLOW:
        return
    import tensorflow as tf

    strategy = keras_internals.strategy_of(optimizer)
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        raise ValueError(
            "ParameterServerStrategy is not supported: its workers update weights at different "
            "times, and a mask update needs one step that all agree on. Use MirroredStrategy, "
            "or MultiWorkerMirroredStrategy with keras_sparseopt.fit_distributed."
        )
    if _trains_with_several_workers(strategy):
        # Keras' `fit` fails before it calls anything of ours that could say so.
        warnings.warn(_FIT_FAILS, stacklevel=3)


def check_optimizer(optimizer):
    """Refuse an optimizer that its strategy cannot train, before anything is built."""
    if not IS_TENSORFLOW:
        return
    strategy = keras_internals.strategy_of(optimizer)
    if strategy.num_replicas_in_sync == 1:
        return
    base = optimizer.base_optimizer()
    for argument, broken in (
        ("gradient_accumulation_steps", base.gradient_accumulation_steps),
        ("use_ema", base.use_ema),
    ):
        if broken:
            raise ValueError(
                f"`{argument}` does not work under {type(strategy).__name__} in Keras 3 itself. "
                f"Train on one device, or without it. Received: {argument}={broken}"
            )


def check_fit(model, own_loop):
    """Refuse what Keras 3 itself cannot train under the model's strategy, before it starts."""
    if not IS_TENSORFLOW:
        return
    strategy = model.distribute_strategy
    own = strategy
    if isinstance(model.optimizer, keras.optimizers.Optimizer):
        own = keras_internals.strategy_of(model.optimizer)
    if strategy is None or (strategy.num_replicas_in_sync == 1 and own is strategy):
        return
    if own is not strategy:
        raise ValueError(
            "Model and optimizer must be made, and the model compiled, in the scope of the same "
            f"strategy. Received: a model of {type(strategy).__name__} with an optimizer of "
            f"{type(own).__name__}"
        )
    import tensorflow as tf

    kind = type(strategy).__name__
    if _trains_with_several_workers(strategy) and not own_loop:
        raise ValueError(_FIT_FAILS)
    on_cpu = "CPU" in strategy.extended.worker_devices[0]
    if model.steps_per_execution > 1 and (on_cpu or own_loop):
        raise ValueError(
            f"`steps_per_execution` must be 1 under {kind}"
            f"{' on CPU devices: Keras 3 itself fails there' if on_cpu else ''}. "
            f"Received: steps_per_execution={model.steps_per_execution}"
        )
    if isinstance(strategy, tf.distribute.MirroredStrategy) and model.jit_compile is True:
        raise ValueError(
            f"`jit_compile=True` under {kind} fails in Keras 3 itself. Compile the model with "
            "jit_compile=False. Received: jit_compile=True"
        )


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
    strategy = getattr(model, "distribute_strategy", None)
    own_loop = IS_TENSORFLOW and _needs_own_loop(strategy)
    check_fit(model, own_loop)
    if own_loop:
        return _fit_in_own_loop(model, data, **settings)
    x, y, weights = (*data, None, None)[:3] if isinstance(data, tuple) else (data, None, None)
    return model.fit(x, y, sample_weight=weights, shuffle=False, **settings)


def _fit_in_own_loop(
    model, data, epochs, steps_per_epoch, initial_epoch, validation_data, callbacks, verbose
):
    import tensorflow as tf

    strategy = model.distribute_strategy
    for argument, value in (("data", data), ("validation_data", validation_data)):
        if not (hasattr(value, "element_spec") or (argument, value) == ("validation_data", None)):
            raise ValueError(
                f"`{argument}` must be a tf.data.Dataset or a distributed dataset under "
                f"{type(strategy).__name__}. Received: {type(value).__name__}"
            )
    if not model.built:
        raise ValueError("`model` must be built: give its first layer an input shape.")
    restart = steps_per_epoch is None
    if restart:
        steps_per_epoch = _length(data)
    build_optimizer(model)
    with strategy.scope():
        keras_internals.build_metrics(model, _batch_spec(data))
    data, validation_data = (_distributed(strategy, part) for part in (data, validation_data))
    verbose = (1 if verbose == "auto" else verbose) if worker_index(model) == 0 else 0
    callback_list = keras.callbacks.CallbackList(
        callbacks, add_history=True, add_progbar=verbose != 0, model=model,
        epochs=epochs, steps=steps_per_epoch, verbose=verbose, own_loop=True,
    )  # fmt: skip
    model.stop_training = False
    callback_list.on_train_begin()

    # One for each kind of gradients that are kept, which changes while training.
    def new_train_step():
        @tf.function(reduce_retracing=True)
        def train_step(batch):
            strategy.run(model.train_step, args=(batch,))

        return train_step

    train_steps: collections.defaultdict = collections.defaultdict(new_train_step)

    @tf.function(reduce_retracing=True)
    def test_step(batch):
        strategy.run(model.test_step, args=(batch,))

    batches: Any = iter(data)
    logs: dict = {}
    for epoch in range(keras_internals.initial_epoch(model) or initial_epoch, epochs):
        model.reset_metrics()
        callback_list.on_epoch_begin(epoch)
        for step in range(steps_per_epoch):
            callback_list.on_train_batch_begin(step)
            try:
                batch = next(batches)
            except StopIteration:
                raise ValueError(
                    f"`data` ran out at step {step} of {steps_per_epoch} in epoch {epoch}: with "
                    "`steps_per_epoch` it is read on from epoch to epoch and must suffice for all."
                ) from None
            train_steps[_kept_gradients(model)](batch)
            callback_list.on_train_batch_end(step, {})
            if model.stop_training:
                break
        if restart:
            batches = iter(data)
        logs = _metrics(model)
        if validation_data is not None:
            model.reset_metrics()
            callback_list.on_test_begin()
            for batch in validation_data:
                test_step(batch)
            validation = _metrics(model)
            callback_list.on_test_end(validation)
            logs.update({f"val_{name}": value for name, value in validation.items()})
        callback_list.on_epoch_end(epoch, logs)
        if model.stop_training:
            break
    model.optimizer.finalize_variable_values(model.trainable_weights)
    callback_list.on_train_end(logs)
    return model.history


def _length(data):
    import tensorflow as tf

    length = int(data.cardinality()) if isinstance(data, tf.data.Dataset) else -1
    if length < 1:
        raise ValueError(
            "`steps_per_epoch` must be given for a distributed dataset, or one of unknown length; "
            f"and `data` must hold a batch. Received: steps_per_epoch=None, {length} batches"
        )
    return length


def _batch_spec(data):
    """Shapes and dtypes of one replica's batch."""
    return keras.tree.map_structure(
        lambda spec: getattr(spec, "_value_specs", (spec,))[0], data.element_spec
    )


def _distributed(strategy, data):
    import tensorflow as tf

    if not isinstance(data, tf.data.Dataset):
        return data
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return strategy.experimental_distribute_dataset(data.with_options(options))


def _metrics(model):
    return {name: float(value) for name, value in model.get_metrics_result().items()}


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
    variables += [k.topology.mask for k in kernels if topology_of(k) is not None]
    variables += [] if optimizer is None else list(optimizer.variables)
    variables = list({id(v): v for v in variables}.values())
    variables = [v for v in variables if getattr(v, "synchronization", "") != "on_read"]
    digests: np.ndarray = np.zeros(len(variables), dtype="int32")
    for i, variable in enumerate(variables):
        shards = _copies_of_shards(variable)
        for copies in shards:
            same = [copy.tobytes() == copies[0].tobytes() for copy in copies]
            if not all(same):
                raise AssertionError(
                    f"Replicas disagree on '{variable.path}': copy {same.index(False)} differs "
                    f"from copy 0 (of {len(copies)} in this process)."
                )
        if len(shards) == 1:
            digests[i] = zlib.crc32(shards[0][0].tobytes()) >> 1  # fits int32
    for other in of_all_workers(digests, optimizer):
        if not np.array_equal(other, digests):
            variable = variables[int(np.flatnonzero(other != digests)[0])]
            raise AssertionError(f"Workers disagree on '{variable.path}'.")


def _copies_of_shards(variable):
    """For every part of a variable, its copies on the devices of this process."""
    value = variable.value
    if IS_TENSORFLOW:
        return [[ops.convert_to_numpy(copy) for copy in getattr(value, "values", (value,))]]
    try:
        shards = value.addressable_shards
    except ValueError:
        # JAX cannot list the shards of what `device_put` gave to several processes, such as
        # initial values; that call has compared them.
        return [[np.asarray(value)]]
    parts: dict = {}
    for shard in shards:
        parts.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    return list(parts.values())


def of_all_workers(digests, optimizer):
    """Rows of int32, one per worker (or per replica); none if there is one worker."""
    if not IS_TENSORFLOW:
        import jax

        if jax.process_count() == 1:
            return []
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(digests)
    strategy = None if optimizer is None else keras_internals.strategy_of(optimizer)
    if strategy is None or not _trains_with_several_workers(strategy):
        return []
    rows = strategy.gather(strategy.run(lambda: ops.convert_to_tensor(digests[None])), axis=0)
    return ops.convert_to_numpy(rows)


def share_statistics(model):
    """Give all replicas the mean of what each of them has gathered, such as moving averages.

    Without it a file, which holds one value per variable, could not bring the others back.
    """
    if not IS_TENSORFLOW:
        return  # JAX has one value for the global batch
    strategy = model.distribute_strategy
    if strategy is None or strategy.num_replicas_in_sync == 1:
        return
    import tensorflow as tf

    variables = [v for v in model.non_trainable_variables if "float" in v.dtype]

    @tf.function
    def means():
        def of_replica():
            values = [tf.identity(variable.value) for variable in variables]
            return tf.distribute.get_replica_context().all_reduce(
                tf.distribute.ReduceOp.MEAN, values
            )

        return strategy.run(of_replica)

    if variables:
        for variable, mean in zip(variables, means()):
            variable.assign(strategy.experimental_local_results(mean)[0])
