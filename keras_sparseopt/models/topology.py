"""What makes a weight sparse: a mask that hangs on it."""

import contextlib
import fnmatch
import math
import threading
import warnings
import weakref
import zlib
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_sparseopt import backend, keras_internals, masks
from keras_sparseopt.backend import are_on_host, compiled, host
from keras_sparseopt.forms import Geometry, compiled_of
from keras_sparseopt.structures import Unstructured, as_structure, structure_config
from keras_sparseopt.typing import Variable

# ---------------------------------------------------------------------- the mask


class Topology:
    """What an optimizer needs to know of a sparse weight; it hangs on the Keras variable.

    `variable.topology` is the only link from optimizers to models: an optimizer never sees
    a layer, and a variable without a topology is an ordinary one.

    Weights win: where an attached mask's weight is assigned from outside (`load_weights`,
    `set_weights`, `EarlyStopping`), its nonzero weights become the active ones, filled up to
    their number with positions that were active.

    A mask is never a placeholder: one that only a config has announced (of a clone, of a file that
    is being read) is *open*. It is filled by the file's, else by the zeros of the weight, when
    these are assigned or when it is first needed; if that is not possible, whoever needs it gets
    an error.

    Attributes:
        variable: Keras variable, the weight; of a condensed one the values of its active tiles.
        shape: Tuple of ints, that of the plain kernel.
        pattern: Keras variable that says which weights are active. Of a masked weight its bool
            mask: an attached one becomes a variable of the `SparseOpt` that trains the weight, that
            of a layer sparse by construction is the layer's. Of a condensed one the indices of its
            active tiles: the layer's.
        mask: Bool array of the kernel's shape, `True` = active; `set_mask` changes it. Of a masked
            weight the `keras.Variable`, of a condensed one a tensor that is made when asked for.
        kernel: The kernel with its zeros: of a masked weight the variable, else a tensor.
        is_condensed: Bool, see `condense`.
        neuron_axes: Tuple of ints, the axes that index neurons.
        input_axes: Tuple of ints, the axes that index input channels.
        skew_correction: Bool, whether `SparseOpt` may correct this weight's gradient.
        name: String: the layer's name or path, and the weight's name where it is not `kernel`.
        feeds: String, the normalization that the neurons feed, as far as it could be read, or `""`.
        structure: `Structure` of the mask; `None` is `Unstructured()`.
        is_attached: Bool; `False` for a layer sparse by construction.
        sparsity: Float, the inactive fraction.
        neuron_sparsity: NumPy array, the inactive fraction of every neuron's fan-in.
    """

    def __init__(
        self, variable, mask, neuron_axes, input_axes, skew_correction, name, feeds="",
        structure=None, is_attached=True, announced=None,
    ):  # fmt: skip
        self.variable = variable
        self.shape = tuple(variable.shape)
        self.pattern = mask
        # The active tiles of each group of a condensed weight; `None` for a masked one.
        self.tiles: int | None = None
        # The attached mask of a condensed weight, empty for so long: optimizers hold the variable.
        self.spare_mask: Any = None
        # To whom the layer of a condensed weight tells of dense gradients: list of `Seen`.
        self.seen: list = []
        # How often the layer was called in training since a step was last made.
        self.calls = 0
        self.neuron_axes = tuple(neuron_axes)
        self.input_axes = tuple(input_axes)
        self.skew_correction = skew_correction
        self.name = name
        self.feeds = feeds
        self.structure = structure or Unstructured()
        self.is_attached = is_attached
        # Whether a compiled step holds the mask as a constant, under another optimizer.
        self.is_compiled_in = False
        # The share of active weights that a config tells of a mask that is open; else `None`.
        self._announced = announced
        # Whether the weight was assigned since its mask was announced.
        self.weights_came = False
        # How often weight and mask have been written, as far as that is known here.
        self._writes: dict[str, Any] = {}
        # How many are moving weight and mask together just now. A count, because the replicas of
        # MirroredStrategy take turns within.
        self._moving = 0

    def hang(self):
        """Hang on the weight: it, or a layer's mask, tells of assignments from now on."""
        variable, mask = self.variable, self.pattern
        variable.topology, variable.was_stripped = self, False
        if self.is_attached:
            variable.constraint = KeepZeros(self, variable.constraint)
            keras_internals.tell(variable)
        else:
            mask.topology = self
            keras_internals.tell(mask)
        self.has_seen(variable, mask)
        for optimizer in trainers_of(variable):
            optimizer.adopt(variable)
        self.lead()
        return self

    def lead(self):
        """The weights that follow this one get its mask: see `keras_sparseopt.follow`.

        Steps that were compiled without a mask do not know of one that is new: `forget_steps`.
        """
        if _waiting.lists:
            _waiting.lists[-1].append(self)
            return
        for variable in followers_of(self.variable):
            topology = topology_of(variable)
            if topology is None:
                topology = attach(
                    variable, np.ones(self.shape, bool), self.neuron_axes, self.input_axes,
                    self.skew_correction, self.name, self.feeds, self.structure,
                    announced=self._announced,
                )  # fmt: skip
            if self.is_open or keras_internals.is_absent(self.pattern):
                continue
            if topology.is_condensed:
                topology.change(topology.form.of_mask(host(self.mask)))
            else:
                # A copy: the memory of the leader's may be freed.
                mask = np.array(host(self.mask)) if self.is_on_host() else ops.copy(self.mask)
                with topology.moving():
                    values = ops.convert_to_tensor(variable)
                    variable.assign(masks.masked(values, ops.convert_to_tensor(mask)))
                topology._have(mask)
            topology.set_budget()

    @property
    def is_led(self):
        """Whether the mask is that of another weight, which has one."""
        leader = leader_of(self.variable)
        return leader is not None and topology_of(leader) is not None

    def __repr__(self):
        shape = "×".join(map(str, self.shape))
        if self.is_open or self.is_out_of_sight:
            known = "mask not known now"
        else:
            known = f"{self.sparsity:.2%} sparse"
        form = "condensed" if self.is_condensed else "masked"
        return f"<Topology of '{self.name}': {shape}, {known}, {self.structure}, {form}>"

    @property
    def is_out_of_sight(self):
        """Whether the mask cannot be read now: it is in a step, or in JAX's state of a training."""
        if keras_internals.in_stateless_scope() or keras_internals.is_absent(self.pattern):
            return True
        return backend.is_traced(self.pattern.value)

    @property
    def is_condensed(self):
        return self.tiles is not None

    @property
    def mask(self):
        """Which weights are active: bool tensor or variable of the plain kernel's shape."""
        pattern = self.filled_pattern
        return self.form.mask(ops.convert_to_tensor(pattern)) if self.is_condensed else pattern

    @property
    def kernel(self):
        """The plain kernel: the variable itself, or a tensor that is made of what is stored."""
        if not self.is_condensed:
            return self.variable
        return self.form.plain(*map(ops.convert_to_tensor, (self.variable, self.pattern)))

    def plain(self, variable):
        """The weight, or a slot of it, as an array of the kernel's shape: NumPy's."""
        return host(self.form.plain(host(variable), host(self.pattern)))

    @property
    def filled_pattern(self):
        """The pattern; an error if it is not known."""
        self.fill()
        if self.is_open:
            raise ValueError(
                f"The mask of '{self.name}' is not known: its model was made from a config, and "
                "its weights hold no zeros to take the mask from. Give it the weights of the "
                "trained model (`set_weights`, `load_weights`); or, to train it from the start, "
                "call keras_sparseopt.strip(model), then keras_sparseopt.sparsify(model, sparsity)."
            )
        return self.pattern

    @property
    def optimizers(self):
        """The `SparseOpt`s that were built with this weight."""
        return [
            optimizer
            for optimizer in trainers_of(self.variable)
            if optimizer.trains_sparse(self.variable)
        ]

    # ------------------------------------------------------------------ a mask that is open

    @property
    def is_open(self):
        """Whether nothing has filled the mask yet."""
        return self._announced is not None

    def known_state(self):
        """What is known of the mask beside its values, for `restore_state`."""
        return self._announced, self.weights_came

    def restore_state(self, state):
        self._announced, self.weights_came = state

    def fill(self):
        """Fill a mask that is open from the zeros of the weight, if it has such."""
        if not self.is_open or keras_internals.in_stateless_scope():
            return
        with backend.init_scope():
            if keras_internals.is_absent(self.variable):
                return
            if not backend.is_initialized(self.variable):
                return
            mask = self._mask_from(self.variable)
            if mask is not None:
                self.take(mask)

    def _mask_from(self, weight):
        """The mask that the zeros of a weight tell, `None` if they tell nothing."""
        if not backend.is_whole(self.variable):
            nonzero = ops.not_equal(ops.convert_to_tensor(weight), 0)
            share = float(host(_count(nonzero))) / math.prod(self.shape)
            is_told = 0 < share < 1 or share == self._announced
            return nonzero if is_told and self.structure == Unstructured() else None
        weight = host(weight)
        nonzero = weight != 0
        # Zeros that have come with weights count; those that were there may be an initializer's.
        is_sparse = looks_trained_sparse(weight, nonzero)
        if self._announced == 1:
            announced = nonzero.mean() if is_sparse else 1.0  # pruned since the config was written
        elif nonzero.all() or not (self.weights_came or is_sparse):
            return None
        else:
            announced = self._announced
        # What has just grown is 0, too: filled up to the number that was announced.
        units, seed = self.units, zlib.crc32(self.variable.path.encode())
        count = units.nearest(round(announced * nonzero.size))
        mask = units.fit(weight, units.random_mask(count, seed))[3]
        return mask if units.holds(mask) else None

    def take(self, mask):
        """A first mask: what is active now is what it was given."""
        self.replace_mask(mask, is_first=True)

    # ------------------------------------------------------------------ what it is

    def num_active(self):
        """How many weights are active: int."""
        pattern = self.filled_pattern
        if self.is_on_host():
            return int(self.form.count(host(pattern)))
        return int(host(compiled_of(self.form, "count")(ops.convert_to_tensor(pattern))))

    def num_active_units(self):
        """How many units of its structure are active: int."""
        pattern = self.filled_pattern
        if self.is_condensed:
            return math.prod(self.pattern.shape)
        if self.is_on_host():
            return int(self.units.num_active(host(pattern)))
        return int(host(self.units.num_active_compiled(ops.convert_to_tensor(pattern))))

    def check_mask(self, mask, is_final=False):
        """`mask` as a NumPy bool array, if the weight may have it.

        Args:
            mask: Array.
            is_final: Bool; `False` takes what `GMP` passes through under `NM`, too.

        Raises:
            ValueError: If it has another shape or dtype, or not the weight's structure.
        """
        mask = masks.check_mask(mask, self.shape)
        if not self.units.holds(mask) or (is_final and not self.units.is_finished(mask)):
            raise ValueError(
                f"The mask of '{self.name}' must have the structure {self.structure}. Received: a "
                "mask that has not"
            )
        tiles = int(self.units.num_active(mask)) if self.is_condensed else 0
        if self.is_condensed and tiles != self.num_active_units():
            raise ValueError(
                f"The mask of '{self.name}' must have {self.num_active_units()} tiles, as it is "
                "condensed; for another number call keras_sparseopt.uncondense(model) before. "
                f"Received: {tiles}"
            )
        check_followers(self.variable, self.structure, mask)
        return mask

    def check_units(self, chosen):
        """The pattern of a NumPy array of active units, if the weight may have them."""
        if not self.is_condensed:
            return self.check_mask(self.units.write(chosen))
        counts = np.count_nonzero(chosen, axis=1)
        if chosen.shape != self.units.unit_shape or (counts != self.tiles).any():
            raise ValueError(
                f"Each group of neurons of '{self.name}' must keep its {self.tiles} tiles, as it "
                f"is condensed. Received: from {counts.min()} to {counts.max()} tiles"
            )
        return self.form.pattern(chosen)

    @property
    def geometry(self):
        """`Geometry`: all that a mask update must know of the weight."""
        return Geometry(
            self.structure, self.shape, self.neuron_axes, self.input_axes, self.skew_correction,
            self.tiles,
        )  # fmt: skip

    @property
    def form(self):
        """How it is stored: `Masked` or `Condensed`."""
        return self.geometry.form

    def get_config(self):
        """What a file says of the mask, beside its values: dict of JSON."""
        config = {
            "path": self.variable.path,
            "shape": list(self.shape),
            "neuron_axes": list(self.neuron_axes),
            "input_axes": list(self.input_axes),
            "skew_correction": self.skew_correction,
            "name": self.name,
            "feeds": self.feeds,
            "structure": structure_config(self.structure),
        }
        self.fill()
        if self.is_open:
            return {**config, "density": self._announced}
        if keras_internals.is_absent(self.pattern):
            return {**config, "density": 0.0}
        return {**config, "density": self.num_active() / math.prod(self.shape)}

    @property
    def sparsity(self):
        """Inactive fraction: float."""
        return 1.0 - self.num_active() / math.prod(self.shape)

    @property
    def neuron_sparsity(self):
        """Inactive fraction of each neuron's fan-in: NumPy array, one entry per neuron."""
        mask = host(self.mask)
        return 1.0 - mask.mean(axis=masks.fan_in_axes(mask.ndim, self.neuron_axes))

    @property
    def units(self):
        """`Units`: the mask's structure on this kernel."""
        return self.geometry.units

    def is_on_host(self):
        """Whether weight and mask lie in this process' memory."""
        return are_on_host([self.variable, self.pattern])

    def moved_weights(self):
        """How many inactive weights are not 0: what something other than SparseOpt has moved."""
        if self.is_condensed:
            return 0
        if self.is_on_host():
            return int(np.count_nonzero((host(self.variable) != 0) & ~host(self.mask)))
        weight, mask = ops.convert_to_tensor(self.variable), ops.convert_to_tensor(self.mask)
        return int(host(_count_moved(weight, mask)))

    # ------------------------------------------------------------------ changing it

    def change(self, new, grown=None):
        """Pattern, weight and all slots move together.

        Args:
            new: NumPy array, the new pattern. Connections in both keep weight and slots; dropped
                ones become 0.
            grown: Array of the kernel's shape, where new ones start; `None` (default) for 0.
        """
        old = np.array(new if self.is_open else host(self.pattern)) if self.is_on_host() else None
        values = ops.convert_to_tensor(self.variable)
        grown = None if grown is None else ops.convert_to_tensor(grown)
        if self.is_on_host():
            values = self.form.moved(values, old, new, grown)
        else:
            pattern = ops.convert_to_tensor(new if self.is_open else self.pattern)
            old = np.array(host(pattern)) if self.is_condensed else None
            moved = compiled_of(self.form, "moved")
            values = moved(values, pattern, ops.convert_to_tensor(new), grown)
        with self.moving():
            self.variable.assign(values)
        self._have(new, old)

    def replace_mask(self, mask, is_first=False):
        """A new mask for a weight that is 0 where it is inactive; optimizers follow."""
        if self.is_condensed:
            self.change(self.form.of_mask(host(mask)))
        else:
            self._have(mask)
        if is_first:
            self.set_budget()

    def _have(self, pattern, old=None):
        self._announced = None
        with self.moving():
            # Copied: JAX may use NumPy's memory as it is, and cannot donate a buffer twice.
            is_numpys = isinstance(pattern, np.ndarray)
            self.pattern.assign(np.array(pattern) if is_numpys else pattern)
        self._after_pattern(old)
        if self.is_compiled_in:
            self.is_compiled_in = False
            forget_steps([self.variable])

    def take_kernel(self, kernel, mask=None):
        """Weights win, of a condensed weight: a kernel of the plain shape from elsewhere.

        Args:
            kernel: NumPy array.
            mask: Array, its mask; `None` (default) if only its zeros are known.

        Raises:
            ValueError: If it has more nonzero tiles than the weight holds, or the mask not as many.
        """
        if mask is not None:
            mask = self.check_mask(mask)
        else:
            mask = self._fitting(kernel)
            self._warn_of_zeros(kernel)
        if mask is not None:
            self.change(self.form.of_mask(host(mask)))
        with self.moving():
            self.variable.assign(self.form.stored(kernel, host(self.pattern)))

    def set_budget(self):
        """What is active now is what the mask was given."""
        for optimizer in self.optimizers:
            optimizer.set_budget(self)

    @contextlib.contextmanager
    def moving(self):
        """While what is assigned fits already, and whoever assigns it keeps the zeros."""
        self._moving += 1
        try:
            yield
        finally:
            self._moving -= 1
            self.has_seen(self.variable, self.pattern)

    @property
    def is_moving(self):
        return self._moving > 0

    def before_assign(self, variable, value):
        """What to do once `value` is assigned to the weight or the mask; `None` for nothing.

        Raises:
            ValueError: If a weight with an attached mask would have more nonzero values than the
                mask has active ones. Nothing has changed then.
        """
        if self.is_moving or backend.is_traced(value) or keras_internals.in_stateless_scope():
            return None
        if tuple(np.shape(value)) != tuple(variable.shape):
            return None  # Keras refuses it
        counters = [keras_internals.step_count(o.base_optimizer()) for o in self.optimizers]
        if any(map(keras_internals.is_absent, (self.pattern, self.variable, *counters))):
            return None  # JAX brings its state back, one variable after the other
        if variable is self.pattern:
            return self._before_pattern(value)
        if self.is_condensed or not self.is_attached or self.variable.constraint.has_given(value):
            return None
        if self.is_led:  # perhaps the leader's mask comes next, as where both are restored
            return None
        self.weights_came |= self.is_open
        if self.is_open:
            mask = self._mask_from(value)
        else:
            mask = self._fitting(value)
            self._warn_of_zeros(value)
        return None if mask is None else lambda: self.replace_mask(mask, is_first=self.is_open)

    def _before_pattern(self, value):
        if not self.is_condensed:
            if self.is_on_host() and not self.is_led:
                self.check_mask(value)
            return self._after_pattern
        if not self.form.is_pattern(host(value)):
            raise ValueError(
                f"The indices of '{self.name}' must be those of tiles, sorted, each once: from 0 "
                f"to {self.form.num_tiles - 1}. Received: other ones"
            )
        old = np.array(host(self.pattern))
        return lambda: self._after_pattern(old)

    def _after_pattern(self, old=None):
        self._announced = None
        for optimizer in self.optimizers:
            optimizer.follow(self, old)
        self.lead()

    def _fitting(self, weight):
        """The mask that nonzero weights want, `None` if they fit the present one."""
        mask, weight = (ops.convert_to_tensor(x) for x in (self.pattern, weight))
        if self.is_condensed:
            mask = self.form.mask(mask)
        if self.is_on_host():
            outside, wanted, active, new = self.units.fit(host(weight), host(mask))
        else:
            outside, wanted, active, new = self.units.fit_compiled(weight, mask)
        outside, wanted, active = (int(host(number)) for number in (outside, wanted, active))
        given = [optimizer.budget_of(self) for optimizer in self.optimizers]
        if outside and wanted > max([active, *given]):
            units = "" if self.structure == Unstructured() else f" of {self.structure}"
            raise ValueError(
                f"The weight of '{self.name}' is denser than its mask: {wanted} values{units} are "
                f"not 0, {active} are active, and none of them may be lost. To start from a dense "
                "or denser model load first and sparsify then; to let go of the mask call "
                "keras_sparseopt.strip(model), load, and keras_sparseopt.masks_from_zeros(model). "
                "EarlyStopping that restores weights from before a pruning method had ended needs "
                "start_from_epoch; a copy that averages the weights of another model, whose masks "
                "move, needs keras_sparseopt.follow(copy, model); an optimizer with use_ema=True "
                "needs a SparseOpt around it."
            )
        return new if outside else None

    def _warn_of_zeros(self, weight):
        """Where weights arrive that are much sparser than their mask: what training would fill."""
        size, active = math.prod(self.shape), self.num_active()
        if self.is_on_host():
            nonzero = int(np.count_nonzero(host(weight)))
        else:
            nonzero = int(host(ops.count_nonzero(ops.convert_to_tensor(weight))))
        few = 0.9 * size if active == size else 0.5 * active
        if 0 < nonzero < few:
            warnings.warn(
                f"The weights that '{self.name}' was given are sparser than its mask: {nonzero:,} "
                f"are not 0, {active:,} are active, and training will fill the others. To take the "
                "topology of these weights call keras_sparseopt.masks_from_zeros(model).",
                stacklevel=4,
            )

    def warn_of_lora(self):
        """Where Keras' `enable_lora` is called on the layer of the weight."""
        warnings.warn(
            f"LoRA on the sparse weight '{self.name}' is dense: what it adds is in no mask, and "
            "Keras saves the sum of both, so that a file holds a dense kernel.",
            stacklevel=4,
        )

    def settle(self):
        """Weights win, also where an assignment went past the variable (`tf.train.Checkpoint`)."""
        self.fill()
        if self.is_led:
            leader_of(self.variable).topology.lead()
        elif self.is_attached and not (self.is_open or self.is_condensed):
            mask = self._fitting(self.variable)
            if mask is not None:
                self.replace_mask(mask)

    def has_seen(self, *variables):
        """What the weight, the mask, or both hold now is known."""
        if not keras_internals.in_stateless_scope():
            self._writes |= {v.path: backend.num_writes(v) for v in variables}

    def catch_up(self):
        """Take over what was written past Keras' variables, as PyTorch's `load_state_dict` does.

        The weights win, as in an assignment. Slots of tiles whose place is not known begin at 0.

        Raises:
            ValueError: As `before_assign`; here the weight has its new value already.
        """
        if self.is_moving or keras_internals.in_stateless_scope():
            return
        weight_is_new, mask_is_new = map(self._is_new, (self.variable, self.pattern))
        if mask_is_new:
            if self.is_condensed:
                for optimizer in self.optimizers:
                    optimizer.empty_slots(self)
            self._after_pattern()
        if weight_is_new or mask_is_new:
            self.settle()
        self.has_seen(self.variable, self.pattern)

    def _is_new(self, variable):
        """Whether the memory that a variable had when it was last seen was written since."""
        before, now = self._writes.get(variable.path), backend.num_writes(variable)
        if before is None or now is None or before[0] != now[0]:
            return False
        return before != now


