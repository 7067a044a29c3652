"""Layers that store and multiply their kernel without its zeros."""

import functools
import math
from typing import Any

import keras
import numpy as np
from keras import ops, regularizers

from keras_sparseopt import backend, forms, keras_internals
from keras_sparseopt.backend import host
from keras_sparseopt.models.products import Letters, equation_of, is_convolution, windows_of
from keras_sparseopt.models.topology import forget_steps, mask_variable, trainers_of

_BY_ELEMENT = regularizers.L1, regularizers.L2, regularizers.L1L2
# Groups of neurons whose dense gradient is made at a time.
_PIECES = 8


# ---------------------------------------------------------------------- the product


def multiply(columns, values, pattern, as_columns=False):
    """A matrix (inputs, neurons) in condensed form times rows, as columns.

    ```
    g = columns, viewed as (tiles, inputs of a tile, rows), at the pattern
    y = gᵀ · values                                                  for each group
    ```

    Args:
        columns: Tensor (inputs, rows), the rows transposed: whole rows of it are gathered.
        values: Tensor (groups, tiles · inputs of a tile, neurons).
        pattern: Int tensor (groups, tiles).
        as_columns: Bool, whether the outputs may be computed as columns, too, where that is faster.

    Returns:
        Tensor (rows, groups · neurons).
    """
    gathered = _gathered(columns, pattern, values.shape[1] // pattern.shape[1])
    return _by_group(gathered, values, as_columns and backend.products_are_columns())


def convolve(planes, values, pattern, windows):
    """A convolution in condensed form: the channels that a group reads, with all taps, as columns.

    Args:
        planes: Tensor (channels, *spatial, batch), with what padding adds.
        values: Tensor (groups, taps · tiles · channels of a tile, neurons).
        pattern: Int tensor (groups, tiles).
        windows: List of tuples of slices, along the spatial axes, one for each tap.

    Returns:
        Tensor (rows, groups · neurons), rows being positions and examples.
    """
    channels = values.shape[1] // len(windows) // pattern.shape[1]
    gathered = _gathered(planes, pattern, channels)
    taps = [gathered[(slice(None), slice(None), *window)] for window in windows]
    taps = [ops.reshape(tap, (*gathered.shape[:2], -1)) for tap in taps]
    return _by_group(ops.concatenate(taps, axis=1), values)


def _gathered(columns, pattern, inputs):
    """The active tiles of inputs: (groups, tiles · inputs of a tile, …)."""
    rest = ops.shape(columns)[1:]
    if inputs > 1:
        columns = ops.reshape(columns, (columns.shape[0] // inputs, inputs, *rest))
    found = backend.rows_at(columns, pattern)
    return ops.reshape(found, (pattern.shape[0], pattern.shape[1] * inputs, *rest))


def _by_group(gathered, values, as_columns=False):
    groups, _, width = values.shape
    if as_columns:
        products = backend.transposed_matmul(values, gathered)
        return transposed(ops.reshape(products, (groups * width, -1)), (1, 0))
    products = backend.transposed_matmul(gathered, values)
    products = ops.transpose(products, (1, 0, 2))
    return backend.settled(ops.reshape(products, (-1, groups * width)))


def transposed(array, order):
    """An array with its axes in another order, in memory, too, where that is faster."""
    return backend.settled(ops.transpose(backend.settled(array), order))


def dense_gradient(form, units, taps, gradient):
    """The gradient of the plain kernel: inputs times the gradient of outputs.

    Args:
        form, units: Of the weight.
        taps: List of tensors (inputs, rows), one for each position of the window.
        gradient: Tensor (rows, neurons).
    """
    found = [ops.matmul(columns, gradient)[: form.inputs] for columns in taps]
    return units.kernel_of(ops.cast(ops.stack(found), "float32"))


def sums_over_tiles(form, taps, gradient):
    """The sums of the dense gradient's magnitudes over all tiles: an array of units.

    It is made for some groups of neurons at a time, so that not all of it is there at once.

    Args:
        form, taps, gradient: As in `dense_gradient`.
    """
    found, step = [], -(-form.groups // _PIECES)
    for first in range(0, form.groups, step):
        last = min(first + step, form.groups)
        piece = gradient[:, first * form.width : last * form.width]
        shape = form.num_tiles, form.tile_inputs, last - first, form.width
        sums = 0
        for columns in taps:
            magnitudes = ops.abs(ops.cast(ops.matmul(columns, piece), "float32"))
            sums = sums + ops.sum(ops.reshape(magnitudes, shape), axis=(1, 3))
        found.append(sums)
    return ops.concatenate(found, axis=1)[None]


# ---------------------------------------------------------------------- the layers


class CondensedLayer(keras.layers.Layer):
    """Mixin in front of a Keras layer that is a product: its kernel is stored without zeros.

    `layer.kernel` reads the plain kernel, and files hold it. What makes the layer anew (a config, a
    clone, a file) makes the plain one. A subclass says how the kernel is stored.
    """

    # Whether it was condensed for inference alone.
    is_for_inference = False

    def plain_kernel(self):
        """The kernel with its zeros: a NumPy array."""
        raise NotImplementedError

    def take_kernel(self, kernel, mask=None):
        """Store a kernel of the plain shape from elsewhere; ValueError if it does not fit.

        Args:
            kernel: NumPy array.
            mask: Array, its mask, or `None` (default) if that is not known.
        """
        raise NotImplementedError

    def product(self, columns):
        """The kernel, as a matrix (inputs, neurons), times inputs (inputs, rows): its transpose."""
        raise NotImplementedError

    def multiplied(self, inputs):
        """The product of inputs and kernel, as the plain layer has it."""
        letters = Letters(equation_of(self)[0], len(inputs.shape))
        sizes = dict(zip(letters.given, ops.shape(inputs)))
        sizes |= letters.kernel_sizes(self.kernel_shape)
        order = letters.summed + letters.rows
        columns = transposed(inputs, [letters.given.index(letter) for letter in order])
        columns = ops.reshape(columns, (math.prod(sizes[x] for x in letters.summed), -1))
        outputs = self.product(columns)
        order = letters.rows + letters.neurons
        outputs = ops.reshape(outputs, [sizes[letter] for letter in order])
        return ops.transpose(outputs, [order.index(letter) for letter in letters.result])

    def call(self, inputs, training=None):
        if self.is_for_inference and keras_internals.is_training(self):
            raise ValueError(for_inference_alone(self))
        outputs = self.multiplied(inputs)
        if self.bias is not None:
            outputs = ops.add(outputs, self.shaped_bias())
        return outputs if self.activation is None else self.activation(outputs)

    def shaped_bias(self):
        """The bias as it broadcasts over the outputs."""
        return self.bias

    def save_own_variables(self, store):
        own: dict = {}
        super().save_own_variables(own)
        own["0"] = self.plain_kernel()
        for name, value in own.items():
            store[name] = value

    def load_own_variables(self, store):
        own = {name: store[name] for name in store.keys()}
        kernel, mask = own.get("0"), own.pop("kernel_mask", None)
        own["0"], own["indices"] = host(self._kernel), None  # Keras counts the variables
        # Past what a layer sparse by construction does with a kernel of the plain shape.
        kinds = type(self).plain_class.__mro__
        plain: Any = next(x for x in kinds if x.__module__.startswith("keras.src"))
        plain.load_own_variables(self, own)
        self.take_kernel(np.asarray(kernel), mask)

    def _check_shape(self, kernel):
        if kernel.shape != self.kernel_shape:
            raise ValueError(
                f"The kernel of '{self.name}' must have the shape {self.kernel_shape}. Received: a "
                f"kernel of shape {kernel.shape}"
            )

    def get_config(self):
        if keras_internals.is_called_by("save_model_to_hdf5"):
            raise ValueError(
                "A legacy `.h5` file cannot hold condensed weights: save as `.keras`, or call "
                f"keras_sparseopt.uncondense(model) before. Received: layer '{self.name}'"
            )
        return super().get_config()

    def enable_lora(self, *args, **kwargs):
        return self._as_plain("enable_lora", *args, **kwargs)

    def quantize(self, *args, **kwargs):
        return self._as_plain("quantize", *args, **kwargs)

    def _as_plain(self, name, *args, **kwargs):
        if not hasattr(self, "is_sparse_by_construction"):  # these refuse it
            uncondense_layers([self])
            return getattr(self, name)(*args, **kwargs)
        return getattr(super(), name)(*args, **kwargs)

    @classmethod
    def from_config(cls, config):
        return cls.plain_class.from_config(config)


class Tiled(CondensedLayer):
    """One whose kernel is the active tiles of a balanced mask; the topology knows which."""

    @property
    def kernel(self):
        """The plain kernel with its zeros: a tensor, made anew each time."""
        return self._kernel.topology.kernel

    @property
    def kernel_shape(self):
        return self._kernel.topology.shape

    @property
    def variables(self):
        """With what dense gradients arrive by in a step, while somebody asks for them."""
        found = []
        for variable in super().variables:
            found.append(variable)
            if variable is self._kernel and variable.trainable:
                seen = variable.topology.seen
                found += [s.variable for s in seen if s.variable is not None]
        return found

    def plain_kernel(self):
        return self._kernel.topology.plain(self._kernel)

    def take_kernel(self, kernel, mask=None):
        self._check_shape(kernel)
        self._kernel.topology.take_kernel(kernel, mask)

    def product(self, columns):
        form = self._kernel.topology.form
        if form.padding:
            columns = ops.pad(columns, [[0, form.padding], [0, 0]])
        values, pattern = self._stored()
        # The next product reads columns; a convolution, or what normalizes it, reads rows.
        outputs = multiply(columns, values, pattern, as_columns=not is_convolution(self))
        return self._told(outputs, columns, [()])

    def _stored(self):
        topology = self._kernel.topology
        return map(ops.convert_to_tensor, (self._kernel, topology.pattern))

    def _told(self, outputs, inputs, windows):
        """The outputs (rows, neurons); their backward pass tells of dense gradients."""
        topology = self._kernel.topology
        topology.calls += keras_internals.is_training(self)
        for seen in topology.seen:
            look = functools.partial(_look, seen, topology, windows)
            outputs = seen.through(outputs, inputs, look)
        return outputs


class TiledConvolution(Tiled):
    """A convolution, of whose kernel the active tiles are stored; a tile spans the window."""

    def multiplied(self, inputs):
        last, form = self.data_format == "channels_last", self._kernel.topology.form
        channels = self.rank + 1 if last else 1
        spatial = [axis for axis in range(1, self.rank + 2) if axis != channels]
        planes = transposed(inputs, (channels, *spatial, 0))
        padding, lengths, windows = windows_of(self, ops.shape(planes)[1:-1])
        if form.padding or any(map(any, padding)):
            planes = ops.pad(planes, [[0, form.padding], *padding, [0, 0]])
        values, pattern = self._stored()
        outputs = self._told(convolve(planes, values, pattern, windows), planes, windows)
        outputs = ops.reshape(outputs, (*lengths, ops.shape(inputs)[0], form.neurons))
        batch, neurons = self.rank, self.rank + 1
        positions = range(self.rank)
        order = (batch, *positions, neurons) if last else (batch, neurons, *positions)
        return transposed(outputs, order)

    def shaped_bias(self):
        if self.data_format == "channels_last":
            return self.bias
        return ops.reshape(self.bias, (1, self.filters, *(1,) * self.rank))


def why_plain(layer, units, regularizer, constraint):
    """Why a layer cannot store its kernel in tiles: string, `""` if it can.

    Args:
        layer: Keras layer, whose `kernel` it is about.
        units: `Units` of the kernel.
        regularizer, constraint: Those of the kernel, or `None`.
    """
    equation, why = equation_of(layer)
    if equation is None and not is_convolution(layer):
        return why
    why = forms.why_not_condensed(units)
    if why:
        return why
    if constraint is not None:
        return "it has a constraint"
    if regularizer is not None and type(regularizer) not in _BY_ELEMENT:
        return f"{type(regularizer).__name__} may look at the shape of the kernel"
    return ""


def tiled_form(layer):
    """The class that stores the kernel of a layer in tiles."""
    return Tiled if equation_of(layer)[0] else TiledConvolution


class ByNeuron(CondensedLayer):
    """One whose kernel is, for each neuron, its weights that are not 0 and the inputs they read."""

    stores_by_neuron = True

    @property
    def kernel(self):
        """The plain kernel with its zeros: a tensor, made anew each time."""
        return ops.convert_to_tensor(self.plain_kernel())

    def plain_kernel(self):
        letters = Letters(equation_of(self)[0])
        values = host(self._kernel)
        matrix = np.zeros(letters.matrix_shape(self.kernel_shape), values.dtype)
        neurons = np.arange(matrix.shape[1])
        for inputs, own in zip(host(self.indices), values):
            matrix[inputs, neurons] += own
        return letters.kernel_of(matrix, self.kernel_shape)

    def take_kernel(self, kernel, mask=None):
        self._check_shape(kernel)
        indices, values = by_neuron(Letters(equation_of(self)[0]).matrix(kernel))
        more = self._kernel.shape[0] - len(values)
        if more < 0:
            raise ValueError(
                f"The kernel of '{self.name}' must have at most {self._kernel.shape[0]} weights "
                "per neuron, as it was condensed with; call keras_sparseopt.uncondense(model) "
                f"before. Received: {len(values)}"
            )
        self._kernel.assign(np.pad(values, ((0, more), (0, 0))))
        self.indices.assign(np.pad(indices, ((0, more), (0, 0))).astype(self.indices.dtype))

    def product(self, columns):
        values, indices = (backend.tensor_of(v) for v in (self._kernel, self.indices))
        return _sum_by_neuron(columns, values, indices)


def layers_by_neuron(model):
    """The layers of a model that `condense(model, trainable=False)` has stored by neuron."""
    return [x for x in keras_internals.all_layers(model) if isinstance(x, ByNeuron)]


_AT_ONCE = 4  # rows of indices in one turn of the loop: two to four times as fast as one


def by_neuron(matrix):
    """Indices and values (fan-in, neurons) of a matrix (inputs, neurons), padded with zeros."""
    nonzero = matrix != 0
    most = max(int(nonzero.sum(axis=0).max(initial=0)), 1)
    fan_in = -(-most // _AT_ONCE) * _AT_ONCE
    # Stable: nonzero ones first, each in its order.
    order = np.argsort(~nonzero, axis=0, kind="stable")[:fan_in]
    order = np.pad(order, ((0, fan_in - len(order)), (0, 0)))
    is_used = np.arange(fan_in)[:, None] < nonzero.sum(axis=0)
    values = np.where(is_used, np.take_along_axis(matrix, order, axis=0), 0)
    return np.where(is_used, order, 0), values


@backend.compiled  # TensorFlow would run the loop op by op
def _sum_by_neuron(columns, values, indices):
    dtype = keras.backend.standardize_dtype(columns.dtype)
    wide = "float32" if dtype in ("float16", "bfloat16") else dtype
    columns, values = ops.cast(columns, wide), ops.cast(values, wide)

    def add(turn, sums):
        for i in range(_AT_ONCE):
            k = turn * _AT_ONCE + i
            found = ops.take(columns, ops.cast(indices[k], "int32"), axis=0)
            sums = sums + found * ops.expand_dims(values[k], 1)
        return sums

    start = ops.zeros((values.shape[1], ops.shape(columns)[1]), wide)
    sums = ops.fori_loop(0, values.shape[0] // _AT_ONCE, add, start)
    return ops.cast(ops.transpose(sums), dtype)


def _look(seen, topology, windows, inputs, gradient):
    form = topology.form
    taps = [inputs[(slice(None), *window)] for window in windows]
    taps = [ops.reshape(tap, (tap.shape[0], -1)) for tap in taps]
    if seen.shape == topology.units.unit_shape:
        return sums_over_tiles(form, taps, gradient)
    return dense_gradient(form, topology.units, taps, gradient)


def for_inference_alone(what):
    """The message for who trains it: string."""
    return (
        f"'{what.name}' was condensed for inference alone: call keras_sparseopt.uncondense(model) "
        "before training, or condense(model) with balanced tiles. Received: training=True"
    )


def become(layer, form):
    """Let a layer store its kernel in another form: a subclass of `CondensedLayer`, or `None`.

    Its class has the name of Keras' one: by that files have it.
    """
    kind = type(layer)
    if form is None:
        layer.__class__ = kind.plain_class
        keras_internals.replace_wrapped(layer, "quantize", vars(layer).pop("_quantize"))
        vars(layer).pop("is_for_inference", None)
        return
    if (form, kind) not in _classes:
        names: dict = {"__module__": kind.__module__, "plain_class": kind}
        if hasattr(kind, "is_sparse_by_construction"):
            names["kernel_mask"] = property(lambda layer: layer._kernel.topology.mask)
        _classes[form, kind] = type(kind.__name__, (form, kind), names)
        keras_internals.file_as(_classes[form, kind], kind)
    layer.__class__ = _classes[form, kind]
    vars(layer)["_quantize"] = keras_internals.replace_wrapped(layer, "quantize", None)


_classes: dict = {}


# ---------------------------------------------------------------------- from one form to another


def check_leases(variable):
    """Raise ValueError while a step that is compiled may tell of dense gradients."""
    for optimizer in trainers_of(variable):
        if optimizer.kept_gradients:
            raise ValueError(
                "Weights change their form between trainings, not while a callback holds dense "
                f"gradients. Received: '{variable.path}' in training"
            )


def add_indices(layer, indices, dtype, name="indices"):
    """Give a layer a weight beside its kernel that says which weights are active."""
    with backend.colocated_scope(layer._kernel.value):
        found = keras_internals.add_weight(
            layer, shape=indices.shape, dtype=dtype, trainable=False, autocast=False,
            initializer=lambda shape, dtype: ops.convert_to_tensor(indices, dtype),
            aggregation="only_first_replica", name=name,
        )  # fmt: skip
    found.is_pattern = dtype != "bool"
    return found


def exchange_on_device(variable, values, optimizers=()):
    """Give a Keras variable a value of another shape, where it lives."""
    with backend.colocated_scope(variable.value):
        keras_internals.exchange(variable, values, optimizers)


def uncondense_layers(layers):
    """Let layers store their plain kernels again, with masks if they are `Tiled`."""
    if not layers:
        return
    optimizers = keras_internals.all_optimizers()
    for layer in layers:
        _uncondense(layer, optimizers)
    forget_steps([layer._kernel for layer in layers], also_of_inference=True)


def _uncondense(layer, optimizers):
    variable, indices = layer._kernel, layer.indices
    if isinstance(layer, ByNeuron):
        exchange_on_device(variable, layer.plain_kernel(), optimizers)
        del layer.kernel_shape
    else:
        topology = variable.topology
        form, pattern = topology.form, host(indices)
        mask = form.mask(pattern)
        if topology.spare_mask is not None:
            exchange_on_device(topology.spare_mask, mask)
            mask, topology.spare_mask = topology.spare_mask, None
        elif topology.is_attached:
            mask = mask_variable(variable, mask)
        else:
            mask = add_indices(layer, mask, "bool", "kernel_mask")

        def plain(array):
            return host(form.plain(host(array), pattern))

        change_form(variable, plain, None, mask, optimizers)
    del layer.indices
    keras_internals.forget_weight(layer, indices)
    become(layer, None)
    if hasattr(layer, "is_sparse_by_construction"):
        layer.kernel_mask = variable.topology.pattern
        keras_internals.tell(layer.kernel_mask)


def change_form(variable, change, tiles, pattern, optimizers):
    """Store a weight, and all that belongs to it, in another form.

    Args:
        variable: Keras variable, the weight.
        change: Function of an array as it is stored now: the same as it is stored then.
        tiles: Int or `None`, as in `Topology`.
        pattern: Keras variable, its new pattern.
        optimizers: List of those that may have been built with it, plain ones too.
    """
    topology = variable.topology
    ours = topology.optimizers
    values = change(host(variable))
    slots = [(s, change(host(s))) for o in ours for s in o.weight_of(variable).slots]
    before = [(optimizer, optimizer.let_go(variable)) for optimizer in ours]
    for slot, value in slots:
        exchange_on_device(slot, value)
    exchange_on_device(variable, values, optimizers)
    topology.tiles, topology.pattern = tiles, pattern
    pattern.topology = topology
    for optimizer, state in before:
        optimizer.take_back(variable, state)
