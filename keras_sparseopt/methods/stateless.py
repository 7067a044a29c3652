"""A mask update as a pure function inside of a step whose state lives outside of the variables."""

import keras
from keras import ops

from keras_sparseopt import backend, keras_internals
from keras_sparseopt.models.topology import followers_of
from keras_sparseopt.optimizers.moving import is_gradient, update


def stateless_update(method, optimizer_variables, trainable_variables):
    """`DynamicSparseTraining.stateless_step`."""
    optimizer = method.optimizer
    if optimizer is None:
        raise ValueError("`begin` must be called before `stateless_step`.")
    if backend.STEPS_SHARE_VARIABLES:
        raise ValueError("`stateless_step` is for the JAX backend; use `step`.")
    weights = method.weights()
    owned = [w.topology.name for w in weights if not w.topology.is_attached]
    if owned:
        raise ValueError(
            "`stateless_step` needs masks that `sparsify` has attached. Received: layers that "
            f"are sparse by construction: {', '.join(owned)}"
        )
    if any(followers_of(weight.variable) for weight in weights):
        raise ValueError(
            "`stateless_step` moves masks inside of the step, where copies that follow the model "
            "(keras_sparseopt.follow) are not seen: use `step`."
        )
    condensed = [w.topology.name for w in weights if w.topology.is_condensed]
    if condensed:
        raise ValueError(
            "`stateless_step` cannot move condensed weights, whose indices are variables of the "
            "model: use `step`, or keras_sparseopt.uncondense(model) before. Received: "
            + ", ".join(condensed)
        )
    trained = keras_internals.trained_variables(optimizer)
    lists = (trained, trainable_variables), (optimizer.variables, optimizer_variables)
    for own, given in lists:
        if len(own) != len(given):
            raise ValueError(
                "The lists must hold the values of the optimizer's and of the trained "
                f"variables, {len(lists[1][0])} and {len(trained)}. Received: "
                f"{len(optimizer_variables)} and {len(trainable_variables)}"
            )
    mapping = [pair for own, given in lists for pair in zip(own, given)]
    with keras.StatelessScope(state_mapping=mapping) as scope:
        _update(method, weights, scope)
    return tuple(
        [scope.get_current_value(v) for v in own] for own in (optimizer.variables, trained)
    )


def _update(method, weights, scope):
    optimizer = method.optimizer
    step = ops.convert_to_tensor(optimizer.iterations)
    fraction = method.current_drop_fraction(step)
    moving = []
    for weight in weights:
        variables = [*weight.moving_variables, weight.topology.pattern]
        moving.append(variables + ([] if weight.scale is None else [weight.scale]))
    gradients = [method.gradient_of(weight) for weight in weights]
    has_gradient = [True if g is None else is_gradient(g) for g in gradients]
    healthy = [ops.all(ops.isfinite(weight.variable)) for weight in weights]
    healthy += [
        ops.logical_or(ops.all(ops.isfinite(g)), ops.logical_not(has))
        for g, has in zip(gradients, has_gradient)
        if g is not None
    ]
    due = ops.all(ops.stack([_is_time(method, step), *healthy]))

    def change():
        results, changed, active = [], 0, 0
        for weight, variables, gradient, has in zip(weights, moving, gradients, has_gradient):
            values = [ops.convert_to_tensor(v) for v in variables]
            state, mask = values[: 2 + len(weight.slots)], values[2 + len(weight.slots)]
            geometry, has_scale = weight.topology.geometry, weight.scale is not None
            units = ops.cast(weight.topology.units.num_active(mask), "float32")
            number = ops.floor(units * fraction)
            # A layer that no loss depends on keeps its topology.
            number = ops.where(has, ops.cast(number, "int32"), 0)
            numbers = {"num_update": number, "num_grow": number}
            numbers |= {"step": step, "index": weight.index}
            run = update(method.choose, optimizer.correction, geometry, has_scale, is_first=False)
            state, mask, scale, (new, count, _) = run(state, mask, gradient, numbers)
            results.append([*state, mask, *([] if scale is None else [scale])])
            changed, active = changed + new, active + count
        share = ops.cast(changed, "float32") / ops.cast(ops.maximum(active, 1), "float32")
        return results, share

    def leave():
        same = [[ops.convert_to_tensor(v) for v in variables] for variables in moving]
        return same, ops.convert_to_tensor(optimizer.mask_change)

    results, share = ops.cond(due, change, leave)
    for variables, values in zip(moving, results):
        for variable, value in zip(variables, values):
            scope.add_update((variable, value))
    scope.add_update((optimizer.mask_change, share))


def _is_time(method, step):
    """Whether an update is due at a step that is a tensor: a multiple, and the method says so."""
    base = method.optimizer.base_optimizer()
    accumulation = base.gradient_accumulation_steps or 1
    calls = ops.convert_to_tensor(keras_internals.step_count(base))
    is_multiple = calls % (method.update_every * accumulation) == 0
    try:
        with method._run.at(step):
            is_due = method.is_due()
    except Exception as error:  # jax.errors.ConcretizationTypeError, or what comes of it
        raise NotImplementedError(
            f"`is_due` of {type(method).__name__} cannot be traced, as `stateless_step` must: "
            "write it with keras.ops, for a step that is a tensor. "
            f"Received: {type(error).__name__}"
        ) from error
    return ops.logical_and(is_multiple, is_due)