def looks_trained_sparse(weight, nonzero):
    """Whether a weight (NumPy array) has zeros that training has left, not an initializer.

    What an initializer leaves (zeros, an identity) has one value at most beside 0.
    """
    values = weight[nonzero]
    return 0 < values.size < weight.size and bool((values != values[0]).any())


@compiled
def _count_moved(weight, mask):
    return masks.count(ops.logical_and(ops.not_equal(weight, 0), ops.logical_not(mask)))


_count = compiled(masks.count)


class KeepZeros(keras.constraints.Constraint):
    """Holds an attached mask under an optimizer that knows nothing of it.

    Keras applies it after each of the optimizer's steps. While a `SparseOpt` steps, which keeps
    zeros by itself, it only applies the weight's own constraint.

    Args:
        topology: `Topology` of the weight.
        constraint: The weight's own constraint, which is kept, or `None`.
    """

    def __init__(self, topology, constraint=None):
        self.topology = topology
        self.constraint = constraint
        self._result: Any = None  # refers to what it has returned last

    def __call__(self, w):
        w = ops.convert_to_tensor(w)
        if self.constraint is not None:
            w = self.constraint(w)
        if self.topology.is_moving or self.topology.is_condensed:
            return w
        mask, is_traced = self.topology.mask, backend.is_traced(w)
        self.topology.is_compiled_in |= not backend.STEPS_SHARE_VARIABLES and is_traced
        w = masks.masked(w, ops.convert_to_tensor(mask))
        self._result = None if is_traced else weakref.ref(w)
        return w

    def has_given(self, value):
        """Whether `value` is its own last result, which Keras assigns to the weight."""
        return self._result is not None and self._result() is value

    def get_config(self):
        raise ValueError("KeepZeros belongs to a weight with a mask, and is not saved.")


