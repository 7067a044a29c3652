"""What makes a weight sparse: a mask that hangs on it, and what the axes of each kernel mean."""

import contextlib
import fnmatch
import math
import weakref
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_sparseopt import keras_internals, masks
from keras_sparseopt.backend import (
    IS_TENSORFLOW,
    are_on_host,
    colocated_scope,
    compiled,
    host,
    is_traced,
)
from keras_sparseopt.structures import (
    Geometry,
    Unstructured,
    as_structure,
    structure_config,
    units_of,
)
from keras_sparseopt.typing import Variable

# ---------------------------------------------------------------------- axes of kernels


class Kernel:
    """A weight of a layer that can be masked, and what its axes mean.

    Attributes:
        layer: The layer that made it.
        variable: Keras variable of rank ≥ 2.
        neuron_axes: Tuple of ints, the axes that index neurons: output units, or channels.
        input_axes: Tuple of ints, the axes that index inputs: units, or channels.
        by_default: Bool, whether `sparsify` masks it without being asked.
        why_not: String, why not; empty otherwise.
    """

    def __init__(self, layer, variable, neuron_axes, input_axes, why_not=""):
        self.layer = layer
        self.variable = variable
        self.neuron_axes = neuron_axes
        self.input_axes = input_axes
        self.why_not = why_not

    @property
    def by_default(self):
        return not self.why_not

    @property
    def size(self):
        return math.prod(self.variable.shape)

    def units(self, structure):
        """`Units` of a structure on this kernel."""
        shape = tuple(self.variable.shape)
        return units_of(structure, shape, tuple(self.neuron_axes), tuple(self.input_axes))

    @property
    def shape(self):
        """Spatial axes, then all inputs, then all neurons: how ER and ERK see it."""
        shape, known = self.variable.shape, {*self.neuron_axes, *self.input_axes}
        spatial = [shape[axis] for axis in range(len(shape)) if axis not in known]
        inputs = [shape[axis] for axis in self.input_axes if axis not in self.neuron_axes]
        neurons = [shape[axis] for axis in self.neuron_axes]
        return (*spatial, math.prod(inputs), math.prod(neurons))


_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_NEVER = (
    layers.BatchNormalization,
    layers.LayerNormalization,
    layers.GroupNormalization,
    layers.RMSNormalization,
    layers.UnitNormalization,
    layers.SpectralNormalization,
    layers.Normalization,
    layers.PReLU,
)


def kernels_of(model):
    """The weights of a model that can be masked, each once, in the model's order.

    Args:
        model: Any Keras model or layer.

    Returns:
        List of `Kernel`.
    """
    found: dict[int, Kernel] = {}
    for layer in keras_internals.all_layers(model):
        for variable in keras_internals.own_weights(layer):
            kernel = _kernel(layer, variable)
            if kernel is not None:
                found.setdefault(id(variable), kernel)
    order = {id(variable): i for i, variable in enumerate(model.weights)}
    return sorted(found.values(), key=lambda kernel: order.get(id(kernel.variable), len(order)))


def _kernel(layer, variable):
    rank, name = len(variable.shape), variable.name
    is_float = "float" in keras.backend.standardize_dtype(variable.dtype)
    if rank < 2 or not is_float or isinstance(layer, _NEVER) or "bias" in name:
        return None
    last, before = rank - 1, rank - 2
    if isinstance(layer, layers.EinsumDense) and name == "kernel":
        neurons = einsum_neuron_axes(layer.equation)
        return Kernel(layer, variable, neurons, masks.fan_in_axes(rank, neurons))
    if isinstance(layer, _TRANSPOSED) and name == "kernel":
        return Kernel(layer, variable, (before,), (last,))
    if isinstance(layer, _DEPTHWISE) or name == "depthwise_kernel":
        return Kernel(layer, variable, (before, last), (before,), "depthwise")
    if isinstance(layer, _CONVOLUTIONS) and layer.groups > 1 and variable.shape[before] == 1:
        return Kernel(layer, variable, (last,), (before,), "depthwise")
    if isinstance(layer, layers.Embedding) or "embedding" in name:
        return Kernel(layer, variable, (last,), (before,), "embedding")
    if "kernel" in name and not name.startswith("lora_"):
        return Kernel(layer, variable, (last,), (before,))
    return Kernel(layer, variable, (last,), (before,), "not named kernel")


def einsum_neuron_axes(equation):
    """The kernel axes of an einsum `"input,kernel->output"` that appear in its output."""
    operands, output = equation.replace("...", "").replace(" ", "").split("->")
    labels = operands.split(",")[1]
    return tuple(axis for axis, label in enumerate(labels) if label in output)


# ---------------------------------------------------------------------- the mask


