"""Which weights of a model can be masked, and what the axes of each mean."""

import math
import weakref

import keras
from keras import layers

from keras_sparseopt import backend, keras_internals, masks
from keras_sparseopt.models.topology import shape_of
from keras_sparseopt.structures import units_of


class Kernel:
    """A weight of a layer that can be masked, and what its axes mean.

    Attributes:
        layer: The layer that made it.
        variable: Keras variable of rank ≥ 2.
        neuron_axes: Tuple of ints, the axes that index neurons: output units, or channels.
        input_axes: Tuple of ints, the axes that index inputs: units, or channels.
        why_not: String, why `sparsify` does not mask it without being asked; `""` if it does.
    """

    def __init__(self, layer, variable, neuron_axes, input_axes, why_not=""):
        self.layer = layer
        self.variable = variable
        self.neuron_axes = neuron_axes
        self.input_axes = input_axes
        self.why_not = why_not

    @property
    def size(self):
        return math.prod(shape_of(self.variable))

    def units(self, structure):
        """`Units` of a structure on this kernel."""
        shape = shape_of(self.variable)
        return units_of(structure, shape, tuple(self.neuron_axes), tuple(self.input_axes))

    @property
    def shape(self):
        """Spatial axes, then all inputs, then all neurons: how ER and ERK see it."""
        shape, known = shape_of(self.variable), {*self.neuron_axes, *self.input_axes}
        spatial = [shape[axis] for axis in range(len(shape)) if axis not in known]
        inputs = [shape[axis] for axis in self.input_axes if axis not in self.neuron_axes]
        neurons = [shape[axis] for axis in self.neuron_axes]
        return (*spatial, math.prod(inputs), math.prod(neurons))


CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
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
NO_PRODUCT = "in no product"


def kernels_of(model):
    """The weights of a model that can be masked, each once, in the model's order.

    Layers of Keras are known by class. In others, what multiplies the data is a kernel: a product
    of matrices, an einsum or a convolution, as one symbolic call of the model shows. Where it
    cannot be called so, what has `kernel` in its name is one.

    Args:
        model: Any Keras model or layer.

    Returns:
        List of `Kernel`.
    """
    found: dict[int, Kernel] = {}
    unsure = []
    for layer in keras_internals.all_layers(model):
        for variable in keras_internals.own_weights(layer):
            kernel = _by_name(layer, variable)
            if kernel is not None and id(variable) not in found:
                found[id(variable)] = kernel
                if kernel.why_not == NO_PRODUCT or not (kernel.why_not or _is_of_keras(layer)):
                    unsure.append(kernel)
    _look_at_uses(model, unsure)
    order = {id(variable): i for i, variable in enumerate(model.weights)}
    return sorted(found.values(), key=lambda kernel: order.get(id(kernel.variable), len(order)))


def _is_of_keras(layer):
    """Whether it is, or derives from, a layer of Keras that makes its weights itself."""
    bases = layers.Layer, layers.Wrapper
    return any(
        kind.__module__.startswith("keras.src.layers.") and kind not in bases
        for kind in type(layer).__mro__
    )


def _by_name(layer, variable):
    rank, name = len(shape_of(variable)), variable.name
    is_float = "float" in keras.backend.standardize_dtype(variable.dtype)
    if rank < 2 or not is_float or isinstance(layer, _NEVER) or "bias" in name:
        return None
    if hasattr(layer, "stores_by_neuron"):  # condensed for inference
        return None
    last, before = rank - 1, rank - 2
    if isinstance(layer, layers.EinsumDense) and name == "kernel":
        neurons = einsum_neuron_axes(layer.equation)
        return Kernel(layer, variable, neurons, masks.fan_in_axes(rank, neurons))
    if isinstance(layer, _TRANSPOSED) and name == "kernel":
        return Kernel(layer, variable, (before,), (last,))
    if isinstance(layer, DEPTHWISE) or name == "depthwise_kernel":
        return Kernel(layer, variable, (before, last), (before,), "depthwise")
    if isinstance(layer, CONVOLUTIONS) and layer.groups > 1 and shape_of(variable)[before] == 1:
        return Kernel(layer, variable, (last,), (before,), "depthwise")
    if isinstance(layer, layers.Embedding) or "embedding" in name:
        return Kernel(layer, variable, (last,), (before,), "embedding")
    if name.startswith("lora_"):
        return Kernel(layer, variable, (last,), (before,), "LoRA")
    why_not = "" if "kernel" in name else NO_PRODUCT
    return Kernel(layer, variable, (last,), (before,), why_not)


def einsum_neuron_axes(equation):
    """The kernel axes of an einsum `"input,kernel->output"` that appear in its output."""
    operands, output = equation.replace("...", "").replace(" ", "").split("->")
    labels = operands.split(",")[1]
    return tuple(axis for axis, label in enumerate(labels) if label in output)


# ---------------------------------------------------------------------- by their use

_uses: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _look_at_uses(model, kernels):
    """Sets the axes, and `why_not`, of kernels by what one call of the model does with them."""
    kernels = [kernel for kernel in kernels if kernel.variable.trainable]
    if not kernels:
        return
    key = tuple(id(kernel.variable) for kernel in kernels)
    if _uses.get(model, (None,))[0] != key:
        _uses[model] = key, _uses_in(model, [kernel.variable for kernel in kernels])
    for position, (input_axes, neuron_axes) in _uses[model][1].items():
        kernel = kernels[position]
        kernel.input_axes, kernel.neuron_axes, kernel.why_not = input_axes, neuron_axes, ""


def _uses_in(model, variables):
    """Dict from position to the axes by the first product that each variable is in."""
    found: dict = {}
    for owner in (model, *_parts_of(model)):
        missing = [i for i in range(len(variables)) if i not in found]
        own = {id(v) for v in owner.trainable_variables}
        missing = [i for i in missing if id(variables[i]) in own]
        if not missing:
            continue
        products = _products_in(owner, [variables[i] for i in missing])
        for product in products:
            if product.input_axes and product.neuron_axes:
                axes = product.input_axes, product.neuron_axes
                found.setdefault(missing[product.variable], axes)
    return found


def _parts_of(model):
    """Models and layers inside, for one that cannot be called itself."""
    return [layer for layer in keras_internals.all_layers(model) if layer is not model]


def _products_in(owner, variables):
    def look(call, inputs):
        return backend.products_of(call, inputs, variables)

    return keras_internals.with_example_inputs(owner, look) or []