# ---------------------------------------------------------------------- hanging it on weights


def attach(
    variable, mask, neuron_axes, input_axes, skew_correction, name, feeds="", structure=None,
    announced=None,
):  # fmt: skip
    """Hang a mask on a weight, which stays as it is: the caller sees that zeros are zeros.

    The optimizers that train the weight already take part from now on. Steps that were compiled
    without the mask do not know of it: `forget_steps`.

    Args:
        variable: Keras variable.
        mask: NumPy bool array of its shape.
        neuron_axes, input_axes, skew_correction, name, feeds, structure: As in `Topology`.
        announced: Float for a mask that is open: the share of active weights that it will have.
    """
    return Topology(
        variable, mask_variable(variable, mask), neuron_axes, input_axes, skew_correction, name,
        feeds, structure, announced=announced,
    ).hang()  # fmt: skip


def mask_variable(variable, mask):
    """A Keras variable that holds a mask for a weight, and lives where it does."""
    with backend.colocated_scope(variable.value):
        found = keras.Variable(
            initializer=np.array(mask), dtype="bool", trainable=False, autocast=False,
            aggregation="only_first_replica", name=f"{variable.path.replace('/', '_')}_mask",
        )  # fmt: skip
    keras_internals.follow_layout(found, of=variable)
    return found


