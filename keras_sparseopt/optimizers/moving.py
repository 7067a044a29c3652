"""An update of a mask: read, choose, move.

*Read* gives arrays of units: value, active, gradient. *Choose* is a method's pure function of them.
*Move* changes all that belongs to a weight together: itself, its pattern, its slots, the
correction's scale, the bits of what was ever active. The first and the last alone know how a weight
is stored: they are functions of its form (`keras_sparseopt.forms`).

| where | read | choose | move |
|---|---|---|---|
| on the host | NumPy, the same memory | NumPy | `Topology.change` |
| compiled | in one program | in the same | in the same, its results are assigned |
| in a step of one's own on JAX | in the step | in the step | in the step |
"""

import functools
import types
from typing import Any

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
        spare_scale: The variable of `scale`, kept where another form does without it.
        held_copy: The optimizer's own copy of what its step must hold at 0, where it could not
            read that: on JAX the mask of a layer sparse by construction, and where the tiles of a
            condensed weight reach beyond its inputs; else `None`.
        seen: `Seen`, by what the backward pass of a condensed weight tells of its dense gradient
            while somebody holds a lease; `None` before the first one.
        calls: Int, how often the last traced step has called the layer of a condensed weight; 0 if
            that is not known.
        taps: Dict from `Averaging` to the `Tap` that keeps the weight's dense gradient.
        own_taps: The same, of what the optimizer gets as the gradient of a condensed weight that
            has a regularizer.
    """

    def __init__(self, variable, index, slots, explored, budget, scale, held_copy):
        self.variable = variable
        self.topology = variable.topology
        self.index = index
        self.slots = slots
        self.explored = explored
        self.budget = budget
        self.scale = scale
        self.held_copy = held_copy
        self.spare_scale = scale
        self.seen: Any = None
        self.calls = 0
        self.taps: dict = {}
        self.own_taps: dict = {}

    @property
    def held(self):
        """What the training step holds the values to: a bool variable; `None` for nothing."""
        if self.held_copy is not None or self.topology.is_condensed:
            return self.held_copy
        return self.topology.pattern

    def look(self, shape):
        """Let the layer of a condensed weight tell of its dense gradient, in an array of a shape.

        Compiled steps hold what it is told by, so that stays the same.
        """
        if self.seen is None:
            self.seen = backend.Seen(self.variable, f"{self.variable.name}_seen")
        self.seen.open(shape)
        if self.seen not in self.topology.seen:
            self.topology.seen.append(self.seen)

    def look_away(self):
        """Let it tell no more."""
        if self.seen is not None and self.seen in self.topology.seen:
            self.topology.seen.remove(self.seen)
            self.seen.close()

    @property
    def moving_variables(self):
        """What a mask update computes anew in floats: the weight and its slots; and the bits."""
        return [self.variable, *self.slots, self.explored]

    @property
    def variables(self):
        """All that moves in a mask update."""
        others = self.topology.pattern, self.held, self.scale
        return [*self.moving_variables, *(v for v in others if v is not None)]


# ---------------------------------------------------------------------- read


def facts_of(geometry, values, pattern, numbers, correction):
    """What hooks are told beside the arrays of units: a namespace.

    Args:
        geometry: `Geometry` of the weight.
        values, pattern: Arrays.
        numbers: Dict of numbers, which become attributes.
        correction: Function of a mask and neuron axes, SparseOpt's.
    """
    units, form = geometry.units, geometry.form

    def neuron_scale():
        found = correction(form.mask(pattern), geometry.neuron_axes)
        return units.of_neurons(host(found) if masks.on_host(pattern) else found)

    def draw_weights(seed):
        mask = form.mask(pattern)
        return masks.random_scores(mask, seed, numbers["index"], numbers["step"])

    return types.SimpleNamespace(
        units=units,
        neuron_scale=neuron_scale,
        mean_magnitude=lambda: form.mean_magnitude(values, pattern),
        draw_weights=draw_weights,
        structure=geometry.structure,
        neuron_axes=geometry.neuron_axes,
        input_axes=geometry.input_axes,
        skew_correction=geometry.skew_correction,
        **numbers,
    )


# ---------------------------------------------------------------------- move


def follow(geometry, slots, explored, old, new, correction, is_first=False):
    """What follows a new pattern: slots are 0 where it is not, and it was active from now on.

    Args:
        geometry: `Geometry` of the weight.
        slots: List of arrays that are stored as its values.
        explored: int32 array of bits.
        old, new: Patterns.
        correction: Function of a mask and neuron axes, or `None`.
        is_first: Bool, whether earlier masks do not count as explored.

    Returns:
        Tuple of slots, bits, and the correction's scale or `None`.
    """
    form, scale = geometry.form, None
    slots = [form.followed(slot, old, new) for slot in slots]
    now = form.bits(new)
    explored = now if is_first else ops.bitwise_or(explored, now)
    if correction is not None:
        scale = form.of_neurons(correction(form.mask(new), geometry.neuron_axes))
    return slots, explored, scale


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
        Function of ([values, *slots, explored], pattern, gradient, numbers) → the first two, new;
        the scale or `None`; and how many weights are new, are active, and how many units are.
    """
    form = geometry.form

    def run(state, pattern, gradient, numbers):
        values, *slots, explored = state
        facts = facts_of(geometry, values, pattern, numbers, correction)
        chosen, grown = choose(*form.read(values, pattern, gradient), facts)
        new = form.pattern(chosen)
        values = form.moved(values, pattern, new, grown)
        own = correction if has_scale else None
        slots, explored, scale = follow(geometry, slots, explored, pattern, new, own, is_first)
        counts = form.num_grown(pattern, new), form.count(new), masks.count(chosen)
        return [values, *slots, explored], new, scale, counts

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

    def follow(self, weight, old=None, explores=True):
        """A pattern has changed: slots, correction and what was explored follow.

        Args:
            weight: `Weight`.
            old: NumPy array, the pattern before, that slots are stored by; `None` (default) if they
                are stored by the present one.
            explores: Bool; `False` where what was explored comes from a file, too.
        """
        topology, optimizer, geometry = weight.topology, self._optimizer, weight.topology.geometry
        correction = None if weight.scale is None else optimizer.correction

        def run(slots, explored, old, new):
            return follow(geometry, slots, explored, old, new, correction)

        if are_on_host([topology.pattern]):
            new = host(topology.pattern)
        else:
            new = ops.convert_to_tensor(topology.pattern)
            run = self._program(("follow", geometry, correction is None), run)
        slots = [ops.convert_to_tensor(slot) for slot in weight.slots]
        explored = ops.convert_to_tensor(weight.explored)
        if optimizer.has_not_stepped():
            explored = ops.zeros_like(explored)
        slots, explored, scale = run(slots, explored, new if old is None else old, new)
        for slot, value in zip(weight.slots, slots):
            slot.assign(value)
        self._tell_step(weight, new)
        if scale is not None:
            weight.scale.assign(scale)
        if explores:
            weight.explored.assign(explored)

    def _tell_step(self, weight, pattern):
        """Give the step its own copy of what it holds, if it has one."""
        if weight.held_copy is not None:
            held = weight.topology.form.held(pattern)
            held = np.array(held) if isinstance(held, np.ndarray) else ops.copy(held)
            weight.held_copy.assign(held)

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
            geometry, form = topology.geometry, topology.form
            gradient = None if gradient is None else host(gradient)
            old, values = host(topology.filled_pattern), host(weight.variable)
            facts = facts_of(geometry, values, old, numbers, optimizer.correction)
            chosen, grown = choose(*form.read(values, old, gradient), facts)
            new, grown = topology.check_units(host(chosen)), geometry.units.spread(grown)
            del facts, gradient, values  # the memory is that of the variables, which may be freed
            changed += int(form.num_grown(old, new))
            active += int(form.count(new))
            if not np.array_equal(new, old):
                with backend.freed(weight.variables if donates else []):
                    topology.change(new, grown)
                    if not keeps_budget:
                        topology.set_budget()
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
            pattern = ops.convert_to_tensor(topology.filled_pattern)
            others = [other for other in topology.optimizers if other is not optimizer]
            before = np.array(host(pattern)) if others and topology.is_condensed else None
            state, pattern, scale, (new, now, units) = program(
                state, pattern, gradient_of(weight), numbers
            )
            with topology.moving():
                for variable, value in zip(moving, state):
                    variable.assign(value)
                topology.pattern.assign(pattern)
            self._tell_step(weight, pattern)
            if scale is not None:
                weight.scale.assign(scale)
            for other in others:
                other.follow(topology, before)
            for one in () if keeps_budget else (optimizer, *others):
                one.weight_of(weight.variable).budget.assign(ops.cast(units, "int32"))
            topology.lead()
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
            topology = weight.topology
            axes = topology.neuron_axes
            if topology.is_condensed:
                continue  # every group of neurons has tiles
            if are_on_host([topology.pattern]):
                number += int(_count_dead(host(topology.pattern), axes))
            else:
                count = self._program(("dead", axes), functools.partial(_count_dead, axes=axes))
                number += int(host(count(ops.convert_to_tensor(topology.pattern))))
        return number


