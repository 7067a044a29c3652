"""Dynamic sparse training: when masks change, and what all methods share. They are in `methods`."""

import math
import types
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_sparseopt import keras_internals, masks
from keras_sparseopt.backend import IS_TENSORFLOW, are_on_host, freed, host
from keras_sparseopt.checks import (
    check_bool,
    check_fraction,
    check_int,
    check_patterns,
    is_schedule,
)
from keras_sparseopt.conversion import masked_share, sparse_weights
from keras_sparseopt.devices import (
    assert_replicas_agree,
    build_optimizer,
    check_fit,
    optimizers_of,
    use_step,
)
from keras_sparseopt.optimizers.sparse_opt import UNWRITTEN, sparse_opt_of
from keras_sparseopt.topology import is_named
from keras_sparseopt.typing import Array, DropFraction, DropSchedule, GrowthValues, Redistribution

# How much of the drop fraction is left, by progress from 0 to 1.
_SCHEDULES = {
    "cosine": lambda progress, cos: (1 + cos(math.pi * progress)) / 2,
    "linear": lambda progress, cos: 1 - progress,
    "constant": lambda progress, cos: 1.0,
}
NO_GRADIENT = (
    "No dense gradient has arrived: the train step was compiled before `begin`, which then "
    "returned True. Make the train step again after it."
)