def attach_saved(variable, config):
    """Hang an open mask on a weight, as `Topology.get_config` has written it."""
    known = "neuron_axes", "input_axes", "skew_correction", "name", "feeds"
    structure = as_structure(config.get("structure"))
    return attach(
        variable, np.ones(variable.shape, bool), **{key: config[key] for key in known},
        structure=structure, announced=config["density"],
    )  # fmt: skip


def release(variable):
    """Take a weight's topology away, from its optimizers too."""
    for optimizer in trainers_of(variable):
        optimizer.forget(variable)
    del variable.topology


def detach(variable):
    """Let go of an attached mask."""
    keras_internals.tell_no_more(variable)
    variable.constraint = own_constraint(variable)
    release(variable)


def own_constraint(variable):
    """The constraint that a weight has without its mask."""
    constraint = variable.constraint
    return constraint.constraint if isinstance(constraint, KeepZeros) else constraint


def shape_of(variable):
    """The shape of a weight, of a condensed one that of its plain kernel: tuple of ints."""
    topology = topology_of(variable)
    return tuple(variable.shape) if topology is None else topology.shape


def topology_of(variable):
    """The `Topology` of a weight, or `None`."""
    return getattr(variable, "topology", None)


def trainers_of(variable):
    """The `SparseOpt`s that were built with a variable, sparse or not."""
    found = [reference() for reference in getattr(variable, "trainers", ())]
    return [optimizer for optimizer in found if optimizer is not None]


