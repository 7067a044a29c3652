"""Reads how a model calls its layers: which feed a normalization, how often each is called."""

import math

import keras

from keras_sparseopt import keras_internals
from keras_sparseopt.keras_internals import functional_of

# What passes each channel on, so that a normalization further down still sees its scale.
_PASSES_ON = frozenset(
    "Activation ReLU LeakyReLU PReLU ELU Softmax Identity Dropout SpatialDropout1D "
    "SpatialDropout2D SpatialDropout3D AlphaDropout GaussianDropout GaussianNoise "
    "ActivityRegularization StochasticDepth ZeroPadding1D ZeroPadding2D ZeroPadding3D "
    "Cropping1D Cropping2D Cropping3D UpSampling1D UpSampling2D UpSampling3D "
    "Reshape Flatten Permute RepeatVector Transpose Squeeze ExpandDims Pad Cast "
    "Add Subtract Average Maximum Minimum Concatenate Stack "
    "MaxPooling1D MaxPooling2D MaxPooling3D AveragePooling1D AveragePooling2D "
    "AveragePooling3D GlobalAveragePooling1D GlobalAveragePooling2D "
    "GlobalAveragePooling3D GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D "
    "MaxPool AveragePool Mean Relu Relu6 Silu Swish Gelu Elu Selu LeakyRelu Sigmoid Tanh "
    "Softplus HardSigmoid HardSilu HardSwish LayerScale".split()
)
_NORMALIZATIONS = frozenset(
    "BatchNormalization SyncBatchNormalization GroupNormalization LayerNormalization "
    "RMSNormalization UnitNormalization InstanceNormalization".split()
)


class Graph:
    """Tensors of a model and its nested models, with who consumes them.

    Args:
        model: Built Functional or Sequential model.
    """

    def __init__(self, model):
        self._consumers = {}  # id(tensor) → [(operation, its output tensors)]
        self._same = {}  # id(tensor) → tensors of a nested model that carry its value
        self._outputs = {}  # id(layer) → [output tensors, one list entry a call]
        self._inputs = {}  # likewise
        self._seen = set()
        self._read(functional_of(model))

    def _read(self, functional):
        if id(functional) in self._seen:
            return
        self._seen.add(id(functional))
        for node in keras_internals.nodes_of(functional):
            operation, outputs = node.operation, list(node.outputs)
            inputs = list(node.arguments.keras_tensors)
            inner = functional_of(operation)
            if inner is not None:
                self._read(inner)
                for outside, inside in zip(inputs, keras.tree.flatten(inner.inputs)):
                    self._same.setdefault(id(outside), []).append(inside)
                for inside, outside in zip(keras.tree.flatten(inner.outputs), outputs):
                    self._same.setdefault(id(inside), []).append(outside)
                continue
            self._outputs.setdefault(id(operation), []).extend(outputs)
            self._inputs.setdefault(id(operation), []).extend(inputs)
            for tensor in inputs:
                self._consumers.setdefault(id(tensor), []).append((operation, outputs))

    def outputs(self, layer):
        """Output tensors of every call of the layer."""
        return self._outputs.get(id(layer), [])

    def inputs(self, layer):
        """Input tensors of every call of the layer."""
        return self._inputs.get(id(layer), [])

    def normalization_after(self, layer):
        """Class name of the first normalization that the layer's output reaches, or `None`.

        The way may lead through activations, padding, reshapes, pooling, additions and
        concatenations; it ends at any other layer that has weights or mixes channels.
        """
        queue, seen = list(self.outputs(layer)), set()
        while queue:
            tensor = queue.pop(0)
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            queue.extend(self._same.get(id(tensor), []))
            for operation, outputs in self._consumers.get(id(tensor), []):
                kind = type(operation).__name__
                if kind in _NORMALIZATIONS:
                    return kind
                if kind in _PASSES_ON:
                    queue.extend(outputs)
        return None

    def batch_normalization_of(self, layer):
        """The Batch Normalization that takes the layer's output as it is, or `None`."""
        for tensor in self.outputs(layer):
            for same in (tensor, *self._same.get(id(tensor), [])):
                for operation, _ in self._consumers.get(id(same), []):
                    if isinstance(operation, keras.layers.BatchNormalization):
                        return operation
        return None

    def positions(self, layer, of_inputs=False):
        """Positions per example: how often each kernel weight is used.

        Args:
            layer: The layer, whose channels are one axis.
            of_inputs: Bool, whether the positions of the input count, not those of the output.

        Returns:
            Int, `None` where an axis has no fixed size.
        """
        total = 0
        channels_first = getattr(layer, "data_format", None) == "channels_first"
        for tensor in self.inputs(layer) if of_inputs else self.outputs(layer):
            sizes = list(tensor.shape[1:])
            del sizes[0 if channels_first else -1]
            if None in sizes:
                return None
            total += math.prod(sizes)
        return total


class Following:
    """What follows each layer of a model: by its graph where there is one, else by order of calls.

    A layer that a graph does not show, inside of another layer or a subclassed model, feeds a
    normalization if the next layer with weights that is called after it is one.

    Args:
        model: Built Keras model.
    """

    def __init__(self, model):
        self.graph = None if functional_of(model) is None else Graph(model)
        self._next = None
        self._model = model

    def normalization_after(self, layer):
        """Class name of the normalization that the layer feeds, or `""`."""
        if "Cell" in type(layer).__name__:  # gates and states come in between
            return ""
        if self.graph is not None and self.graph.outputs(layer):
            return self.graph.normalization_after(layer) or ""
        if self._next is None:
            called = [x for x in _call_order(self._model) if keras_internals.own_weights(x)]
            self._next = {id(a): b for a, b in reversed(list(zip(called, called[1:])))}
        kind = type(self._next.get(id(layer))).__name__
        return kind if kind in _NORMALIZATIONS else ""


def _call_order(model):
    """The layers in the order of their calls, inner ones first."""

    def look(call, inputs):
        with keras_internals.calls_recorded() as called:
            keras_internals.symbolic_call(call, inputs)
        return [layer for layer, _ in called]

    called = keras_internals.with_example_inputs(model, look)
    return keras_internals.all_layers(model) if called is None else called
