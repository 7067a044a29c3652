"""SparseOpt: masks and corrects gradients before any inner optimizer sees them."""

import contextlib
import json
import math
import types
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops, optimizers

from keras_sparseopt import backend, keras_internals, masks
from keras_sparseopt.backend import host
from keras_sparseopt.checks import check_bool
from keras_sparseopt.models.topology import (
    attach,
    attach_saved,
    check_leads,
    forget_steps,
    is_trained_by,
    looks_trained_sparse,
    own_constraint,
    shape_of,
    topology_of,
)
from keras_sparseopt.optimizers.gradients import Averaging, DenseGradients
from keras_sparseopt.optimizers.ham import HAM
from keras_sparseopt.optimizers.matching import matching
from keras_sparseopt.optimizers.moving import Mover, Weight, count_explored
from keras_sparseopt.optimizers.wrapper import WrapperOptimizer
from keras_sparseopt.typing import Array, Variable

# Where gradient and slots are 0, these leave weight and slots at 0: `tests/test_optimizers.py`.
# Anything else, also what derives from them, may move what is inactive.
KEEPS_ZEROS = (
    optimizers.SGD,
    optimizers.RMSprop,
    optimizers.Adam,
    optimizers.AdamW,
    optimizers.Adadelta,
    optimizers.Adagrad,
    optimizers.Adamax,
    optimizers.Nadam,
    optimizers.Lion,
    optimizers.Lamb,
)
# What part of a weight must be 0 for it to have been sparse once; and beside one that is sparse.
# (Of an initializer of half precision one weight in 128 may be 0.)
_FEW_ZEROS, _FEW_BESIDE = 0.1, 0.02


def sparse_opt_of(optimizer):
    """The `SparseOpt` in a compiled optimizer, under loss scaling too; `None` without one."""
    while optimizer is not None and not isinstance(optimizer, SparseOpt):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer


