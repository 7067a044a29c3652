"""Networks without their dead neurons: smaller, plain, and exactly the same."""

import collections
import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import layers

from keras_sparseopt import keras_internals
from keras_sparseopt.backend import host
from keras_sparseopt.deployment.convert import example_inputs
from keras_sparseopt.deployment.copies import (
    check_not_quantized,
    check_same,
    outputs_of,
    plain_copy,
)
from keras_sparseopt.models.conversion import check_built
from keras_sparseopt.models.kernels import CONVOLUTIONS, DEPTHWISE

_POOLING = (
    layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D, layers.AveragePooling1D,
    layers.AveragePooling2D, layers.AveragePooling3D, layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D, layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D,
)  # fmt: skip
_PADDING = (layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D)
_ACTIVATING = layers.ReLU, layers.LeakyReLU, layers.ELU
_PASSING_ON = (
    layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D,
    layers.GaussianNoise, layers.Identity, layers.UpSampling1D, layers.UpSampling2D,
    layers.UpSampling3D,
)  # fmt: skip
_ACTIVATIONS = {
    "linear", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "tanh",
    "sigmoid", "hard_sigmoid", "hard_silu", "hard_tanh", "softplus", "softsign", "exponential",
    "mish", "log_sigmoid",
}  # fmt: skip
_TOLERANCE = 1e-5  # of the largest output


@dataclasses.dataclass(frozen=True)
class CompactedModel:
    """What `compact` has made; `print` shows it.

    Attributes:
        model: The Keras model.
        removed: Dict from the name of each layer that lost neurons to their numbers before and
            after.
        kept: Dict from the name of each layer with dead neurons that stay to their number and the
            reason.
        weights: Ints, all numbers of the model before and after.
    """

    model: keras.Model
    removed: dict
    kept: dict
    weights: tuple

    def __str__(self):
        lines = [f"{name}: {before} → {after}" for name, (before, after) in self.removed.items()]
        lines += [f"{name}: {n} dead stay: {why}" for name, (n, why) in self.kept.items()]
        before, after = self.weights
        return "\n".join([*lines, f"weights: {before:,} → {after:,}"])


def compact(model: keras.Model, inputs: Any = None) -> CompactedModel:
    """A copy of a model without the neurons that do nothing: smaller, plain, and exactly the same.

    ```
    unread: no nonzero weight of any layer reads the neuron          → it goes
    dead:   it has no nonzero weight, so its output is a constant c  → it goes, and
            bias of who reads it += c · the weights that read it
    ```

    Followed are neurons of `Dense` and convolutions (without groups) through Batch Normalization,
    activations, dropout, pooling, `Flatten` and depthwise convolutions to the dense layers and
    convolutions that read them. A dead neuron stays if its constant is not 0 and zero padding comes
    after it, since the border then differs; those that an addition ties to others, that are
    outputs, or that another kind of layer reads stay as well.

    Neurons die at high sparsity, or by the ablation of `SRigL(min_salient=0.9)`; what that is worth
    is measured in `docs/deployment.md`.

    Args:
        model: Built Functional or Sequential model that Keras can save and load, with masks or
            plain with zeros.
        inputs: A batch of inputs that the copy is compared on; `None` (default): drawn at random.

    Returns:
        `CompactedModel`.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the model is no Functional or Sequential one or is quantized, if Keras cannot
            copy it, or if the copy computes something else. It has not changed.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, "relu", name="hidden"), keras.layers.Dense(2)]
    )
    hidden = model.get_layer("hidden")
    hidden.kernel.assign(hidden.kernel * np.array([1.0, 0.0, 1.0]))
    assert kso.compact(model).removed == {"hidden": (3, 2)}
    ```
    """
    check_built(model)
    if keras_internals.functional_of(model) is None:
        raise ValueError(
            "`model` must be a Functional or Sequential model, whose graph can be read. "
            f"Received: {type(model).__name__} '{model.name}'"
        )
    check_not_quantized(model)
    inputs = example_inputs(model, inputs, 2)
    copied = plain_copy(model)
    network = _Network(copied)
    sizes = {layer.name: network.neurons(layer) for layer in network.producers}
    while any([network.shrink(layer) for layer in reversed(network.producers)]):
        pass
    smaller = network.rebuilt()
    check_same(smaller, inputs, outputs_of(model, inputs), _TOLERANCE, "smaller")
    after = {layer.name: network.neurons(layer) for layer in network.producers}
    removed = {name: (sizes[name], after[name]) for name in sizes if sizes[name] > after[name]}
    return CompactedModel(
        smaller, removed, network.kept, (copied.count_params(), smaller.count_params())
    )


