"""Copies of models that are changed, and the outputs they are compared by."""

import pathlib
import tempfile

import keras

from keras_sparseopt import keras_internals
from keras_sparseopt.backend import host
from keras_sparseopt.deployment.measuring import relative_difference
from keras_sparseopt.models.condensed import CondensedLayer
from keras_sparseopt.models.conversion import strip


def plain_copy(model):
    """A copy without masks, by way of a file."""
    kinds = [type(layer) for layer in keras_internals.all_layers(model)]
    kinds = [getattr(kind, "plain_class", kind) for kind in kinds]
    own = {kind.__name__: kind for kind in kinds}
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "model.keras"
            model.save(path)
            return strip(keras.models.load_model(path, own, compile=False, safe_mode=False))
    except Exception as error:
        raise ValueError(
            "`model` must be one that Keras can save and load: the classes of its parts "
            f"registered, their `get_config` complete. Received: {error}"
        ) from error


def check_not_quantized(model):
    """Raise ValueError for a model with integer kernels, which Keras' `quantize` has made."""
    names = [layer.name for layer in keras_internals.quantized_layers(model)]
    if names:
        raise ValueError(
            "`model` must have float kernels: do this first, then quantize. Received: quantized "
            f"layers {', '.join(names[:5])}"
        )


def plain_form(model):
    """The model itself, or a copy without masks of one that holds condensed weights."""
    layers = keras_internals.all_layers(model)
    return plain_copy(model) if any(isinstance(x, CondensedLayer) for x in layers) else model


def outputs_of(model, inputs):
    """The outputs as a list of NumPy arrays."""
    return [host(x) for x in keras.tree.flatten(model(inputs, training=False))]


def check_same(copied, inputs, expected, tolerance, what):
    """An error if outputs differ from `expected` by more than a part of the largest one."""
    for value, wanted in zip(outputs_of(copied, inputs), expected):
        difference = relative_difference(value, wanted)
        if not difference <= tolerance:
            raise ValueError(
                f"The {what} model does not compute what the model does: its outputs differ by "
                f"{difference:.1e} of the largest. Received: model '{copied.name}'"
            )