def _dtype(value):
    return "int32" if isinstance(value, (int, np.integer)) else "float32"


def _count_dead(mask, axes):
    return masks.count(masks.neuron_counts(mask, axes) == 0)


def count_explored(weight):
    """How many weights were ever active: int."""
    form, words = weight.topology.form, weight.explored
    if form.is_condensed or are_on_host([words]):
        return form.count_bits(host(words))
    return int(host(_count_packed(ops.convert_to_tensor(words))))


_count_packed = compiled(masks.count_packed)


# ---------------------------------------------------------------------- before it may begin


def inspect(weights, gradient_of):
    """What a mask update must know before it may begin, a few numbers of each weight.

    Args:
        weights: List of `Weight`s.
        gradient_of: Function of a `Weight`: its gradient, a tensor, or `None`.

    Returns:
        Dict from index to a dict of bools: `weight_is_finite`, `gradient_is_finite`,
        `has_gradient`. A gradient that is 0 throughout is none: JAX gives that to what no loss
        depends on, where TensorFlow gives nothing.
    """
    found = {}
    for weight in weights:
        gradient = gradient_of(weight)
        if are_on_host([weight.variable, weight.topology.pattern]):
            facts = _facts_on_host(host(weight.variable), gradient)
        else:
            facts = _compiled_facts(ops.convert_to_tensor(weight.variable), gradient)
        found[weight.index] = facts
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


def is_written(gradient):
    """Whether a step has written a kept gradient, be it 0 throughout: a bool or a tensor."""
    xp = masks.xp_of(gradient)
    return xp.any(xp.not_equal(gradient, UNWRITTEN))


def _facts_on_host(weight, gradient):
    facts = {"weight_is_finite": _is_finite(weight)}
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
def _compiled_facts(weight, gradient):
    facts = {"weight_is_finite": ops.all(ops.isfinite(weight))}
    if gradient is not None:
        facts["gradient_is_finite"] = ops.all(ops.isfinite(gradient))
        facts["has_gradient"] = is_gradient(gradient)
    return facts