def is_trained_by(variable, optimizer):
    """A `SparseOpt` says that it was built with a variable."""
    variable.trainers = [weakref.ref(o) for o in (*trainers_of(variable), optimizer)]


def check_followers(variable, structure, mask):
    """Raise ValueError where a weight that follows cannot have a mask.

    Args:
        variable: Keras variable, the weight that leads.
        structure: `Structure` that its mask has, or is about to have.
        mask: NumPy bool array.
    """
    for follower in followers_of(variable):
        topology = topology_of(follower)
        if topology is None:
            check_followers(follower, structure, mask)
        elif not topology.is_open:
            if topology.structure != structure:
                raise ValueError(
                    f"'{topology.name}' of the copy follows '{variable.path}', whose mask has "
                    f"another structure, {structure}: strip(copy) before, or give both the same. "
                    f"Received: a copy with {topology.structure}"
                )
            topology.check_mask(mask)


def check_leads(variable):
    """Raise ValueError for a weight that has the mask of another one."""
    if topology_of(variable) is not None and variable.topology.is_led:
        raise ValueError(
            f"'{variable.topology.name}' follows '{leader_of(variable).path}', whose mask it has: "
            "change that one, or let go of it by keras_sparseopt.strip(copy). Received: "
            f"'{variable.path}'"
        )


