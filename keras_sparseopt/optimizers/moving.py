"""An update of a mask: read, choose, move.

*Read* gives arrays of units: value, active, gradient. *Choose* is a method's pure function of them.
*Move* changes all that belongs to a weight together: itself, its mask, its slots, the correction's
scale, the bits of what was ever active. The first and the last alone know how a weight is stored.

| where | read | choose | move |
|---|---|---|---|
| on the host | NumPy, the same memory | NumPy | `Topology.change` |
| compiled | in one program | in the same | in the same, its results are assigned |
| in a step of one's own on JAX | in the step | in the step | in the step |
"""

import functools
import types

import numpy as np
from keras import ops

from keras_sparseopt import backend, masks
from keras_sparseopt.backend import are_on_host, compiled, host


class Weight:
    """One sparse weight as its optimizer sees it.

    Attributes:
        variable, topology: The Keras variable, and what hangs on it.
        index: Int, its number among the optimizer's sparse weights.
        slots: List of the optimizer's variables of the weight's shape.
        explored: int32 variable, one bit per weight that was ever active.
        budget: int32 variable, the active units that the mask was given: what SRigL may use up.
        scale: Float variable, the correction of every neuron; `None` where there is none.
        mask_copy: On JAX the optimizer's own copy of the mask of a layer sparse by construction,
            which its step could not read; else `None`.
        taps: Dict from `Averaging` to the `Tap` that keeps the weight's dense gradient.
    """

    def __init__(self, variable, index, slots, explored, budget, scale, mask_copy):
        self.variable = variable
        self.topology = variable.topology
        self.index = index
        self.slots = slots
        self.explored = explored
        self.budget = budget
        self.scale = scale
        self.mask_copy = mask_copy
        self.taps: dict = {}

    @property
    def mask(self):
        """The variable that the training step reads."""
        return self.topology.mask_variable if self.mask_copy is None else self.mask_copy

    @property
    def moving_variables(self):
        """What a mask update computes anew in floats: the weight and its slots; and the bits."""
        return [self.variable, *self.slots, self.explored]

    @property
    def variables(self):
        """All that moves in a mask update."""
        scale = [] if self.scale is None else [self.scale]
        mask = self.topology.mask_variable
        return [*self.moving_variables, mask, self.mask, *scale]


# ---------------------------------------------------------------------- read


def read(units, value, mask, gradient):
    """(values, active, gradient) of the units of a weight.

    Args:
        units: `Units` of the weight.
        value, mask: Arrays of the weight's shape.
        gradient: Array of its shape, or `None`.

    Returns:
        Arrays of units: for a unit that is one weight its value and its gradient as they are, for
        one of several the sums of their magnitudes; the gradient is `None` without one.
    """
    found = None if gradient is None else units.magnitudes(gradient)
    return units.magnitudes(value), units.active(mask), found


def facts_of(geometry, value, mask, numbers, correction):
    """What hooks are told beside the arrays of units: a namespace.

    Args:
        geometry: `Geometry` of the weight.
        value, mask: Arrays of its shape.
        numbers: Dict of numbers, which become attributes.
        correction: Function of a mask and neuron axes, SparseOpt's.
    """
    units = geometry.units(mask.shape)

    def neuron_scale():
        found = correction(mask, geometry.neuron_axes)
        return units.of_neurons(host(found) if masks.on_host(mask) else found)

    return types.SimpleNamespace(
        units=units,
        neuron_scale=neuron_scale,
        mean_magnitude=lambda: masks.mean_magnitude(value, mask),
        draw_weights=lambda seed: masks.random_scores(
            mask, seed, numbers["index"], numbers["step"]
        ),
        **geometry._asdict(),
        **numbers,
    )


# ---------------------------------------------------------------------- move


def follow(slots, explored, mask, correction, axes, is_first=False):
    """What follows a new mask: slots are 0 where it is not, and it was active from now on.

    Args:
        slots: List of arrays of the weight's shape.
        explored: int32 array of bits.
        mask: Bool array, the new one.
        correction: Function of a mask and neuron axes, or `None`.
        axes: Tuple of ints, the neuron axes.
        is_first: Bool, whether earlier masks do not count as explored.

    Returns:
        Tuple of slots, bits, and the correction's scale or `None`.
    """
    slots = [ops.where(mask, slot, ops.cast(0, slot.dtype)) for slot in slots]
    now = masks.packed(mask)
    explored = now if is_first else ops.bitwise_or(explored, now)
    return slots, explored, None if correction is None else correction(mask, axes)


