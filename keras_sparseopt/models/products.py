"""Layers that are a product with a matrix, and their kernels as that matrix."""

import math
import re
import string

import numpy as np
from keras import layers

from keras_sparseopt.backend import host
from keras_sparseopt.models.kernels import CONVOLUTIONS
from keras_sparseopt.models.topology import topology_of


def active_values(variable):
    """A weight as a NumPy array, zeros where its mask is."""
    topology = topology_of(variable)
    return host(variable) if topology is None else host(topology.kernel) * host(topology.mask)


def equation_of(layer):
    """The einsum that a layer is, or `None` and why it cannot be condensed."""
    if not _is_one_of(layer, (layers.Dense, layers.EinsumDense, *CONVOLUTIONS)):
        return None, f"{plain_class(layer).__name__} cannot be condensed"
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return None, "it has LoRA or is quantized"
    if isinstance(layer, layers.EinsumDense):
        if not Letters(layer.equation).is_product:
            return None, f"{layer.equation} is no product of two matrices"
        return layer.equation, ""
    if isinstance(layer, layers.Dense):
        return "...i,io->...o", ""
    if {*layer.kernel_size, *layer.strides, layer.groups} != {1}:
        why = "has groups" if layer.groups > 1 else "is not 1×1, or has a stride"
        return None, f"a convolution that {why}"
    if layer.data_format != "channels_last":
        return None, "channels come first"
    return "...i,io->...o", ""


def plain_class(layer):
    """The class of a layer, of a condensed one that of the plain one."""
    return getattr(type(layer), "plain_class", type(layer))


def _is_one_of(layer, kinds):
    """Whether it is a layer of these classes, and not of one that derives from them."""
    is_known = plain_class(layer) in kinds or hasattr(layer, "is_sparse_by_construction")
    return is_known and isinstance(layer, kinds)


def is_convolution(layer):
    """Whether it is a convolution that can be condensed: one of Keras, without groups."""
    is_plain = not getattr(layer, "lora_enabled", False)
    return is_plain and _is_one_of(layer, CONVOLUTIONS) and layer.groups == 1


def windows_of(layer, sizes):
    """What the positions of a convolution's window read, of inputs of some spatial sizes.

    Returns:
        Pairs, what is added before and after each axis; the sizes of the outputs; and tuples of
        slices of the inputs with what is added, one for each position.
    """
    places = list(zip(sizes, layer.kernel_size, layer.strides, layer.dilation_rate))
    padding = [_padding(*place, layer.padding) for place in places]
    lengths = [
        (size + sum(added) - (window - 1) * dilation - 1) // stride + 1
        for (size, window, stride, dilation), added in zip(places, padding)
    ]
    windows = [
        tuple(
            slice(at * dilation, at * dilation + (length - 1) * stride + 1, stride)
            for at, length, (_, _, stride, dilation) in zip(position, lengths, places)
        )
        for position in np.ndindex(*layer.kernel_size)
    ]
    return padding, lengths, windows


def _padding(size, window, stride, dilation, kind):
    """What a convolution adds before and after an axis: tuple of ints."""
    reach = (window - 1) * dilation
    if kind == "causal":
        return reach, 0
    if kind == "valid":
        return 0, 0
    if stride == 1:
        return reach // 2, reach - reach // 2
    # A size may be unknown: plain arithmetic does for integers of Python and of all backends. ONNX
    # rounds quotients towards 0, which is right for numbers ≥ 0.
    missing = reach - (size - 1) % stride
    missing = (missing + abs(missing)) // 2  # 0 if it is negative
    return missing // 2, missing - missing // 2


class Letters:
    """What the letters of an einsum mean, for one given tensor and one kernel.

    Attributes:
        given, kernel, result: Strings, the axes of the inputs, of the kernel and of the outputs.
        rows: Those of the inputs that stay.
        summed, neurons: Those of the kernel that go, and that come.
    """

    def __init__(self, equation, rank=None):
        given, kernel, result = re.split(",|->", equation.replace(" ", ""))
        more = 0 if rank is None else rank - len(given.replace("...", ""))
        unused = [letter for letter in string.ascii_letters if letter not in equation]
        given, self.kernel, result = (
            part.replace("...", "".join(unused[:more])) for part in (given, kernel, result)
        )
        self.given, self.result = given, result
        self.summed = "".join(x for x in self.kernel if x in given and x not in result)
        self.neurons = "".join(x for x in self.kernel if x not in given)
        self.rows = "".join(x for x in given if x not in self.summed)

    @property
    def is_product(self):
        """Whether it is a product of two matrices, up to the order of axes."""
        parts = self.given, self.kernel, self.result
        return (
            all(len(set(part)) == len(part) for part in parts)
            and {*self.kernel} == {*self.summed, *self.neurons}
            and {*self.result} == {*self.rows, *self.neurons}
            and bool(self.summed and self.neurons)
        )

    def kernel_sizes(self, shape):
        """By letter, of a kernel that may have axes of size 1 in front: a 1×1 convolution's."""
        return dict(zip(self.kernel, shape[len(shape) - len(self.kernel) :]))

    def matrix_shape(self, shape):
        sizes = self.kernel_sizes(shape)
        inputs, neurons = ([sizes[x] for x in part] for part in (self.summed, self.neurons))
        return math.prod(inputs), math.prod(neurons)

    def matrix(self, kernel):
        """The kernel with its inputs along the first axis, its neurons along the second."""
        order = [self.kernel.index(letter) for letter in self.summed + self.neurons]
        shape = self.matrix_shape(kernel.shape)
        return kernel.reshape(kernel.shape[-len(order) :]).transpose(order).reshape(shape)

    def kernel_of(self, matrix, shape):
        """What `matrix` was made of."""
        order = self.summed + self.neurons
        sizes = self.kernel_sizes(shape)
        kernel = matrix.reshape([sizes[letter] for letter in order])
        return kernel.transpose([order.index(letter) for letter in self.kernel]).reshape(shape)
