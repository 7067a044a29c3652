"""`tf.distribute`: a training loop where Keras' own fails, and what its replicas hold."""

import collections
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_sparseopt import keras_internals


def trains_with_several_workers(strategy):
    """Whether several processes train together."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def tf_workers(strategy):
    """Number of processes, and the index of this one."""
    if not trains_with_several_workers(strategy) or strategy.cluster_resolver is None:
        return 1, 0
    resolver = strategy.cluster_resolver
    workers = resolver.cluster_spec().as_dict()
    chiefs = len(workers.get("chief", []))
    index = resolver.task_id + (0 if resolver.task_type == "chief" else chiefs)
    return chiefs + len(workers.get("worker", [])), index


def fit_in_own_loop(
    model, data, epochs, steps_per_epoch, initial_epoch, validation_data, callbacks, verbose,
    use_step, build_optimizer,
):  # fmt: skip
    """`fit` under strategies that Keras' `fit` cannot train under.

    Args:
        model, data, epochs, steps_per_epoch, initial_epoch, validation_data, callbacks, verbose:
            As in `fit_distributed`.
        use_step, build_optimizer: Functions of the model.
    """
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
    verbose = (1 if verbose == "auto" else verbose) if tf_workers(strategy)[1] == 0 else 0
    callback_list = keras.callbacks.CallbackList(
        callbacks, add_history=True, add_progbar=verbose != 0, model=model,
        epochs=epochs, steps=steps_per_epoch, verbose=verbose, own_loop=True,
    )  # fmt: skip
    model.stop_training = False
    callback_list.on_train_begin()

    # One for each of Keras' train functions. These are made anew (and never run here) where
    # gradients begin or cease to be kept, and where masks come that a compiled step does not know.
    use_step(model)

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
            train_steps[model.train_function](batch)
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
    if not isinstance(data, tf.data.Dataset):
        return data
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return strategy.experimental_distribute_dataset(data.with_options(options))


def _metrics(model):
    return {name: float(value) for name, value in model.get_metrics_result().items()}


# ---------------------------------------------------------------------- what replicas hold


def copies_of_shards(variable):
    """For every part of a variable, its copies on the devices of this process."""
    value = variable.value
    return [[ops.convert_to_numpy(copy) for copy in getattr(value, "values", (value,))]]


def of_all_workers(digests, optimizer):
    """Rows of int32, one per worker (or per replica); none if there is one worker."""
    strategy = None if optimizer is None else keras_internals.strategy_of(optimizer)
    if strategy is None or not trains_with_several_workers(strategy):
        return []
    rows = strategy.gather(strategy.run(lambda: ops.convert_to_tensor(digests[None])), axis=0)
    return ops.convert_to_numpy(rows)


def share_statistics(model):
    """Give all replicas the mean of what each of them has gathered, such as moving averages.

    Without it a file, which holds one value per variable, could not bring the others back.
    """
    strategy = model.distribute_strategy
    if strategy is None or strategy.num_replicas_in_sync == 1:
        return
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