class Topology:
    """What an optimizer needs to know of a sparse weight; it hangs on the Keras variable.

    `variable.topology` is the only link from optimizers to models: an optimizer never sees
    a layer, and a variable without a topology is an ordinary one.

    Weights win: where an attached mask's weight is assigned from outside (`load_weights`,
    `set_weights`, `EarlyStopping`), its nonzero weights become the active ones, filled up to
    their number with positions that were active.

    Attributes:
        variable: Keras variable, the weight.
        mask: Bool `keras.Variable` of the weight's shape. An attached one becomes a variable of the
            `SparseOpt` that trains the weight; that of a layer sparse by construction is the
            layer's.
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
        structure=None, is_attached=True,
    ):  # fmt: skip
        self.variable = variable
        self.mask = mask
        self.neuron_axes = tuple(neuron_axes)
        self.input_axes = tuple(input_axes)
        self.skew_correction = skew_correction
        self.name = name
        self.feeds = feeds
        self.structure = structure or Unstructured()
        self.is_attached = is_attached
        # Whether JAX has compiled the mask into another optimizer's step, as a constant.
        self.is_compiled_in = False
        self._models: list = []
        self._optimizers: list = []
        self._is_quiet = False

    # ------------------------------------------------------------------ who trains it

    @property
    def optimizers(self):
        """The `SparseOpt`s that were built with this weight."""
        alive = [reference() for reference in self._optimizers]
        return [optimizer for optimizer in alive if optimizer is not None]

    def join(self, optimizer):
        """A `SparseOpt` says that it trains the weight."""
        self._optimizers = [weakref.ref(o) for o in self.optimizers]
        self._optimizers.append(weakref.ref(optimizer))

    def belong_to(self, model):
        """The weight is one of a model's."""
        self._models.append(weakref.ref(model))

    # ------------------------------------------------------------------ changing it

    def num_active(self):
        """How many weights are active: int."""
        if self._is_on_host():
            return int(np.count_nonzero(host(self.mask)))
        return int(host(_count(ops.convert_to_tensor(self.mask))))

    def num_active_units(self):
        """How many units of its structure are active: int."""
        if self._is_on_host():
            return int(self.units.num_active(host(self.mask)))
        return int(host(self.units.num_active_compiled(ops.convert_to_tensor(self.mask))))

    def check_mask(self, mask, is_final=False):
        """`mask` as a NumPy bool array, if the weight may have it.

        Args:
            mask: Array.
            is_final: Bool; `False` takes what `GMP` passes through under `NM`, too.

        Raises:
            ValueError: If it has another shape or dtype, or not the weight's structure.
        """
        mask = masks.check_mask(mask, self.variable.shape)
        if not self.units.holds(mask) or (is_final and not self.units.is_finished(mask)):
            raise ValueError(
                f"The mask of '{self.name}' must have the structure {self.structure}. Received: a "
                "mask that has not"
            )
        return mask

    @property
    def geometry(self):
        """`Geometry`: all that a mask update must know of the weight."""
        return Geometry(self.structure, self.neuron_axes, self.input_axes, self.skew_correction)

    def get_config(self):
        """What a file says of the mask, beside its values: dict of JSON."""
        return {
            "shape": list(self.variable.shape),
            "neuron_axes": list(self.neuron_axes),
            "input_axes": list(self.input_axes),
            "skew_correction": self.skew_correction,
            "name": self.name,
            "feeds": self.feeds,
            "structure": structure_config(self.structure),
        }

    @property
    def sparsity(self):
        """Inactive fraction: float."""
        return 1.0 - self.num_active() / math.prod(self.variable.shape)

    @property
    def neuron_sparsity(self):
        """Inactive fraction of each neuron's fan-in: NumPy array, one entry per neuron."""
        mask = host(self.mask)
        return 1.0 - mask.mean(axis=masks.fan_in_axes(mask.ndim, self.neuron_axes))

    @property
    def units(self):
        """`Units`: the mask's structure on this kernel."""
        return self.geometry.units(self.variable.shape)

    def _is_on_host(self):
        return are_on_host([self.variable, self.mask])

    def change(self, mask, grown=None):
        """Mask, weight and all slots move together.

        Args:
            mask: NumPy bool array. Connections in both masks keep weight and slots; dropped ones
                become 0.
            grown: Array of the weight's shape, where new ones start; `None` (default) for 0.
        """
        weight = ops.convert_to_tensor(self.variable)
        grown = None if grown is None else ops.convert_to_tensor(grown)
        if self._is_on_host():
            survives = mask & host(self.mask)
            grows = None if grown is None else ops.convert_to_tensor(mask & ~survives)
            weight = masks.moved(weight, ops.convert_to_tensor(survives), grows, grown)
        else:
            old, new = map(ops.convert_to_tensor, (self.mask, mask))
            weight = _moved(weight, old, new, grown)
        with self.quiet():
            self.variable.assign(weight)
        self.replace_mask(mask)

    def replace_mask(self, mask):
        """A new mask for a weight that is 0 where it is inactive; optimizers follow."""
        with self.quiet():
            # Copied: JAX may use NumPy's memory as it is, and cannot donate a buffer twice.
            self.mask.assign(np.array(mask) if isinstance(mask, np.ndarray) else mask)
        for optimizer in self.optimizers:
            optimizer.follow(self)
        if self.is_compiled_in:
            self.is_compiled_in = False
            for model in filter(None, (reference() for reference in self._models)):
                model.train_function = None  # to be compiled anew

    @contextlib.contextmanager
    def quiet(self):
        """While what is assigned fits already."""
        was, self._is_quiet = self._is_quiet, True
        try:
            yield
        finally:
            self._is_quiet = was

    def before_assign(self, variable, value):
        """What to do once `value` is assigned to the weight or the mask; `None` for nothing.

        Raises:
            ValueError: If a weight with an attached mask would have more nonzero values than the
                mask has active ones. Nothing has changed then.
        """
        if self._is_quiet or is_traced(value) or keras_internals.in_stateless_scope():
            return None
        if keras_internals.is_absent(self.mask) or keras_internals.is_absent(self.variable):
            return None  # JAX's `fit` brings its state back
        if variable is self.mask:
            if self._is_on_host():
                self.check_mask(value)
            return self._after_mask
        if not self.is_attached:
            return None
        mask = self._fitting(value)
        return None if mask is None else lambda: self.replace_mask(mask)

    def _after_mask(self):
        for optimizer in self.optimizers:
            optimizer.follow(self)

    def _fitting(self, weight):
        """The mask that nonzero weights want, `None` if they fit the present one."""
        mask, weight = ops.convert_to_tensor(self.mask), ops.convert_to_tensor(weight)
        if self._is_on_host():
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
                "start_from_epoch."
            )
        return new if outside else None

    def settle(self):
        """Weights win, also where an assignment went past the variable (`tf.train.Checkpoint`)."""
        mask = self._fitting(self.variable) if self.is_attached else None
        if mask is not None:
            self.replace_mask(mask)

    def moved_weights(self):
        """How many inactive weights are not 0: what something other than SparseOpt has moved."""
        if self._is_on_host():
            return int(np.count_nonzero((host(self.variable) != 0) & ~host(self.mask)))
        weight, mask = ops.convert_to_tensor(self.variable), ops.convert_to_tensor(self.mask)
        return int(host(_count_moved(weight, mask)))


