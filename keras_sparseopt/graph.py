"""Reads a built model's graph: which layers feed a normalization, how often each is called."""

import math

import keras

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


def functional_of(model):
    """The functional graph inside a Functional or Sequential model, or `None`."""
    if isinstance(model, keras.Sequential):
        return model._functional if model.built else None
    return model if hasattr(model, "_nodes_by_depth") and hasattr(model, "operations") else None


class Graph:
    """Tensors of a model and its nested models, with who consumes them.

    Args:
        model: Built Functional or Sequential model.
    """

    def __init__(self, model):
        self._consumers = {}  # id(tensor) → [(operation, its output tensors)]
        self._same = {}  # id(tensor) → tensors of a nested model that carry its value
        self._outputs = {}  # id(layer) → [output tensors, one list entry a call]
        self._seen = set()
        self._read(functional_of(model))

    def _read(self, functional):
        if id(functional) in self._seen:
            return
        self._seen.add(id(functional))
        for node in (n for nodes in functional._nodes_by_depth.values() for n in nodes):
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
            for tensor in inputs:
                self._consumers.setdefault(id(tensor), []).append((operation, outputs))

    def outputs(self, layer):
        """Output tensors of every call of the layer."""
        return self._outputs.get(id(layer), [])

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

    def positions(self, layer, neuron_axes_of_output=1):
        """Output positions per example: how often each kernel weight is used.

        `None` where an axis has no fixed size.
        """
        total = 0
        channels_first = getattr(layer, "data_format", None) == "channels_first"
        for tensor in self.outputs(layer):
            sizes = list(tensor.shape[1:])
            del sizes[0 if channels_first else slice(-neuron_axes_of_output, None)]
            if None in sizes:
                return None
            total += math.prod(sizes)
        return total