class _Waiting(threading.local):
    """Topologies whose followers wait: a list for each `leading_at_the_end`."""

    def __init__(self):
        self.lists: list[list[Topology]] = []


_waiting = _Waiting()


@contextlib.contextmanager
def leading_at_the_end():
    """While masks change that may have to be given back: followers get them once all is well."""
    _waiting.lists.append([])
    try:
        yield
    except BaseException:
        _waiting.lists.pop()
        raise
    for topology in {id(topology): topology for topology in _waiting.lists.pop()}.values():
        topology.lead()


def let_follow(variable, leader):
    """From now on a variable has the masks of another one, which may have none yet."""
    variable.leader = weakref.ref(leader)
    leader.followers = [weakref.ref(v) for v in (*followers_of(leader), variable)]
    topology = topology_of(leader)
    if topology is not None:
        topology.lead()


def leader_of(variable):
    """The variable whose masks a variable has, or `None`."""
    reference = getattr(variable, "leader", None)
    return None if reference is None else reference()


def followers_of(variable):
    """The variables that have the masks of a variable, each once: list."""
    found = {id(v): v for v in (reference() for reference in getattr(variable, "followers", ()))}
    return [v for v in found.values() if v is not None and leader_of(v) is variable]


def forget_steps(variables, also_of_inference=False):
    """Let models compile their steps anew: what these know of variables has changed.

    Args:
        variables: List of Keras variables. What follows them has changed, too.
        also_of_inference: Bool, whether what `evaluate` and `predict` run has changed as well.
    """
    variables = list(variables)
    for variable in variables:  # which grows
        variables += followers_of(variable)
    for model in keras_internals.models_of(variables):
        keras_internals.forget_functions(model, also_of_inference)


