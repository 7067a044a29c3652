"""SparseOpt: masks and corrects gradients before any inner optimizer sees them."""

import contextlib
import dataclasses
import functools
import math
import warnings
import weakref
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_sparseopt import keras_internals, masks
from keras_sparseopt.backend import (
    IS_TENSORFLOW,
    Tap,
    are_on_host,
    compiled,
    host,
    init_scope,
    summed_over_replicas,
)
from keras_sparseopt.checks import check_bool
from keras_sparseopt.devices import check_optimizer, check_strategy
from keras_sparseopt.optimizers.wrapper import WrapperOptimizer
from keras_sparseopt.topology import attach_saved, own_constraint, topology_of
from keras_sparseopt.typing import Array, Variable

# What a dense gradient is before any step has written it.
UNWRITTEN = -math.inf


def sparse_opt_of(optimizer):
    """The `SparseOpt` in a compiled optimizer, under loss scaling too; `None` without one."""
    while optimizer is not None and not isinstance(optimizer, SparseOpt):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer


class Weight:
    """One sparse weight as its optimizer sees it.

    Attributes:
        variable, topology: The Keras variable, and what hangs on it.
        index: Int, its position among the optimizer's sparse weights.
        slots: List of the optimizer's variables of the weight's shape.
        explored: int32 variable, one bit per weight that was ever active.
        scale: Float variable, the correction of every neuron; `None` where there is none.
        mask: The variable that the training step reads: `topology.mask`, or on JAX the optimizer's
            own copy of the mask of a layer sparse by construction.
    """

    def __init__(self, variable, index, slots, explored, scale, mask):
        self.variable = variable
        self.topology = variable.topology
        self.index = index
        self.slots = slots
        self.explored = explored
        self.scale = scale
        self.mask = mask

    @property
    def variables(self):
        """All that moves in a mask update."""
        scale = [] if self.scale is None else [self.scale]
        return [self.variable, *self.slots, self.topology.mask, self.mask, self.explored, *scale]


@dataclasses.dataclass(frozen=True)
class Averaging:
    """How dense gradients are kept: the last one, or averaged over micro-batches."""

    window: int = 1
    interval: int = 1
    momentum: float | None = None

    @property
    def carries(self):
        """Whether more is kept than the last step's."""
        return self.window > 1 or self.momentum is not None


class Lease:
    """Somebody's right to the dense gradients; `SparseOpt` keeps them while one is alive.

    Users with the same averaging share the memory. A lease ends with `release`, or when its owner
    is gone (an interrupted `fit`).
    """

    def __init__(self, optimizer, averaging):
        self._optimizer = optimizer
        self.averaging = averaging
        self._end = weakref.finalize(self, _give_back, weakref.ref(optimizer), averaging)

    def gradient(self, variable):
        """The dense gradient kept for one sparse weight, all-reduced over replicas.

        Args:
            variable: Keras variable, one of the optimizer's `sparse_weights`.

        Returns:
            Tensor of the weight's shape, neither masked nor corrected; −inf throughout if no
            step has written it.
        """
        weight = self._optimizer.weight_of(variable)
        return self._optimizer._sparse.taps[self.averaging][weight.index].read()

    def release(self):
        """Give the gradients back; a second time does nothing."""
        self._end()


def _give_back(optimizer, averaging):
    optimizer = optimizer()
    if optimizer is not None:
        optimizer._return_lease(averaging)


class _Sparse:
    """What Keras' and TensorFlow's attribute tracking must not see."""

    def __init__(self):
        self.weights: dict[int, Weight] = {}
        self.taps: dict[Averaging, list[Tap]] = {}
        self.leases: dict[Averaging, int] = {}
        self.copies: list = []
        self.saved_topologies: list = []
        self.programs: dict = {}

    @property
    def open_taps(self):
        return {a: self.taps[a] for a, count in self.leases.items() if count}