class _Fixed(Exception):
    """Why neurons cannot be followed."""


class _Network:
    """The weights of a graph, and who reads whom."""

    def __init__(self, model):
        self._model = model
        functional = keras_internals.functional_of(model)
        self._outputs = {id(tensor) for tensor in functional.outputs}
        self._readers, self._results = collections.defaultdict(list), {}
        calls: collections.Counter = collections.Counter()
        for node in keras_internals.nodes_of(functional):
            calls[id(node.operation)] += 1
            self._results[id(node.operation)] = node.outputs[0]
            for tensor in node.arguments.keras_tensors:
                self._readers[id(tensor)].append(node)
        self._shared = {key for key, number in calls.items() if number > 1}
        self.values = {
            id(layer): [host(v).copy() for v in layer.weights] for layer in functional.layers
        }
        self.producers = [layer for layer in functional.layers if _is_product(layer)]
        self.kept: dict = {}

    def neurons(self, layer):
        return self.values[id(layer)][0].shape[-1]

    def shrink(self, layer):
        """Takes out what can go of a layer's neurons; whether there was any."""
        kernel, *bias = self.values[id(layer)]
        dead = ~kernel.any(axis=tuple(range(kernel.ndim - 1)))
        constant = np.zeros(len(dead)) if not bias else bias[0].astype("float64")
        self.kept.pop(layer.name, None)
        try:
            if id(layer) in self._shared:
                raise _Fixed("the layer is used more than once")
            on_way: list = []
            reading: list = []
            self._follow(
                self._results[id(layer)], _applied(layer.activation, constant), 1, on_way, reading
            )
        except _Fixed as reason:
            if dead.any():
                self.kept[layer.name] = int(dead.sum()), str(reason)
            return False
        rows = [self._rows(reader, positions) for reader, _, positions in reading]
        unread = ~np.any([r.any(axis=(0, 2)) for r in rows], axis=0)
        foldable = np.all([self._can_fold(reader, c) for reader, c, _ in reading], axis=0)
        gone = unread | (dead & foldable)
        why = "zero padding comes after them"
        if gone.all():
            gone[0], why = False, "a layer has one neuron at least"
        if (dead & ~gone).any():
            self.kept[layer.name] = int((dead & ~gone).sum()), why
        if not gone.any():
            return False
        for (reader, c, positions), own in zip(reading, rows):
            weights = self.values[id(reader)]
            folded = (np.where(gone & ~unread, c, 0)[:, None] * own.sum(axis=0)).sum(axis=0)
            if folded.any():
                weights[1:] = [(weights[1] if weights[1:] else 0) + folded]
            shape = weights[0].shape
            kept = own[:, ~gone]
            weights[0] = kept.reshape(
                (*shape[:-2], -1, shape[-1]) if positions == 1 else (-1, shape[-1])
            )
        for own in (layer, *on_way):
            axis = -2 if isinstance(own, DEPTHWISE) else -1
            self.values[id(own)] = [
                np.compress(~gone, v, axis if v.ndim > 1 else -1) for v in self.values[id(own)]
            ]
        return True

    def _rows(self, reader, positions):
        """A reader's kernel as (positions, neurons that it reads, its own neurons)."""
        kernel = self.values[id(reader)][0]
        if positions > 1:
            return kernel.reshape(positions, -1, kernel.shape[-1])
        return kernel.reshape(-1, *kernel.shape[-2:])

    @staticmethod
    def _can_fold(reader, constant):
        pads = isinstance(reader, CONVOLUTIONS) and not (
            reader.padding == "valid" or set(reader.kernel_size) == {1}
        )
        return (constant == 0) if pads else np.isfinite(constant)

    def _follow(self, tensor, constant, positions, on_way, reading):
        """From a tensor to the layers that read it, with what each neuron is if it is dead."""
        if id(tensor) in self._outputs:
            raise _Fixed("it is an output")
        if not self._readers[id(tensor)]:
            raise _Fixed("nothing reads it")
        for node in self._readers[id(tensor)]:
            layer = node.operation
            if id(layer) in self._shared:
                raise _Fixed(f"'{layer.name}' is used more than once")
            if _is_product(layer) and (positions == 1 or len(tensor.shape) == 2):
                reading.append((layer, constant, positions))
                continue
            after, times = self._through(layer, constant, positions, tensor)
            if self.values.get(id(layer)):
                on_way.append(layer)
            self._follow(self._results[id(layer)], after, positions * times, on_way, reading)

    def _through(self, layer, constant, positions, tensor):
        """What the constants are behind a layer, and how often each neuron is there."""
        unlike_0 = np.where(constant == 0, 0.0, np.nan)  # behind zero padding
        if isinstance(layer, layers.Activation):
            return _applied(layer.activation, constant), 1
        if isinstance(layer, _PASSING_ON):
            return constant, 1
        if isinstance(layer, _ACTIVATING):
            return host(layer(_batch(constant))).ravel(), 1
        if isinstance(layer, _POOLING) and positions == 1:
            if layer.data_format == "channels_last" and not getattr(layer, "keepdims", False):
                return constant, 1
        if isinstance(layer, _PADDING) and getattr(layer, "data_format", "") != "channels_first":
            return unlike_0, 1
        if isinstance(layer, layers.Flatten) and layer.data_format == "channels_last":
            return constant, math.prod(tensor.shape[1:-1])
        if isinstance(layer, layers.BatchNormalization) and positions == 1:
            if layer.axis in (-1, len(tensor.shape) - 1):
                return _normalized(layer, self.values[id(layer)], constant), 1
        if isinstance(layer, DEPTHWISE) and layer.depth_multiplier == 1:
            if layer.data_format == "channels_last":
                kernel, *bias = self.values[id(layer)]
                pads = layer.padding != "valid" and set(layer.kernel_size) != {1}
                value = (unlike_0 if pads else constant) * _sums(kernel)
                return _applied(layer.activation, value + (bias[0] if bias else 0)), 1
        raise _Fixed(f"'{layer.name}' ({type(layer).__name__}) reads it")

    def rebuilt(self):
        """A model of these weights."""

        def clone(layer):
            config = layer.get_config()
            if _is_product(layer):
                config["units" if isinstance(layer, layers.Dense) else "filters"] = self.neurons(
                    layer
                )
                config["use_bias"] = len(self.values[id(layer)]) > 1
            return type(layer).from_config(config)

        model = keras.models.clone_model(self._model, clone_function=clone)
        for old, new in zip(self._model.layers, model.layers, strict=True):
            new.set_weights(self.values[id(old)])
        return model


def _is_product(layer):
    """Whether it is a dense layer or a convolution that each of its neurons reads whole."""
    if type(layer) in CONVOLUTIONS:
        return layer.groups == 1 and layer.data_format == "channels_last"
    return type(layer) is layers.Dense


def _is_elementwise(activation):
    return getattr(activation, "__name__", "") in _ACTIVATIONS


def _applied(activation, constant):
    if not _is_elementwise(activation):
        raise _Fixed(
            f"the activation {getattr(activation, '__name__', activation)} may mix neurons"
        )
    return host(activation(_batch(constant)))[0]


def _batch(constant):
    return keras.ops.convert_to_tensor(constant[None].astype("float32"))


def _normalized(layer, weights, constant):
    weights = list(weights)
    gamma = weights.pop(0) if layer.scale else 1.0
    beta = weights.pop(0) if layer.center else 0.0
    mean, variance = weights
    return (constant - mean) * gamma / np.sqrt(variance + layer.epsilon) + beta


def _sums(kernel):
    """Of a depthwise kernel, by channel."""
    return kernel.reshape(-1, *kernel.shape[-2:]).sum(axis=0)[:, 0]