@compiled
def _count_moved(weight, mask):
    return masks.count(ops.logical_and(ops.not_equal(weight, 0), ops.logical_not(mask)))


_count = compiled(masks.count)


@compiled
def _moved(weight, old, new, grown):
    grows = ops.logical_and(new, ops.logical_not(old))
    return masks.moved(weight, ops.logical_and(old, new), grows, grown)


class KeepZeros(keras.constraints.Constraint):
    """Holds an attached mask under an optimizer that knows nothing of it.

    Keras applies it after each of the optimizer's steps; `SparseOpt` needs it not and takes it off.

    Args:
        topology: `Topology` of the weight.
        constraint: The weight's own constraint, which is kept, or `None`.
    """

    def __init__(self, topology, constraint=None):
        self.topology = topology
        self.constraint = constraint

    def __call__(self, w):
        w = ops.convert_to_tensor(w)
        self.topology.is_compiled_in |= not IS_TENSORFLOW and is_traced(w)
        if self.constraint is not None:
            w = self.constraint(w)
        return masks.masked(w, ops.convert_to_tensor(self.topology.mask))

    def get_config(self):
        raise ValueError("KeepZeros belongs to a weight with a mask, and is not saved.")


def attach(
    variable, mask, neuron_axes, input_axes, skew_correction, name, feeds="",
    structure=None,
):  # fmt: skip
    """Hang a mask on a weight, which stays as it is: the caller sees that zeros are zeros.

    Args:
        variable: Keras variable.
        mask: NumPy bool array of its shape.
        neuron_axes, input_axes, skew_correction, name, feeds, structure: As in `Topology`.
    """
    with colocated_scope(variable.value):
        mask = keras.Variable(
            initializer=np.array(mask), dtype="bool", trainable=False, autocast=False,
            aggregation="only_first_replica", name=f"{name.replace('/', '_')}_mask",
        )  # fmt: skip
    keras_internals.follow_layout(mask, of=variable)
    topology = Topology(
        variable, mask, neuron_axes, input_axes, skew_correction, name, feeds, structure
    )
    variable.topology = topology
    variable.constraint = KeepZeros(topology, variable.constraint)
    keras_internals.tell(variable)
    return topology


def attach_saved(variable, mask, config):
    """Hang a mask on a weight, as `Topology.get_config` has written it."""
    known = "neuron_axes", "input_axes", "skew_correction", "name", "feeds"
    structure = as_structure(config.get("structure"))
    return attach(variable, mask, **{key: config[key] for key in known}, structure=structure)


def detach(variable):
    """Let go of an attached mask."""
    keras_internals.tell_no_more(variable)
    variable.constraint = own_constraint(variable)
    del variable.topology


def own_constraint(variable):
    """The constraint that a weight has without its mask."""
    constraint = variable.constraint
    return constraint.constraint if isinstance(constraint, KeepZeros) else constraint


def topology_of(variable):
    """The `Topology` of a weight, or `None`."""
    return getattr(variable, "topology", None)


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
    return [v for v in model.weights if topology_of(v) is not None and v is not v.topology.mask]


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