class _State:
    """What Keras' and TensorFlow's attribute tracking must not see."""

    def __init__(self, saved):
        self.weights: dict[int, Weight] = {}
        self.gradients = DenseGradients(self.weights)
        self.slots: dict = {}
        self.copies: list = []
        # From a file: what hung on which variable.
        self.saved = list(saved)
        self.mover: Any = None
        # The weights that the step knew which was traced last.
        self.traced: set | None = None
        # Whether a step was taken, or weights that were sparse once are looked for just now.
        self.has_looked = False
        # The optimizers that this one is inside of, once that mattered.
        self.around: list | None = None
        # What has begun with this optimizer: names of methods, and of their fits of one epoch.
        self.begun: set = set()


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

    Inactive weights, and all their optimizer slots, are exactly 0 after every step: after that of
    an inner optimizer that is not known to keep them so (of a class of your own, Muon, …), they are
    masked once more. Masks that `sparsify` attached are variables of the optimizer and saved with
    it: plain `keras.models.load_model` brings them back, by the paths of the weights, those of
    frozen weights too. A weight without a mask that was sparse once (saved before the optimizer was
    built, say) takes its mask from its zeros, with a warning.

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
        backend.check_strategy(self)
        self.skew_correction = skew_correction
        self.renormalize = renormalize
        self._state = _State(topologies or ())
        self._state.mover = Mover(self)
        self._state.gradients.on_change = self._tell_around

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
        backend.check_optimizer(self)
        outer = keras_internals.outer_of(self)
        if outer is not None:
            keras_internals.store_own_only(outer)
        variables = [variable for variable in variables if not _is_seen(variable)]
        with backend.init_scope():
            self._attach_saved(variables)
            base = self.base_optimizer()
            with keras_internals.slots_recorded(base) as slots:
                super().build(variables)
            self._state.slots = slots
            # The share of active weights that the last mask update made new. Kept here, so
            # that a resumed training logs what the uninterrupted one would have.
            self.mask_change = self.add_variable((), dtype="float32", name="mask_change")
            is_new = not self._state.saved
            for variable in variables:
                is_trained_by(variable, self)
                # What a file told of weights that were frozen then is there for the next optimizer.
                self._state.saved = self._state.saved or getattr(variable, "told_topologies", [])
                if topology_of(variable) is not None:
                    self.adopt(variable)
                    self._check_zeros(variable)
            for variable in variables:
                variable.told_topologies = self._state.saved
            if is_new:
                self._attach_to_zeros()
            self._check_slots()
        if not variables:
            warnings.warn(
                "SparseOpt was built for no variables: all are frozen, or the model comes from a "
                "legacy `.h5` file, of which Keras does not restore the optimizer. Compile it "
                "with a new one.",
                stacklevel=2,
            )
        elif not self.weights:
            warnings.warn(
                "SparseOpt found no sparse weight among the trainable variables and acts as "
                "the inner optimizer alone. Convert the model with "
                "`keras_sparseopt.sparsify(model, sparsity)` before, or use its layers; a clone of "
                "a sparse model whose optimizer was not built yet has its masks in its zeros, "
                "`keras_sparseopt.masks_from_zeros(model)`.",
                stacklevel=2,
            )

    def _check_zeros(self, variable):
        """Weights win, also where another optimizer has moved what is inactive."""
        topology = variable.topology
        is_known = backend.is_initialized(variable) and not keras_internals.is_absent(variable)
        if is_known and not topology.is_open:
            topology.settle()

    def _attach_saved(self, variables):
        saved = self._state.saved
        if saved and not variables:
            raise ValueError(
                "The masks of this model are in its optimizer, which Keras does not restore from "
                "a legacy `.h5` file. Save as `.keras`; or load with compile=False, take the "
                "masks from the zeros with keras_sparseopt.masks_from_zeros(model), and compile."
            )
        if len(self._attach_told(saved, variables)) < len(saved):  # others were frozen
            self._attach_told(saved, [*variables, *_frozen_beside(variables)])

    def _attach_told(self, saved, variables):
        """Hang open masks on variables that have none, and that a file tells of: their list."""
        new = []
        for position, at in matching(saved, variables).items():
            if topology_of(variables[position]) is None and saved[at].get("attached", True):
                attach_saved(variables[position], saved[at])
                new.append(variables[position])
        return new

    def _attach_to_zeros(self):
        """Masks for weights that were sparse once: an optimizer did not see them, being frozen."""
        regained, unsure, trained = [], [], keras_internals.trained_variables(self)
        told = matching(self._state.saved, trained)
        without = {
            position: _zeros_of_training(variable)
            for position, variable in enumerate(trained)
            if topology_of(variable) is None and not getattr(variable, "was_stripped", False)
        }
        # Beside a weight that is sparse, fewer zeros tell of a mask, too.
        is_sparse = self.weights or any(share > _FEW_ZEROS for _, share in without.values())
        few = _FEW_BESIDE if is_sparse else _FEW_ZEROS
        for position, (zeros, scattered) in without.items():
            variable = trained[position]
            entry = self._state.saved[told[position]] if position in told else None
            if entry is not None and zeros and 1 - zeros <= entry["density"] + 1e-6:
                attach_saved(variable, entry).fill()
                how = "as the file describes it"
            elif scattered > (few if entry is None else 0):
                mask, rank = host(variable) != 0, len(variable.shape)
                attach(variable, mask, (rank - 1,), (rank - 2,), False, variable.path)
                how = "unstructured, not corrected"
            else:
                if zeros > _FEW_ZEROS:
                    unsure.append(f"'{variable.path}' ({zeros:.1%} zeros)")
                continue
            regained.append(f"'{variable.path}' ({zeros:.1%} zeros; {how})")
        if unsure:
            warnings.warn(
                "Weights without a mask hold zeros along whole inputs or neurons, as masks of "
                "tiles leave them, and as what no data has reached: they are trained densely. If "
                "they were sparse call keras_sparseopt.masks_from_zeros(model, structure=...) "
                f"before; else keras_sparseopt.strip(layer). Received: {', '.join(unsure)}",
                stacklevel=4,
            )
        if regained:
            warnings.warn(
                "SparseOpt takes masks from the zeros of weights that have none, as after a file "
                f"that was saved while they were frozen: {', '.join(regained)}. For another "
                "structure or correction call keras_sparseopt.masks_from_zeros(model) before. To "
                "train them densely call keras_sparseopt.strip(layer) before.",
                stacklevel=4,
            )

    def _told(self):
        if not self.built:
            return ", not built"
        topologies = [weight.topology for weight in self.weights]
        told = f", {len(topologies) or 'no'} sparse weights"
        if not topologies or any(t.is_open or t.is_out_of_sight for t in topologies):
            return told
        active = sum(topology.num_active() for topology in topologies)
        size = sum(math.prod(topology.shape) for topology in topologies)
        return f"{told}, {1 - active / size:.2%} sparse"

    def trains_sparse(self, variable):
        """Whether a variable is one of its sparse weights."""
        return self._find(variable) is not None

    def adopt(self, variable, before=None):
        """Take a mask over that hangs on a variable which the optimizer was built with.

        Args:
            variable: Keras variable.
            before: `Weight` that it was in another form, whose number and variables go on; `None`
                (default) for a new one.
        """
        index = keras_internals.variable_index(self, variable)
        if index is None or index in self._state.weights:
            return
        topology, name = variable.topology, variable.path.replace("/", "_")
        if topology.is_condensed:
            self.check_condensed(topology)
        form, held_copy = topology.form, None
        if topology.is_attached and not topology.is_condensed:
            keras_internals.track(self, topology.pattern)
        elif topology.is_condensed or not backend.STEPS_SHARE_VARIABLES:
            # A step on JAX sees optimizer variables, not the layer's mask.
            held = form.held(host(topology.pattern))
            if held is not None:
                held_copy = keras.Variable(
                    np.array(held), dtype="bool", trainable=False,
                    layout=keras_internals.layout(variable), name=f"{name}_held",
                )  # fmt: skip
                self._state.copies.append(held_copy)
        # int32: several TensorFlow workers cannot share a uint8.
        explored = self._own(before and before.explored, (-(-form.num_bits // 32),), "int32",
                             f"{name}_explored")  # fmt: skip
        budget = self._own(before and before.budget, (), "int32", f"{name}_budget")
        scale = spare_scale = before and before.spare_scale
        if self._corrects(topology):
            neurons = topology.neuron_axes
            ones = np.ones([n if a in neurons else 1 for a, n in enumerate(topology.shape)])
            shape = form.of_neurons(ones).shape
            scale = spare_scale = self._own(spare_scale, shape, "float32", f"{name}_correction")
            scale.assign(np.ones(shape))
        else:
            scale = None
        slots = keras_internals.slots_of(self._state.slots, self.base_optimizer(), variable)
        slots = [slot for slot in slots if tuple(slot.shape) == tuple(variable.shape)]
        number = 1 + max((weight.index for weight in self.weights), default=-1)
        if before is not None:
            number = before.index
        if topology.is_condensed:
            self._store_plain()
        weight = Weight(variable, number, slots, explored, budget, scale, held_copy)
        weight.spare_scale = spare_scale
        self._state.weights[index] = weight
        self._state.gradients.adopt(weight, self)
        if not topology.is_open and backend.is_initialized(topology.pattern):
            self.follow(topology)
            self.set_budget(topology)

    def _own(self, before, shape, dtype, name):
        """A variable of the optimizer's: a new one, or one from before with this shape."""
        if before is None:
            return self.add_variable(tuple(shape), "zeros", dtype=dtype, name=name)
        if tuple(before.shape) != tuple(shape):
            with backend.colocated_scope(before.value):
                keras_internals.exchange(before, np.zeros(shape, dtype))
        return before

    def check_condensed(self, topology):
        """Raise ValueError where a weight cannot be condensed under the inner optimizer."""
        base = self.base_optimizer()
        if isinstance(base, optimizers.Muon):
            raise ValueError(
                f"{type(base).__name__} looks at a kernel as a matrix, which a condensed weight "
                "is not: train it masked, keras_sparseopt.uncondense(model), or with another "
                f"optimizer. Received: '{topology.name}'"
            )

    def _corrects(self, topology):
        """Whether it corrects the gradient of a weight, as far as that could change anything."""
        if not (self.skew_correction and topology.skew_correction):
            return False
        # Balanced tiles: all neurons have as many weights, unless a tile reaches beyond the inputs.
        is_even = topology.is_condensed and not topology.form.padding
        return not (is_even and type(self).correction is SparseOpt.correction)

    def begins_again(self, what):
        """Whether this has begun before with this optimizer; it does now."""
        is_known = what in self._state.begun
        self._state.begun.add(what)
        return is_known

    def forget(self, variable):
        """Let go of a weight whose mask goes; the `Weight`, or `None`.

        Its variables stay among the optimizer's: TensorFlow cannot export a list that has shrunk.
        """
        weight = self._state.weights.pop(keras_internals.variable_index(self, variable), None)
        if weight is not None:
            copies = self._state.copies
            copies[:] = [copy for copy in copies if copy is not weight.held_copy]
        return weight

    def _store_plain(self):
        """Let files hold the slots of condensed weights as those of the plain kernels."""

        def topology_by(slot):
            for weight in self.weights:
                if weight.topology.is_condensed and any(own is slot for own in weight.slots):
                    return weight.topology
            return None

        def written(slot):
            topology = topology_by(slot)
            return None if topology is None else topology.plain(slot)

        def read(slot, value):
            topology = topology_by(slot)
            if topology is None:
                return None
            return topology.form.stored(np.asarray(value), host(topology.pattern))

        keras_internals.store_as(self.base_optimizer(), written, read)

    def let_go(self, variable):
        """Forget a weight that is about to be stored in another form.

        Returns:
            What `take_back` needs.
        """
        weight, base = self.weight_of(variable), self.base_optimizer()
        key = keras_internals.variable_key(base, variable)
        return types.SimpleNamespace(
            recorded=self._state.slots.pop(key, []),
            explored=weight.topology.form.bits_of_weights(host(weight.explored)),
            budget=int(host(weight.budget)),
            weight=self.forget(variable),
        )

    def take_back(self, variable, state):
        """Go on with a weight that `let_go` has given away; its slots are stored as it is."""
        key = keras_internals.variable_key(self.base_optimizer(), variable)
        self._state.slots[key] = state.recorded
        self.adopt(variable, state.weight)
        weight = self.weight_of(variable)
        weight.explored.assign(weight.topology.form.bits_from_weights(state.explored))
        weight.budget.assign(state.budget)

    def _check_slots(self):
        followed = {id(slot) for group in self._state.slots.values() for slot in group}
        shapes = {tuple(weight.variable.shape) for weight in self.weights}
        for variable in self.base_optimizer().variables:
            if tuple(variable.shape) in shapes and id(variable) not in followed:
                raise ValueError(
                    f"{type(self.base_optimizer()).__name__} holds a slot that SparseOpt cannot "
                    f"follow through mask updates: '{variable.path}' was not made by "
                    "`add_variable_from_reference` or `add_optimizer_variables`."
                )

    def _look_once(self):
        """Fill masks that are open, and find weights that were sparse once, before a first step."""
        if self._state.has_looked or not self.built or keras_internals.in_stateless_scope():
            return
        self._state.has_looked = True  # adopting reads `variables` again
        with backend.init_scope():
            for weight in self.weights:
                weight.topology.fill()
            self._attach_to_zeros()
        self._state.has_looked = False

    # ------------------------------------------------------------------ one training step

    def apply(self, grads, trainable_variables=None):
        if trainable_variables is not None:
            grads, trainable_variables = list(grads), list(trainable_variables)
            self._take_seen(grads, trainable_variables)
            own = [i for i, v in enumerate(trainable_variables) if not _is_seen(v)]
            grads, trainable_variables = ([x[i] for i in own] for x in (grads, trainable_variables))
        super().apply(grads, trainable_variables)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        every = self._with_seen()
        own = [i for i, v in enumerate(every) if not _is_seen(v)]
        if len(own) == len(every) or len(trainable_variables) != len(every):
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)
        self._take_seen(grads, every)
        grads, values = ([x[i] for i in own] for x in (grads, trainable_variables))
        values, optimizer_variables = super().stateless_apply(optimizer_variables, grads, values)
        given = dict(zip(own, values))
        values = [given.get(i, value) for i, value in enumerate(trainable_variables)]
        return values, optimizer_variables

    def _with_seen(self):
        """The variables that a step is differentiated by while condensed weights are looked at."""
        every = []
        for variable in keras_internals.trained_variables(self):
            every.append(variable)
            topology = topology_of(variable)
            seen = [] if topology is None else topology.seen
            every += [s.variable for s in seen if s.variable is not None]
        return every

    def _tell_around(self):
        """Optimizers around this one pair what they pass on with variables."""
        is_condensed = any(weight.topology.is_condensed for weight in self.weights)
        if backend.STEPS_SHARE_VARIABLES or not is_condensed:
            return
        if self._state.around is None:
            every = keras_internals.all_optimizers()
            self._state.around = [o for o in every if getattr(o, "inner_optimizer", None) is self]
        for optimizer in self._state.around:
            keras_internals.pair_with(optimizer, self._with_seen())

    def _take_seen(self, grads, variables):
        """Take what is no gradient out of what a step has found."""
        arrived = {id(v): g for g, v in zip(grads, variables) if _is_seen(v)}
        for weight in self.weights if arrived else ():
            if weight.seen is not None:
                weight.seen.arrived = arrived.get(id(weight.seen.variable))

    def _apply(self, grads, variables):
        if backend.is_single_replica():
            self._look_once()
            self.catch_up()
        self._state.has_looked = True
        if backend.is_traced(*grads):
            self._state.traced = set(self._state.weights)
        weights = [self._find(variable) for variable in variables]
        grads = [
            grad if weight is None or grad is None else self._keep_and_correct(grad, weight)
            for grad, weight in zip(grads, weights)
        ]
        weights = [weight for weight in weights if weight is not None]
        for weight in weights:
            weight.calls, weight.topology.calls = weight.topology.calls, 0
        with contextlib.ExitStack() as stack:
            for weight in weights:
                stack.enter_context(weight.topology.moving())
            super()._apply(grads, variables)
            keeps_zeros = self._inner_keeps_zeros()
            for weight in weights:
                if not keeps_zeros or own_constraint(weight.variable) is not None:
                    self._mask_again(weight)

    def _find(self, variable):
        return self._state.weights.get(keras_internals.variable_index(self, variable))

    def _keep_and_correct(self, grad, weight):
        grad = self._state.gradients.keep(
            grad, weight, self.base_optimizer(), self.loss_scale_factor
        )
        _ = weight.topology.filled_pattern  # an error, if it is not known
        if weight.scale is None:
            return _held(weight, grad)
        scale = ops.convert_to_tensor(weight.scale)
        if self.renormalize:
            active = backend.summed_over_replicas(ops.cast(_held(weight, grad), "float32"))
            before, after = (ops.sum(ops.square(g)) for g in (active, active * scale))
            scale = scale * ops.sqrt(before / ops.where(after > 0, after, 1.0))
        return _held(weight, grad * ops.cast(scale, grad.dtype))

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

    def _inner_keeps_zeros(self):
        """Whether the inner optimizer is exactly one that is known to leave zeros as they are."""
        optimizer = self.inner_optimizer
        while type(optimizer) is HAM:
            optimizer = optimizer.inner_optimizer
        changed = keras_internals.changed_steps(optimizer)
        is_of_ham = "apply" not in changed and type(self.inner_optimizer) is HAM
        is_known = keras_internals.plain_class(optimizer) in KEEPS_ZEROS
        return is_known and (not changed or is_of_ham)

    def _mask_again(self, weight):
        if weight.held is not None:
            for variable in (weight.variable, *weight.slots):
                self.assign(variable, _held(weight, ops.convert_to_tensor(variable)))

    # ------------------------------------------------------------------ topology

    @property
    def weights(self):
        """The `Weight`s that this optimizer was built with, in order."""
        return [weight for _, weight in sorted(self._state.weights.items())]

    @property
    def sparse_weights(self):
        """The sparse weights (Keras variables) that this optimizer trains, in order.

        Without those that were frozen since it was built.
        """
        return [weight.variable for weight in self.weights if weight.variable.trainable]

    @property
    def mover(self):
        """`Mover`: what changes masks."""
        return self._state.mover

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

    def rewire(self, variable: Variable, new_mask: Array, grown: Array = None):
        """Change one weight's topology: mask, weight and slots together.

        Connections in both masks keep weight and slots. New ones start with slots 0 and the
        weight of `grown`; dropped ones become 0, slots included.

        Args:
            variable: Keras variable, one of `sparse_weights`.
            new_mask: Bool array of its shape.
            grown: Array of its shape, or `None` (default) for 0.

        Raises:
            ValueError: If the weight is not trained by this optimizer, or the mask does not
                fit, or has not the weight's structure. Nothing has changed then.
        """
        topology = self.weight_of(variable).topology
        check_leads(variable)
        topology.change(topology.form.of_mask(topology.check_mask(new_mask)), grown)
        topology.set_budget()

    def follow(self, topology, old=None, explores=True):
        """A mask has changed: slots, correction and what was explored follow.

        Args:
            topology: `Topology` of one of the optimizer's weights.
            old: NumPy array, the pattern before; `None` (default) if slots are stored by this one.
            explores: Bool; `False` where what was explored comes from a file, too.
        """
        self.mover.follow(self.weight_of(topology.variable), old, explores)

    def settle(self):
        """Take over weights and masks that were changed from outside, past Keras' variables.

        Assignments to a Keras variable are noticed at once; the callbacks call this for the rest,
        such as `tf.train.Checkpoint.restore` of the model alone.
        """
        self._look_once()
        for weight in self.weights:
            weight.topology.settle()
            if not weight.topology.is_open:
                self.follow(weight.topology, explores=False)
                weight.topology.lead()

    def catch_up(self):
        """Take over what was written past Keras' variables, where that is seen: on PyTorch."""
        for weight in self.weights:
            weight.topology.catch_up()

    def empty_slots(self, topology):
        """Slots of one of the optimizer's weights begin again, at 0."""
        for slot in self.weight_of(topology.variable).slots:
            slot.assign(ops.zeros_like(slot))

    def budget_of(self, topology):
        """The active units that a mask was given: int."""
        return int(host(self.weight_of(topology.variable).budget))

    def set_budget(self, topology):
        """What is active now is what the mask was given."""
        self.weight_of(topology.variable).budget.assign(topology.num_active_units())

    def has_not_stepped(self):
        return int(host(keras_internals.step_count(self.base_optimizer()))) == 0

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
        explored = sum(count_explored(weight) for weight in self.weights)
        total = sum(math.prod(weight.topology.shape) for weight in self.weights)
        if all_weights:
            trained = keras_internals.trained_variables(self)
            dense = sum(math.prod(shape_of(v)) for v in trained) - total
            explored, total = explored + dense, total + dense
        return explored / total

    def dead_neurons(self) -> int:
        """How many neurons of the sparse weights have no active incoming weight: int.

        They compute a constant, and what grows towards them is all that can bring them back.
        `connectivity` tells which they are.
        """
        return self.mover.dead_neurons(self.weights)

    # ------------------------------------------------------------------ dense gradients

    def lease_gradients(
        self, steps: int = 1, every: int = 1, momentum: float | None = None, whole: bool = False
    ):
        """Begin to keep the dense gradient of every sparse weight, for as long as the lease lives.

        A train step that was compiled before must be made again, or does not write them; the
        callbacks see to that.

        Args:
            steps: Int, how many optimizer steps the kept gradient is averaged over, defaults to 1.
            every: Int, the averaging window ends at multiples of this step count, defaults to 1.
            momentum: Float in (0, 1) to keep a moving average of all steps' gradients instead,
                or `None` (default).
            whole: Bool, whether a condensed weight's gradient must be there, too, in the shape of
                its kernel. By default (`False`) sums of its magnitudes over tiles may take its
                place, which cost no memory.

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
        return self._state.gradients.lease(self, averaging, whole)

    @property
    def has_new_weights(self):
        """Whether masks have come since a step was traced last: it does not know of them."""
        traced = self._state.traced
        return traced is not None and traced != set(self._state.weights)

    @property
    def kept_gradients(self):
        """What a compiled step writes: hashable, and different where the step must be another."""
        gradients = self._state.gradients
        return frozenset([*gradients.kinds, *gradients.shapes])

    # ------------------------------------------------------------------ state

    @property
    def variables(self):
        self._look_once()
        if keras_internals.is_training_state_taken():
            for weight in self.weights:  # an error now, or the state would be lost
                _ = weight.topology.filled_pattern
        own = super().variables
        # A step that does not share variables must carry the transient state as well.
        return own if backend.STEPS_SHARE_VARIABLES else own + self.transient_variables

    @property
    def transient_variables(self):
        """Mask copies and dense gradients, which Keras' files do not hold."""
        return self._state.copies + [tap.variable for tap in self._state.gradients.taps()]

    @property
    def seen_variables(self):
        """What dense gradients of condensed weights arrive by in a step, just now."""
        return [v for v in self._with_seen() if _is_seen(v)]

    @property
    def carried_gradients(self):
        """The `Tap`s that a resume would need: averages over several steps."""
        return self._state.gradients.taps(outlasting=True)

    def save_own_variables(self, store):
        weights = self.weights
        about = [
            {**w.topology.get_config(), "attached": w.topology.is_attached, "index": w.index}
            for w in weights
        ]
        store["weights"] = np.frombuffer(json.dumps(about).encode(), "uint8")
        store["mask_change"] = host(self.mask_change) if self.built else np.float32(0)
        for at, weight in enumerate(weights):
            if weight.topology.is_open:
                continue  # nothing is known of it yet
            if weight.topology.is_attached:
                store[f"{at}_mask"] = host(weight.topology.mask)
            store[f"{at}_explored"] = weight.topology.form.bits_of_weights(host(weight.explored))
            store[f"{at}_budget"] = host(weight.budget)

    def load_own_variables(self, store):
        if "weights" not in store.keys() or not self.built:
            warnings.warn(
                f"Skipping variable loading for optimizer '{self.name}': "
                f"{'the file holds no SparseOpt' if self.built else 'it is not built'}. Masks stay "
                "as they are where weights fit them; to take the topology of weights that were "
                "sparse in the file call keras_sparseopt.masks_from_zeros(model).",
                stacklevel=2,
            )
            return
        saved = json.loads(bytes(np.asarray(store["weights"], "uint8")).decode())
        new = self._attach_told(saved, keras_internals.trained_variables(self))
        if new:
            for variable in new:
                variable.topology.weights_came = True
            forget_steps(new)
            warnings.warn(
                f"The file holds masks of {', '.join(v.path for v in new)}, which had none: they "
                "have them now. To train them densely call keras_sparseopt.strip.",
                stacklevel=2,
            )
        trained = keras_internals.trained_variables(self)
        every = [*trained, *(_frozen_beside(trained) if len(saved) > len(self.weights) else [])]
        for position, at in matching(saved, every).items():
            topology = topology_of(every[position])
            if position >= len(trained) and topology is not None:
                self._load_mask(topology, store, at)
        weights = self.weights
        found = matching(saved, [weight.variable for weight in weights])
        self._number_as_saved(weights, {position: saved[at] for position, at in found.items()})
        missing = [
            weight.topology.name
            for position, weight in enumerate(weights)
            if position not in found or not self._load_weight(weight, store, found[position])
        ]
        self.mask_change.assign(store["mask_change"])
        if missing and saved:
            warnings.warn(
                f"The file holds no masks that fit {', '.join(missing)}. Masks stay as they are "
                "where weights fit them; those that are not known are taken from the zeros of the "
                "weights.",
                stacklevel=2,
            )

    def _number_as_saved(self, weights, entries):
        """Random growth goes by a weight's number: that of a weight that has come later goes on."""
        taken = {entry["index"] for entry in entries.values()}
        for position, weight in enumerate(weights):
            if position in entries:
                weight.index = entries[position]["index"]
            elif weight.index in taken:
                weight.index = 1 + max([*taken, *(w.index for w in weights)])

    def _load_weight(self, weight, store, at):
        """Take over what was saved of a weight; whether it fits, where the weight has come before.

        An open mask is for a weight from the same file.
        """
        topology = weight.topology
        if f"{at}_explored" not in store.keys() or not self._load_mask(topology, store, at):
            return False
        explored = topology.form.bits_from_weights(np.asarray(store[f"{at}_explored"]))
        weight.explored.assign(explored)
        weight.budget.assign(store[f"{at}_budget"])
        if topology.is_open or topology.is_led or not keras_internals.is_loading():
            topology.settle()  # else weights come, too, perhaps only after their optimizer
        self.follow(topology, explores=False)
        return True

    def _load_mask(self, topology, store, at):
        """Take over a mask that was saved; whether the weight fits, where it has come before."""
        if topology.is_attached and f"{at}_mask" in store.keys():
            mask = topology.check_mask(np.asarray(store[f"{at}_mask"]).astype(bool))
            can_look = topology.weights_came and backend.is_whole(topology.variable)
            if can_look and (topology.plain(topology.variable)[~mask] != 0).any():
                return False
            topology.replace_mask(mask)
        return True

    def get_config(self) -> dict[str, Any]:
        config = {
            **super().get_config(),
            "skew_correction": self.skew_correction,
            "renormalize": self.renormalize,
        }
        trained = keras_internals.trained_variables(self) if self.built else []
        topologies = [weight.topology for weight in self.weights]
        topologies += [v.topology for v in _frozen_beside(trained) if topology_of(v) is not None]
        own = [topology.get_config() for topology in topologies if topology.is_attached]
        paths = {entry["path"] for entry in own}
        # What a file told of weights that are frozen now goes on to the next one.
        told = matching(self._state.saved, trained)
        gone = {at for i, at in told.items() if getattr(trained[i], "was_stripped", False)}
        kept = [entry for at, entry in enumerate(self._state.saved) if at not in gone]
        saved = own + [entry for entry in kept if entry["path"] not in paths]
        if saved:
            config["topologies"] = saved
        return config


def _frozen_beside(variables):
    """What an optimizer does not know: the frozen weights of the models that hold variables."""
    known = {id(variable) for variable in variables}
    models = keras_internals.models_of(variables) if variables else []
    every = {id(v): v for model in models for v in model.weights}
    return [
        v for key, v in every.items()
        if key not in known and not (v.trainable or getattr(v, "was_stripped", False))
        and (topology_of(v) is None or v.topology.variable is v)
    ]  # fmt: skip


def _is_seen(variable):
    """Whether it is no weight, but what a dense gradient arrives by."""
    return getattr(variable, "is_seen", False)


def _held(weight, values):
    """Values, 0 where those of the weight are."""
    if weight.held is None:
        return values
    return masks.masked(values, ops.convert_to_tensor(weight.held))


def _zeros_of_training(variable):
    """The share of zeros that a weight has among different values, as a sparse one would.

    Returns:
        Tuple of floats: of all zeros; and, of what does not lie along a whole input or neuron, of
        those that do not. What no data has reached may be as an initializer has left it.
    """
    is_float = "float" in keras.backend.standardize_dtype(variable.dtype)
    if len(variable.shape) < 2 or not is_float or "bias" in variable.name:
        return 0.0, 0.0
    if not backend.is_initialized(variable) or keras_internals.is_absent(variable):
        return 0.0, 0.0
    if not backend.is_whole(variable):
        return 0.0, 0.0
    weight = host(variable)
    nonzero = weight != 0
    if not looks_trained_sparse(weight, nonzero):
        return 0.0, 0.0
    matrix = nonzero.reshape(-1, nonzero.shape[-1])
    reached = matrix.any(axis=1)[:, None] & matrix.any(axis=0)
    scattered = np.count_nonzero(reached & ~matrix) / np.count_nonzero(reached)
    return float(1 - nonzero.mean()), float(scattered)