def update(choose, correction, geometry, has_scale, is_first):
    """A whole mask update of one weight as a pure function: read, choose and move.

    Args:
        choose: Function of the arrays of units and of `facts_of`: the new active units, and where
            new ones start (an array of units or of the weight's shape), or `None` for 0.
        correction: SparseOpt's.
        geometry: `Geometry` of the weight.
        has_scale: Bool, whether SparseOpt corrects it.
        is_first: Bool, as in `follow`.

    Returns:
        Function of ([value, *slots, explored], mask, gradient, numbers) → the first two, new, the
        scale or `None`, and how many weights are new, are active, and how many units are active.
    """

    def run(state, mask, gradient, numbers):
        value, *slots, explored = state
        facts = facts_of(geometry, value, mask, numbers, correction)
        chosen, grown = choose(*read(facts.units, value, mask, gradient), facts)
        new = facts.units.write(chosen)
        survives = ops.logical_and(new, mask)
        grows = ops.logical_and(new, ops.logical_not(mask))
        value = masks.moved(value, survives, grows, facts.units.spread(grown))
        own = correction if has_scale else None
        slots, explored, scale = follow(slots, explored, new, own, geometry.neuron_axes, is_first)
        counts = masks.count(grows), masks.count(new), masks.count(chosen)
        return [value, *slots, explored], new, scale, counts

    return run


class Mover:
    """Changes the masks of an optimizer's weights, on the host or where they are.

    Args:
        optimizer: `SparseOpt`.
    """

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self._programs: dict = {}

    def _program(self, key, function, donate=()):
        if key not in self._programs:
            self._programs[key] = compiled(function, donate=donate)
        return self._programs[key]

    # ------------------------------------------------------------------ a mask has changed

    def follow(self, weight, explores=True):
        """A mask has changed: slots, correction and what was explored follow.

        Args:
            weight: `Weight`.
            explores: Bool; `False` where what was explored comes from a file, too.
        """
        topology, optimizer = weight.topology, self._optimizer
        mask = ops.convert_to_tensor(topology.mask_variable)
        correction = None if weight.scale is None else optimizer.correction
        axes = topology.neuron_axes

        def run(slots, explored, mask):
            return follow(slots, explored, mask, correction, axes)

        if are_on_host([topology.mask_variable]):
            mask = host(mask)
        else:
            run = self._program(("follow", axes, correction is None), run)
        slots = [ops.convert_to_tensor(slot) for slot in weight.slots]
        explored = ops.convert_to_tensor(weight.explored)
        if optimizer.has_not_stepped():
            explored = ops.zeros_like(explored)
        slots, explored, scale = run(slots, explored, mask)
        for slot, value in zip(weight.slots, slots):
            slot.assign(value)
        if weight.mask_copy is not None:
            copy = np.array(mask) if isinstance(mask, np.ndarray) else ops.copy(mask)
            weight.mask_copy.assign(copy)
        if scale is not None:
            weight.scale.assign(scale)
        if explores:
            weight.explored.assign(explored)

    # ------------------------------------------------------------------ a method's update

    def update_on_host(self, weights, choose, plan, gradient_of, keeps_budget, donates):
        """Change masks one by one: in parallel it is hardly faster, and takes the memory of all.

        Args:
            weights: List of `Weight`s.
            choose: As in `update`.
            plan: List of dicts of numbers, one for each.
            gradient_of: Function of a `Weight`: its gradient, a tensor, or `None`.
            keeps_budget: Bool, whether the masks' budgets stay as they are.
            donates: Bool, whether the memory of the variables may be given to their new values.
        """
        optimizer = self._optimizer
        changed = active = 0
        for weight, numbers in zip(weights, plan):
            topology, gradient = weight.topology, gradient_of(weight)
            gradient = None if gradient is None else host(gradient)
            old = host(topology.mask)
            value = host(weight.variable)
            facts = facts_of(topology.geometry, value, old, numbers, optimizer.correction)
            chosen, grown = choose(*read(facts.units, value, old, gradient), facts)
            new, grown = host(facts.units.write(host(chosen))), facts.units.spread(grown)
            del facts, gradient, value  # the memory is that of the variables, which may be freed
            changed += int(np.count_nonzero(new & ~old))
            active += int(np.count_nonzero(new))
            if not np.array_equal(new, old):
                with backend.freed(weight.variables if donates else []):
                    optimizer.rewire(weight.variable, new, keeps_budget, grown)
        optimizer.mask_change.assign(changed / max(active, 1))

    def update_compiled(self, weights, choose, plan, gradient_of, keeps_budget, donates, key):
        """Change masks where the variables are; nothing comes to the host.

        Args:
            weights, choose, plan, gradient_of, keeps_budget, donates: As in `update_on_host`.
            key: Hashable; with the same key `choose` is the same.
        """
        optimizer = self._optimizer
        is_first = optimizer.has_not_stepped()
        changed, active = [], []
        for weight, numbers in zip(weights, plan):
            topology, has_scale = weight.topology, weight.scale is not None
            geometry = topology.geometry
            program = self._program(
                ("update", key, geometry, has_scale, is_first, donates),
                update(choose, optimizer.correction, geometry, has_scale, is_first),
                donate=(0,) if donates else (),
            )
            moving = weight.moving_variables
            state = [ops.convert_to_tensor(variable) for variable in moving]
            numbers = {k: np.asarray(v, _dtype(v)) for k, v in numbers.items()}
            mask = ops.convert_to_tensor(topology.mask)
            state, mask, scale, (new, now, units) = program(
                state, mask, gradient_of(weight), numbers
            )
            with topology.moving():
                for variable, value in zip(moving, state):
                    variable.assign(value)
                topology.mask_variable.assign(mask)
            if weight.mask_copy is not None:
                weight.mask_copy.assign(ops.copy(mask))
            if scale is not None:
                weight.scale.assign(scale)
            for other in topology.optimizers:
                if other is not optimizer:
                    other.follow(topology)
                if not keeps_budget:
                    other.weight_of(weight.variable).budget.assign(ops.cast(units, "int32"))
            changed.append(new)
            active.append(now)
        counts = ops.maximum(sum(active), 1)
        changed = ops.cast(sum(changed), "float32")
        optimizer.mask_change.assign(changed / ops.cast(counts, "float32"))

    # ------------------------------------------------------------------ looking

    def dead_neurons(self, weights):
        """How many neurons have no active incoming weight: int."""
        number = 0
        for weight in weights:
            axes = weight.topology.neuron_axes
            if are_on_host([weight.mask]):
                number += int(_count_dead(host(weight.mask), axes))
            else:
                count = self._program(("dead", axes), functools.partial(_count_dead, axes=axes))
                number += int(host(count(ops.convert_to_tensor(weight.mask))))
        return number


