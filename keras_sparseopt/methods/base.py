"""Dynamic sparse training: what all methods share. Each has a file of its own."""

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any, Never

import numpy as np
from keras import ops

from keras_sparseopt import masks
from keras_sparseopt.backend import are_on_host, host
from keras_sparseopt.checks import (
    check_among,
    check_bool,
    check_fraction,
    check_int,
    frozen,
    is_schedule,
)
from keras_sparseopt.devices import assert_replicas_agree
from keras_sparseopt.methods.schedule import DROP_SCHEDULES, drop_fraction_at
from keras_sparseopt.methods.stateless import stateless_update
from keras_sparseopt.methods.steps import StepCallback
from keras_sparseopt.models.topology import followers_of, topology_of
from keras_sparseopt.optimizers import moving
from keras_sparseopt.typing import Array, DropFraction, DropSchedule, GrowthValues, Redistribution

# What a callback is beside its arguments: compiled updates do not depend on it.
_NO_ARGUMENTS = {
    "params", "optimizer", "optimizer_name", "layers", "_model", "_run",
    "update_every", "begin_step", "end_step", "compiled", "check_replicas",
}  # fmt: skip


class DynamicSparseTraining(StepCallback):
    """Base of the mask-update methods: drop the smallest weights, grow others, keep the count.

    ```
    every `update_every` optimizer steps t, begin_step ≤ t < end_step, for every sparse weight:
        f(t)     = drop_fraction/2 · (1 + cos(π t / end_step))      see `drop_schedule`
        n_update = floor(f(t) · n_active)
        mask     = drop_and_grow(weight, mask, scores, n_update)
    ```

    The update comes right after optimizer step t, from the weights after that step (and, for
    RigL, the gradient of that step). Where nothing will happen in a training, a warning says so.

    A method is a subclass with its own `scores`, `values` or `new_mask`: pure functions of arrays
    of *units*, the choices that the structure of the mask leaves. A unit is a single weight, and
    arrays of units have the weight's shape, for `Unstructured` and `ConstantFanIn`; under `Block` a
    unit is a tile, and stands for the sums of the magnitudes in it (see `Structure`). `plan`,
    `is_due`, `is_over` and `lease` say when and with what.

    Put it in `fit(callbacks=[...])`, before callbacks that read its logs (`CSVLogger`) or
    save the model. At the end of every epoch it writes `sparsity`, `drop_fraction`, `itop_rate`,
    `mask_change` (the fraction of active weights that the last update made new) and `dead_neurons`
    (neurons of all sparse weights without an active incoming weight) into the logs.
    Methods log what means something for them. Between updates nothing is read but, now and then,
    the step count, and Keras' asynchronous dispatch stays on.

    In a custom loop, the same object works without `fit`:

    ```
    if method.begin(optimizer, total_steps):
        ...                        # make the train step again, if it was compiled before
    for batch in data:
        train_step(batch)          # calls optimizer.apply, once or several times
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
            the steps of this fit; give it where one training is several fits. Where the data has
            no known length, it is known after one epoch, and the drop fraction stays until then.
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
        **others: None; the error for an argument of another name says what there is.

    Raises:
        TypeError: For an argument of another name.
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
            rows, columns = mask.shape  # of an unstructured Dense kernel
            distance = keras.ops.arange(rows)[:, None] - keras.ops.arange(columns)[None, :]
            return -keras.ops.cast(keras.ops.abs(distance), "float32")

    callback = ByDistance(update_every=10, end_step=100)
    ```
    """

    # Whether the method needs the dense gradient of the step before an update.
    uses_gradient = False
    # Whether connections grow, so that the options about that mean something.
    grows = True
    # Whether every weight keeps its number of active units in an update.
    keeps_number = True
    # Whether a mask may stay below the number of active weights that it was given.
    keeps_budget = False
    # What `read_logs` writes.
    logged: tuple[str, ...] = (
        "sparsity",
        "drop_fraction",
        "itop_rate",
        "mask_change",
        "dead_neurons",
    )

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
        **others: Never,
    ) -> None:
        self._refuse(others)
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
        check_among("drop_schedule", drop_schedule, DROP_SCHEDULES)
        check_among("growth_values", growth_values, ("zero", "random"))
        check_among("redistribution", redistribution, ("mean", "global", None))
        growing = {"drop_schedule": (drop_schedule, "cosine"),
                   "growth_values": (growth_values, "zero"),
                   "redistribution": (redistribution, None)}  # fmt: skip
        for name, (value, default) in growing.items():
            if value != default and not self.grows:
                raise ValueError(
                    f"`{name}` is for methods that grow connections, which {type(self).__name__} "
                    f"does not. Received: {name}={value!r}"
                )
        if redistribution == "mean" and not self.uses_gradient:
            raise ValueError(
                f'`redistribution="mean"` needs gradients, which {type(self).__name__} does not '
                "use; \"global\" does not. Received: redistribution='mean'"
            )
        self.update_every = int(update_every)
        self.begin_step = int(begin_step)
        self.end_step = None if end_step is None else int(end_step)
        super().__init__(layers, optimizer)
        self.drop_fraction: Any = drop_fraction
        self.drop_schedule = drop_schedule
        self.growth_values = growth_values
        self.redistribution = redistribution
        self.seed = int(seed)
        self.compiled = compiled
        self.check_replicas = check_replicas

    def _refuse(self, others):
        """Raise TypeError for arguments that there are none of, under the name of the method."""
        for name, value in others.items():
            known = inspect.signature(type(self)).parameters
            way = f"It has {', '.join(known)}"
            if name == "sparsity":
                way = "Masks are made before, by keras_sparseopt.sparsify(model, sparsity)"
                if "final_sparsity" in known:
                    way = "It is `final_sparsity` here"
            raise TypeError(
                f"{type(self).__name__} has no argument `{name}`. {way}. Received: {name}={value!r}"
            )

    # ------------------------------------------------------------------ what a method chooses

    def scores(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        """What grows first: larger scores.

        Args:
            weight: Float array of units, the present values (of tiles the sums of magnitudes).
            mask: Bool array of units, the active ones.
            gradient: Array of units of the dense gradient (of tiles the sums of magnitudes), for a
                method with `uses_gradient`; else `None`.
            update: What else is known: `update.step`, the optimizer step; `update.index`, the
                weight's number among all; `update.num_update` and what else `plan` says;
                `update.units`, the choices that the structure of the mask allows (`Units`);
                `update.neuron_axes`, `update.input_axes` and `update.skew_correction` of its
                topology; `update.neuron_scale()`, SparseOpt's correction, which broadcasts over
                the units; `update.mean_magnitude()` of the active weights; and
                `update.draw_weights(seed)`, uniform draws for every single weight.

        Returns:
            Float array of units. Unless overridden, |gradient|. All arrays are NumPy's, or tensors
            while the update is compiled; Python's operators and `keras.ops` serve both.
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
            Float array of units.
        """
        return weight

    def new_mask(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        """The next active units of one weight: a pure function.

        Choose by `update.units`, which keeps the structure of the mask. Any other mask without it
        is refused on the host; compiled, nothing checks that.

        Args:
            weight, mask, gradient, update: As in `scores`.

        Returns:
            Bool array of units.
        """
        values = self.values(weight, mask, gradient, update)
        scores = self.scores(weight, mask, gradient, update)
        return update.units.drop_and_grow(values, mask, scores, update.num_update, update.num_grow)

    def grown(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        """Where new connections start; unless overridden, as `growth_values` says.

        Args:
            weight, mask, gradient, update: As in `scores`, before the update.

        Returns:
            Float array of units or of the weight's shape, or `None` for 0.
        """
        if self.growth_values == "zero":
            return None
        # Another stream than that of random growth, whose draws are large where something grows.
        return update.mean_magnitude() * (2 * update.draw_weights(self.seed ^ 2**63) - 1)

    def plan(self, weights: list[Any], active: list[int]) -> list[dict[str, Any]]:
        """What an update must know of all weights together, before any of them changes.

        Args:
            weights: List of `Weight`, those of the optimizer that will be updated.
            active: List of ints, their active units.

        Returns:
            List of dicts of numbers, which become attributes of `update`.
        """
        fraction = self.current_drop_fraction(self.current_step)
        numbers = [math.floor(fraction * number) for number in active]
        grown = numbers
        if self.redistribution is not None:
            numbers, grown = self._redistributed(weights, active, numbers)
        return [{"num_update": d, "num_grow": g} for d, g in zip(numbers, grown)]

    # ------------------------------------------------------------------ when, and with what

    def is_due(self) -> Any:
        """Whether masks change at `self.current_step`, a multiple of `update_every`: bool.

        Inside of `stateless_step` the step is a tensor, and so is the answer.
        """
        step, schedule = self.current_step, self.schedule
        if isinstance(step, int):
            return schedule.begin <= step < schedule.end
        return ops.logical_and(step >= schedule.begin, step < schedule.end)

    def is_over(self) -> bool:
        """Whether masks will not change any more."""
        return self.current_step >= self.schedule.end

    def lease(self, optimizer: Any) -> Any:
        """The `Lease` on dense gradients that the method needs, or `None`."""
        return optimizer.lease_gradients(1, self.update_every) if self.uses_gradient else None

    def current_drop_fraction(self, step: Any) -> Any:
        """f(t): float, or a tensor for a step that is one."""
        return drop_fraction_at(step, self.drop_fraction, self.drop_schedule, self.schedule)

    def check_weights(self) -> None:
        variables = [weight.variable for weight in self.weights()]
        variables += [follower for v in variables for follower in followers_of(v)]
        topologies = [v.topology for v in variables if topology_of(v) is not None]
        condensed = [topology.name for topology in topologies if topology.is_condensed]
        if condensed and not self.keeps_number:
            raise ValueError(
                f"{type(self).__name__} changes how many weights are active, which condensed "
                "weights cannot: prune first, then call keras_sparseopt.condense(model) (or "
                "uncondense(model) now). Received: " + ", ".join(condensed)
            )
        if self.redistribution is None:
            return
        for topology in (weight.topology for weight in self.weights()):
            if topology.units.is_grouped:
                raise ValueError(
                    "`redistribution` is for weights whose number of active ones is free; leave "
                    f"others out by `layers=`. Received: '{topology.name}' of {topology.structure}"
                )

    # ------------------------------------------------------------------ one update

    def act(self) -> None:
        self.update_masks()

    def update_masks(self) -> None:
        """Change the masks now, whatever the schedule says."""
        if self.check_replicas:  # before: the update gives all replicas the same
            assert_replicas_agree(self.optimizer)
        weights = self.weights()
        if not weights:
            warnings.warn(
                f"{type(self).__name__} changes no mask at step {self.current_step}: all weights "
                "that it is for are frozen now.",
                stacklevel=2,
            )
            return
        facts = moving.inspect(weights, self.gradient_of)
        if not any(fact["has_gradient"] for fact in facts.values()):
            self.no_gradient(weights)
            return
        # A layer that no loss depends on has no gradient; its topology stays.
        weights = [weight for weight in weights if facts[weight.index]["has_gradient"]]
        for what in ("gradient", "weight"):
            if not all(facts[weight.index][f"{what}_is_finite"] for weight in weights):
                name = {"gradient": "the dense gradient is", "weight": "the weights are"}[what]
                print(
                    f"\n{type(self).__name__}: {name} not finite at step {self.current_step}; "
                    "the masks stay as they are."
                )
                return
        plan = self.plan(weights, [weight.topology.num_active_units() for weight in weights])
        plan = [
            {"step": self.current_step, "index": weight.index, **numbers}
            for weight, numbers in zip(weights, plan)
        ]
        arguments = {
            "weights": weights, "choose": self.choose, "plan": plan,
            "gradient_of": self.gradient_of, "keeps_budget": self.keeps_budget,
            "donates": self._run.epoch is not None,
        }  # fmt: skip
        mover = self.optimizer.mover
        if self._chooses_on_host(weights):
            mover.update_on_host(**arguments)
        else:
            mover.update_compiled(**arguments, key=self._key())
        if self.check_replicas:
            assert_replicas_agree(self.optimizer)

    def choose(self, weight, mask, gradient, update):
        """The new active units, and where new ones start: all that an update asks of a method."""
        with self._run.at(update.step):  # which a compiled update must not take for a constant
            return (
                self.new_mask(weight, mask, gradient, update),
                self.grown(weight, mask, gradient, update),
            )

    def _chooses_on_host(self, weights):
        if self.compiled is not None:
            return not self.compiled
        return are_on_host([weight.variable for weight in weights])

    def _key(self):
        """What tells compiled updates apart: the class, and all that an instance holds."""
        held = {name: value for name, value in vars(self).items() if name not in _NO_ARGUMENTS}
        return type(self), frozen(held)

    def read_units(self, weight: Any) -> tuple[Array, Array, Array]:
        """(values, active, gradient) of the units of a `Weight`, as hooks get them.

        NumPy's arrays if masks are chosen on the host, else tensors.
        """
        as_array = host if self._chooses_on_host([weight]) else ops.convert_to_tensor
        gradient = self.gradient_of(weight)
        gradient = None if gradient is None else as_array(gradient)
        topology, values = weight.topology, as_array(weight.variable)
        return topology.form.read(values, as_array(topology.filled_pattern), gradient)

    def _redistributed(self, weights, active, numbers):
        """How many units each weight drops, and how many it grows; of all together `numbers`."""
        total = sum(numbers)
        if self.redistribution == "mean":
            means = []
            for weight in weights:
                _, mask, gradient = self.read_units(weight)
                means.append(float(host(masks.mean_magnitude(gradient, mask))))
            totals = [weight.topology.units.total for weight in weights]
            room = [all_ - n + d for all_, n, d in zip(totals, active, numbers)]
            return numbers, _shared_out(total, means, room)
        values, scores, present = [], [], []
        for weight, number in zip(weights, numbers):
            units = self.read_units(weight)
            facts = self._facts(weight, num_update=number)
            values.append(abs(self.values(*units, facts)))
            scores.append(self.scores(*units, facts))
            present.append(units[1])
        kept = masks.best_together(values, present, sum(active) - total)
        numbers = [number - stays for number, stays in zip(active, kept)]
        free = [
            masks.xp_of(mask).logical_not(masks.drop(value, mask, number))
            for value, mask, number in zip(values, present, numbers)
        ]
        return numbers, masks.best_together(scores, free, total)

    def _facts(self, weight, **numbers):
        as_array = host if self._chooses_on_host([weight]) else ops.convert_to_tensor
        topology = weight.topology
        return moving.facts_of(
            topology.geometry, as_array(weight.variable), as_array(topology.filled_pattern),
            {"step": self.current_step, "index": weight.index, **numbers},
            self.optimizer.correction,
        )  # fmt: skip

    def read_logs(self) -> dict[str, float]:
        topologies = [weight.topology for weight in self.optimizer.weights]
        size = sum(math.prod(topology.shape) for topology in topologies)
        measures = {
            "sparsity": lambda: 1.0 - sum(t.num_active() for t in topologies) / size,
            "drop_fraction": lambda: self.current_drop_fraction(self.current_step),
            "itop_rate": self.optimizer.itop_rate,
            "mask_change": lambda: float(host(self.optimizer.mask_change)),
            "dead_neurons": lambda: float(self.optimizer.dead_neurons()),
        }
        return {name: measures[name]() for name in self.logged}

    # ------------------------------------------------------------------ JAX without variables

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
            NotImplementedError: For a method with a plan of its own (`GMP`, `GraNet`, `SRigL`), or
                whose `is_due` cannot be traced.
        """
        if type(self).plan is not DynamicSparseTraining.plan or self.redistribution is not None:
            raise NotImplementedError(
                f"{type(self).__name__} plans its updates on the host; use `fit` or `step`."
            )
        return stateless_update(self, optimizer_variables, trainable_variables)


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