class DynamicSparseTraining(keras.callbacks.Callback):
    """Base of the mask-update methods: drop the smallest weights, grow others, keep the count.

    ```
    every `update_every` optimizer steps t, begin_step ≤ t < end_step, for every sparse weight:
        f(t)     = drop_fraction/2 · (1 + cos(π t / end_step))      see `drop_schedule`
        n_update = floor(f(t) · n_active)
        mask     = drop_and_grow(weight, mask, scores, n_update)
    ```

    The update comes right after optimizer step t, from the weights after that step (and, for
    RigL, the gradient of that step). A method is a subclass with its own `scores` or `new_mask`.

    Put it in `fit(callbacks=[...])`, before callbacks that read its logs (`CSVLogger`) or
    save the model. At the end of every epoch it writes `sparsity`, `drop_fraction`, `itop_rate`,
    `mask_change` (the fraction of active weights that the last update made new) and `dead_neurons`
    (neurons of all sparse weights without an active incoming weight) into the logs.
    It reads nothing between updates, and leaves Keras' asynchronous dispatch on.

    In a custom loop, the same object works without `fit`:

    ```
    if method.begin(optimizer, total_steps):
        ...                        # make the train step again, if it was compiled before
    for batch in data:
        train_step(batch)          # calls optimizer.apply once
        logs = method.step()
    method.end()
    ```

    In a loop on JAX whose state lives outside of the variables, call `stateless_step` inside of
    your jitted step instead of `step`.

    Nothing is kept here that a resume would need: the phase comes from
    `optimizer.iterations`, random growth from (seed, weight, step). Steps that loss scaling
    skips do not count.

    Args:
        update_every: Int, optimizer steps between mask updates, defaults to 100.
        drop_fraction: Float in [0, 1), the fraction of active weights replaced at the start, or a
            Keras learning-rate schedule, a function of the optimizer step. Defaults to 0.3.
        begin_step: Int, no update before this optimizer step, defaults to 0.
        end_step: Int, no update at or after this optimizer step. `None` (default): 75 % of
            the steps of this fit.
        seed: Int, defaults to 0; of random growth.
        drop_schedule: String, how a float `drop_fraction` goes on: `"cosine"` (default) or
            `"linear"` to 0 at `end_step`, or `"constant"`.
        growth_values: String, where connections start that grow: `"zero"` (default), the papers'
            choice, or `"random"`, uniform in ± the mean |w| of the active weights.
        redistribution: String, whether layers share out the weights that grow. `None` (default):
            every layer grows as many as it drops. `"mean"`, SNFS's: in proportion to the mean
            |gradient| of a layer's active weights. `"global"`: the weakest of all layers are
            dropped, and the best of all layers grow. The total is exact in every case. Not for
            `NM` and `ConstantFanIn`.
        layers: List of names or patterns such as `"conv*"` of sparse weights (as `summary` shows
            them, or paths) that this method is for, or `None` (default) for all. Several methods
            with different layers may train one model; `drop_fraction` and `mask_change` are then
            those of the last one in the list.
        optimizer: String, the attribute of the model that holds the `SparseOpt`, for a model with
            several (`"generator_optimizer"`), or `None` (default) for the only one.
        compiled: Bool, or `None` (default). `True` ranks with a compiled function where the weights
            are, `False` on the host, `None` on the host if all of them lie there. The masks are
            the same.
        check_replicas: Bool, defaults to `False`. `True` compares masks, weights and slots of all
            devices before and after every update (`assert_replicas_agree`): slow, for debugging.

    Raises:
        ValueError: For an argument out of range; at the start of training if the optimizer is
            not a `SparseOpt`, the model holds no sparse weight, or `update_every` or an epoch is
            not a multiple of `steps_per_execution`.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    class ByDistance(kso.DynamicSparseTraining):
        # Grows the connections between the nearest units.
        def scores(self, weight, mask, gradient, update):
            rows, columns = mask.shape
            distance = keras.ops.arange(rows)[:, None] - keras.ops.arange(columns)[None, :]
            return -keras.ops.cast(keras.ops.abs(distance), "float32")

    callback = ByDistance(update_every=10, end_step=100)
    ```
    """

    # Whether the method needs the dense gradient of the step before an update.
    uses_gradient = False
    # Whether connections grow, so that the options about that mean something.
    grows = True
    # Whether a mask may stay below the number of active weights that it was given.
    keeps_budget = False

    def __init__(
        self,
        update_every: int = 100,
        drop_fraction: DropFraction = 0.3,
        begin_step: int = 0,
        end_step: int | None = None,
        seed: int = 0,
        drop_schedule: DropSchedule = "cosine",
        growth_values: GrowthValues = "zero",
        redistribution: Redistribution | None = None,
        layers: Sequence[str] | None = None,
        optimizer: str | None = None,
        compiled: bool | None = None,
        check_replicas: bool = False,
    ) -> None:
        super().__init__()
        check_int("update_every", update_every, 1)
        check_int("begin_step", begin_step, 0)
        if end_step is not None:
            check_int("end_step", end_step, begin_step + 1)
        check_int("seed", seed, 0)
        check_bool("check_replicas", check_replicas)
        if compiled is not None:
            check_bool("compiled", compiled)
        if not is_schedule(drop_fraction):
            check_fraction(drop_fraction)
        if drop_schedule not in _SCHEDULES:
            raise ValueError(
                f"`drop_schedule` must be one of {', '.join(_SCHEDULES)}. "
                f"Received: drop_schedule={drop_schedule!r}"
            )
        if growth_values not in ("zero", "random"):
            raise ValueError(
                '`growth_values` must be "zero" or "random". '
                f"Received: growth_values={growth_values!r}"
            )
        if redistribution not in (None, "mean", "global"):
            raise ValueError(
                '`redistribution` must be "mean", "global" or None. '
                f"Received: redistribution={redistribution!r}"
            )
        if not self.grows:
            for name, value, default in (
                ("drop_schedule", drop_schedule, "cosine"),
                ("growth_values", growth_values, "zero"),
                ("redistribution", redistribution, None),
            ):
                if value != default:
                    raise ValueError(
                        f"`{name}` is for methods that grow connections, which "
                        f"{type(self).__name__} does not. Received: {name}={value!r}"
                    )
        if redistribution == "mean" and not self.uses_gradient:
            raise ValueError(
                f'`redistribution="mean"` needs gradients, which {type(self).__name__} does not '
                "use; \"global\" does not. Received: redistribution='mean'"
            )
        if optimizer is not None and not isinstance(optimizer, str):
            raise ValueError(
                "`optimizer` must be the name of an attribute of the model, or None. "
                f"Received: optimizer={optimizer!r}"
            )
        self.update_every = int(update_every)
        self.drop_fraction: Any = drop_fraction
        self.drop_schedule = drop_schedule
        self.growth_values = growth_values
        self.redistribution = redistribution
        self.begin_step = int(begin_step)
        self.end_step = None if end_step is None else int(end_step)
        self.seed = int(seed)
        self.layers = check_patterns("layers", layers)
        self.optimizer_name = optimizer
        self.compiled = compiled
        self.check_replicas = check_replicas
        self.optimizer: Any = None
        self._lease: Any = None
        self._epoch: int | None = None
        self._settled = False
        self._logs: dict[str, float] = {}

    # ------------------------------------------------------------------ what a method is

    def scores(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        """What grows first: larger scores.

        Args:
            weight: Float array, the present value.
            mask: Bool array, the present mask.
            gradient: Array of the dense gradient, for a method with `uses_gradient`; else `None`.
            update: What else is known: `update.step`, the optimizer step; `update.index`, the
                weight's position among all; `update.num_update` and what else `plan` says;
                `update.units`, the choices that the structure of the mask allows (`Units`);
                `update.neuron_axes`, `update.input_axes` and `update.skew_correction` of its
                topology.

        Returns:
            Float array of the weight's shape. Unless overridden, |gradient|. All arrays are
            NumPy's, or tensors while the update is compiled; Python's operators and `keras.ops`
            serve both.
        """
        if gradient is None:
            raise NotImplementedError(
                f"{type(self).__name__} must implement `scores` or `new_mask`, or set "
                "`uses_gradient = True`."
            )
        return abs(gradient)

    def values(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        """What is dropped first: smaller absolute values. Unless overridden, the weight.

        Args:
            weight, mask, gradient, update: As in `scores`.

        Returns:
            Float array of the weight's shape.
        """
        return weight

    def new_mask(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        """The next mask of one weight: a pure function.

        Choose by `update.units`, which keeps the structure of the mask. Any other mask without it
        is refused on the host; compiled, nothing checks that.

        Args:
            weight, mask, gradient, update: As in `scores`.

        Returns:
            Bool array of the weight's shape.
        """
        values = self.values(weight, mask, gradient, update)
        scores = self.scores(weight, mask, gradient, update)
        return update.units.drop_and_grow(values, mask, scores, update.num_update, update.num_grow)

    def grown(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        """Where new connections start; unless overridden, as `growth_values` says.

        Args:
            weight, mask, gradient, update: As in `scores`, before the update.

        Returns:
            Float array of the weight's shape, or `None` for 0.
        """
        if self.growth_values == "zero":
            return None
        mean = masks.mean_magnitude(weight, mask)
        # Another stream than that of random growth, whose draws are large where something grows.
        draws = masks.random_scores(mask, self.seed ^ 2**63, update.index, update.step)
        return mean * (2 * draws - 1)

    def plan(self, weights: list[Any], active: list[int]) -> list[dict[str, Any]]:
        """What an update must know of all weights together, before any of them changes.

        Args:
            weights: List of the optimizer's `Weight`s that will be updated.
            active: List of ints, their active units.

        Returns:
            List of dicts of numbers, which become attributes of `update`.
        """
        fraction = self.current_drop_fraction(self._step)
        numbers = [math.floor(fraction * number) for number in active]
        grown = numbers
        if self.redistribution is not None:
            numbers, grown = self._redistributed(weights, active, numbers)
        return [{"num_update": d, "num_grow": g} for d, g in zip(numbers, grown)]

    def is_due(self) -> bool:
        """Whether masks change at the present step, a multiple of `update_every`."""
        return self.begin_step <= self._step < self._end_step

    def is_over(self) -> bool:
        """Whether masks will not change any more."""
        return self._step >= self._end_step

    def lease(self, optimizer: Any) -> Any:
        """The `Lease` on dense gradients that the method needs, or `None`."""
        return optimizer.lease_gradients() if self.uses_gradient else None

    # ------------------------------------------------------------------ any training loop

    def begin(self, optimizer: Any, total_steps: float | None = None) -> bool:
        """Start. Call once before the loop, with a built optimizer.

        Args:
            optimizer: `SparseOpt`, also inside a `LossScaleOptimizer`.
            total_steps: Int, optimizer steps of the whole training; needed with
                `end_step=None`.

        Returns:
            Bool, whether the train step must be compiled again: the optimizer keeps other
            gradients than before.
        """
        optimizer = _required(optimizer)
        if self.end_step is None and total_steps is None:
            raise ValueError(
                "`total_steps` must be given when the callback has no `end_step`. "
                "Received: total_steps=None, end_step=None"
            )
        if not optimizer.built:
            raise ValueError(
                "`optimizer` must be built: call optimizer.build(model.trainable_variables)."
            )
        if not optimizer.sparse_weights:
            raise ValueError(
                "The optimizer trains no sparse weight, or all of them are frozen. Convert the "
                "model with keras_sparseopt.sparsify(model, sparsity), or use SparseDense, …"
            )
        self._check_layers_exist(optimizer)
        self.optimizer, self._settled = optimizer, False
        self._check_structures()
        self._set_horizon(0, total_steps)
        before = optimizer.kept_gradients
        self._lease = self.lease(optimizer)
        optimizer.settle()
        self._look()
        self._logs = self.read_logs()
        return optimizer.kept_gradients != before

    def _check_layers_exist(self, optimizer):
        topologies = [variable.topology for variable in optimizer.sparse_weights]
        for pattern in self.layers or ():
            if not any(is_named(topology, [pattern]) for topology in topologies):
                raise ValueError(
                    "`layers` must name sparse weights that are trained: "
                    f"{[topology.name for topology in topologies]}. Received: {pattern!r}"
                )

    def _check_structures(self):
        """Raise ValueError where a weight's structure does not let it take part."""
        if self.redistribution is None:
            return
        for topology in (weight.topology for weight in self._weights()):
            if topology.units.is_grouped:
                raise ValueError(
                    "`redistribution` is for weights whose number of active ones is free; leave "
                    f"others out by `layers=`. Received: '{topology.name}' of {topology.structure}"
                )

    def _set_horizon(self, first_step, total_steps):
        """Where annealing starts and updates end, in optimizer steps."""
        if self.end_step is None:
            self._first_step = first_step
            self._end_step = math.ceil(first_step + 0.75 * total_steps)
        else:
            self._first_step, self._end_step = 0, self.end_step

    def step(self, batches: int = 1) -> dict[str, float] | None:
        """Tell that the optimizer was applied; updates the masks when it is time.

        Args:
            batches: Int, how many times it was applied since the last call, defaults to 1.

        Returns:
            Dict with `sparsity`, `drop_fraction`, `itop_rate`, `mask_change`, after the last
            update.

        Raises:
            ValueError: If the optimizer's step count stands still, because the state of the loop
                lives outside of the variables.
        """
        if self.optimizer is None:
            raise ValueError("`begin` must be called before `step`.")
        if self._may_be_due(batches):
            pending, before = self._pending, self._step
            if self._update_if_due():
                self._logs = self.read_logs()
            if not IS_TENSORFLOW and self._step == before and pending >= 2 * self._calls(1):
                raise ValueError(
                    f"`step` has nothing to do: optimizer.iterations stands at {before} after "
                    f"{pending} more steps, so the state of the loop lives outside of the "
                    "variables. Call `stateless_step` inside of your jitted step, or assign the "
                    "state to the variables before `step`."
                )
            self._logs["drop_fraction"] = self.current_drop_fraction(self._step)
        return dict(self._logs)

    def end(self) -> None:
        """Stop; frees the dense gradients."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def stateless_step(
        self, optimizer_variables: Sequence[Any], trainable_variables: Sequence[Any]
    ) -> Any:
        """`step` as a pure function on JAX, to be called inside of your jitted train step.

        ```
        method.begin(optimizer, total_steps)                    # once, before
        def train_step(trainable, state, batch):
            ...
            trainable, state = optimizer.stateless_apply(state, gradients, trainable)
            return method.stateless_step(state, trainable)[::-1]
        ```

        Args:
            optimizer_variables: List of arrays, the values of `optimizer.variables`, after
                `stateless_apply`. Take them after `begin`.
            trainable_variables: List of arrays, of the variables that the optimizer trains.

        Returns:
            Tuple of `optimizer_variables` and `trainable_variables`, with new masks where an update
            was due. The drop fraction is computed in float32 here.

        Raises:
            ValueError: On TensorFlow; if the lists do not fit; for layers sparse by construction,
                whose masks are not variables of the optimizer (use `sparsify`).
            NotImplementedError: For a method with a plan of its own (`GMP`, `GraNet`, `SRigL`).
        """
        optimizer = self.optimizer
        if optimizer is None:
            raise ValueError("`begin` must be called before `stateless_step`.")
        if IS_TENSORFLOW:
            raise ValueError("`stateless_step` is for the JAX backend; use `step`.")
        if type(self).plan is not DynamicSparseTraining.plan or self.redistribution is not None:
            raise NotImplementedError(
                f"{type(self).__name__} plans its updates on the host; use `fit` or `step`."
            )
        weights = self._weights()
        owned = [w.topology.name for w in weights if not w.topology.is_attached]
        if owned:
            raise ValueError(
                "`stateless_step` needs masks that `sparsify` has attached. Received: layers that "
                f"are sparse by construction: {', '.join(owned)}"
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
            self._update_traced(weights, scope)
        return tuple(
            [scope.get_current_value(v) for v in own] for own in (optimizer.variables, trained)
        )

    def _update_traced(self, weights, scope):
        optimizer = self.optimizer
        base = optimizer.base_optimizer()
        calls = ops.convert_to_tensor(keras_internals.step_count(base))
        step = ops.convert_to_tensor(optimizer.iterations)
        due = ops.all(
            ops.stack([calls % self._calls(1) == 0, step >= self.begin_step, step < self._end_step])
        )
        fraction = self.current_drop_fraction(step)
        moving = []
        for weight in weights:
            variables = [weight.variable, *weight.slots, weight.explored, weight.topology.mask]
            variables += [] if weight.scale is None else [weight.scale]
            moving.append(variables)
        gradients = [self._gradient(weight) for weight in weights]
        healthy = [ops.all(ops.isfinite(weight.variable)) for weight in weights]
        written = [g is None or ops.any(ops.not_equal(g, UNWRITTEN)) for g in gradients]
        healthy += [
            ops.logical_or(ops.all(ops.isfinite(g)), ops.logical_not(is_written))
            for g, is_written in zip(gradients, written)
            if g is not None
        ]
        due = ops.all(ops.stack([due, *healthy]))

        def update():
            results, changed, active = [], 0, 0
            for weight, variables, gradient, is_written in zip(weights, moving, gradients, written):
                values = [ops.convert_to_tensor(v) for v in variables]
                state, mask = values[: 2 + len(weight.slots)], values[2 + len(weight.slots)]
                active_units = weight.topology.units.num_active(mask)
                number = ops.floor(ops.cast(active_units, "float32") * fraction)
                # A layer that no loss depends on keeps its topology.
                number = ops.where(is_written, ops.cast(number, "int32"), 0)
                facts = {"num_update": number, "num_grow": number}
                facts |= {"step": step, "index": weight.index}
                mover = optimizer.mover(weight, self._ranking(weight), initial=False)
                state, mask, scale, (new, count, _) = mover(state, mask, gradient, facts)
                results.append([*state, mask, *([] if scale is None else [scale])])
                changed, active = changed + new, active + count
            change = ops.cast(changed, "float32") / ops.cast(ops.maximum(active, 1), "float32")
            return results, change

        def leave():
            same = [[ops.convert_to_tensor(v) for v in variables] for variables in moving]
            return same, ops.convert_to_tensor(optimizer.mask_change)

        results, change = ops.cond(due, update, leave)
        for variables, values in zip(moving, results):
            for variable, value in zip(variables, values):
                scope.add_update((variable, value))
        scope.add_update((optimizer.mask_change, change))

    # ------------------------------------------------------------------ when

    def _calls(self, updates):
        """How many calls of `apply` lie between so many mask updates, at least."""
        accumulation = self.optimizer.base_optimizer().gradient_accumulation_steps or 1
        return updates * self.update_every * accumulation

    def _may_be_due(self, batches):
        """Whether the step count can have crossed a multiple, without reading it.

        Reading a variable waits for the device (and on JAX moves the whole state), so the
        applied batches are counted here; skipped steps only make the count an upper bound.
        """
        self._pending += batches
        accumulation = self.optimizer.base_optimizer().gradient_accumulation_steps or 1
        return self._step + math.ceil(self._pending / accumulation) >= self._next

    def _look(self):
        self._step = int(host(self.optimizer.iterations))
        self._pending = 0
        self._next = (self._step // self.update_every + 1) * self.update_every

    def _update_if_due(self):
        """Update the masks, if the step count says so; whether it did."""
        before, pending = self._step // self.update_every, self._pending
        self._look()
        if self._step // self.update_every == before:
            self._pending = pending if self._step % self.update_every == 0 else 0
            return False
        if self.is_due():
            self.update_masks()
            return True
        return False

    def current_drop_fraction(self, step: Any) -> float:
        """f(t): float, or a tensor for a step that is one."""
        if is_schedule(self.drop_fraction):
            value = self.drop_fraction(step)
            if isinstance(step, int):
                value = float(host(value))
                check_fraction(value)
            return value
        progress = (step - self._first_step) / (self._end_step - self._first_step)
        share = _SCHEDULES[self.drop_schedule]
        if isinstance(step, int):
            return self.drop_fraction * share(min(progress, 1.0), math.cos)
        return self.drop_fraction * share(ops.minimum(ops.cast(progress, "float32"), 1.0), ops.cos)

    # ------------------------------------------------------------------ one update

    def _weights(self):
        """The weights that this method is for."""
        return [
            weight
            for weight in self.optimizer.weights
            if weight.variable.trainable
            and (self.layers is None or is_named(weight.topology, self.layers))
        ]

    def update_masks(self) -> None:
        """Change the masks now, whatever the schedule says."""
        if self.check_replicas:  # before: the update gives all replicas the same
            assert_replicas_agree(self.optimizer)
        weights = self._weights()
        facts = self.optimizer.inspect(weights, self._gradient)
        # A layer that no loss depends on has no gradient; its topology stays.
        weights = [weight for weight in weights if facts[weight.index]["gradient_is_written"]]
        if not weights:
            raise ValueError(NO_GRADIENT)
        for what in ("gradient", "weight"):
            if not all(facts[weight.index][f"{what}_is_finite"] for weight in weights):
                name = {"gradient": "the dense gradient is", "weight": "the weights are"}[what]
                print(
                    f"\n{type(self).__name__}: {name} not finite at step {self._step}; "
                    "the masks stay as they are."
                )
                return
        plan = self.plan(weights, [weight.topology.num_active_units() for weight in weights])
        plan = [
            {"step": self._step, "index": weight.index, **numbers}
            for weight, numbers in zip(weights, plan)
        ]
        if self._ranks_on_host(weights):
            self._update_on_host(weights, plan)
        else:
            self.optimizer.update_compiled(
                [
                    (weight, self._ranking(weight), numbers)
                    for weight, numbers in zip(weights, plan)
                ],
                self._gradient,
                key=self._key(),
                keeps_budget=self.keeps_budget,
                donates=self._epoch is not None,
            )
        if self.check_replicas:
            assert_replicas_agree(self.optimizer)

    def _redistributed(self, weights, active, numbers):
        """How many units each weight drops, and how many it grows; of all together `numbers`."""
        read = host if self._ranks_on_host(weights) else ops.convert_to_tensor
        units, total = [weight.topology.units for weight in weights], sum(numbers)
        if self.redistribution == "mean":
            means = [
                float(host(masks.mean_magnitude(read(self._gradient(w)), read(w.topology.mask))))
                for w in weights
            ]
            room = [u.total - n + d for u, n, d in zip(units, active, numbers)]
            return numbers, _shared_out(total, means, room)
        values, scores, present = [], [], []
        for weight, unit, number in zip(weights, units, numbers):
            mask, gradient = read(weight.topology.mask), self._gradient(weight)
            gradient = None if gradient is None else read(gradient)
            numbers_so_far = {"step": self._step, "index": weight.index, "num_update": number}
            update = _update(weight.topology.geometry, mask.shape, numbers_so_far)
            arguments = read(weight.variable), mask, gradient, update
            values.append(abs(unit.magnitudes(self.values(*arguments))))
            scores.append(unit.scores(self.scores(*arguments)))
            present.append(unit.active(mask))
        kept = masks.best_together(values, present, sum(active) - total)
        numbers = [number - stays for number, stays in zip(active, kept)]
        free = [
            masks.xp_of(mask).logical_not(masks.drop(value, mask, number))
            for value, mask, number in zip(values, present, numbers)
        ]
        return numbers, masks.best_together(scores, free, total)

    def _ranks_on_host(self, weights):
        if self.compiled is not None:
            return not self.compiled
        return are_on_host([weight.variable for weight in weights])

    def _gradient(self, weight):
        """The dense gradient kept for a `Weight`; read one by one, each read may be a copy."""
        return None if self._lease is None else self._lease.gradient(weight.variable)

    def _update_on_host(self, weights, plan):
        """One by one: in parallel it is hardly faster, and takes the memory of several."""
        changed = active = 0
        for weight, numbers in zip(weights, plan):
            gradient = self._gradient(weight)
            gradient = None if gradient is None else host(gradient)
            old = host(weight.topology.mask)
            rank = self._ranking(weight)
            new, grown = rank(host(weight.variable), old, gradient, numbers)
            new = host(new)
            del gradient
            changed += int(np.count_nonzero(new & ~old))
            active += int(np.count_nonzero(new))
            if not np.array_equal(new, old):
                with freed(weight.variables if self._epoch is not None else []):
                    self.optimizer.rewire(weight.variable, new, self.keeps_budget, grown)
        self.optimizer.mask_change.assign(changed / max(active, 1))

    def _ranking(self, weight):
        """`new_mask` and `grown`, a function of arrays and numbers; the same for weights alike."""
        geometry = weight.topology.geometry

        def rank(value, mask, gradient, numbers):
            arguments = value, mask, gradient, _update(geometry, mask.shape, numbers)
            return self.new_mask(*arguments), self.grown(*arguments)

        return rank

    def _key(self):
        """What distinguishes compiled updates: the class, and every argument."""
        told = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        arguments = {k: v for k, v in told.items() if k not in ("params", "optimizer", "model")}
        key = type(self), *sorted(arguments.items())
        try:
            hash(key)
        except TypeError:
            return id(self)
        return key

    def read_logs(self) -> dict[str, float]:
        """What appears in the logs: dict of floats."""
        facts = self.optimizer.inspect(
            [weight for weight in self.optimizer.weights if weight.variable.trainable]
        )
        sizes = [math.prod(self.optimizer.weights[index].variable.shape) for index in facts]
        return {
            "sparsity": 1.0 - sum(fact["active"] for fact in facts.values()) / sum(sizes),
            "drop_fraction": self.current_drop_fraction(self._step),
            "itop_rate": self.optimizer.itop_rate(),
            "mask_change": float(host(self.optimizer.mask_change)),
            "dead_neurons": float(self.optimizer.dead_neurons()),
        }

    # ------------------------------------------------------------------ inside of `fit`

    def on_train_begin(self, logs=None):
        model = self.model
        self.end()  # of a fit that was interrupted
        self.optimizer, self._epoch = None, None
        self._find_optimizer(model)
        check_fit(model, own_loop=self.params.get("own_loop", False))
        self._check_interval(model.steps_per_execution)
        # TensorFlow builds a model without known input shape at its first batch.
        if not keras_internals.unbuilt_layers(model):
            self._begin_fit(model)

    def _find_optimizer(self, model):
        """The `SparseOpt` of the model that this method is for."""
        if self.optimizer_name is not None:
            return _required(getattr(model, self.optimizer_name, None))
        found = [o for o in optimizers_of(model) if sparse_opt_of(o) is not None]
        if len(found) > 1:
            names = [k for k, v in vars(model).items() if any(v is o for o in found)]
            raise ValueError(
                "The model has several SparseOpts: give each its own callback, with "
                f"`optimizer=`. Received: {', '.join(names)}"
            )
        return _required(found[0] if found else model.optimizer)

    def _check_interval(self, steps_per_execution):
        if self.update_every % steps_per_execution:
            raise ValueError(
                "`update_every` must be a multiple of `steps_per_execution`, or updates would "
                f"come late. Received: update_every={self.update_every}, "
                f"steps_per_execution={steps_per_execution}"
            )
        steps, epochs = self.params.get("steps"), self.params.get("epochs", 1)
        if steps is not None and steps % steps_per_execution and epochs > 1:
            raise ValueError(
                "The steps of an epoch must be a multiple of `steps_per_execution`, or updates "
                f"would come late. Received: {steps} steps, "
                f"steps_per_execution={steps_per_execution}"
            )

    def _begin_fit(self, model):
        if not sparse_weights(model):
            raise ValueError(
                "The model holds no sparse weight. Convert it with "
                "keras_sparseopt.sparsify(model, sparsity), or use SparseDense, SparseConv2D, …"
                f" Received: model '{model.name}'"
            )
        optimizer = self._find_optimizer(model)
        if optimizer is sparse_opt_of(model.optimizer):
            build_optimizer(model)
        elif not optimizer.built:  # the model's own step builds it
            return
        self.begin(optimizer, total_steps=self._fit_steps(model) or 1)
        use_step(model)
        self._tell_what_is_sparse(model)

    def _tell_what_is_sparse(self, model):
        if not self.params.get("verbose") or keras_internals.told_once(model):
            return
        masked, total, dense = masked_share(model)
        text = f"{masked / total:.1%} of the {total:,} kernel weights have a mask"
        if dense:
            names = ", ".join(f"{path} ({size:,}, {why})" for path, size, why in dense[:8])
            more = f" and {len(dense) - 8} more" if len(dense) > 8 else ""
            text += f"; dense: {names}{more}"
        print(f"{type(self).__name__}: {text}.")

    def _fit_steps(self, model):
        """Optimizer steps from epoch 0 to the end of this fit, `None` if unknown."""
        if self.params.get("steps") is None:
            return None
        base = self._find_optimizer(model).base_optimizer()
        accumulation = base.gradient_accumulation_steps or 1
        return self.params["epochs"] * self.params["steps"] / accumulation

    def _settle(self):
        """Read phase and horizon off the step count, which may just have been restored."""
        self._settled = True
        self.optimizer.settle()
        if self.end_step is None:
            steps = self._fit_steps(keras_internals.model_of(self))
            now = int(host(self.optimizer.iterations))
            if steps is None:
                if not (self._epoch and now):
                    raise ValueError(
                        "`end_step` must be given when the number of steps per epoch is unknown. "
                        "Received: end_step=None"
                    )
                steps = now / self._epoch * self.params["epochs"]  # as many as so far
            before_this_fit = math.floor(now - self._epoch * steps / self.params["epochs"])
            self._set_horizon(max(0, before_this_fit), steps)
        self._look()

    def on_epoch_begin(self, epoch, logs=None):
        self._applied, self._epoch = 0, epoch
        # Not in `on_train_begin`: BackupAndRestore may have restored the state after ours.
        if self.optimizer is not None and not self._settled:
            self._attach_state()
            self._settle()

    # Not `on_train_batch_end`: Keras would wait for the loss of every batch, and call it in a
    # thread beside the training. The next batch's beginning is the same point.
    def on_train_batch_begin(self, batch, logs=None):
        batches, self._applied = batch - self._applied, batch
        if not batches:
            return
        if self.optimizer is None:  # the first batch has built the model
            self._begin_late()
        elif self._may_be_due(batches):
            self._attach_state()
            self._update_if_due()
            self._stop_keeping_gradients()

    def _begin_late(self):
        self._begin_fit(self.model)
        if self.optimizer is not None:
            self._settle()

    def _stop_keeping_gradients(self):
        if self._lease is not None and self.is_over():
            self.end()
            use_step(keras_internals.model_of(self))

    def _after_last_batch(self):
        """An update that is due after an epoch's last step comes before anything looks at it."""
        if self.optimizer is None:
            self._begin_late()
        elif self._epoch is not None:
            self._update_if_due()
            self._stop_keeping_gradients()

    def on_test_begin(self, logs=None):
        if self._epoch is not None:
            self._attach_state()
            self._after_last_batch()

    def _attach_state(self):
        # In the middle of an epoch JAX holds the state outside of the variables; reading
        # `model` puts it back. It costs, so only where variables are read.
        _ = self.model

    def on_epoch_end(self, epoch, logs=None):
        self._attach_state()
        self._after_last_batch()
        if self.optimizer is not None:
            self._logs = self.read_logs()
            if logs is not None:
                logs.update(self._logs)

    def on_train_end(self, logs=None):
        self._epoch = None
        if self.optimizer is not None:
            self.end()
            use_step(self.model)


def _update(geometry, shape, numbers):
    """What `scores` and `new_mask` are told beside the arrays."""
    units = geometry.units(shape)
    return types.SimpleNamespace(units=units, **geometry._asdict(), **numbers)


def _shared_out(total, shares, room):
    """Ints that add up to `total`, in proportion to `shares`, none above its `room`."""
    given: np.ndarray = np.zeros(len(room), int)
    room = np.asarray(room)
    while given.sum() < total:
        rest = total - int(given.sum())
        weights = np.where(given < room, np.maximum(shares, 0.0), 0.0)
        if not weights.any():
            weights = (given < room).astype(float)
        ideal = rest * weights / weights.sum()
        more = np.minimum(np.floor(ideal).astype(int), room - given)
        if not more.any():  # less than one for each: the largest shares first
            more[np.argsort(-ideal, kind="stable")[:rest]] = 1
            more = np.minimum(more, room - given)
        given += more
    return [int(number) for number in given]


def _required(optimizer):
    found = sparse_opt_of(optimizer)
    if found is None:
        raise ValueError(
            "The optimizer must be a SparseOpt: it moves masks, weights and slots together. "
            "Compile with optimizer=keras_sparseopt.SparseOpt(optimizer); for masking without "
            "the correction SparseOpt(optimizer, skew_correction=False). "
            f"Received: optimizer={type(optimizer).__name__}"
        )
    return found