# ---------------------------------------------------------------------- finding them


def sparse_weights(model: keras.layers.Layer) -> list[Variable]:
    """The sparse weights of a model, each once, in the model's order.

    Args:
        model: Any Keras model or layer.

    Returns:
        List of Keras variables; `variable.topology` has `mask`, `name`, `neuron_axes` and more.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((5, 8)), keras.layers.LSTM(4, name="lstm")])
    kso.sparsify(model, 0.5)
    names = [weight.topology.name for weight in kso.sparse_weights(model)]
    assert names == ["lstm/lstm_cell", "lstm/lstm_cell/recurrent_kernel"]
    ```
    """
    return [v for v in model.weights if topology_of(v) is not None and v is v.topology.variable]


def plain_weights(model):
    """The weights that a model has when none of them is condensed, in order: list of variables."""
    return [v for v in model.weights if not getattr(v, "is_pattern", False)]


def sparse_layers(model: keras.layers.Layer) -> list[Any]:
    """The layers of a model that own a sparse weight, nested ones too, each once.

    Args:
        model: Any Keras model or layer.

    Returns:
        List of layers.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((8,)), kso.SparseDense(4, sparsity=0.5)])
    assert [layer.units for layer in kso.sparse_layers(model)] == [4]
    ```
    """
    return [
        layer
        for layer in keras_internals.all_layers(model)
        if any(topology_of(v) is not None for v in keras_internals.own_weights(layer))
    ]


def is_named(topology, patterns):
    """Whether a sparse weight has one of these names, paths or patterns."""
    names = topology.name, topology.variable.path
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)