def _dtype(value):
    return "int32" if isinstance(value, (int, np.integer)) else "float32"


def _count_dead(mask, axes):
    return masks.count(masks.neuron_counts(mask, axes) == 0)


def count_bits(words):
    """How many bits are set in a variable of int32."""
    if are_on_host([words]):
        return masks.count_packed(host(words))
    return int(host(_count_packed(ops.convert_to_tensor(words))))


_count_packed = compiled(masks.count_packed)


# ---------------------------------------------------------------------- before it may begin


def inspect(weights, gradient_of=lambda weight: None):
    """What a mask update must know before it may begin, a few numbers of each weight.

    Args:
        weights: List of `Weight`s.
        gradient_of: Function of a `Weight`: its gradient, a tensor, or `None`.

    Returns:
        Dict from index to a dict: `active` (int), `weight_is_finite`, `gradient_is_finite`,
        `has_gradient` (bools). A gradient that is 0 throughout is none: JAX gives that to what
        no loss depends on, where TensorFlow gives nothing.
    """
    found = {}
    for weight in weights:
        gradient = gradient_of(weight)
        arrays = weight.variable, weight.mask
        if are_on_host(arrays):
            value, mask = map(host, arrays)
            found[weight.index] = _facts_on_host(value, mask, gradient)
        else:
            tensors = [ops.convert_to_tensor(array) for array in arrays]
            found[weight.index] = _compiled_facts(*tensors, gradient)
    always = {"gradient_is_finite": True, "has_gradient": True}
    return {
        index: {**always, **{name: np.asarray(value).item() for name, value in facts.items()}}
        for index, facts in found.items()
    }


# What a dense gradient is before any step has written it.
UNWRITTEN = -np.inf


def is_gradient(gradient):
    """Whether a kept gradient is one: written, and not 0 throughout; a bool or a tensor."""
    xp = masks.xp_of(gradient)
    is_something = xp.logical_and(xp.not_equal(gradient, 0), xp.not_equal(gradient, UNWRITTEN))
    return xp.any(is_something)


def _facts_on_host(weight, mask, gradient):
    facts = {"active": np.count_nonzero(mask), "weight_is_finite": _is_finite(weight)}
    if gradient is not None:
        gradient = host(gradient)
        facts["gradient_is_finite"] = _is_finite(gradient)
        facts["has_gradient"] = is_gradient(gradient)
    return facts


def _is_finite(values):
    values = values.ravel()
    # One fast pass; it can only overflow where a value has become enormous.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(values, values)):
            return True
    return bool(np.isfinite(values).all())


@compiled
def _compiled_facts(weight, mask, gradient):
    facts = {"active": masks.count(mask), "weight_is_finite": ops.all(ops.isfinite(weight))}
    if gradient is not None:
        facts["gradient_is_finite"] = ops.all(ops.isfinite(gradient))
        facts["has_gradient"] = is_gradient(gradient)
    return facts