@keras.saving.register_keras_serializable(package="keras_sparseopt")
class SparseOpt(WrapperOptimizer):
    """SparseOpt: trains sparse weights with any Keras optimizer, without gradient skew.

    For every weight that carries a mask (see `sparsify`, `SparseDense`):

    ```
    s_i   = 1 − nnz(mask of neuron i) / fan_in
    s_avg = mean of s_i over the weight's neurons
    g'    = g · mask · √(1 − s_i) / √(1 − s_avg)
    w     ← inner_optimizer(w, g')
    ```

    A Batch Normalization that follows a sparse layer divides each neuron by its own σ and so
    amplifies its gradient by `1/√(1 − s_i)`: the correction takes that back and keeps the
    layer's gradient norm about where it was. Equal fan-ins, and dense layers, are left
    exactly as they are; variables without a mask go to the inner optimizer untouched.
    Clipping, weight decay, EMA and accumulation are the inner optimizer's and act on `g'`.

    Adam-like inner optimizers divide most of a constant per-neuron scale back out, so the
    correction acts on them mainly through its changes at mask updates.

    Inactive weights, and all their optimizer slots, are exactly 0 after every step. Masks that
    `sparsify` attached are variables of the optimizer and saved with it: plain
    `keras.models.load_model` brings them back.

    Args:
        inner_optimizer: Keras optimizer, its name or its config. Refused: Adafactor,
            Ftrl, MultiOptimizer and LossScaleOptimizer (which goes outside), and what derives from
            them.
        skew_correction: Bool, defaults to `True`. `False` masks only: the honest baseline.
            A weight whose topology says `skew_correction=False` is never corrected.
        renormalize: Bool, defaults to `False`. `True` rescales each corrected gradient to the
            norm that the masked one had, which isolates the change of direction.
        name: String or `None`.
        topologies: What `get_config` writes of the masks that `sparsify` attached: list of dicts,
            or `None` (default). Not for you: `keras.models.load_model` needs it.

    Raises:
        ValueError: For an argument of the wrong kind or a refused inner optimizer.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([
        keras.Input((20,)),
        keras.layers.Dense(32, use_bias=False),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(1),
    ])
    kso.sparsify(model, 0.8)
    model.compile(optimizer=kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9)), loss="mse")
    model.fit(np.ones((8, 20)), np.ones((8, 1)), verbose=0)
    ```

    References:
        Adnan et al., "SparseOpt", ICML 2026, arXiv 2605.27541.
    """

    holds_masks = True

    def __init__(
        self,
        inner_optimizer: Any,
        skew_correction: bool = True,
        renormalize: bool = False,
        name: str | None = None,
        topologies: Any = None,
    ) -> None:
        check_bool("skew_correction", skew_correction)
        check_bool("renormalize", renormalize)
        super().__init__(inner_optimizer, name=name)
        check_strategy(self)
        self.skew_correction = skew_correction
        self.renormalize = renormalize
        self._sparse = _Sparse()
        # From a file: what hung on which variable.
        self._sparse.saved_topologies = list(topologies or ())

    @classmethod
    def reasons_to_refuse(cls):
        return {
            **super().reasons_to_refuse(),
            SparseOpt: "the correction would be applied twice",
            keras.optimizers.Adafactor: "its factored second moment mixes active and inactive "
            "weights (rows without active weights divide 0 by 0)",
            keras.optimizers.Ftrl: "it divides by an accumulator that is 0 at inactive weights; "
            "use Adagrad instead",
        }

    # ------------------------------------------------------------------ building

    def build(self, variables):
        if self.built:
            return
        check_optimizer(self)
        with init_scope():
            self._attach_saved(variables)
            base = self.base_optimizer()
            with keras_internals.slots_recorded(base) as slots:
                super().build(variables)
            sparse = [i for i, v in enumerate(variables) if topology_of(v) is not None]
            # The share of active weights that the last mask update made new. Kept here, so
            # that a resumed training logs what the uninterrupted one would have.
            self.mask_change = self.add_variable((), dtype="float32", name="mask_change")
            # The active units that each mask was given: what SRigL may use up.
            self.budgets = self.add_variable((len(sparse),), dtype="int32", name="budgets")
            for position, index in enumerate(sparse):
                own_slots = keras_internals.slots_of(slots, base, variables[index])
                self._adopt(index, position, variables[index], own_slots)
            self._check_slots(slots)
            if all(_is_initialized(weight) for weight in self.weights):
                self._take_masks(explores=True)
                self.budgets.assign(np.array([w.topology.num_active_units() for w in self.weights]))
        if not variables:
            warnings.warn(
                "SparseOpt was built for no variables: all are frozen, or the model comes from a "
                "legacy `.h5` file, of which Keras does not restore the optimizer. Compile it "
                "with a new one.",
                stacklevel=2,
            )
        elif not sparse:
            warnings.warn(
                "SparseOpt found no sparse weight among the trainable variables and acts as "
                "the inner optimizer alone. Convert the model with "
                "`keras_sparseopt.sparsify(model, sparsity)` before, or use its layers.",
                stacklevel=2,
            )

    def _attach_saved(self, variables):
        if self._sparse.saved_topologies and not variables:
            raise ValueError(
                "The masks of this model are in its optimizer, which Keras does not restore from "
                "a legacy `.h5` file. Save as `.keras`; or load with compile=False, take the "
                "masks from the zeros with keras_sparseopt.masks_from_zeros(model), and compile."
            )
        for saved in self._sparse.saved_topologies:
            index, shape = saved["index"], tuple(saved["shape"])
            variable = variables[index] if index < len(variables) else None
            if variable is None or tuple(variable.shape) != shape:
                raise ValueError(
                    "The optimizer's file belongs to other variables: a mask is for variable "
                    f"{index} of shape {shape}. Received: {len(variables)} variables"
                )
            if topology_of(variable) is None:
                attach_saved(variable, np.ones(shape, bool), saved)

    def _adopt(self, index, position, variable, slots):
        topology, name = variable.topology, variable.path.replace("/", "_")
        mask = topology.mask
        if topology.is_attached:
            keras_internals.track(self, mask)
        elif not IS_TENSORFLOW:
            # JAX's stateless step sees optimizer variables, not the layer's mask.
            mask = keras.Variable(
                np.array(host(mask)), dtype="bool", trainable=False,
                layout=keras_internals.layout(variable),
            )  # fmt: skip
            self._sparse.copies.append(mask)
        explored = self.add_variable(
            shape=(-(-math.prod(variable.shape) // 32),),
            dtype="int32",  # several TensorFlow workers cannot share a uint8
            name=f"{name}_explored",
        )
        scale = None
        if self.skew_correction and topology.skew_correction:
            shape = tuple(
                size if axis in topology.neuron_axes else 1
                for axis, size in enumerate(variable.shape)
            )
            scale = self.add_variable(shape, "ones", dtype="float32", name=f"{name}_correction")
        slots = [slot for slot in slots if tuple(slot.shape) == tuple(variable.shape)]
        weight = Weight(variable, position, slots, explored, scale, mask)
        self._sparse.weights[index] = weight
        topology.join(self)

    def _check_slots(self, slots):
        followed = {id(slot) for group in slots.values() for slot in group}
        shapes = {tuple(weight.variable.shape) for weight in self.weights}
        for variable in self.base_optimizer().variables:
            if tuple(variable.shape) in shapes and id(variable) not in followed:
                raise ValueError(
                    f"{type(self.base_optimizer()).__name__} holds a slot that SparseOpt cannot "
                    f"follow through mask updates: '{variable.path}' was not made by "
                    "`add_variable_from_reference` or `add_optimizer_variables`."
                )

    # ------------------------------------------------------------------ one training step

    def _apply(self, grads, variables):
        weights = [self._find(variable) for variable in variables]
        grads = [
            grad if weight is None or grad is None else self._keep_and_correct(grad, weight)
            for grad, weight in zip(grads, weights)
        ]
        with contextlib.ExitStack() as stack:
            for weight in weights:
                if weight is not None:
                    stack.enter_context(weight.topology.quiet())
                    stack.enter_context(_without_keeping_zeros(weight.variable))
            super()._apply(grads, variables)
            for weight in weights:
                if weight is not None and self._moves_inactive_weights(weight):
                    value = ops.convert_to_tensor(weight.variable)
                    mask = ops.convert_to_tensor(weight.mask)
                    self.assign(weight.variable, masks.masked(value, mask))

    def _find(self, variable):
        return self._sparse.weights.get(keras_internals.variable_index(self, variable))

    def _keep_and_correct(self, grad, weight):
        for averaging, taps in self._sparse.open_taps.items():
            tap = taps[weight.index]
            self._keep(grad, tap, averaging)
            if averaging == Averaging() and self.loss_scale_factor is None:
                # So that the gradient is not held twice.
                grad = ops.cast(tap.read(), grad.dtype) if IS_TENSORFLOW else grad
        mask = ops.convert_to_tensor(weight.mask)
        if weight.scale is None:
            return masks.masked(grad, mask)
        scale = ops.convert_to_tensor(weight.scale)
        if self.renormalize:
            active = summed_over_replicas(ops.cast(masks.masked(grad, mask), "float32"))
            before, after = (ops.sum(ops.square(g)) for g in (active, active * scale))
            scale = scale * ops.sqrt(before / ops.where(after > 0, after, 1.0))
        return masks.masked(grad * ops.cast(scale, grad.dtype), mask)

    def correction(self, mask, neuron_axes):
        """The factor of every neuron's gradient: what a variant of the method overrides.

        It is computed when a mask changes, and kept.

        Args:
            mask: Bool array of the weight's shape.
            neuron_axes: Tuple of ints, the axes that index neurons.

        Returns:
            Float32 tensor that broadcasts over the weight: of size 1 along all other axes.
        """
        return masks.correction(mask, neuron_axes)

    def _moves_inactive_weights(self, weight):
        # Muon orthogonalises the whole matrix; a constraint may return anything.
        has_constraint = own_constraint(weight.variable) is not None
        return has_constraint or isinstance(self.base_optimizer(), keras.optimizers.Muon)

    # ------------------------------------------------------------------ topology

    @property
    def weights(self):
        """The `Weight`s that this optimizer was built with, in order."""
        return list(self._sparse.weights.values())

    @property
    def sparse_weights(self):
        """The sparse weights (Keras variables) that this optimizer trains, in order.

        Without those that were frozen since it was built.
        """
        return [weight.variable for weight in self.weights if weight.variable.trainable]

    def weight_of(self, variable):
        """The `Weight` of a variable.

        Raises:
            ValueError: If it is not a sparse weight that this optimizer was built with.
        """
        weight = self._find(variable) if self.built else None
        if weight is None:
            raise ValueError(
                "`variable` must be a sparse weight that this optimizer was built with. "
                f"Received: variable={getattr(variable, 'path', variable)}"
            )
        return weight

    def rewire(
        self, variable: Variable, new_mask: Array, keeps_budget: bool = False, grown: Array = None
    ):
        """Change one weight's topology: mask, weight and slots together.

        Connections in both masks keep weight and slots. New ones start with slots 0 and the
        weight of `grown`; dropped ones become 0, slots included.

        Args:
            variable: Keras variable, one of `sparse_weights`.
            new_mask: Bool array of its shape.
            keeps_budget: Bool, defaults to `False`. `True` remembers the number of active weights
                that the mask had been given before (`SRigL` leaves some of them unused).
            grown: Array of its shape, or `None` (default) for 0.

        Raises:
            ValueError: If the weight is not trained by this optimizer, or the mask does not
                fit, or has not the weight's structure. Nothing has changed then.
        """
        weight = self.weight_of(variable)
        mask = weight.topology.check_mask(new_mask)
        weight.topology.change(mask, grown)
        if not keeps_budget:
            self.set_budget(weight.topology)

    def follow(self, topology, explores=True):
        """A mask has changed: slots, correction and what was explored follow.

        Args:
            topology: `Topology` of one of the optimizer's weights.
            explores: Bool; `False` where what was explored comes from a file, too.
        """
        weight = self.weight_of(topology.variable)
        alike = topology.neuron_axes, weight.scale is not None
        follow, mask = self._follower(*alike), ops.convert_to_tensor(topology.mask)
        if are_on_host([topology.mask]):
            mask = host(mask)
        else:
            follow = self._sparse.programs.setdefault(("follow", alike), compiled(follow))
        slots = [ops.convert_to_tensor(slot) for slot in weight.slots]
        explored = ops.convert_to_tensor(weight.explored)
        slots, now, ever, scale = follow(slots, mask, explored)
        for slot, value in zip(weight.slots, slots):
            slot.assign(value)
        if weight.mask is not topology.mask:
            weight.mask.assign(np.array(mask) if isinstance(mask, np.ndarray) else ops.copy(mask))
        if scale is not None:
            weight.scale.assign(scale)
        if explores:
            weight.explored.assign(now if self.has_not_stepped() else ever)

    def _follower(self, neuron_axes, has_scale):
        def follow(slots, mask, explored):
            now = masks.packed(mask)
            slots = [ops.where(mask, slot, ops.cast(0, slot.dtype)) for slot in slots]
            scale = self.correction(mask, neuron_axes) if has_scale else None
            return slots, now, ops.bitwise_or(explored, now), scale

        return follow

    def _take_masks(self, explores):
        for weight in self.weights:
            self.follow(weight.topology, explores)

    def settle(self):
        """Take over weights and masks that were changed from outside, past Keras' variables.

        Assignments to a Keras variable are noticed at once; the callbacks call this for the rest,
        such as `tf.train.Checkpoint.restore` of the model alone.
        """
        for weight in self.weights:
            weight.topology.settle()
        self._take_masks(explores=False)

    def budget_of(self, topology):
        """The active units that a mask was given: int."""
        return int(host(self.budgets)[self.weight_of(topology.variable).index])

    def set_budget(self, topology):
        """What is active now is what the mask was given."""
        budgets = np.array(host(self.budgets))
        budgets[self.weight_of(topology.variable).index] = topology.num_active_units()
        self.budgets.assign(budgets)

    def has_not_stepped(self):
        return int(host(keras_internals.step_count(self.base_optimizer()))) == 0

    # ------------------------------------------------------------------ mask updates

    def inspect(self, weights, gradient_of=lambda weight: None):
        """What a mask update must know before it may begin, a few numbers of each weight.

        Args:
            weights: List of `Weight`s.
            gradient_of: Function of a `Weight`: its gradient, a tensor, or `None`.

        Returns:
            Dict from index to a dict: `active` (int), `weight_is_finite`, `gradient_is_finite`,
            `gradient_is_written` (bools).
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
        always = {"gradient_is_finite": True, "gradient_is_written": True}
        return {
            index: {**always, **{name: np.asarray(value).item() for name, value in facts.items()}}
            for index, facts in found.items()
        }

    def update_compiled(self, updates, gradient_of, key, keeps_budget, donates):
        """Change masks where the variables are; nothing comes to the host.

        Args:
            updates: List of (`Weight`, function, numbers). The function of (weight, mask,
                gradient, numbers) gives the new mask, a bool array of its shape, and where new
                connections start, as in `rewire`; numbers is a dict of ints and floats.
            gradient_of: As in `inspect`.
            key: Hashable; with the same key the functions are the same for weights whose topologies
                are alike, and compiled once for each shape.
            keeps_budget: Bool, whether the masks' budgets stay as they are.
            donates: Bool, whether JAX may give the memory of the variables to their new values, as
                Keras' `fit` does.
        """
        initial = self.has_not_stepped()
        changed, active, budgets = [], [], {}
        for weight, rank, numbers in updates:
            topology, has_scale = weight.topology, weight.scale is not None
            alike = topology.geometry, has_scale
            name = key, alike, initial, donates
            program = self._sparse.programs.get(name)
            if program is None:
                program = compiled(
                    self.mover(weight, rank, initial), donate=(0,) if donates else ()
                )
                self._sparse.programs[name] = program
            moving = [weight.variable, *weight.slots, weight.explored]
            state = [ops.convert_to_tensor(variable) for variable in moving]
            numbers = {k: np.asarray(v, _dtype(v)) for k, v in numbers.items()}
            mask = ops.convert_to_tensor(topology.mask)
            state, mask, scale, (new, now, units) = program(
                state, mask, gradient_of(weight), numbers
            )
            with topology.quiet():
                for variable, value in zip(moving, state):
                    variable.assign(value)
                topology.mask.assign(mask)
            if weight.mask is not topology.mask:
                weight.mask.assign(ops.copy(mask))
            if scale is not None:
                weight.scale.assign(scale)
            for optimizer in topology.optimizers:
                if optimizer is not self:
                    optimizer.follow(topology)
            changed.append(new)
            active.append(now)
            budgets[weight.index] = units
        counts = ops.maximum(sum(active), 1)
        self.mask_change.assign(ops.cast(sum(changed), "float32") / ops.cast(counts, "float32"))
        if not keeps_budget:
            before = ops.unstack(ops.convert_to_tensor(self.budgets))
            self.budgets.assign(
                ops.stack([budgets.get(index, old) for index, old in enumerate(before)])
            )

    def mover(self, weight, rank, initial):
        """A mask update of one weight as a pure function.

        Args:
            weight: `Weight`.
            rank: Function as in `update_compiled`.
            initial: Bool, `True` before the first step, when earlier masks do not count as
                explored.

        Returns:
            Function of ([weight, *slots, explored], mask, gradient, numbers) → the first two, new,
            the correction's scale or `None`, and how many weights are new, are active, and how
            many units are active.
        """
        geometry, has_scale = weight.topology.geometry, weight.scale is not None

        def move(state, mask, gradient, numbers):
            value, *slots, explored = state
            new, grown = rank(value, mask, gradient, numbers)
            survives = ops.logical_and(new, mask)
            grows = ops.logical_and(new, ops.logical_not(mask))
            moving = [masks.moved(value, survives, grows, grown)]
            moving += [masks.moved(slot, survives) for slot in slots]
            now = masks.packed(new)
            explored = now if initial else ops.bitwise_or(explored, now)
            scale = self.correction(new, geometry.neuron_axes) if has_scale else None
            units = geometry.units(mask.shape)
            counts = masks.count(grows), masks.count(new), units.num_active(new)
            return [*moving, explored], new, scale, counts

        return move

    def itop_rate(self, all_weights: bool = False) -> float:
        """In-time over-parameterisation: the fraction of sparse weights ever active.

        ```
        R = |∪_t mask_t| / (all weights that have a mask), initial masks included
        ```

        Saved with the optimizer, so it survives a resume.

        Args:
            all_weights: Bool, defaults to `False`. `True` counts what has no mask as well, such as
                biases, normalizations and dense layers: always active.

        Raises:
            ValueError: If the optimizer is not built, or trains no sparse layer.

        References:
            Liu et al., "Do We Actually Need Dense Over-Parameterization?", ICML 2021.
        """
        if not self.weights:
            raise ValueError(
                "`itop_rate` needs a built optimizer with sparse weights to train. Received: "
                f"built={self.built}, sparse weights: 0"
            )
        explored = sum(_count_bits(weight.explored) for weight in self.weights)
        total = sum(math.prod(weight.variable.shape) for weight in self.weights)
        if all_weights:
            trained = keras_internals.trained_variables(self)
            dense = sum(math.prod(v.shape) for v in trained) - total
            explored, total = explored + dense, total + dense
        return explored / total

    def dead_neurons(self) -> int:
        """How many neurons of the sparse weights have no active incoming weight: int.

        They compute a constant, and what grows towards them is all that can bring them back.
        `connectivity` tells which they are.
        """
        number = 0
        for weight in self.weights:
            axes = weight.topology.neuron_axes
            if are_on_host([weight.mask]):
                number += int(_count_dead(host(weight.mask), axes))
            else:
                program = self._sparse.programs.setdefault(
                    ("dead_neurons", axes), compiled(functools.partial(_count_dead, axes=axes))
                )
                number += int(host(program(ops.convert_to_tensor(weight.mask))))
        return number

    # ------------------------------------------------------------------ dense gradients

    def lease_gradients(self, steps: int = 1, every: Any = None, momentum: float | None = None):
        """Begin to keep the dense gradient of every sparse weight, for as long as the lease lives.

        A train step that was compiled before must be made again, or does not write them; the
        callbacks see to that.

        Args:
            steps: Int, how many optimizer steps the kept gradient is averaged over.
            every: Int, the averaging window ends at multiples of this step count; needed
                with `steps` > 1 or with gradient accumulation.
            momentum: Float in (0, 1) to keep a moving average of all steps' gradients instead,
                or `None` (default).

        Returns:
            `Lease`.

        Raises:
            ValueError: For `momentum` together with gradient accumulation.
        """
        accumulation = self.base_optimizer().gradient_accumulation_steps or 1
        if momentum is not None and accumulation > 1:
            raise ValueError(
                "A moving average of dense gradients cannot be kept under gradient accumulation. "
                f"Received: gradient_accumulation_steps={accumulation}"
            )
        window = steps * accumulation
        averaging = Averaging(window, 1 if window == 1 else every * accumulation, momentum)
        state = self._sparse
        if not state.leases.get(averaging):
            if averaging not in state.taps:
                state.taps[averaging] = [Tap(w.variable, UNWRITTEN) for w in self.weights]
            for tap in state.taps[averaging]:
                tap.open()
        state.leases[averaging] = state.leases.get(averaging, 0) + 1
        return Lease(self, averaging)

    def _return_lease(self, averaging):
        state = self._sparse
        state.leases[averaging] -= 1
        if not state.leases[averaging]:
            for tap in state.taps[averaging]:
                tap.close()

    @property
    def kept_gradients(self):
        """What a compiled step writes: hashable, and different where the step must be another."""
        return frozenset(self._sparse.open_taps)

    def _keep(self, grad, tap, averaging):
        if self.loss_scale_factor is not None:
            grad = grad / self.loss_scale_factor
        if averaging.carries:
            kept = tap.read()
            restart = kept == UNWRITTEN
            weight = 1 / averaging.window
            if averaging.momentum is None:
                position = keras_internals.step_count(self.base_optimizer()) % averaging.interval
                fresh = position <= averaging.interval - averaging.window
                restart = ops.logical_or(fresh, restart)
            else:
                kept, weight = averaging.momentum * kept, 1 - averaging.momentum
            grad = ops.where(restart, ops.zeros_like(kept), kept) + grad * weight
        tap.assign(grad)

    # ------------------------------------------------------------------ state

    @property
    def variables(self):
        # JAX's step must carry the transient state as well.
        return super().variables + ([] if IS_TENSORFLOW else self.transient_variables)

    @property
    def transient_variables(self):
        """Mask copies and dense gradients, which Keras' files do not hold."""
        return self._sparse.copies + [tap.variable for tap in self._kept(lambda averaging: True)]

    @property
    def carried_gradients(self):
        """The `Tap`s that a resume would need: averages over several steps."""
        return self._kept(lambda averaging: averaging.carries)

    def _kept(self, condition):
        open_taps = sorted(self._sparse.open_taps.items(), key=lambda pair: repr(pair[0]))
        return [tap for averaging, taps in open_taps if condition(averaging) for tap in taps]

    def load_own_variables(self, store):
        super().load_own_variables(store)
        if self.weights:
            self._take_masks(explores=False)

    def get_config(self) -> dict[str, Any]:
        config = {
            **super().get_config(),
            "skew_correction": self.skew_correction,
            "renormalize": self.renormalize,
        }
        saved = self._sparse.saved_topologies
        if self.weights:
            # As Keras will build the loaded one: without what was frozen since.
            trained = keras_internals.trained_variables(self)
            position = {id(v): i for i, v in enumerate(v for v in trained if v.trainable)}
            saved = [
                {"index": position[id(weight.variable)], **weight.topology.get_config()}
                for weight in self.weights
                if weight.topology.is_attached and weight.variable.trainable
            ]
        if saved:
            config["topologies"] = list(saved)
        return config


def _dtype(value):
    return "int32" if isinstance(value, (int, np.integer)) else "float32"


@contextlib.contextmanager
def _without_keeping_zeros(variable):
    """`SparseOpt` keeps zeros by itself; the weight's own constraint stays."""
    constraint = variable.constraint
    variable.constraint = own_constraint(variable)
    try:
        yield
    finally:
        variable.constraint = constraint


def _is_initialized(weight):
    """`False` while TensorFlow traces the step that will create the layer's variables."""
    return not IS_TENSORFLOW or bool(weight.topology.mask.value.is_initialized())


def _count_bits(words):
    if are_on_host([words]):
        return masks.count_packed(host(words))
    return int(host(_count_packed(ops.convert_to_tensor(words))))


_count_packed = compiled(masks.count_packed)


def _count_dead(mask, axes):
    return masks.count(masks.neuron_counts(mask, axes) == 0)


def _facts_on_host(weight, mask, gradient):
    facts = {"active": np.count_nonzero(mask), "weight_is_finite": _is_finite(weight)}
    if gradient is not None:
        gradient = host(gradient)
        is_finite = _is_finite(gradient)
        facts["gradient_is_finite"] = is_finite
        facts["gradient_is_written"] = is_finite or not np.all(gradient == UNWRITTEN)
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
        facts["gradient_is_written"] = ops.any(gradient != UNWRITTEN)
    return facts
